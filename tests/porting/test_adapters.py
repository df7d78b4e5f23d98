"""Adapters of every trainer: names, scales, partial targets, and what is refused."""

import json
import math
import tracemalloc

import jax
import numpy as np
import pytest
from layouts import SMALL, draw, lora_names, write_layout
from safetensors.numpy import save_file
from torch_files import Raw, write_torch

from anchor_jax.errors import UserError
from anchor_jax.porting import key_tables, port
from anchor_jax.porting.convert import convert_lora
from anchor_jax.porting.export import export

PLAIN = {
    name.removeprefix("base_model.model."): array
    for name, array in draw(lora_names(SMALL), np.float32, 0).items()
}
MODULES = sorted({name.rsplit(".lora_", 1)[0] for name in PLAIN})
DIFFUSERS = {
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "self_attn.": "attn1.to_",
    "cross_attn.": "attn2.to_",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def diffusers(name):
    for ours, theirs in DIFFUSERS.items():
        if ours in name:
            return name.replace(ours, theirs)
    raise ValueError(name)


def updown(name):
    return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def flat(name):
    module, _, end = updown(name).partition(".lora_")
    return f"lora_unet_{module.replace('.', '_')}.lora_{end}"


def renamed(change):
    return {change(name): array for name, array in PLAIN.items()}


def alphas(value, name="diffusion_model.{}.alpha"):
    return {
        name.format(module, flat=module.replace(".", "_")): np.array(value, np.float32)
        for module in MODULES
    }


FORMS = {
    "peft": renamed(lambda name: f"base_model.model.{name}"),
    "adapter named default": renamed(
        lambda name: (
            f"base_model.model.model.{name.replace('.weight', '.default.weight')}"
        )
    ),
    "comfyui": renamed(lambda name: "diffusion_model." + updown(name)),
    "comfyui peft": renamed("diffusion_model.{}".format),
    "comfyui whole": renamed("model.diffusion_model.{}".format),
    "bare": PLAIN,
    "musubi": renamed(flat),
    "diffusers": renamed(lambda name: "transformer." + diffusers(name)),
    "an underscore more": renamed(
        lambda name: flat(name).replace("lora_unet_", "lora_unet__")
    ),
    "of a pipeline": renamed("pipe.dit.{}".format),
    "kohya of diffusers": renamed(lambda name: flat(diffusers(name))),
    "older diffusers": renamed(
        lambda name: (
            "transformer."
            + diffusers(name)
            .replace("lora_A", "lora.down")
            .replace("lora_B", "lora.up")
        )
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_layout(tmp_path_factory.mktemp("base"), "generator")[0]


@pytest.fixture
def planned(base, tmp_path):
    """Returns the plan of porting adapters that were written to a file."""

    def plan(arrays, header=None, alpha=None, settings=None):
        path = tmp_path / "adapters.safetensors"
        save_file(arrays, path, metadata=header)
        if settings is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        return port.plan(generator=base, lora=path, alpha=alpha, method="longlive")

    return plan


def adapters_of(plan):
    tree = plan.items["generator"]["lora"]
    return jax.tree.map(lambda leaf: leaf.load(), tree)


def products(tree, path):
    node = tree
    for name in path.split("/"):
        node = node[name]
    return node["a"] @ node["b"]


def reference(alpha=SMALL.rank):
    named = {f"base_model.model.{name}": array for name, array in PLAIN.items()}
    return convert_lora(named, key_tables.LORA, alpha)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_adapters(planned, form):
    plan = planned(FORMS[form], alpha=4.0)

    found = adapters_of(plan)

    jax.tree.map(np.testing.assert_array_equal, found, reference(alpha=4))
    assert plan.meta["sources"][1]["alpha"] == 4
    assert plan.meta["sources"][1]["rank"] == SMALL.rank


PEFT_SETTINGS = {"r": SMALL.rank, "lora_alpha": 16, "target_modules": ["q"]}
HEADERS = {
    "diffusers": {
        "lora_adapter_metadata": json.dumps(
            {f"transformer.{name}": value for name, value in PEFT_SETTINGS.items()}
        )
    },
    "diffusers, one network": {"lora_adapter_metadata": json.dumps(PEFT_SETTINGS)},
    "plain": {"lora_alpha": "16", "rank": "2"},
    "a fraction as text": {"lora_alpha": "16.0", "rank": "2.0"},
    "capitals": {"LoRA_Alpha": "16"},
    "of a component": {"transformer.lora_alpha": "16"},
    "text in a section": {"lora_config": json.dumps({"r": 2, "alpha": "16.0"})},
    "kohya": {
        "ss_network_alpha": "16.0",
        "ss_network_dim": "2",
        "ss_network_module": "networks.lora_wan",
        "ss_network_args": '{"loraplus_lr_ratio": "4"}',
    },
    "a section": {"lora_config": json.dumps({"rank": 2, "alpha": 16})},
}


@pytest.mark.parametrize("name", HEADERS)
def test_alpha_of_a_header_is_used_and_reported(planned, name):
    plan = planned(FORMS["diffusers"], HEADERS[name])

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        adapters_of(plan),
        reference(alpha=16),
    )
    assert plan.meta["sources"][1]["alpha"] == 16
    assert any("alpha 16 of" in note for note in plan.notes)


def test_alpha_of_each_module_is_used(planned):
    one = "blocks.1.self_attn.q"
    arrays = FORMS["comfyui"] | alphas(8.0)
    arrays[f"diffusion_model.{one}.alpha"] = np.array([3.0], np.float32)

    plan = planned(arrays)

    found, wanted = adapters_of(plan), reference(alpha=8)
    path = "blocks/self_attn/q"
    np.testing.assert_allclose(
        products(found, path)[0], products(wanted, path)[0], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        products(found, path)[1],
        products(wanted, path)[1] * 3 / 8,
        rtol=1e-5,
        atol=1e-6,
    )
    # The factors are in the tensors, and alpha over rank is then one.
    assert plan.meta["sources"][1]["alpha"] == SMALL.rank
    assert plan.meta["sources"][1]["factors"] == [1.5, 4]
    assert any("different factors" in note for note in plan.notes)


@pytest.mark.parametrize(
    "settings, module, factor",
    [
        ({"use_rslora": True}, "self_attn/q", 16 / math.sqrt(2)),
        ({"alpha_pattern": {"self_attn.q": 6}}, "self_attn/q", 3),
        ({"alpha_pattern": {"q": 6}}, "cross_attn/q", 3),
        ({"alpha_pattern": {"attn.q": 6}}, "self_attn/q", 8),
        ({"alpha_pattern": {"^self_attn.q": 6}}, "self_attn/q", 8),
        ({"alpha_pattern": {"blocks.0.self_attn.q": 6}}, "self_attn/q", 3),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, "self_attn/q", 8),
        ({"task_type": "X", "eva_config": {"rho": 1.0}}, "self_attn/q", 8),
    ],
)
def test_settings_of_peft_are_used(planned, settings, module, factor):
    plan = planned(FORMS["peft"], settings=PEFT_SETTINGS | settings)

    path = f"blocks/{module}"
    np.testing.assert_allclose(
        products(adapters_of(plan), path)[0],
        factor * products(reference(), path)[0],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["head"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"rank_pattern": {"self_attn.q": 8}},
        {"alpha_pattern": {"(a+)+b": 8}},
        {"alpha_pattern": {r"blocks\.\d\.self_attn\.q": 8}},
        {"alpha_pattern": {"q": -1}},
        {"lora_alpha": "16,0"},
        {"lora_alpha": 0},
        {"r": 3},
        {"peft_type": "IA3"},
        {"use_rslora": "yes"},
        {"something_new": 3},
    ],
    ids=lambda setting: "-".join(map(str, setting.items())),
)
@pytest.mark.parametrize("place", ["file", "header"])
def test_settings_that_are_not_read_are_refused_by_name(planned, setting, place):
    settings = PEFT_SETTINGS | setting
    name = next(iter(setting))
    name = {"r": "rank 3", "rank_pattern": "has rank 8"}.get(name, name)
    given = {"settings": settings}
    if place == "header":
        named = {f"transformer.{key}": value for key, value in settings.items()}
        given = {"header": {"lora_adapter_metadata": json.dumps(named)}}

    with pytest.raises(UserError, match=name):
        planned(FORMS["peft"], **given)


