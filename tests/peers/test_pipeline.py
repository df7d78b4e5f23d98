"""Whole videos: our session beside `WanPipeline`, from the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import peer_models as peers
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from anchor_jax import flow
from anchor_jax.cache.policies import whole_clip
from anchor_jax.streaming import stream
from anchor_jax.streaming.loop import Euler, UniPC
from anchor_jax.streaming.session import Session
from anchor_jax.streaming.types import StreamSetup

FRAMES, STEPS, SHIFT, SEED = 3, 6, 3.0, 4
PROMPT, NEGATIVE = "a red fox runs in the snow", "blue bird"


def video_of_ours(bundle, solver, grid, guidance):
    """Returns a session's video as whole numbers, and the noise that it began with."""
    setup = StreamSetup(
        model=bundle.model,
        grid=bundle.grid,
        policy=whole_clip(FRAMES),
        levels=flow.GRIDS[grid](STEPS, SHIFT),
        solver=solver,
        guidance=guidance,
    )
    key = jax.random.key(SEED)
    noise = stream.draw_noise(key, 0, jnp.zeros((1,)), setup=setup).initial
    session = Session(bundle, setup, PROMPT, SEED, NEGATIVE)
    return session.step().fetch()[0], np.asarray(noise)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("grid", ["diffusers_unipc", "diffusers_euler"])
def test_a_video_is_that_of_the_pipeline(pipeline, bundle, grid, guidance, monkeypatch):
    solver, scheduler = UniPC(), peers.scheduler()
    assert isinstance(scheduler, UniPCMultistepScheduler)
    if grid == "diffusers_euler":
        solver, scheduler = Euler(), FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    ours, noise = video_of_ours(bundle, solver, grid, guidance)

    theirs = pipeline(
        PROMPT,
        NEGATIVE,
        height=8 * bundle.grid.height,
        width=8 * bundle.grid.width,
        num_frames=4 * FRAMES - 3,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=peers.channels_first(noise),
        output_type="np",
    ).frames[0]

    assert ours.shape == theirs.shape == (9, 16, 32, 3)
    assert ours.dtype == np.uint8
    assert theirs.std() > 0.01
    # Half a step of rounding, and 1e-4 of the range.
    np.testing.assert_allclose(ours / 255, theirs, rtol=0, atol=0.5 / 255 + 1e-4)
