import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from anchor_jax.cache import store
from anchor_jax.cache.memory import lay_out
from anchor_jax.cache.policies import POLICIES
from anchor_jax.perf import roofline
from anchor_jax.streaming.decode import decode
from anchor_jax.wan import dit, kernels
from anchor_jax.wan.attention import ContextKV, LayersKV, Prefix
from anchor_jax.wan.spec import GRIDS, PRESETS, TINY, WAN_1_3B, WAN_14B, LatentGrid
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeCodec, VaeConfig, WanVae

GRID = GRIDS["480x832"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def stream(keys):
    return roofline.Stream(WAN_1_3B, GRID, keys=keys)


@pytest.mark.parametrize("keys, tera", [(12, 28.29), (15, 32.33), (21, 40.41)])
def test_a_pass_over_a_block_takes_these_operations(keys, tera):
    work = roofline.pass_flops(WAN_1_3B, GRID, frames=3, keys=keys)

    assert round(work.main / 1e12, 2) == tera
    assert round(work.projections / 1e12, 2) == 2.65
    assert round(work.cross_attention / 1e12, 2) == 1.77
    assert round(work.feed_forward / 1e12, 2) == 7.73
    assert work.rest < 1e-3 * work.main


def test_operations_are_those_of_the_traced_model():
    grid = LatentGrid(8, 8)
    counted = roofline.pass_flops(TINY, grid, frames=3, keys=5)
    params = jax.eval_shape(functools.partial(dit.init_params, TINY), jax.random.key(0))
    traced = jax.make_jaxpr(functools.partial(forward, grid))(params)

    assert products(traced.jaxpr) == counted.total


def forward(grid, params):
    """Runs the tiny model on a block of 3 that sees 2 frames more."""
    rows, columns = grid.tokens(TINY.patch)
    shape = (TINY.num_layers, 1, 2, rows * columns, TINY.dim)
    text = (TINY.num_layers, 1, TINY.text_len, TINY.dim)
    kernel = kernels.KERNELS["plain"]
    visible = Prefix(jnp.int32(5))
    past = LayersKV(jnp.zeros(shape), jnp.zeros(shape))
    latents = jnp.zeros((1, 3, grid.height, grid.width, TINY.latent_channels))
    context = ContextKV(jnp.zeros(text), jnp.zeros(text))
    past = lay_out(kernel, TINY.head_dim, past, 3)
    position = jnp.arange(3)
    return dit.WanDit(TINY, kernel).apply(
        {"params": params},
        latents,
        jnp.zeros((1, 3)),
        context,
        visible,
        position,
        position,
        past,
    )


def products(jaxpr, times=1):
    """Returns the operations of all matrix products of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((left, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = [shape[axis] for axis in left]
            total += times * 2 * equation.outvars[0].aval.size * math.prod(inner)
        repeat = equation.params.get("length", 1)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += products(inner, times * repeat)
    return total


@pytest.mark.parametrize(
    "kind, twelve, fifteen",
    [
        ("NVIDIA H100 80GB HBM3", 83.9, 73.4),
        ("NVIDIA H200", 83.9, 73.4),
        ("TPU v5", 38.9, 34.1),
        ("TPU v6 lite", 77.9, 68.1),
        ("TPU7x", 195.7, 171.3),
        ("NVIDIA B200", 190.9, 167.0),
        ("NVIDIA A100-SXM4-80GB", 26.5, 23.2),
    ],
)
def test_frames_per_second_at_the_peak(kind, twelve, fifteen):
    chip = roofline.find(kind)

    assert round(roofline.frames_per_second(stream(12), chip), 1) == twelve
    assert round(roofline.frames_per_second(stream(15), chip), 1) == fifteen


def test_efficiency_divides_the_speed_where_arithmetic_is_the_limit():
    chip = roofline.find("TPU v5p")

    assert round(roofline.frames_per_second(stream(12), chip, 0.5), 1) == 19.5


def test_memory_is_the_limit_where_it_is_slow():
    slow = roofline.Chip("slow", (), "other", 1e18, 1e12, 1e9)

    seconds = roofline.block_seconds(stream(12), slow)

    assert seconds == 5 * roofline.pass_bytes(WAN_1_3B, GRID, 12) / 1e9


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
    ],
)
def test_chips_are_found_by_the_kind_that_jax_tells(kind, name):
    assert roofline.find(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v4 lite", ""])
def test_unknown_chips_are_not_guessed(kind):
    assert roofline.find(kind) is None


@pytest.mark.parametrize("model", [WAN_1_3B, WAN_14B, TINY])
def test_parameters_of_the_generator_are_counted(model):
    init = functools.partial(dit.init_params, model)

    assert roofline.model_params(model) == count(
        jax.eval_shape(init, jax.random.key(0))
    )


def test_parameters_of_the_text_encoder_are_counted():
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = jax.eval_shape(Umt5Encoder(TextConfig()).init, jax.random.key(0), ids, ids)

    assert roofline.text_params(TextConfig()) == count(shapes)


def test_cache_is_as_large_as_the_one_that_is_made():
    policy = POLICIES["anchor_forcing"]
    made = jax.eval_shape(
        functools.partial(store.init_cache, policy, WAN_1_3B, 1, 1560)
    )

    counted = roofline.cache_bytes(WAN_1_3B, GRID, policy.slots)

    assert counted == 2 * count(made.slots)


@pytest.mark.slow
def test_decoding_a_block_takes_this_long_and_keeps_this_much():
    config = VaeConfig()
    latents = jax.ShapeDtypeStruct((1, 3, 60, 104, 16), jnp.bfloat16)
    pixels = jax.ShapeDtypeStruct((1, 1, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(WanVae(config).init, jax.random.key(0), pixels)["params"]
    call = functools.partial(decode, codec=VaeCodec(config))
    _, state = jax.eval_shape(call, params, None, latents)

    layers = list(roofline.decoder_layers(config, GRID))

    assert round(3 * roofline.decode_flops(config, GRID) / 1e12, 2) == 40.65
    assert sum(layer.kept for layer in layers) == count(state)


def test_a_switch_costs_a_recache_more_than_a_block():
    policy = POLICIES["anchor_forcing"]
    chip = roofline.find("NVIDIA H100")
    make = functools.partial(roofline.make_stream, PRESETS["1.3B"], GRID)
    kept, renewed = make(POLICIES["no_recache"]), make(policy)

    more = roofline.switch_seconds(renewed, chip, 1.0)
    more -= roofline.switch_seconds(kept, chip, 1.0)

    work = roofline.pass_flops(WAN_1_3B, GRID, frames=9, keys=15).main
    assert more == pytest.approx(work / chip.flops)
    assert renewed.keys == 15


def test_the_first_block_sees_only_itself():
    chip = roofline.find("NVIDIA H100")

    first = roofline.first_seconds(stream(12), chip, 1.0)

    assert first < roofline.block_seconds(stream(12), chip)


@pytest.mark.parametrize(
    "name, keys, recache, recache_keys",
    [
        ("anchor_forcing", 15, 9, 15),
        ("longlive", 12, 9, 12),
        ("no_global_sink", 15, 12, 15),
        ("self_forcing_rolling", 21, 0, 0),
    ],
)
def test_a_policy_decides_what_passes_see(name, keys, recache, recache_keys):
    made = roofline.make_stream(WAN_1_3B, GRID, POLICIES[name])

    assert (made.keys, made.recache, made.recache_keys) == (keys, recache, recache_keys)


def test_a_streams_programs_take_these_seconds_on_an_h100():
    chip = roofline.find("NVIDIA H100 80GB HBM3")
    policy = POLICIES["anchor_forcing"]
    sizes = roofline.make_stream(
        WAN_1_3B, GRID, policy, text=TextConfig(), codec=VaeConfig()
    )

    seconds = roofline.program_seconds(sizes, chip, 0.4)
    attention = roofline.attention_seconds(sizes, chip, 0.4)

    # Five passes over 15 key frames of 32.33 TFLOP, and a re-cache of 9 frames.
    assert seconds["step"] == pytest.approx(5 * 32.33 / (0.4 * 989), rel=1e-3)
    recache = roofline.pass_flops(WAN_1_3B, GRID, sizes.recache, sizes.recache_keys)
    assert seconds["switch"] == pytest.approx(recache.main / (0.4 * 989e12))
    decode = 3 * roofline.decode_flops(VaeConfig(), GRID)
    assert seconds["decode"] == pytest.approx(decode / (0.4 * 989e12))
    assert set(seconds) == {"step", "switch", "decode", "text"}
    one = roofline.pass_flops(WAN_1_3B, GRID, 3, 15).self_attention
    assert attention["step"] == pytest.approx(5 * one / (0.4 * 989e12))
    assert attention["switch"] < seconds["switch"]
    alone = dataclasses.replace(sizes, recache=0, text=None, codec=None)
    assert set(roofline.program_seconds(alone, chip)) == {"step"}
    assert set(roofline.attention_seconds(alone, chip)) == {"step"}