def test_a_kohya_module_of_another_kind_is_refused(planned):
    for header in (
        {"ss_network_module": "networks.oft", "ss_network_alpha": "1"},
        {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}'},
        {"ss_network_module": "networks.lora", "ss_network_dim": "7"},
    ):
        with pytest.raises(UserError, match="oft|loha|rank 7"):
            planned(FORMS["musubi"], header)


def test_statements_that_disagree_are_refused_until_one_is_chosen(planned):
    arrays = FORMS["comfyui"] | alphas(8.0)
    header = {"lora_alpha": "16"}

    with pytest.raises(UserError, match=r"different factors.*--alpha"):
        planned(arrays, header)

    plan = planned(arrays, header, alpha=8)
    np.testing.assert_allclose(
        products(adapters_of(plan), "blocks/ffn_in"),
        products(reference(alpha=8), "blocks/ffn_in"),
        rtol=1e-6,
    )
    assert any("--alpha replaces alpha 16" in note for note in plan.notes)


def test_alpha_is_kept_as_it_is_written(planned):
    alpha = planned(FORMS["peft"], alpha=16.0).meta["sources"][1]["alpha"]
    assert alpha == 16 and isinstance(alpha, float)
    alpha = planned(FORMS["peft"], settings=PEFT_SETTINGS).meta["sources"][1]["alpha"]
    assert alpha == 16 and isinstance(alpha, int)


