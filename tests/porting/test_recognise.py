"""Files and folders of others: read under their names, or named with the remedy."""

import json

import ml_dtypes
import numpy as np
import pytest
from layouts import (
    SMALL,
    Sizes,
    dit_names,
    draw,
    lora_names,
    text_names,
    vae_names,
    write_layout,
)
from safetensors.numpy import save_file
from torch_files import write_torch

from anchor_jax.errors import UserError
from anchor_jax.porting import port

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:" + b"0a" * 32 + b"\nsize 5683456\n"
)
HEADS = '{"num_heads": 2}'


def generator(**changes):
    return draw(dit_names(Sizes(**changes)), np.float32, 0)


@pytest.fixture
def planned(tmp_path):
    """Returns the plan of a generator whose arrays were written to a file."""

    def plan(arrays, name="model.safetensors"):
        save_file(arrays, tmp_path / name)
        (tmp_path / "config.json").write_text(HEADS)
        return port.plan(generator=tmp_path / name, method="causvid")

    return plan


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "diffusion_model.", "model.", "module.model.", ""],
)
def test_prefixes_of_single_files_are_read(planned, prefix):
    plan = planned({prefix + name: array for name, array in generator().items()})

    assert plan.meta["totals"]["generator"]["tensors"] == len(dit_names(SMALL))


def test_a_file_of_all_networks_gives_its_transformer(planned):
    arrays = {f"model.diffusion_model.{k}": v for k, v in generator().items()}
    vae = draw(vae_names(SMALL), np.float32, 0)

    plan = planned(arrays | {f"first_stage_model.{k}": v for k, v in vae.items()})

    assert plan.meta["totals"]["generator"]["tensors"] == len(dit_names(SMALL))
    assert any("of other networks in the file" in note for note in plan.notes)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (draw(vae_names(SMALL), np.float32, 0), "holds a VAE of Wan2.1, not a trans"),
        (draw(vae_names(SMALL, "diffusers"), np.float32, 0), "holds a VAE"),
        (draw(text_names(SMALL), np.float32, 0), "holds a text encoder"),
        (draw(text_names(SMALL, "diffusers"), np.float32, 0), "holds a text encoder"),
        (draw(lora_names(SMALL), np.float32, 0), "give it with --lora"),
        (generator() | {"img_emb.proj.1.weight": np.ones(2)}, "I2V"),
        (generator() | {"blocks.0.cross_attn.k_img.weight": np.ones(2)}, "I2V"),
        (generator() | {"vace_blocks.0.after_proj.weight": np.ones(2)}, "VACE"),
        (generator() | {"face_adapter.x.weight": np.ones(2)}, "further conditions"),
        (generator(latent=48), "Wan2.2-TI2V-5B"),
        (
            generator() | {"patch_embedding.weight": np.ones((16, 36, 1, 2, 2), "f4")},
            "takes 36 channels and gives 16",
        ),
        (
            generator() | {"scaled_fp8": np.ones(2, ml_dtypes.float8_e4m3fn)},
            "quantised",
        ),
        (generator() | {"blocks.0.ffn.0.scale_weight": np.ones(1)}, "quantised"),
        (generator() | {"blocks.0.ffn.0.weight": np.ones((2, 2), "i1")}, "quantised"),
        (
            generator()
            | {"blocks.0.ffn.0.weight": np.ones((24, 16), ml_dtypes.float8_e4m3fn)},
            "quantised.*float8",
        ),
        ({"_fsdp_wrapped_module._flat_param": np.ones(9)}, "flat parameters of FSDP"),
        ({"double_blocks.0.img_attn.weight": np.ones(2)}, "network that is not Wan's"),
        ({"encoder.downsamples.0.downsamples.0.x": np.ones(2)}, "Wan2.2-TI2V-5B"),
        ({"visual.transformer.0.weight": np.ones(2)}, "image or CLIP"),
    ],
)
def test_other_weights_as_generator_are_named(planned, arrays, message):
    with pytest.raises(UserError, match=message):
        planned(arrays)


@pytest.mark.parametrize(
    "name", ["wan2.2_t2v_high_noise_14B_fp16.safetensors", "LowNoise.safetensors"]
)
def test_one_of_two_transformers_is_refused(planned, name):
    with pytest.raises(UserError, match=r"Wan2\.2-A14B"):
        planned(generator(), name)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (POINTER, r"Git LFS pointer.*5,683,456 bytes.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n <html>", "is a web page"),
        (b"Entry not found", "failed download"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (bytes(100), "not a complete safetensors|not a zip archive"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "pth", "bin"])
