"""Every published layout into a checkpoint and back, and what is refused."""

import dataclasses
import functools
import hashlib
import json
import math
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from layouts import SMALL, dit_names, draw, lora_names, write_layout
from safetensors.numpy import load_file, save_file
from torch_files import write_torch

from anchor_jax.errors import UserError
from anchor_jax.porting import key_tables, port, sources
from anchor_jax.porting.convert import convert, places
from anchor_jax.porting.export import export
from anchor_jax.wan import dit
from anchor_jax.wan.attention import bidirectional
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.lora import merge
from anchor_jax.wan.spec import WAN_1_3B, WAN_14B, ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeConfig, WanVae
from anchor_jax.weights import checkpoint


def full_size(network):
    if network in ("1.3B", "14B"):
        config = {"1.3B": WAN_1_3B, "14B": WAN_14B}[network]
        init = functools.partial(dit.init_params, config)
        return jax.eval_shape(init, jax.random.key(0))
    module, args = {
        "text": (Umt5Encoder(TextConfig()), [jnp.zeros((1, 2), jnp.int32)] * 2),
        "vae": (WanVae(VaeConfig()), [jnp.zeros((1, 5, 16, 16, 3))]),
    }[network]
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, tables, names, parameters",
    [
        ("1.3B", (key_tables.DIT, key_tables.DIT_DIFFUSERS), 825, 1_418_996_800),
        ("14B", (key_tables.DIT, key_tables.DIT_DIFFUSERS), 1095, 14_288_491_584),
        ("text", (key_tables.UMT5, key_tables.UMT5_TRANSFORMERS), 242, 5_680_910_336),
        ("vae", (key_tables.VAE, key_tables.VAE_DIFFUSERS), 194, 126_892_531),
    ],
)
def test_tables_count_the_published_networks(network, tables, names, parameters):
    tree = full_size(network)
    shapes = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for table in tables:
        found = {one.name: one.shape(shapes[one.path]) for one in places(tree, table)}
        assert len(found) == len(places(tree, table)) == names
        assert sum(map(math.prod, found.values())) == parameters


TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json")


