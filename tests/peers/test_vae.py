"""Our VAE beside diffusers' `AutoencoderKLWan`."""

import functools

import jax
import numpy as np
import peer_models as peers
import pytest
import torch

from anchor_jax.wan.vae import WanVae

LATENTS = (1, 4, 2, 3, 16)  # batch, frame, height, width, channel
PIXELS = (1, 13, 16, 24, 3)


def normal(vae):
    """Returns mean and deviation of the latents, [1, channel, 1, 1, 1]."""
    config = vae.config
    return (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )


@pytest.fixture(scope="module")
def decoded(pipeline):
    """Latents, and the video that diffusers makes of them."""
    latents = peers.draw(*LATENTS)
    mean, std = normal(pipeline.vae)
    with torch.no_grad():
        raw = peers.channels_first(latents) * std + mean
        return latents, peers.channels_last(pipeline.vae.decode(raw).sample)


@pytest.fixture(scope="module")
def encoded(pipeline):
    """A video, and the latents that diffusers makes of it."""
    pixels = np.tanh(peers.draw(*PIXELS))
    mean, std = normal(pipeline.vae)
    with torch.no_grad():
        raw = pipeline.vae.encode(peers.channels_first(pixels)).latent_dist.mean
        return pixels, peers.channels_last((raw - mean) / std)


def ours(bundle, method, values, pieces):
    """Returns the outputs of a streamed method, joined along time."""
    network, state, made = WanVae(bundle.codec.config), None, []
    run = jax.jit(functools.partial(network.apply, method=method))
    assert sum(pieces) == values.shape[1]
    for piece in np.split(values, np.cumsum(pieces)[:-1], axis=1):
        out, state = run({"params": bundle.codec_params}, piece, state)
        made.append(out)
    return np.concatenate(made, axis=1)


@pytest.mark.parametrize("pieces", [(4,), (1, 2, 1)], ids=["whole", "streamed"])
def test_a_decoded_video_is_that_of_diffusers(bundle, decoded, pieces):
    latents, video = decoded

    assert video.shape == PIXELS
    peers.assert_close(ours(bundle, "decode_stream", latents, pieces), video)


@pytest.mark.parametrize("pieces", [(13,), (5, 8)], ids=["whole", "streamed"])
def test_latents_of_a_video_are_those_of_diffusers(bundle, encoded, pieces):
    pixels, latents = encoded

    assert latents.shape == LATENTS
    peers.assert_close(ours(bundle, "encode_stream", pixels, pieces), latents)
