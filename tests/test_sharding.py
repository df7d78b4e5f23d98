import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax import sharding
from anchor_jax.wan import dit, lora, shapes
from anchor_jax.wan.attention import bidirectional
from anchor_jax.wan.spec import WAN_1_3B, ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeConfig, WanVae

SMALL = ModelConfig(
    dim=32, ffn_dim=64, num_heads=4, num_layers=2, freq_dim=16, text_dim=8,
    text_len=4, latent_channels=4, dtype="float32",
)  # fmt: skip


def text_shapes():
    ids = jnp.zeros((1, 4), jnp.int32)
    encoder = Umt5Encoder(TextConfig())
    return jax.eval_shape(encoder.init, jax.random.key(0), ids, ids)["params"]


def vae_shapes():
    vae = WanVae(VaeConfig())

    def both(module, pixels):
        return module.decode(module.encode(pixels))

    pixels = jnp.zeros((1, 1, 16, 16, 3))
    init = jax.eval_shape(
        lambda rng: vae.init(rng, pixels, method=both), jax.random.key(0)
    )
    return init["params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes, placements",
    [
        (
            lambda: jax.eval_shape(
                lambda r: dit.init_params(WAN_1_3B, r), jax.random.key(0)
            ),
            sharding.GENERATOR,
        ),
        (text_shapes, sharding.TEXT),
        (vae_shapes, sharding.CODEC),
    ],
    ids=["generator", "text", "vae"],
)
def test_every_parameter_has_as_many_logical_axes_as_axes(shapes, placements):
    tree = shapes()

    axes = sharding.logical_axes(tree, placements)

    leaves = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in leaves] == [x.ndim for x in jax.tree.leaves(tree)]


def test_an_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="blocks/odd/thing"):
        tree = {"blocks": {"odd": {"thing": jnp.zeros(3)}}}
        sharding.logical_axes(tree, sharding.GENERATOR)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs 7 devices"):
        sharding.make_mesh((7, 1, 1, 1))


def test_more_sizes_than_data_and_fsdp_are_not_inferred():
    with pytest.raises(ValueError, match="only one axis may be -1, or data and fsdp"):
        sharding.make_mesh((-1, -1, -1, 1))


def test_a_mesh_of_too_few_axes_names_the_four():
    with pytest.raises(ValueError, match="four integers.*data, fsdp, context, tensor"):
        sharding.make_mesh((2, 2))


@pytest.mark.parametrize(
    ("shape", "found", "expected"),
    [
        ((-1, -1, 1, 1), [0] * 8, (1, 8, 1, 1)),
        ((-1, -1, 1, 1), [n // 8 for n in range(56)], (7, 8, 1, 1)),
        ((-1, -1, 1, 1), list(range(56)), (7, 8, 1, 1)),
        ((-1, -1, 1, 2), [n // 8 for n in range(16)], (2, 4, 1, 2)),
        ((-1, -1, 1, 1), [0], (1, 1, 1, 1)),
        ((2, -1, 1, 1), [0] * 8, (2, 4, 1, 1)),
    ],
    ids=["host", "hosts", "a process a device", "tensor", "one", "fsdp"],
)
def test_sizes_that_are_not_given_follow_from_the_machines(shape, found, expected):
    devices = [
        types.SimpleNamespace(platform="gpu", process_index=one) for one in found
    ]

    assert sharding.infer(shape, devices) == expected


def test_on_a_tpu_up_to_sixteen_chips_split_the_weights():
    devices = [types.SimpleNamespace(platform="tpu", process_index=0)] * 64

    assert sharding.infer((-1, -1, 1, 1), devices) == (4, 16, 1, 1)


def test_an_axis_may_have_a_part_of_a_slices_side(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no product of whole sides")

    monkeypatch.setattr(jax, "make_mesh", refuse)

    mesh = sharding.make_mesh((2, -1, 1, 1))

    assert dict(mesh.shape) == MESH | {"data": 2, "fsdp": jax.device_count() // 2}
    assert set(mesh.devices.flat) == set(jax.devices())


MESH = dict(zip(sharding.MESH_AXES, (1, 1, 1, 1), strict=True))


def test_an_axis_that_does_not_divide_a_large_array_is_refused_with_what_does():
    tree = {"patch_embed": {"kernel": jnp.zeros((64, 1536))}}

    with pytest.raises(sharding.Unsplittable) as refusal:
        sharding.specs(tree, sharding.GENERATOR, MESH | {"fsdp": 56})

    message = str(refusal.value)
    assert "fsdp=56 does not divide the 1536 of transformer patch_embed" in message
    assert "48, 64, 96" in message


def test_a_small_array_that_an_axis_does_not_divide_is_replicated():
    tree = {"patch_embed": {"kernel": jnp.zeros((4, 10))}}

    (spec,) = jax.tree.leaves(
        sharding.specs(tree, sharding.GENERATOR, MESH | {"fsdp": 4})
    )

    assert tuple(spec) == (None, None)


def test_features_that_layers_add_up_are_split_however_small_they_are():
    tree = {"blocks": {"ffn_out": {"kernel": jnp.zeros((1, 64, 24))}}}

    with pytest.raises(sharding.Unsplittable, match="tensor=3 does not divide the 64"):
        sharding.specs(tree, sharding.GENERATOR, MESH | {"tensor": 3})


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        (
            {"tensor": 8},
            "tensor=8 x context=1 does not divide the 12 and 24 attention heads",
        ),
        ({"tensor": 4, "context": 2}, "tensor=4 x context=2 does not divide"),
        ({"context": 3}, "context=3 does not divide the 1000 tokens"),
        ({"context": 4}, "context=4 does not divide the 6 text tokens"),
    ],
)
def test_heads_and_tokens_that_devices_cannot_share_are_refused(axes, named):
    with pytest.raises(sharding.Unsplittable, match=named):
        sharding.check_heads(MESH | axes, heads={12, 24}, tokens=1000, text=6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 256])
def test_every_large_matrix_is_split_over_fsdp(rank):
    params = shapes.of(WAN_1_3B)
    tree, table = params, sharding.GENERATOR
    if rank:
        begin = functools.partial(lora.init, rank=rank, rng=jax.random.key(0))
        tree, table = jax.eval_shape(begin, params), sharding.LORA

    specs = sharding.specs(tree, table, MESH | {"fsdp": 16})

    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        assert "fsdp" in tuple(spec) or leaf.ndim < 3 or leaf.shape[-2] == 6


@pytest.mark.slow
def test_sharded_parameters_give_the_same_flow_as_whole_ones():
    params = dit.init_params(SMALL, jax.random.key(0))
    params["head"]["out"]["kernel"] += 0.1
    mesh = sharding.make_mesh((1, 2, 1, jax.device_count() // 2))
    latents = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 4))
    text = jax.random.normal(jax.random.key(2), (2, 4, 8))
    model = dit.WanDit(SMALL)

    @jax.jit
    def flow(params):
        variables = {"params": params}
        context = model.apply(variables, text, method="project")
        times, position = jnp.full((2, 3), 500.0), jnp.arange(3)
        return model.apply(
            variables, latents, times, context, bidirectional(3), position
        )[0]

    placed = jax.device_put(
        params, sharding.shardings(params, sharding.GENERATOR, mesh)
    )
    kernel = placed["blocks"]["ffn_in"]["kernel"]

    assert kernel.addressable_shards[0].data.size < kernel.size
    np.testing.assert_allclose(flow(placed), flow(params), atol=1e-5)
