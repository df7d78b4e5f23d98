import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax.tiny_world import codec, scene


def clips(seed: int, count: int, held_out: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tracks = [
        scene.sample_track(rng, [(scene.sample_attributes(rng, held_out), 17)])
        for _ in range(count)
    ]
    return codec.to_unit(np.stack([track.render() for track in tracks]))


@functools.cache
def fitted(channels: int = 16) -> dict[str, np.ndarray]:
    pixels = clips(0, 100, held_out=False)
    blocks = codec.pixel_blocks(codec.with_first_repeated(pixels))
    return codec.fit_codec(blocks, channels)


def psnr(params: dict, pixels: np.ndarray) -> float:
    decoded = codec.decode(params, codec.encode(params, pixels), first=True)
    error = np.clip(np.asarray(decoded), -1, 1) - pixels
    return float(10 * np.log10(4 / np.mean(error**2)))


@pytest.mark.slow
def test_quality_on_held_out_clips():
    pixels = clips(1, 24, held_out=True)
    few, more = psnr(fitted(16), pixels), psnr(fitted(24), pixels)
    assert few > 24.5
    assert more > few + 0.8


@pytest.mark.slow
def test_shapes_and_dtype():
    params = fitted()
    pixels = clips(2, 2, held_out=False)
    latents = codec.encode(params, pixels)
    assert latents.shape == (2, 5, 8, 8, 16)
    assert latents.dtype == jnp.float32
    assert codec.decode(params, latents, first=True).shape == pixels.shape
    assert codec.decode(params, latents, first=False).shape == (2, 20, 64, 64, 3)
    assert codec.encode_blocks(params, pixels[:, 1:]).shape == (2, 4, 8, 8, 16)


@pytest.mark.slow
def test_latents_are_half_whitened():
    params = fitted()
    latents = np.asarray(codec.encode(params, clips(0, 100, held_out=False)))
    flat = latents.reshape(-1, 16)
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(flat.var(axis=0).mean(), 1, rtol=1e-3)
    components = flat * np.linalg.norm(params["decode"], axis=1)
    ratio = flat.var(axis=0) / components.std(axis=0)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-2)


def test_encode_undoes_decode():
    params = fitted()
    latents = jax.random.normal(jax.random.key(0), (1, 3, 2, 2, 16))
    pixels = codec.decode(params, latents, first=False)
    np.testing.assert_allclose(codec.encode_blocks(params, pixels), latents, atol=1e-4)


def test_a_clip_from_mid_video_has_the_same_latents():
    params = fitted()
    pixels = clips(3, 1, held_out=False)
    whole = codec.encode(params, pixels)
    late = codec.encode_blocks(params, pixels[:, 5:])
    np.testing.assert_allclose(late, whole[:, 2:], atol=1e-5)


def test_rolled_latents_are_rolled_pixels():
    params = fitted()
    latents = codec.encode(params, clips(4, 1, held_out=False))
    pixels = codec.decode(params, latents, first=True)
    rolled = codec.decode(params, jnp.roll(latents, (1, -2), axis=(2, 3)), first=True)
    np.testing.assert_allclose(
        rolled, np.roll(pixels, (8, -16), axis=(2, 3)), atol=1e-6
    )


def test_motion_is_a_token_a_latent_frame():
    one = scene.Attributes("red", "triangle", "left", "white")
    pixels = codec.to_unit(scene.render([(one, 17)], (5.5, 40.2), 13.0))[None]
    latents = np.asarray(codec.encode(fitted(), pixels))
    np.testing.assert_allclose(
        latents[:, 2:], np.roll(latents[:, 1:-1], -2, axis=3), atol=1e-4
    )


@pytest.mark.slow
def test_jit_and_vmap_agree():
    params = fitted()
    pixels = jnp.asarray(clips(5, 2, held_out=False))
    latents = codec.encode(params, pixels)
    mapped = jax.vmap(lambda one: codec.encode(params, one[None])[0])(pixels)
    np.testing.assert_allclose(mapped, latents, atol=1e-5)
    compiled = jax.jit(codec.decode, static_argnames="first")
    np.testing.assert_allclose(
        compiled(params, latents, first=True),
        codec.decode(params, latents, first=True),
        atol=1e-5,
    )


def test_streaming_equals_the_whole():
    params, stream = fitted(), codec.LinearCodec()
    pixels = clips(6, 1, held_out=False)
    latents = stream.encode(params, pixels)
    state, parts = None, []
    for begin in (0, 3):
        part, state = stream.decode(params, state, latents[:, begin : begin + 3])
        parts.append(part)
    assert jax.tree.structure(state) == jax.tree.structure(stream.init(1, 64, 64))
    whole = codec.decode(params, latents, first=True)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)


def test_bytes_survive():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(codec.to_bytes(codec.to_unit(frames)), frames)


def test_wrong_lengths_are_refused():
    pixels = np.zeros((1, 16, 64, 64, 3), np.float32)
    with pytest.raises(ValueError, match="encode_blocks"):
        codec.encode(fitted(), pixels)
    with pytest.raises(ValueError, match="more blocks"):
        codec.fit_codec(np.zeros((8, 768)), 16)