def read_folder(folder):
    """Every array of all safetensors in a folder, by network."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        where = path.parent.name
        item = {"transformer": "generator", "lora": "lora"}.get(where, where)
        if where not in ("transformer", "text_encoder", "vae", "lora"):
            item = "generator"
            for start, name in (("models_t5", "text_encoder"), ("Wan2.1_V", "vae")):
                item = name if path.name.startswith(start) else item
        found.setdefault(item, {}).update(load_file(path))
    return found


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("wan", np.float16),
        ("wan_sharded", np.float32),
        ("diffusers", ml_dtypes.bfloat16),
    ],
)
def test_a_folder_comes_back_bit_for_bit(tmp_path, kind, dtype):
    folder, arrays = write_layout(tmp_path / "in", kind, dtype=dtype)
    meta = port.run(port.plan(folder), tmp_path / "out")

    layout = "diffusers" if kind == "diffusers" else "wan"
    export(tmp_path / "out", tmp_path / "back", layout, shard_bytes=10_000)

    back = read_folder(tmp_path / "back")
    assert back.keys() == arrays.keys()
    for item in arrays:
        assert_same_bits(back[item], arrays[item])
    assert checkpoint.read_meta(tmp_path / "out") == json.loads(json.dumps(meta))
    again = port.plan(tmp_path / "back")
    assert again.meta["totals"] == meta["totals"]
    assert again.meta["text"] == port.plan(folder).meta["text"]
    tokenizer = {f"tokenizer/{name}" for name in TOKENIZER_FILES}
    scheduler = {"scheduler/scheduler_config.json"} if kind == "diffusers" else set()
    assert {*again.files} == tokenizer | scheduler


@pytest.mark.slow
def test_the_manifest_says_where_everything_came_from(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan_sharded")
    seen = []
    plan = port.plan(folder)
    meta = port.run(plan, tmp_path / "out", seen.append)
    assert sum(seen) == plan.read_bytes + plan.write_bytes
    files = {file["name"]: file for one in meta["sources"] for file in one["files"]}
    assert len(files) == 6
    for name, file in files.items():
        content = (folder / name).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert meta["method"] == "wan"
    assert meta["model"]["num_heads"] == 2
    assert meta["text"]["text_len"] == meta["model"]["text_len"] == 32
    assert checkpoint.items(tmp_path / "out") == (
        "generator",
        "text_encoder",
        "vae",
        "meta",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, alpha", [("lora", SMALL.rank), ("peft", 2 * SMALL.rank)]
)
def test_a_generator_and_adapters_come_back(tmp_path, kind, alpha, monkeypatch):
    # Every leaf is read by itself, as those of large networks.
    monkeypatch.setattr("anchor_jax.porting.export._SMALL", 0)
    base, arrays = write_layout(tmp_path / "base", "generator")
    lora, adapters = write_layout(tmp_path / "lora", kind)
    plan = port.plan(generator=base, lora=lora, method="longlive")
    assert plan.meta["sources"][0]["key"] == "generator"
    assert plan.meta["sources"][0]["prefixes"] == ["_fsdp_wrapped_module.", "model."]
    assert plan.meta["sources"][1]["alpha"] == alpha
    assert {*plan.missing()} == {"text_encoder", "vae", "tokenizer"}
    port.run(plan, tmp_path / "out")

    export(tmp_path / "out", tmp_path / "back", "generator")

    found = load_file(tmp_path / "back" / "generator.safetensors")
    named = {f"model.{name}": part for name, part in arrays["generator"].items()}
    assert_same_bits(found, named)
    found = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert_same_bits(found, adapters["lora"])
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (SMALL.rank, alpha)
    assert len(settings["target_modules"]) == 10


@pytest.mark.slow
def test_a_rank_256_file_gives_the_same_video_unmerged_and_merged(tmp_path):
    sizes = dataclasses.replace(SMALL, rank=256)
    base, _ = write_layout(tmp_path / "base", "generator", sizes, np.float32)
    lora, _ = write_layout(tmp_path / "lora", "lora", sizes, np.float32)
    plan = port.plan(generator=base, lora=lora, method="anchor_forcing")
    port.run(plan, tmp_path / "out")
    assert plan.meta["sources"][1]["rank"] == 256
    variables = checkpoint.restore(tmp_path / "out", "generator")
    model = WanDit(ModelConfig(**plan.meta["model"], dtype="float32"))
    rng = np.random.default_rng(0)
    shape = (1, 3, 4, 4, model.config.latent_channels)
    latents = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    text = (1, model.config.text_len, model.config.text_dim)
    text = jnp.asarray(rng.standard_normal(text), jnp.float32)

    @jax.jit
    def flow(variables):
        context = model.apply(variables, text, method="project")
        times, place = jnp.full((1, 3), 500.0), jnp.arange(3)
        seen = bidirectional(3)
        return model.apply(variables, latents, times, context, seen, place)[0]

    apart = flow(variables)
    merged = flow({"params": merge(variables["params"], variables["lora"])})

    size = np.abs(apart).max()
    assert np.abs(apart - flow({"params": variables["params"]})).max() > 1e-2 * size
    np.testing.assert_allclose(apart, merged, rtol=0, atol=1e-4 * size)


def test_merged_adapters_are_added_in_float32(tmp_path):
    base, arrays = write_layout(tmp_path / "base", "generator")
    lora, adapters = write_layout(tmp_path / "lora", "lora")
    plan = port.plan(generator=base, lora=lora, alpha=1.0, method="longlive")
    port.run(plan, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", "wan", lora="merged")
    found = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    name, wide = "blocks.1.cross_attn.k", np.float32
    a, b = (
        adapters["lora"][f"base_model.model.{name}.lora_{part}.weight"].astype(wide)
        for part in "AB"
    )
    weight = arrays["generator"][f"{name}.weight"]
    expected = (weight.astype(wide) + 0.5 * b @ a).astype(weight.dtype)
    np.testing.assert_array_equal(found[f"{name}.weight"], expected)
    untouched = "blocks.1.cross_attn.norm_k.weight"
    np.testing.assert_array_equal(found[untouched], arrays["generator"][untouched])
    assert not list((tmp_path / "back").rglob("adapter*"))


def test_adapters_in_other_styles_of_names(tmp_path):
    plain = draw(lora_names(SMALL), np.float32, 0)
    renamed = {
        name.replace("base_model.model.", "base_model.model.model.").replace(
            ".weight", ".default.weight"
        ): array
        for name, array in plain.items()
    }
    save_file(renamed, tmp_path / "one.safetensors")
    assert_same_bits(sources.open_lora(tmp_path / "one.safetensors").arrays, plain)


def test_prefixes_and_fragments():
    value = np.zeros(1)
    names = ("module.model._fsdp_wrapped_module.a.bias", "module.model.b._orig_mod.c")
    plain, removed = sources.plain_names(
        dict.fromkeys(names, value), ("module.", "model.")
    )
    assert list(plain) == ["a.bias", "b.c"]
    assert removed == ("_fsdp_wrapped_module.", "_orig_mod.", "module.", "model.")
    with pytest.raises(UserError, match=r"this is a, but another tensor"):
        sources.plain_names({"a": value, "_orig_mod.a": value}, ())


def test_diffusers_and_official_names_make_one_tree():
    official, other = (
        draw(dit_names(SMALL, style), np.float32, 0) for style in ("wan", "diffusers")
    )
    assert len(official) == len(other) == 15 + 27 * SMALL.layers
    trees = convert(official, key_tables.DIT), convert(other, key_tables.DIT_DIFFUSERS)
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.slow
def test_a_second_name_of_the_embedding_is_kept_apart(tmp_path):
    folder, arrays = write_layout(tmp_path / "in", "diffusers")
    for path in (folder / "text_encoder").glob("model*"):
        path.unlink()
    alias, name = key_tables.UMT5_ALIAS
    text = arrays["text_encoder"]
    text[alias] = text[name]
    save_file(text, folder / "text_encoder" / "model.safetensors")
    meta = port.run(port.plan(folder), tmp_path / "out")
    assert [one["aliases"] for one in meta["sources"]] == [[], [alias], []]
    export(tmp_path / "out", tmp_path / "back", "diffusers")
    assert_same_bits(read_folder(tmp_path / "back")["text_encoder"], text)

    text[alias] = text[name] + 1
    save_file(text, folder / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match=r"embed_tokens\.weight must equal"):
        port.plan(folder)


def test_the_critic_and_another_key(tmp_path):
    arrays = draw(dit_names(SMALL), np.float32, 0)
    other = {name: array + 1 for name, array in arrays.items()}
    content = {"generator": arrays, "generator_ema": other, "critic": other, "step": 1}
    write_torch(tmp_path / "model.pt", content)
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    options = {"generator": tmp_path / "model.pt", "method": "self_forcing"}
    port.run(port.plan(**options, critic=True), tmp_path / "out")
    assert checkpoint.items(tmp_path / "out") == ("generator", "fake_score", "meta")
    bias = checkpoint.leaf(tmp_path / "out", "fake_score", "params/patch_embed/bias")
    np.testing.assert_array_equal(bias, other["patch_embedding.bias"])
    ema = port.plan(**options, key="generator_ema").items["generator"]["params"]
    np.testing.assert_array_equal(ema["patch_embed"]["bias"].load(), bias)
    with pytest.raises(UserError, match=r"no key 'emma'.*generator, generator_ema"):
        port.plan(**options, key="emma")


def change(**changes):
    """Returns a change of the arrays of one safetensors file."""

    def edit(folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        arrays = load_file(path)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del arrays[name]
            else:
                arrays[name] = value(arrays.get(name))
        save_file(arrays, path)

    return edit


def truncate(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def overlap(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


def long_header(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def escape(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    save_file({"a": np.zeros(1)}, folder.parent / "secret.safetensors")
    index = {"weight_map": {"a": "../secret.safetensors"}}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))


def link_outside(folder):
    escape(folder)
    name = "linked.safetensors"
    (folder / name).symlink_to(folder.parent / "secret.safetensors")
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))


def hostile(folder):
    program = b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00touch owned\x85R."
    with zipfile.ZipFile(folder / "Wan2.1_VAE.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3")


def wrong_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ffn_dim": 99}))


@pytest.mark.parametrize(
    "edit, message",
    [
        (change(blocks__1__norm3__bias=None), r"blocks\.1\.norm3\.bias: missing"),
        (change(blocks__1__more=lambda _: np.zeros(2)), r"blocks\.1\.more: extra"),
        (
            change(blocks__2__ffn__0__bias=lambda a: a[:-1].copy()),
            r"blocks\.2\.ffn\.0\.bias: shape",
        ),
        (
            change(blocks__0__modulation=lambda a: a.astype(np.int8)),
            r"blocks\.0\.modulation: type int8, must be one of float32",
        ),
        (
            change(blocks__1__modulation=lambda a: a.astype(np.float32)),
            r"blocks\.1\.modulation: type float32, but bfloat16 in other layers",
        ),
        (change(patch_embedding__weight=None), r"patch_embedding\.weight: missing"),
        (
            truncate,
            r"diffusion_pytorch_model\.safetensors is not a complete safetensors",
        ),
        (overlap, r"b starts at byte 0, expected 4"),
        (long_header, r"a header of \d+ bytes"),
        (escape, r"names '\.\./secret\.safetensors', which must be"),
        (link_outside, r"names 'linked\.safetensors', which must be"),
        (hostile, r"Wan2\.1_VAE\.pth.*posix\.system"),
        (wrong_config, r"config\.json: ffn_dim=99, the tensors have 24"),
    ],
)
def test_a_bad_download_is_refused_by_name(tmp_path, edit, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = write_layout(tmp_path / "in", "wan")
    edit(folder)
    with pytest.raises(UserError, match=message):
        port.run(port.plan(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "owned").exists()


def test_shards_must_be_those_of_the_index(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan_sharded")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["blocks.9.bias"] = (
        "diffusion_pytorch_model-00001-of-00003" + (".safetensors")
    )
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"blocks\.9\.bias: .*00001.* lacks it"):
        port.plan(folder)
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.unlink()
    with pytest.raises(UserError, match=r"00002-of-00003\.safetensors is missing"):
        port.plan(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"is a shard, but .*index\.json is missing"):
        port.plan(folder)


def test_links_of_a_download_cache_are_followed(tmp_path):
    folder, arrays = write_layout(tmp_path / "in", "wan_sharded")
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "hub" / "blobs"
    folder.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert port.plan(snapshot).meta["totals"]["generator"]["tensors"] == len(
        arrays["generator"]
    )


def test_many_problems_are_in_one_message(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan")
    path = folder / "diffusion_pytorch_model.safetensors"
    arrays = load_file(path)
    for name in list(arrays):
        if name.startswith("blocks.1.cross"):
            del arrays[name]
    arrays |= {f"strange.{number}": np.zeros(1) for number in range(30)}
    save_file(arrays, path)
    with pytest.raises(UserError) as caught:
        port.plan(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("40 problems")
    assert lines[1] == "strange.0: extra, no rule claims it (and 29 more like it)"
    assert lines[-1] == "... and 1 more of other kinds"
    assert len(caught.value.problems) == 40


def test_a_leaf_is_read_when_it_is_loaded(tmp_path, monkeypatch):
    folder, _ = write_layout(tmp_path / "in", "wan")
    plan = port.plan(folder)
    sizes = []
    monkeypatch.setattr(
        "anchor_jax.porting.convert.release", lambda array: sizes.append(array.shape)
    )
    leaf = plan.items["generator"]["params"]["blocks"]["ffn_in"]["kernel"]
    assert leaf.load().shape == leaf.shape == (SMALL.layers, SMALL.dim, SMALL.ffn)
    assert sizes == [(SMALL.ffn, SMALL.dim)] * SMALL.layers


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "nothing to port"),
        ({"generator": "x.pt"}, "--method is missing.*longlive"),
        ({"generator": "x.pt", "method": "longlife"}, "did you mean 'longlive'"),
        ({"wan": "nowhere"}, "nowhere.* is not a folder"),
        ({"key": "generator"}, "--key and --critic need --generator"),
        ({"lora": "x.pt", "method": "longlive"}, "needs the generator"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        port.plan(**options)


def test_a_folder_that_is_taken_is_refused_unless_overwritten(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan")
    plan = port.plan(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="out"):
            port.run(plan, out, overwrite=overwrite)
    assert (out / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "wann"}, "unknown layout 'wann'; did you mean 'wan'"),
        ({"layout": "wan", "item": "ema"}, "no item 'ema'"),
        ({"layout": "wan", "lora": "merge"}, "unknown lora 'merge'"),
    ],
)
def test_an_export_of_a_missing_item_is_refused(tmp_path, options, message):
    base, _ = write_layout(tmp_path / "base", "generator")
    port.run(port.plan(generator=base, method="causvid"), tmp_path / "out")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "out", tmp_path / "back", **options)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "wrong", [{"model": None}, {"model": {"dim": "x"}}, {"sources": [3]}]
)
def test_a_manifest_that_says_too_little_is_not_exported(tmp_path, wrong):
    base, _ = write_layout(tmp_path / "base", "generator")
    port.run(port.plan(generator=base, method="causvid"), tmp_path / "out")
    place = tmp_path / "out" / "0" / "meta" / "metadata"
    place.write_text(json.dumps(json.loads(place.read_text()) | wrong))

    with pytest.raises(UserError, match="meta cannot be exported"):
        export(tmp_path / "out", tmp_path / "back", "wan")

    assert not (tmp_path / "back").exists()
