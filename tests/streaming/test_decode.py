import bundles
import jax
import numpy as np
import pytest

from anchor_jax.streaming.decode import decode, renew, to_bytes
from anchor_jax.world import codec as world
from anchor_jax.world.codec import LinearCodec

CODEC = LinearCodec()


@pytest.fixture
def latents():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 9, 4, 4, 4)).astype(np.float32)


def test_blocks_make_the_same_video_as_the_whole(latents):
    params = bundles.params()["codec"]
    whole = np.asarray(to_bytes(world.decode(params, latents, first=True)))

    state, parts = None, []
    for first in range(0, 9, 3):
        part = latents[:, first : first + 3]
        frames, state = decode(params, state, part, codec=CODEC)
        parts.append(frames)

    assert [part.shape[1] for part in parts] == [9, 12, 12]
    assert parts[0].dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_only_two_programs_decode_a_stream(latents):
    params = bundles.params()["codec"]
    decode.clear_cache()

    state = None
    for first in (0, 3, 6, 0, 3):
        _, state = decode(params, state, latents[:, first : first + 3], codec=CODEC)

    assert decode._cache_size() == 2


def test_pixels_are_rounded_and_clipped_as_the_worlds_are():
    pixels = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)

    np.testing.assert_array_equal(
        to_bytes(jax.numpy.array(pixels)), world.to_bytes(pixels)
    )


def test_a_renewed_clip_begins_with_the_last_pixel_frame_of_its_first_latent(latents):
    params = bundles.params()["codec"]
    blocks = (latents[:, :3], latents[:, 3:6])

    whole, parts = renew(params, (), blocks, codec=CODEC)

    before, _ = CODEC.decode(params, (), latents[:, :1])
    after, _ = CODEC.decode(params, None, whole[:, :1])
    still = np.repeat(np.asarray(before[:, -1:]), 4, axis=1)
    expected = world.encode_blocks(params, still)
    np.testing.assert_allclose(whole[:, :1], expected, atol=1e-5)
    assert after.shape[1] == 1
    np.testing.assert_array_equal(whole[:, 1:], latents[:, 1:6])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
