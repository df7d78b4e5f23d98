import bundles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax.streaming.decode import decode, decode_next, renew, to_bytes
from anchor_jax.tiny_world import codec as world
from anchor_jax.tiny_world.codec import LinearCodec
from anchor_jax.wan.vae import VaeCodec, VaeConfig, WanVae

CODEC = LinearCodec()
SMALL = VaeCodec(
    VaeConfig(
        base_dim=4,
        dim_mult=(1, 1),
        num_res_blocks=1,
        temporal_downsample=(True,),
        dtype="float32",
    )
)


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


@pytest.fixture(scope="module")
def vae_params():
    """Returns random parameters; compiling the initialisers would take longer."""
    init = WanVae(SMALL.config).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype),
        shapes["params"],
    )


@pytest.mark.slow
def test_a_stream_that_gives_its_state_away_is_the_same(vae_params):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, 6, 2, 2, 16)).astype(np.float32)
    kept = given = None
    for first in (0, 2, 4):
        part, before = latents[:, first : first + 2], given
        expected, kept = decode(vae_params, kept, part, codec=SMALL)
        frames, given = decode_next(vae_params, given, part, codec=SMALL)
        np.testing.assert_array_equal(frames, expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))

    assert expected.shape == (1, 4, 4, 4, 3)
    assert expected.std() > 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((kept, given)))


@pytest.mark.slow
def test_a_state_given_away_is_written_over(vae_params):
    latents = jnp.zeros((1, 1, 2, 2, 16))
    _, state = jax.eval_shape(
        lambda *args: decode(*args, codec=SMALL), vae_params, None, latents
    )

    lowered = decode_next.lower(vae_params, state, latents, codec=SMALL)

    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert lowered.compile().memory_analysis().alias_size_in_bytes == held


def test_pixels_are_rounded_and_clipped_as_the_worlds_are():
    pixels = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)

    np.testing.assert_array_equal(
        to_bytes(jax.numpy.array(pixels)), world.to_bytes(pixels)
    )


@pytest.mark.slow
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