@pytest.mark.parametrize(
    "header, message",
    [
        ({"lora_scale": "0.5"}, "lora_scale may scale"),
        ({"Scaling": "2"}, "scaling may scale"),
        ({"network_alphas": '{"blocks.0": 1}'}, "network_alphas may scale"),
        ({"training_config": '{"a": {"lora_alpha": 4}}'}, "training_config.a.lora_a"),
        ({"lora_alpha": "4", "alpha": "8"}, "both 8 and 4"),
        ({"lora_alpha": "4", "ss_network_alpha": "8"}, "different factors"),
        ({"lora_adapter_metadata": '{"r": 2}'}, "alpha is not stated"),
    ],
)
def test_a_header_that_may_scale_is_never_passed_over(planned, header, message):
    with pytest.raises(UserError, match=message):
        planned(FORMS["comfyui"], header)


def test_a_setting_that_may_scale_is_settled_by_alpha(planned):
    plan = planned(FORMS["comfyui"], {"lora_scale": "0.5", "snr_alpha": "3"}, alpha=6)

    assert plan.meta["sources"][1]["alpha"] == 6
    plan = planned(FORMS["comfyui"], {"snr_alpha": "3", "config": '{"scale": 2}'})
    assert plan.meta["sources"][1]["alpha"] == SMALL.rank


def test_adapters_among_the_entries_of_a_checkpoint(base, tmp_path):
    path = tmp_path / "final.pt"
    write_torch(path, {"lora": PLAIN, "config": {"lora": {"alpha": 6}}})
    plan = port.plan(generator=base, lora=path, method="longlive")
    assert plan.meta["sources"][1]["alpha"] == 6

    write_torch(path, {"scale": 2.0, **PLAIN})
    with pytest.raises(UserError, match="scale may scale the adapters"):
        port.plan(generator=base, lora=path, method="longlive")
    write_torch(path, {"lora": PLAIN, "ema": PLAIN})
    with pytest.raises(UserError, match="several adapters, lora, ema"):
        port.plan(generator=base, lora=path, method="longlive")


def test_where_nothing_says_alpha(planned, base, tmp_path):
    with pytest.raises(UserError, match=r"alpha is not stated.*--alpha=NUMBER"):
        planned(FORMS["peft"])

    plan = planned(FORMS["comfyui"])
    jax.tree.map(np.testing.assert_array_equal, adapters_of(plan), reference())
    assert any("assumed to be the rank" in note for note in plan.notes)

    some = alphas(8.0)
    some.popitem()
    with pytest.raises(UserError, match="alpha is not stated for 1 of 30"):
        planned(FORMS["comfyui"] | some)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="must be a number above 0"):
            planned(FORMS["comfyui"], alpha=alpha)