def test_files_in_the_place_of_weights_are_named(tmp_path, content, message, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)

    with pytest.raises(UserError, match=message):
        port.plan(generator=path, method="causvid")


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.safetensors",
        "config.json",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/spiece.model",
        "google/umt5-xxl/tokenizer.json",
    ],
)
def test_pointers_are_named_wherever_a_file_is_opened(tmp_path, name):
    folder, _ = write_layout(tmp_path / "in", "wan")
    (folder / name).write_bytes(POINTER)

    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        port.plan(folder)


def test_a_name_does_not_say_what_a_file_is(tmp_path):
    write_torch(tmp_path / "model.safetensors", {"generator": generator()})
    (tmp_path / "config.json").write_text(HEADS)
    port.plan(generator=tmp_path / "model.safetensors", method="causvid")
    save_file(generator(), tmp_path / "model.pt")
    port.plan(generator=tmp_path / "model.pt", method="causvid")


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    "names, message",
    [
        ([".metadata", "__0_0.distcp"], "format_utils dcp_to_torch"),
        (["__0_0.distcp"], "format_utils dcp_to_torch"),
        (["zero_to_fp32.py", "latest"], "python zero_to_fp32.py"),
        (["global_step9/mp_rank_00_model_states.pt"], "python zero_to_fp32.py"),
        (["high_noise_model/x", "low_noise_model/x"], r"Wan2\.2-A14B"),
        (["transformer/x", "transformer_2/x"], r"Wan2\.2-A14B"),
        (["model.safetensors.aria2"], "unfinished"),
        (["abc.incomplete", "def.incomplete"], "unfinished"),
        (["wan.Q4_K_M.gguf"], "GGUF"),
        (["snapshots/abc/config.json", "blobs/0"], "snapshots/REVISION"),
        (
            ["readme.md"],
            "has no weights of Wan2.1|without diffusion|no adapter_model",
        ),
        (
            [
                "diffusion_pytorch_model.safetensors",
                "diffusion_pytorch_model.safetensors.aria2",
            ],
            "download is unfinished|unfinished",
        ),
    ],
    ids=lambda names: names[0] if isinstance(names, list) else "",
)
@pytest.mark.parametrize("flag", ["wan", "generator", "lora"])
def test_folders_that_are_not_read_are_named(tmp_path, names, message, flag):
    touch(tmp_path / "in", *names)
    options = {flag: tmp_path / "in", "method": "causvid"}
    if flag == "lora":
        options["wan"], _ = write_layout(tmp_path / "base", "wan")
        message += "|no adapter_model"

    with pytest.raises(UserError, match=message):
        port.plan(**options)


def test_a_network_with_an_unfinished_download_is_named(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan")
    (folder / "notes.part").touch()
    port.plan(folder)
    path = folder / "Wan2.1_VAE.pth"
    path.rename(folder / "Wan2.1_VAE.pth.incomplete")

    with pytest.raises(UserError, match=r"unfinished \(Wan2.1_VAE.pth.incomplete"):
        port.plan(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", "mp_rank_00_model_states.pt"])
def test_one_part_of_a_checkpoint_is_named(tmp_path, name):
    touch(tmp_path / "in", name)

    with pytest.raises(UserError, match="in parts; convert it to one file"):
        port.plan(generator=tmp_path / "in" / name, method="causvid")


def test_the_folder_of_a_transformer_is_read(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "diffusers")

    plan = port.plan(generator=folder / "transformer", method="causvid")

    assert plan.meta["model"]["num_heads"] == 2


@pytest.mark.parametrize("below", ["", "split_files/"])
def test_names_of_comfyui_are_read(tmp_path, below):
    folder, arrays = write_layout(tmp_path / "in", "wan")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (folder / name).unlink()
    places = {
        "text_encoders/umt5_xxl_fp16.safetensors": draw(
            text_names(SMALL, "diffusers"), np.float16, 0
        )
        | {"spiece_model": np.zeros(9, np.uint8)},
        "vae/wan_2.1_vae.safetensors": arrays["vae"],
    }
    for place, content in places.items():
        path = folder / below / place
        path.parent.mkdir(parents=True)
        save_file(content, path)

    plan = port.plan(folder)

    assert {*plan.items} == {"generator", "text_encoder", "vae"}
    assert any("umt5_xxl_fp16.safetensors read" in note for note in plan.notes)
    assert any("the tokenizer in the file is not used" in note for note in plan.notes)


def test_quantised_files_of_comfyui_are_named(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    arrays = draw(text_names(SMALL, "diffusers"), np.float16, 0)
    arrays["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    name = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_file(arrays, folder / name)

    with pytest.raises(UserError, match=f"{name} is quantised"):
        port.plan(folder)

    save_file(arrays, folder / "umt5_xxl_fp16.safetensors")
    with pytest.raises(UserError, match="keep only one of them"):
        port.plan(folder)


def test_a_long_header_or_name_is_shortened(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {"a" * 10**5: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))

    with pytest.raises(UserError) as caught:
        port.plan(generator=path, method="causvid")

    assert len(str(caught.value)) < 500
