"""Our solvers and noise levels beside the schedulers of diffusers."""

import jax
import numpy as np
import peer_models as peers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from anchor_jax import flow
from anchor_jax.streaming.loop import Euler, UniPC, approach

SHAPE = (1, 2, 2, 3, 4)  # batch, frame, height, width, channel


def unipc(shift):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def euler(shift):
    return FlowMatchEulerDiscreteScheduler(shift=shift)


SAMPLERS = {
    "diffusers_unipc": (unipc, UniPC()),
    "diffusers_euler": (euler, Euler()),
}


def follow(scheduler, steps, noise):
    """Returns the latents after every step, for the network below."""
    scheduler.set_timesteps(steps)
    latents, made = torch.from_numpy(noise), []
    for time in scheduler.timesteps:
        predicted = network(latents.numpy(), np.float32(time), np)
        latents = scheduler.step(
            torch.from_numpy(predicted), time, latents, return_dict=False
        )[0]
        made.append(latents.numpy())
    return np.stack(made)


def network(latents, time, numpy):
    """Returns a made-up flow that depends on latents and timestep."""
    return numpy.sin(2 * latents + time / 300) + 0.3 * latents


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps, shift", [(50, 5.0), (30, 3.0), (7, 1.0), (2, 8.0)])
def test_a_whole_run_is_that_of_diffusers(name, steps, shift):
    make, solver = SAMPLERS[name]
    scheduler, noise = make(shift), peers.draw(*SHAPE)
    expected = follow(scheduler, steps, noise)
    levels = flow.GRIDS[name](steps, shift)

    def denoise(noisy, timestep, carry):
        return network(noisy, timestep, jax.numpy), carry

    last, passes, _ = jax.jit(lambda x: approach(denoise, x, levels, solver))(noise)

    peers.assert_close(levels.timestep, scheduler.timesteps.float().numpy())
    peers.assert_close([*levels.sigma, 0.0], scheduler.sigmas.float().numpy())
    seen = [noise, *expected[:-1]]
    if name == "diffusers_euler":  # UniPC corrects a sample once its flow is known.
        peers.assert_close(passes.noisy, np.stack(seen))
    peers.assert_close(last, expected[-1])