def test_settings_in_a_trainers_checkpoint_are_used(base, tmp_path):
    path = tmp_path / "final.pt"
    content = {"generator_lora": FORMS["peft"], "critic_lora": {}, "step": 3}
    config = {"adapter": {"type": "lora", "rank": 2, "alpha": 6, "dropout": 0.0}}
    write_torch(path, content | {"config": config})
    plan = port.plan(generator=base, lora=path, method="longlive")
    assert plan.meta["sources"][1]["alpha"] == 6
    assert any("not critic_lora, step, config" in note for note in plan.notes)

    write_torch(path, content | {"lora_alpha": 10})
    plan = port.plan(generator=base, lora=path, method="longlive")
    assert plan.meta["sources"][1]["alpha"] == 10

    write_torch(path, content)
    plan = port.plan(generator=base, lora=path, method="longlive")
    assert plan.meta["sources"][1]["alpha"] == SMALL.rank
    assert any("published trainings" in note for note in plan.notes)


def test_partial_targets_leave_the_other_modules_alone(planned):
    arrays = {
        name: array
        for name, array in FORMS["comfyui"].items()
        if ".self_attn.q." in name or ".1.self_attn.v." in name
    }

    plan = planned(arrays)

    found = adapters_of(plan)
    assert {*found} == {"blocks"}
    assert {*found["blocks"]["self_attn"]} == {"q", "v"}
    np.testing.assert_array_equal(
        found["blocks"]["self_attn"]["v"]["a"][1],
        PLAIN["blocks.1.self_attn.v.lora_A.weight"].T,
    )
    for layer in (0, 2):
        assert not products(found, "blocks/self_attn/v")[layer].any()


def test_lower_ranks_are_padded_with_zeros(planned):
    arrays, module = dict(FORMS["comfyui"]), "blocks.1.ffn.0"
    rng = np.random.default_rng(7)
    down = rng.standard_normal((5, SMALL.dim)).astype(np.float32)
    up = rng.standard_normal((SMALL.ffn, 5)).astype(np.float32)
    arrays[f"diffusion_model.{module}.lora_down.weight"] = down
    arrays[f"diffusion_model.{module}.lora_up.weight"] = up

    plan = planned(arrays)

    found = adapters_of(plan)
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(found)} >= {5}
    np.testing.assert_allclose(
        products(found, "blocks/ffn_in")[1], (up @ down).T, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        products(found, "blocks/ffn_in")[0],
        products(reference(), "blocks/ffn_in")[0],
        rtol=1e-5,
        atol=1e-6,
    )
    assert plan.meta["sources"][1]["rank"] == 5
    assert any("ranks from 2 to 5" in note for note in plan.notes)


