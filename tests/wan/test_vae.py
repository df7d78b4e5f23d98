"""The VAE against recorded numbers, and streams against wholes."""

import dataclasses
import functools
import json
import pathlib

import chex
import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax.porting.convert import convert, load_safetensors
from anchor_jax.porting.key_tables import VAE
from anchor_jax.wan import vae
from anchor_jax.wan.spec import WAN_2_1

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vae"
TOLERANCE = 5e-5


def relative(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


class Probed(vae.WanVae):
    """Two methods of one network in one compilation."""

    def both(self, pixels):
        return self.encode(pixels), self.encode_mean(pixels)[0]

    def free_and_clipped(self, latents):
        return self.decode_raw(latents)[0], self.decode(latents)

    def decoded_at_once(self, latents):
        centre, inverse = self._normal(latents.dtype)
        return self.decoder.run(self.conv2(latents / inverse + centre), None)[0]

    def encoded_at_once(self, pixels):
        moments = self.conv1(self.encoder.run(pixels, None)[0])
        return jnp.split(moments, 2, axis=-1)[0]


def last(recorded):
    return einops.rearrange(recorded, "b c f h w -> b f h w c")


def shapes(config):
    pixels = jnp.zeros((1, 5, 16, 16, 3))
    init = vae.WanVae(config).init
    return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


@pytest.fixture(scope="module")
def config():
    model = json.loads((GOLDEN / "dim6_9f/config.json").read_text())["model"]
    return vae.VaeConfig(
        base_dim=model["dim"],
        z_dim=model["z_dim"],
        dim_mult=tuple(model["dim_mult"]),
        num_res_blocks=model["num_res_blocks"],
        temporal_downsample=tuple(model["temperal_downsample"]),
        dtype="float32",
    )


@pytest.fixture(scope="module")
def golden():
    folder = GOLDEN / "dim6_9f"
    stored = load_safetensors(folder / "inputs.safetensors")
    stored |= load_safetensors(folder / "outputs.safetensors")
    return {
        name: last(value) if value.ndim == 5 else value
        for name, value in stored.items()
    }


@pytest.fixture(scope="module")
def params(config):
    source = load_safetensors(GOLDEN / "weights.safetensors")
    return convert(source, VAE, shapes(config))


@pytest.fixture(scope="module")
def run(config, params):
    model = Probed(config)

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, *args):
        return model.apply({"params": params}, *args, method=method)

    return run


@pytest.fixture(scope="module")
def whole(run, golden):
    return np.asarray(run("decode_raw", golden["latent"])[0])


def test_the_latents_scale_is_the_recorded_one(config, golden):
    np.testing.assert_allclose(config.latent_mean, golden["latent_mean"], atol=1e-6)
    np.testing.assert_allclose(config.latent_std, golden["latent_std"], atol=1e-6)


@pytest.mark.slow
def test_encode_matches(run, golden):
    latents, mean = run("both", golden["video"])
    assert relative(latents, golden["encoded"]) < TOLERANCE
    assert relative(mean, golden["encoded_raw_mu"]) < TOLERANCE


@pytest.mark.slow
def test_encode_of_one_frame_matches(run, golden):
    ours, _ = run("encode_stream", golden["video"][:, :1], None)
    assert relative(ours, golden["encoded_single_frame"]) < TOLERANCE


@pytest.mark.slow
def test_decode_matches(whole, golden):
    assert relative(whole, golden["decoded"]) < TOLERANCE


@pytest.mark.slow
def test_decode_is_clipped(run, golden, whole):
    latents = 50 * golden["latent"]
    free, clipped = run("free_and_clipped", latents[:, :1])
    assert np.abs(free).max() > 1
    np.testing.assert_array_equal(clipped, np.clip(free, -1, 1))


@pytest.mark.slow
def test_the_recorded_stream_matches(run, golden):
    state, kept = None, []
    for first, end in ((0, 1), (1, 2), (2, 4)):
        pixels, state = run("decode_raw", golden["latent"][:, first:end], state)
        assert relative(pixels, golden[f"stream.{first}_{end}"]) < TOLERANCE
        kept.append(state)
    slots = {
        0: state.past["conv1"],
        5: state.past["upsamples_0"]["residual_2"],
        12: state.past["upsamples_4"]["residual_2"],
    }
    for slot, ours in slots.items():
        assert relative(ours, golden[f"stream.feat_cache.{slot}"]) < TOLERANCE
    chex.assert_trees_all_equal_shapes_and_dtypes(kept[0], kept[-1])


