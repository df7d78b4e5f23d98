"""Tables there and back, and an error that names each bad parameter."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from anchor_jax.porting import key_tables
from anchor_jax.porting.convert import (
    KeyRule,
    convert,
    convert_lora,
    export,
    export_lora,
    load_safetensors,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TABLE = (
    KeyRule("start.weight", "start/kernel", "o i -> i o"),
    KeyRule("blocks.{layer}.{part:q|k}.weight", "blocks/{part}/kernel", "o i -> i o"),
)


def dit_names(layers=3, dim=12, ffn=20, patch=(1, 2, 2), latent=4, text=10, freq=8):
    """Returns the official names and shapes of a small transformer."""
    names = {
        "patch_embedding.weight": (dim, latent, *patch),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }

    def linear(name, fan_in, out):
        names[name + ".weight"], names[name + ".bias"] = (out, fan_in), (out,)

    linear("text_embedding.0", text, dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", freq, dim)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    linear("head.head", dim, latent * 4)
    for layer in range(layers):
        block = f"blocks.{layer}."
        names[block + "modulation"] = (1, 6, dim)
        names[block + "norm3.weight"] = names[block + "norm3.bias"] = (dim,)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}{attention}.{part}", dim, dim)
            for part in "qk":
                names[f"{block}{attention}.norm_{part}.weight"] = (dim,)
        linear(block + "ffn.0", dim, ffn)
        linear(block + "ffn.2", ffn, dim)
    return names


def draw(names, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32) for name, shape in names.items()
    }


def lora_names(layers=2, rank=4, dim=12, ffn=20):
    names = {}
    sizes = {f"{a}_attn.{p}": (dim, dim) for a in ("self", "cross") for p in "qkvo"}
    sizes |= {"ffn.0": (dim, ffn), "ffn.2": (ffn, dim)}
    for layer in range(layers):
        for module, (fan_in, out) in sizes.items():
            name = f"base_model.model.blocks.{layer}.{module}"
            names[name + ".lora_A.weight"] = (rank, fan_in)
            names[name + ".lora_B.weight"] = (out, rank)
    return names


def small(layers=3):
    names = {"start.weight": (4, 3)}
    for layer in range(layers):
        for part in "qk":
            names[f"blocks.{layer}.{part}.weight"] = (4, 3)
    return draw(names)


def expected(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same(found, source):
    assert found.keys() == source.keys()
    for name, value in source.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    "table, source",
    [
        (
            key_tables.UMT5,
            lambda: load_safetensors(GOLDEN / "umt5/weights.safetensors"),
        ),
        (key_tables.VAE, lambda: load_safetensors(GOLDEN / "vae/weights.safetensors")),
        (key_tables.DIT, lambda: draw(dit_names())),
        (key_tables.LORA, lambda: draw(lora_names())),
    ],
)
def test_round_trip_is_exact(table, source):
    source = source()
    params = convert(source, table)
    assert_same(export(params, table), source)
    again = convert(source, table, expected(params))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_layers_are_stacked_and_transposed():
    source = small(layers=11)
    params = convert(source, TABLE)
    assert params["blocks"]["q"]["kernel"].shape == (11, 3, 4)
    for layer in (0, 2, 10):
        np.testing.assert_array_equal(
            params["blocks"]["q"]["kernel"][layer],
            source[f"blocks.{layer}.q.weight"].T,
        )


def test_layers_are_in_order_in_any_file():
    source = small(layers=11)
    by_name = dict(sorted(source.items()))

    assert [*by_name] != [*source]
    expected, found = convert(source, TABLE), convert(by_name, TABLE)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_transformer_tree():
    source = draw(dit_names())
    params = convert(source, key_tables.DIT)
    assert len(source) == 12 + 3 * 27 + 3
    assert params["blocks"]["modulation"].shape == (3, 6, 12)
    assert params["head"]["modulation"].shape == (2, 12)
    assert set(params["blocks"]["cross_attn"]) == {"q", "o", "norm_q"}
    assert set(params["context"]) == {"k", "v", "norm_k"}
    assert params["time_projection"]["kernel"].shape == (12, 72)
    np.testing.assert_array_equal(
        params["context"]["k"]["kernel"][1], source["blocks.1.cross_attn.k.weight"].T
    )


def test_patch_kernel_takes_channels_fastest():
    source = draw(dit_names())
    kernel = convert(source, key_tables.DIT)["patch_embed"]["kernel"]
    weight = source["patch_embedding.weight"]
    patch = np.random.default_rng(1).standard_normal((1, 2, 2, 4), np.float32)
    np.testing.assert_allclose(
        patch.reshape(-1) @ kernel,
        np.einsum("thwi,oithw->o", patch, weight),
        rtol=1e-5,
        atol=1e-5,
    )


def test_adapters_fold_their_scale():
    source = draw(lora_names(rank=4))
    name = "base_model.model.blocks.1.ffn.0"
    adapters = convert_lora(source, key_tables.LORA, alpha=8)
    a, b = (adapters["blocks"]["ffn_in"][leaf][1] for leaf in "ab")
    change = source[name + ".lora_B.weight"] @ source[name + ".lora_A.weight"]
    np.testing.assert_allclose(a @ b, 2 * change.T, rtol=1e-5, atol=1e-6)
    assert set(adapters) == {"blocks", "context"}
    assert_same(export_lora(adapters, key_tables.LORA, alpha=8), source)


def test_all_bad_names_are_in_one_error():
    source = small()
    tree = expected(convert(source, TABLE))
    tree["more"] = {"bias": jax.ShapeDtypeStruct((2,), np.float32)}
    tree["start"]["other"] = jax.ShapeDtypeStruct((2,), np.float32)
    del source["blocks.1.q.weight"]
    source["blocks.3.k.weight"] = source["blocks.0.k.weight"]
    source["blocks.2.k.weight"] = np.zeros((4, 5), np.float32)
    source["blocks.0.k.weight"] = np.zeros((4, 3, 1), np.float32)
    source["strange.weight"] = np.zeros(2)
    with pytest.raises(ValueError) as caught:
        convert(source, TABLE, tree)
    lines = str(caught.value).splitlines()[1:]
    for start in (
        "strange.weight: extra",
        "blocks.1.q.weight: missing",
        "blocks.3.k.weight: extra",
        "blocks.2.k.weight: shape (4, 5) gives (5, 4)",
        "blocks.0.k.weight: shape (4, 3, 1), expected axes 'o i'",
        "(no rule): missing, expected for more/bias",
        "(no rule): missing, expected for start/other",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    assert len(lines) == 7


@pytest.mark.parametrize("lost", ["start.weight", "blocks.{layer}.q.weight"])
def test_a_parameter_wholly_missing_is_named(lost):
    source = small()
    tree = expected(convert(source, TABLE))
    kept = {
        name: value
        for name, value in source.items()
        if TABLE[0].match_source(name) is None and lost == "start.weight"
        or ".q." not in name and lost != "start.weight"
    }  # fmt: skip
    with pytest.raises(ValueError, match="missing") as caught:
        convert(kept, TABLE, tree)
    assert lost.replace("{layer}", "*") + ": missing" in str(caught.value)


def test_a_gap_is_found_without_an_expected_tree():
    source = small()
    del source["blocks.2.k.weight"]
    with pytest.raises(ValueError, match=r"blocks\.2\.k\.weight: missing"):
        convert(source, TABLE)


def test_a_name_of_an_unexpected_path_is_extra():
    source = small()
    tree = expected(convert(source, TABLE))
    del tree["start"]
    with pytest.raises(
        ValueError, match=r"start\.weight: extra, the network has no start/kernel"
    ):
        convert(source, TABLE, tree)


def test_two_claims_are_refused():
    twice = (*TABLE, KeyRule("start.{kind:weight|bias}", "other/{kind}"))
    with pytest.raises(ValueError, match=r"start\.weight: claimed by 2 rules"):
        convert(small(), twice)


def test_one_place_for_two_names_is_refused():
    table = (KeyRule("{name:a|b}.weight", "same"),)
    source = draw({"a.weight": (1,), "b.weight": (1,)})
    with pytest.raises(ValueError, match=r"b\.weight: its place same is taken by a"):
        convert(source, table)


def test_export_names_a_path_without_a_rule():
    params = convert(small(), TABLE)
    params["strange"] = np.zeros(1)
    with pytest.raises(ValueError, match="strange: claimed by 0 rules"):
        export(params, TABLE)


def test_loading_bfloat16(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    path = tmp_path / "some.safetensors"
    save_file({"model.a": value, "other": value}, path)
    found = load_safetensors(path, prefix="model.")
    assert list(found) == ["a"]
    assert found["a"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["a"], value)
    stacked = convert({"start.weight": found["a"]}, TABLE[:1])
    assert stacked["start"]["kernel"].dtype == ml_dtypes.bfloat16