@pytest.mark.parametrize(
    "name, message",
    [
        ("diffusion_model.blocks.0.self_attn.q.diff", "difference"),
        ("diffusion_model.blocks.0.norm3.diff_b", "difference"),
        ("diffusion_model.blocks.0.self_attn.q.lora_up.bias", "bias"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", "LyCORIS"),
        ("diffusion_model.head.head.lora_down.weight", "missing|extra"),
        ("diffusion_model.blocks.9.self_attn.q.lora_down.weight", "missing"),
        ("diffusion_model.blocks.0.self_attn.q_img.alpha", "no adapters of that name"),
        ("lora_te_layers_0.lora_down.weight", "text encoder|extra|missing"),
    ],
)
def test_what_is_not_low_rank_is_refused_by_name(planned, name, message):
    arrays = FORMS["comfyui"] | {name: np.ones((2, 2) if "down" in name else 1)}

    with pytest.raises(UserError, match=message):
        planned(arrays)


@pytest.mark.parametrize("shape", [(), (0,), (2,), (2, 2, 2), (0, 16)])
def test_matrices_of_no_shape_are_refused_by_name(planned, shape):
    name = "diffusion_model.blocks.1.self_attn.q.lora_down.weight"

    with pytest.raises(UserError, match=r"blocks\.1\.self_attn\.q"):
        planned(FORMS["comfyui"] | {name: np.zeros(shape, np.float32)})


def test_a_rank_of_none_is_refused(planned):
    name = "diffusion_model.blocks.1.self_attn.q.lora_{}.weight"
    empty = {
        name.format("down"): np.zeros((0, SMALL.dim), np.float32),
        name.format("up"): np.zeros((SMALL.dim, 0), np.float32),
    }

    with pytest.raises(UserError, match="has rank 0"):
        planned(FORMS["comfyui"] | empty)


@pytest.mark.parametrize(
    "entries",
    [
        {"lora_config": {"lora_alpha": np.full((2,), 3.0), 5: 6}},
        {"lora_config": {"alpha_pattern": {7: "8"}}},
        {"lora_alpha": "NaN"},
        {"lora_alpha": [16]},
    ],
    ids=str,
)
def test_settings_of_wrong_types_are_refused(base, tmp_path, entries):
    write_torch(tmp_path / "x.pt", {"generator_lora": FORMS["peft"], **entries})

    with pytest.raises(UserError, match=r"alpha|'5'|'7'"):
        port.plan(generator=base, lora=tmp_path / "x.pt", method="longlive")


def test_magnitudes_of_dora_are_refused(planned):
    arrays = dict(FORMS["peft"])
    arrays["base_model.model.blocks.0.ffn.0.lora_magnitude_vector"] = np.ones(24)

    with pytest.raises(UserError, match="magnitude of DoRA"):
        planned(arrays, alpha=2)


def test_adapters_outside_the_blocks_are_refused(planned):
    extra = {
        f"diffusion_model.time_projection.1.lora_{side}.weight": np.zeros((2, 2))
        for side in ("down", "up")
    }

    with pytest.raises(UserError, match=r"time_projection\.1.*no rule"):
        planned(FORMS["comfyui"] | extra)


@pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights", "my_style"])
def test_a_folder_of_adapters_is_read(base, tmp_path, name):
    save_file(FORMS["diffusers"], tmp_path / f"{name}.safetensors")

    plan = port.plan(generator=base, lora=tmp_path, method="longlive")

    jax.tree.map(np.testing.assert_array_equal, adapters_of(plan), reference())


def test_an_error_of_many_names_is_short(planned):
    wrong = {
        name.replace("self_attn.", f"strange{number}.").replace(".0.", f".{number}."): a
        for number, (name, a) in enumerate(FORMS["comfyui"].items())
    }

    with pytest.raises(UserError) as caught:
        planned(wrong)

    lines = str(caught.value).splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) < 250


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_mixed_adapters_survive_export(tmp_path, layout):
    arrays = {k: v for k, v in FORMS["comfyui"].items() if "attn" in k}
    arrays |= {name: a for name, a in alphas(8.0).items() if ".ffn." not in name}
    arrays["diffusion_model.blocks.0.self_attn.q.alpha"] = np.array(5, np.float32)
    wan, _ = write_layout(tmp_path / "wan", "wan", dtype=np.float32)
    save_file(arrays, tmp_path / "mixed.safetensors")
    plan = port.plan(wan, lora=tmp_path / "mixed.safetensors", method="longlive")
    port.run(plan, tmp_path / "out")

    export(tmp_path / "out", tmp_path / "back", layout)

    again = port.plan(tmp_path / "back", lora=tmp_path / "back/lora", method="longlive")
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        adapters_of(again),
        adapters_of(plan),
    )


@pytest.mark.slow
def test_repeated_texts_take_no_memory(base, tmp_path):
    # A list of lists of lists of one text, and so on: 250 GB if written out.
    text = b"X\0\0\4\0" + b"x" * 2**18
    many = b"](" + text + b"q\1" + b"h\1" * 999 + b"eq\2"
    content = b"]q\3(" + many + b"h\2" * 999 + b"e"
    path = tmp_path / "final.pt"
    for name in ("a", "alpha", "scale"):
        write_torch(path, {**PLAIN, "lora": {name: Raw(content)}})

        tracemalloc.start()
        with pytest.raises(UserError, match=name):
            port.plan(generator=base, lora=path, method="longlive")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert peak < 2**28