@pytest.mark.slow
def test_intermediates_match(config, params, golden):
    decode = functools.partial(
        vae.WanVae(config).apply, method="decode_raw", mutable=["intermediates"]
    )
    _, recorded = jax.jit(decode)({"params": params}, golden["latent"][:, :1])
    inner = recorded["intermediates"]["decoder"]
    pairs = {"conv1": "conv1", "middle": "middle_2"}
    pairs |= {f"upsample.{at}": f"upsamples_{at}" for at in (0, 3, 4, 7)}
    for theirs, ours in pairs.items():
        expected = golden[f"decode.first_latent.{theirs}"]
        assert relative(inner[ours]["output"][0], expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("split", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_streamed_decode_equals_whole(run, golden, whole, split):
    state, pieces, at = None, [], 0
    for count in split:
        piece, state = run("decode_raw", golden["latent"][:, at : at + count], state)
        pieces.append(piece)
        at += count
    assert relative(np.concatenate(pieces, axis=1), whole) < 5e-6


@pytest.mark.slow
def test_all_frames_at_once_give_what_one_at_a_time_does(run, golden, whole):
    decoded = run("decoded_at_once", golden["latent"])
    encoded = run("encoded_at_once", golden["video"])
    assert relative(decoded, whole) < 5e-6
    assert relative(encoded, golden["encoded_raw_mu"]) < TOLERANCE


@pytest.mark.slow
def test_more_frames_need_no_larger_program(config, params):
    apply = functools.partial(vae.WanVae(config).apply, {"params": params})
    decode = functools.partial(apply, method="decode_raw")
    latents = jnp.zeros((1, 9, 2, 2, config.z_dim))
    _, state = jax.eval_shape(decode, latents[:, :1])

    def convolutions(frames):
        lowered = jax.jit(decode).lower(latents[:, :frames], state).as_text()
        return lowered.count("stablehlo.convolution")

    assert convolutions(9) == convolutions(1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("split", [(1, 4, 4), (5, 4)])
def test_streamed_encode_equals_whole(run, golden, split):
    state, pieces, at = None, [], 0
    for count in split:
        piece, state = run("encode_stream", golden["video"][:, at : at + count], state)
        pieces.append(piece)
        at += count
    assert relative(np.concatenate(pieces, axis=1), golden["encoded"]) < TOLERANCE


@pytest.mark.slow
def test_frames_past_the_last_whole_latent_are_dropped(run, golden):
    ours = run("encode", golden["video"][:, :8])
    assert relative(ours, golden["encoded"][:, :2]) < TOLERANCE


@pytest.mark.slow
def test_the_upsampler_does_not_see_the_first_frame(config):
    layer = vae.Upsample(config, temporal=True)
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 2, 8))
    variables = layer.init(jax.random.key(1), x, None)
    y, _ = layer.apply(variables, x, None)
    other, _ = layer.apply(variables, x.at[:, 0].add(1.0), None)
    assert y.shape == (1, 7, 4, 4, 4)
    np.testing.assert_array_equal(y[:, 1:], other[:, 1:])
    assert jnp.abs(y[:, 0] - other[:, 0]).max() > 0.1


@pytest.mark.slow
def test_the_downsampler_passes_the_first_frame_by(config):
    layer = vae.Downsample(config, temporal=True)
    flat = vae.Downsample(config, temporal=False)
    x = jax.random.normal(jax.random.key(0), (1, 5, 4, 4, 8))
    params = layer.init(jax.random.key(1), x, None)["params"]
    y, _ = layer.apply({"params": params}, x, None)
    halved, _ = flat.apply({"params": {"resample": params["resample"]}}, x, None)
    assert y.shape == (1, 3, 2, 2, 8)
    np.testing.assert_allclose(y[:, 0], halved[:, 0], atol=1e-6)
    kernel = params["time_conv"]["kernel"][:, 0, 0]
    expected = jnp.einsum("btijc,tco->bijo", halved[:, 2:5], kernel)
    np.testing.assert_allclose(y[:, 2], expected, atol=1e-5)


@pytest.mark.slow
def test_no_pixel_frame_sees_a_later_latent(config, params, golden):
    model = vae.WanVae(config)
    latents = jnp.asarray(golden["latent"][:, :3, :2, :2])

    @jax.jit
    def gradient(at):
        def energy(latents):
            pixels, _ = model.apply({"params": params}, latents, method="decode_raw")
            weights = jnp.arange(pixels.shape[1]) == at
            return jnp.einsum("bfhwc,f->", jnp.square(pixels), weights.astype(float))

        return jnp.abs(jax.grad(energy)(latents)).max(axis=(0, 2, 3, 4))

    for at in (0, 1, 4, 5, 8):
        seen = gradient(at)
        own = (at + 3) // 4
        assert (seen[own + 1 :] == 0).all()
        assert seen[own] > 0


@pytest.mark.slow
def test_both_forms_of_convolution_agree(config):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4, 3))
    for window, stride in (((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2)):
        taps = vae.CausalConv(config, 4, window, stride)
        native = taps.clone(config=dataclasses.replace(config, conv="native"))
        past = x[:, : 3 - stride] + 1
        variables = taps.init(jax.random.key(1), x, past)
        ours, kept = taps.apply(variables, x, past)
        other, also = native.apply(variables, x, past)
        assert ours.shape == (2, 5 // stride, 6, 4, 4)
        assert relative(ours, other) < 1e-6
        np.testing.assert_array_equal(kept, also)


@pytest.mark.parametrize(
    "conv, backend, form",
    [
        ("auto", "gpu", "native"),
        ("auto", "cuda", "native"),
        ("auto", "tpu", "taps"),
        ("auto", "cpu", "taps"),
        ("taps", "gpu", "taps"),
        ("native", "cpu", "native"),
    ],
)
def test_the_form_of_convolution_follows_the_backend(conv, backend, form):
    assert vae.choose_conv(conv, backend) == form


def test_auto_convolves_as_the_backend_of_the_trace_does(config, monkeypatch):
    layer = vae.CausalConv(dataclasses.replace(config, conv="auto"), 4)
    x = jnp.zeros((1, 2, 4, 4, 3))
    variables = layer.init(jax.random.key(0), x, None)

    def dimensions(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        traced = jax.make_jaxpr(lambda x: layer.apply(variables, x, None))(x)
        (one,) = [
            each
            for each in traced.eqns
            if each.primitive.name == "conv_general_dilated"
        ]
        return one.invars[0].aval.ndim

    assert (dimensions("cpu"), dimensions("gpu")) == (4, 5)


@pytest.mark.slow
def test_a_first_call_of_one_frame_in_native_form(config, params, golden, whole):
    native = vae.WanVae(dataclasses.replace(config, conv="native"))
    latents = golden["latent"][:, :1]
    decode = jax.jit(functools.partial(native.apply, method="decode_raw"))
    ours, _ = decode({"params": params}, latents)
    assert relative(ours, whole[:, :1]) < 5e-6


@pytest.mark.slow
def test_bfloat16_keeps_its_type(config, params, golden):
    model = vae.WanVae(dataclasses.replace(config, dtype="bfloat16"))
    apply = functools.partial(model.apply, {"params": params})
    latents, video = golden["latent"][:, :1], golden["video"]
    with jax.numpy_dtype_promotion("strict"):
        pixels, state = jax.eval_shape(
            functools.partial(apply, method="decode_raw"), latents
        )
        clipped = jax.eval_shape(functools.partial(apply, method="decode"), latents)
        encoded = jax.eval_shape(functools.partial(apply, method="encode"), video)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    assert pixels.dtype == jnp.bfloat16
    assert clipped.dtype == encoded.dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_runs_near_float32(config, params, golden, whole):
    model = vae.WanVae(dataclasses.replace(config, dtype="bfloat16"))
    decode = jax.jit(functools.partial(model.apply, method="decode_raw"))
    ours, _ = decode({"params": params}, golden["latent"][:, :3])
    assert relative(ours.astype(jnp.float32), whole[:, :9]) < 0.05


@pytest.mark.slow
def test_parameter_total_of_the_full_size():
    tree = shapes(vae.VaeConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 126_892_531


@pytest.mark.slow
def test_a_still_image_is_enough_to_make_all_parameters(config):
    still = jnp.zeros((1, 1, 16, 16, 3))
    found = jax.eval_shape(vae.WanVae(config).init, jax.random.key(0), still)
    chex.assert_trees_all_equal_shapes(found["params"], shapes(config))


@pytest.mark.slow
def test_the_norm_has_a_gradient_at_zero(config):
    norm = vae.ChannelNorm(config)
    x = jnp.zeros((1, 4))
    variables = norm.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: norm.apply(variables, x).sum())(x)
    assert jnp.isfinite(gradient).all()


def test_numbers_of_frames():
    assert [WAN_2_1.pixel_frames(count) for count in (0, 1, 2, 21)] == [0, 1, 5, 81]


@pytest.mark.slow
@pytest.mark.parametrize("frames, size", [(2, 16), (6, 16), (1, 12)])
def test_wrong_sizes_are_refused(config, params, frames, size):
    pixels = jnp.zeros((1, frames, size, 16, 3))
    with pytest.raises(ValueError, match="pixel frames"):
        vae.WanVae(config).apply({"params": params}, pixels, method="encode_mean")


@pytest.mark.parametrize(
    "field, message",
    [
        ({"conv": "fast"}, "'auto', 'taps' or 'native'"),
        ({"dim_mult": (1, 2)}, "one less than"),
        ({"z_dim": 8}, "z_dim=8"),
    ],
)
def test_wrong_configurations_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        vae.VaeConfig(**field)
