"""The text encoder against recorded numbers and against itself."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax.porting.convert import convert, load_safetensors
from anchor_jax.porting.key_tables import UMT5
from anchor_jax.wan import text

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "umt5"
TOLERANCE = 5e-5


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def config():
    model = json.loads((GOLDEN / "small/config.json").read_text())["model"]
    return text.TextConfig(
        vocab=model["vocab"],
        dim=model["dim"],
        attention_dim=model["dim_attn"],
        ffn_dim=model["dim_ffn"],
        num_heads=model["num_heads"],
        num_layers=model["num_layers"],
        num_buckets=model["num_buckets"],
        dtype="float32",
    )


@pytest.fixture(scope="module")
def golden():
    folder = GOLDEN / "small"
    inputs = load_safetensors(folder / "inputs.safetensors")
    inputs = {name: value.astype(np.int32) for name, value in inputs.items()}
    return inputs, load_safetensors(folder / "outputs.safetensors")


def shapes(config):
    ids = jnp.zeros((1, 8), jnp.int32)
    init = text.Umt5Encoder(config).init
    return jax.eval_shape(init, jax.random.key(0), ids, ids)["params"]


@pytest.fixture(scope="module")
def params(config):
    source = load_safetensors(GOLDEN / "weights.safetensors")
    return convert(source, UMT5, shapes(config))


@pytest.fixture(scope="module")
def recorded(config, params, golden):
    inputs, _ = golden
    output, other = text.Umt5Encoder(config).apply(
        {"params": params}, inputs["ids"], inputs["mask"], mutable=["intermediates"]
    )
    return output, other["intermediates"]


@pytest.mark.slow
def test_output_matches(recorded, golden):
    assert relative(recorded[0], golden[1]["prompt_embeds"]) < TOLERANCE


def test_intermediates_match(recorded, golden, config):
    inner, theirs = recorded[1], golden[1]
    assert relative(inner["embedded"][0], theirs["token_embedding"]) < TOLERANCE
    assert relative(inner["encoded"][0], theirs["encoder"]) < TOLERANCE
    for layer in range(config.num_layers):
        bias = inner["blocks"]["bias"][0][layer]
        output = inner["blocks"]["output"][0][layer]
        assert relative(bias, theirs[f"pos_bias.{layer}"]) < TOLERANCE
        assert relative(output, theirs[f"block.{layer}"]) < TOLERANCE


def test_padded_rows_are_zero(recorded, golden):
    mask = golden[0]["mask"].astype(bool)
    output = np.asarray(recorded[0])
    assert (output[~mask] == 0).all()
    assert (output[mask] != 0).any(axis=-1).all()


@pytest.mark.slow
def test_padding_does_not_change_the_tokens(config, params, golden):
    inputs, _ = golden
    length = int(inputs["mask"][2].sum())
    model = text.Umt5Encoder(config)
    rows = [inputs[name][2:] for name in ("ids", "mask")]
    padded = model.apply({"params": params}, *rows)[:, :length]
    alone = model.apply({"params": params}, *(row[:, :length] for row in rows))
    assert relative(padded, np.asarray(alone)) < 1e-5


def test_scan_equals_layers_one_by_one(config, params, recorded, golden):
    mask = golden[0]["mask"].astype(bool)
    model = text.Umt5Encoder(config)
    x = recorded[1]["embedded"][0]
    for layer in range(config.num_layers):
        own = jax.tree.map(lambda stacked, at=layer: stacked[at], params["blocks"])
        x, _ = text.Umt5Block(config).apply(
            {"params": own}, x, mask, model._buckets(x.shape[1])
        )
    last = np.asarray(recorded[1]["blocks"]["output"][0][-1])
    assert relative(x, last) < 1e-6


def test_buckets_match(golden):
    theirs = golden[1]["relative_buckets"]
    probe = len(theirs) // 2
    ours = text.relative_bucket(np.arange(-probe, probe + 1))
    np.testing.assert_array_equal(ours, theirs)


def test_bucket_boundaries():
    before = text.relative_bucket(-np.arange(300))
    after = text.relative_bucket(np.arange(300))
    first = [int(np.argmax(before == bucket)) for bucket in range(16)]
    assert first == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(after[1:], before[1:] + 16)
    assert before.max() == 15


def test_parameter_total_of_the_full_size():
    tree = shapes(text.TextConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 5_680_910_336


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="attention_dim=64 .* num_heads=5"):
        text.TextConfig(attention_dim=64, num_heads=5)


@pytest.mark.slow
def test_fresh_weights_have_sane_scales_and_gradients():
    config = text.TextConfig(
        vocab=64, dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2,
        dtype="float32",
    )  # fmt: skip
    ids = jnp.arange(8)[None] % 64
    mask = jnp.ones_like(ids)
    model = text.Umt5Encoder(config)
    fresh = jax.jit(model.init)(jax.random.key(0), ids, mask)

    @jax.jit
    @jax.value_and_grad
    def energy(variables):
        return jnp.square(model.apply(variables, ids, mask)).mean()

    loss, grads = energy(fresh)
    assert 0.5 < loss < 2
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_bfloat16_keeps_its_type_and_stays_near(config, params, golden):
    inputs, theirs = golden
    small = text.TextConfig(**{**vars(config), "dtype": "bfloat16"})
    with jax.numpy_dtype_promotion("strict"):
        output = text.Umt5Encoder(small).apply({"params": params}, *inputs.values())
    assert output.dtype == jnp.bfloat16
    assert relative(output.astype(jnp.float32), theirs["prompt_embeds"]) < 0.1


def test_nothing_is_recorded_unless_asked(config, params, golden):
    def program(**more):
        model = text.Umt5Encoder(config)
        run = functools.partial(model.apply, **more)
        return str(jax.make_jaxpr(run)({"params": params}, *golden[0].values()))

    assert len(program()) < len(program(mutable=["intermediates"]))
