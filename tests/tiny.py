"""A tiny random model and the streams that tests run on it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax.cache.policies import POLICIES
from anchor_jax.flow import few_step_levels
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.wan import shapes
from anchor_jax.wan.spec import LatentGrid, ModelConfig

MODEL = ModelConfig(
    dim=48,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=8,
    text_len=6,
    latent_channels=4,
    rope_theta=100.0,
    dtype="float32",
)
GRID = LatentGrid(4, 4)
LEVELS = few_step_levels((1000, 500), 5.0)


def setup(policy="anchor_forcing", **changes) -> StreamSetup:
    """Returns a setup of the tiny model; `policy` is a name or a policy."""
    policy = POLICIES[policy] if isinstance(policy, str) else policy
    return StreamSetup(
        **{"model": MODEL, "grid": GRID, "policy": policy, "levels": LEVELS, **changes}
    )


def params(config: ModelConfig = MODEL, seed: int = 0):
    """Returns parameters of plausible size, filled by numpy: no initialiser runs."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        values = rng.standard_normal(leaf.shape)
        if name == "kernel":
            return values / np.sqrt(leaf.shape[-2])
        return 1 + 0.1 * values if name == "scale" else 0.3 * values

    filled = jax.tree_util.tree_map_with_path(fill, shapes.of(config))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), filled)


@functools.cache
def variables():
    # Kept for all tests, so never the tracers of a test that is being compiled.
    with jax.ensure_compile_time_eval():
        return {"params": params()}


def embedding(prompt: int, batch: int = 1) -> jax.Array:
    """Returns a prompt of 4 words and 2 padded rows, a function of its number."""
    words = np.random.default_rng([1, prompt]).standard_normal((batch, 6, 8))
    words[:, 4:] = 0
    return jnp.asarray(words, jnp.float32)


def context(prompt: int, settings: StreamSetup):
    return stream.project(variables(), embedding(prompt), setup=settings)


def noise(block: int, settings: StreamSetup, batch: int = 1, seed: int = 0):
    """Returns a block's noise, a function of its number and the seed."""
    rng = np.random.default_rng([2, seed, block])
    grid = settings.grid
    shape = (batch, settings.policy.block, grid.height, grid.width)
    shape = (*shape, settings.model.latent_channels)
    levels = len(settings.levels) - 1
    return BlockNoise(
        initial=jnp.asarray(rng.standard_normal(shape), jnp.float32),
        fresh=jnp.asarray(rng.standard_normal((levels, *shape)), jnp.float32),
    )


def trace_at_most(monkeypatch, **counts):
    """Limits how often functions of `stream`, by name, may be traced from now."""
    chex.clear_trace_counter()
    for name, most in counts.items():
        counted = chex.assert_max_traces(getattr(stream, name), n=most)
        monkeypatch.setattr(stream, name, counted)


def copy(tree):
    """Returns a copy that survives when the original is donated."""
    return jax.tree.map(jnp.array, tree)


def run(settings: StreamSetup, blocks: int, switches=(), *, seed: int = 0, state=None):
    """Generates blocks, with prompt k from the k-th switch on.

    Args:
      settings: the stream.
      blocks: how many to generate.
      switches: requested latent frames, as the user gives them.
      seed: seed of the noise.
      state: state to continue from; a new stream if None.

    Returns:
      The last state and the blocks.
    """
    state = stream.start(context(0, settings), setup=settings) if not state else state
    size, waiting, made = settings.policy.block, list(switches), []
    begin = int(state.cache.index.start) // size
    for number in range(begin, begin + blocks):
        if waiting and number * size >= waiting[0]:
            prompt = len(switches) - len(waiting) + 1
            state = switch(settings, state, prompt, waiting.pop(0))
        state, block = stream.step(
            variables(), state, noise(number, settings, seed=seed), setup=settings
        )
        made.append(block)
    return state, made


def switch(settings: StreamSetup, state, prompt: int, requested: int, recache=None):
    """Returns the state under another prompt."""
    recache = recache or settings.policy.recache(int(state.cache.index.start))
    state, _ = stream.switch(
        variables(),
        state,
        context(prompt, settings),
        requested,
        setup=settings,
        recache=recache,
    )
    return state


def latents(blocks) -> np.ndarray:
    """Returns the generated latents of blocks, [batch, frame, ...]."""
    return np.concatenate([block.latents for block in blocks], axis=1)
