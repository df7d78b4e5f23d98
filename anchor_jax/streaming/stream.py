"""The stream: `start`, `step` and `switch`, pure functions of `StreamState`.

`setup` is static and everything else is traced. Therefore one program serves every
block, and one more program serves each length of a re-cache.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from anchor_jax import flow, sharding
from anchor_jax.axes import (
    Array,
    Embedding,
    Flag,
    Latents,
    Number,
    RandomKey,
    Stacked,
    Variables,
)
from anchor_jax.cache import store
from anchor_jax.cache.memory import Memory
from anchor_jax.cache.policies import Flush, RecachePass
from anchor_jax.cache.types import KVCache, ReadPlan
from anchor_jax.deprecation import renamed_keyword
from anchor_jax.streaming import spread
from anchor_jax.streaming.loop import approach, guide
from anchor_jax.streaming.types import (
    Block,
    BlockNoise,
    PromptChange,
    StreamSetup,
    StreamState,
)
from anchor_jax.wan.attention import (
    ContextKV,
    LayersKV,
    Prefix,
    bidirectional,
)


@functools.partial(jax.jit, static_argnames="setup")
def project(
    variables: Variables, embedding: Embedding, *, setup: StreamSetup
) -> ContextKV:
    """Returns a prompt's keys and values. It runs once per prompt.

    Args:
      variables: the generator's collections, `params` and optionally `lora`.
      embedding: a row for each copy of each video, zero at padding. Under guidance the
        prompts' rows come first, then the negative prompts'.
      setup: static.
    """
    split = spread.videos(setup, embedding.shape[0])
    project = sharding.spread(
        functools.partial(_project, setup=setup),
        variables,
        (P(split),),
        spread.context(setup, split),
    )
    return project(variables, embedding)


def _project(variables, embedding, *, setup: StreamSetup) -> ContextKV:
    return setup.network.apply(variables, embedding, method="project")


@functools.partial(jax.jit, static_argnames="setup")
def draw_noise(
    rng: RandomKey,
    start: Number,
    batch_like: Float[Array, " batch *rest"],
    *,
    setup: StreamSetup,
) -> BlockNoise:
    """Returns a block's random numbers as a function of key, latent frame and video.

    Args:
      rng: random key of the video.
      start: first latent frame of the block.
      batch_like: an array whose leading axis is the batch.
      setup: static.
    """
    shape = (len(setup.levels), setup.policy.block, *_latent_shape(setup))
    dtype = setup.solver.dtype(setup.model.dtype)
    rng = jax.random.fold_in(rng, start)

    def draw(video):
        return jax.random.normal(jax.random.fold_in(rng, video), shape, dtype)

    noise = jax.vmap(draw, out_axes=1)(jnp.arange(batch_like.shape[0]))
    return BlockNoise(initial=noise[0], fresh=noise[1:])


def _latent_shape(setup: StreamSetup) -> tuple[int, int, int]:
    grid = setup.grid
    return grid.height, grid.width, setup.model.latent_channels


def start(context: ContextKV, *, setup: StreamSetup) -> StreamState:
    """Returns the state at the start of a stream.

    Args:
      context: the first prompt, from `project`; its batch is copies x videos.
      setup: static.

    Raises:
      ValueError: The context's batch is not a multiple of `setup.copies`.
    """
    rows = context.k.shape[1]
    if rows % setup.copies:
        raise ValueError(
            f"context batch {rows} must be a multiple of {setup.copies}: under"
            " guidance every prompt needs a negative one"
        )
    rows_cols = setup.tokens
    tokens = rows_cols[0] * rows_cols[1]
    recent = (rows // setup.copies, setup.recent, *_latent_shape(setup))
    return StreamState(
        cache=store.init_cache(setup.policy, setup.model, rows, tokens),
        context=jax.tree.map(jnp.array, context),
        recent=jnp.zeros(recent, setup.model.dtype),
    )


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def step(
    variables: Variables, state: StreamState, noise: BlockNoise, *, setup: StreamSetup
) -> tuple[StreamState, Block]:
    """Returns the state after one more block, and the block.

    All noise levels, the clean pass and the commit form one program. `state` is
    donated.
    """

    def one_device(variables, state, noise):
        return advance(variables, state, noise, setup=setup)[:2]

    split = spread.videos(setup, noise.initial.shape[0])
    specs = spread.state(setup, split)
    step = sharding.spread(
        one_device,
        variables,
        (specs, spread.noise(split)),
        (specs, spread.block(split)),
    )
    return step(variables, state, noise)


def advance(
    variables: Variables,
    state: StreamState,
    noise: BlockNoise,
    exit_level: Number | None = None,
    *,
    setup: StreamSetup,
) -> tuple[StreamState, Block, LayersKV | None]:
    """Returns the state after one more block, the block, and its keys and values.

    `step` compiles it; training calls it inside its own programs.

    Args:
      variables: the generator's collections.
      state: as for `step`.
      noise: as for `step`.
      exit_level: number of the noise level whose estimate becomes the block, traced.
        Later levels are not run. None runs all levels.
      setup: static.
    """
    policy, index = setup.policy, state.cache.index
    plan = policy.read(index)
    write, done = policy.write(index)
    memory = _memory(setup, state.cache, plan)
    capture = write.junction[0] < policy.slots if policy.keeps_prior else None

    def run(latents, timestep, carried):
        predicted, own = _forward(setup, variables, state.context, plan)(
            latents, timestep, memory.past(carried)
        )
        return predicted, own, memory.after(carried, own, capture)

    def denoise(noisy, timestep, carried):
        predicted, _, carried = run(noisy, timestep, carried)
        return predicted, carried

    latents, passes, carried = approach(
        denoise,
        noise.initial,
        setup.levels,
        setup.solver,
        noise.fresh,
        memory.carried(),
        None if exit_level is None else exit_level + 1,
    )
    if exit_level is not None:
        latents = passes.x0[exit_level]
    if not policy.remembers:
        after = state.replace(cache=state.cache.replace(index=done))
        return _same_form(after, state), Block(latents, plan, passes, None), None
    clean = _clean_input(latents, noise, setup)
    committed, own, carried = run(clean, jnp.float32(0), carried)
    cache = KVCache(
        slots=store.commit(state.cache.slots, own, write),
        prior=carried[1] if policy.keeps_prior else None,
        index=done,
    )
    recent = _remember(state.recent, latents, index.start)
    after = StreamState(cache=cache, context=state.context, recent=recent)
    return _same_form(after, state), Block(latents, plan, passes, committed), own


def _same_form(after: StreamState, before: StreamState) -> StreamState:
    """Returns a state whose shapes and types serve the programs of the one before."""
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    return after


def _clean_input(latents, noise: BlockNoise, setup: StreamSetup) -> jax.Array:
    """Returns the latents as the clean pass reads them."""
    if not setup.floor:
        return latents
    return flow.add_noise(latents, noise.floor, setup.floor)


def estimate(
    variables: Variables,
    state: StreamState,
    noisy: Latents,
    level: Number,
    *,
    setup: StreamSetup,
) -> Latents:
    """Returns x0 of one pass of a block, as computed in the loop of `advance`.

    Training differentiates it, for the pass at a block's exit level.

    Args:
      variables: the generator's collections.
      state: the state before the block.
      noisy: input of the pass.
      level: number of the pass's noise level, traced.
      setup: static; its policy must not keep a prior junction.
    """
    plan = setup.policy.read(state.cache.index)
    memory = _memory(setup, state.cache, plan)
    timestep, sigma = (
        jnp.asarray(getattr(setup.levels, name), jnp.float32)[level]
        for name in ("timestep", "sigma")
    )
    predicted, _ = _forward(setup, variables, state.context, plan)(
        noisy, timestep, memory.past(None)
    )
    return flow.x0_from_flow(predicted, noisy, sigma)


def recommit(cache: KVCache, own: LayersKV, *, setup: StreamSetup) -> KVCache:
    """Returns the cache after a block, from the block's keys and values."""
    write, done = setup.policy.write(cache.index)
    return cache.replace(slots=store.commit(cache.slots, own, write), index=done)


@functools.partial(
    jax.jit, static_argnames=("setup", "recache", "rerun"), donate_argnames="state"
)
@renamed_keyword("rerun", "recache")
def switch(
    variables: Variables,
    state: StreamState,
    context: ContextKV,
    requested: Number,
    cut: Flag = False,
    *,
    setup: StreamSetup,
    recache: RecachePass | None,
) -> tuple[StreamState, Block | None]:
    """Returns the state under a new prompt, which applies from the next block on.

    Args:
      variables: the generator's collections.
      state: state of the stream; donated.
      context: the new prompt, from `project`.
      requested: latent frame at which the switch was requested, at most the next
        block's start.
      cut: whether the next block is a scene cut, for policies with scene cuts.
      setup: static.
      recache: `setup.policy.recache(next block's start)`, static.

    Returns:
      The new state, and the re-cache's pass as a block without latents, or None.

    Raises:
      ValueError: The context's batch differs from the stream's.
    """
    if context.k.shape != state.context.k.shape:
        raise ValueError(
            f"the new prompt's context has shape {context.k.shape}, the stream's"
            f" {state.context.k.shape}; project one prompt for every video"
        )
    split = spread.videos(setup, state.recent.shape[0])
    specs = spread.state(setup, split)
    switch = sharding.spread(
        functools.partial(change, setup=setup, recache=recache),
        variables,
        (specs, spread.context(setup, split), P(), P()),
        (specs, spread.block(split) if recache else None),
    )
    return switch(variables, state, context, requested, jnp.asarray(cut))


def change(
    variables: Variables,
    state: StreamState,
    context: ContextKV,
    requested: Number,
    cut: Flag = False,
    *,
    setup: StreamSetup,
    recache: RecachePass | None,
) -> tuple[StreamState, Block | None]:
    """Returns the result of `switch`, which compiles it.

    Training calls it inside its own programs.
    """
    policy, cache, block = setup.policy, state.cache, None
    if isinstance(policy.on_switch, Flush):
        source, index = policy.flush(cache.index)
        slots = store.gather(cache.slots, source)
        cache = cache.replace(slots=slots, index=index)
    if policy.zeroes_sink:
        cache = cache.replace(slots=store.emptied(cache.slots, policy.sink))
        state = state.replace(cache=cache)
    if recache:
        cache, block = _recache(variables, state, context, setup, recache)
    index = policy.switched(cache.index, requested, jnp.asarray(cut))
    cache = cache.replace(index=index)
    after = StreamState(cache=cache, context=context, recent=state.recent)
    return _same_form(after, state), block


@functools.partial(
    jax.jit, static_argnames=("setup", "recache", "rerun"), donate_argnames="states"
)
@renamed_keyword("rerun", "recache")
def switch_slot(
    variables: Variables,
    states: Stacked[StreamState],
    slot: Number,
    context: ContextKV,
    requested: Number,
    cut: Flag = False,
    *,
    setup: StreamSetup,
    recache: RecachePass | None,
) -> Stacked[StreamState]:
    """Returns stacked sessions with the session at `slot` under a new prompt.

    It is for sessions that step together under `jax.vmap`, each at its own frame. A
    switch is a separate program, because a branch under vmap would run for all of them.

    Args:
      variables: the generator's collections.
      states: sessions stacked along a new first axis; donated.
      slot: index of the session, traced.
      context: as for `switch`, for that session.
      requested: as for `switch`.
      cut: as for `switch`.
      setup: static.
      recache: as for `switch`, for that session's frame.
    """
    one = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), states
    )
    changed, _ = switch(
        variables, one, context, requested, cut, setup=setup, recache=recache
    )
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, slot, 0),
        states,
        changed,
    )


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def make_block(
    variables: Variables,
    state: StreamState,
    rng: RandomKey,
    frame: Number,
    *,
    setup: StreamSetup,
) -> tuple[StreamState, Latents, ReadPlan]:
    """Returns the state after one more block, the block's latents, and its read plan.

    One program draws the noise, denoises and commits. It drops intermediate results
    that only tests need. `state` is donated.

    Args:
      variables: the generator's collections.
      state: the state of `start` or of the previous call.
      rng: the video's random key.
      frame: the block's first latent frame. The noise is a function of it and the key.
      setup: the static setup.
    """
    noise = draw_noise(rng, frame, state.recent, setup=setup)
    state, block = step(variables, state, noise, setup=setup)
    return state, block.latents, block.plan


def change_prompt(
    variables: Variables,
    state: StreamState,
    change: PromptChange,
    start: int,
    *,
    setup: StreamSetup,
) -> tuple[StreamState, Block | None]:
    """Returns the result of `switch` before the block at `start`, a number on the host.

    This is the only place where a host loop chooses the frames of a re-cache.
    """
    requested = start if change.requested is None else change.requested
    return switch(
        variables,
        state,
        change.context,
        np.int32(requested),
        np.bool_(change.cut),
        setup=setup,
        recache=setup.policy.recache(start),
    )


def run(
    variables: Variables,
    state: StreamState,
    rng: RandomKey,
    frames: Iterable[int],
    changes: Mapping[int, PromptChange] | None = None,
    *,
    setup: StreamSetup,
) -> Iterator[tuple[StreamState, Latents, ReadPlan]]:
    """Yields the state, the latents and the read plan after each block.

    This is the host loop. It never waits for the device. A yielded state is
    donated to the next block: copy it to keep it.

    Args:
      variables: the generator's collections.
      state: the state from `start`, or the last state of an earlier loop; donated.
      rng: the video's random key.
      frames: first latent frame of each block, such as
        `range(0, length, setup.policy.block)`.
      changes: prompt switches by the first latent frame of the block before which they
        take effect.
      setup: static.
    """
    for frame in frames:
        change = (changes or {}).get(frame)
        if change is not None:
            state, _ = change_prompt(variables, state, change, frame, setup=setup)
        state, latents, plan = make_block(
            variables, state, rng, np.int32(frame), setup=setup
        )
        yield state, latents, plan


def resume(
    variables: Variables, state: StreamState, latents: Latents, *, setup: StreamSetup
) -> StreamState:
    """Returns the state as if `latents` were the stream's first frames.

    Continuing a given clip is a re-cache that starts at frame 0.

    Args:
      variables: the generator's collections.
      state: the state from `start`.
      latents: clean latents. The number of frames is a multiple of the
        block and at most the window.
      setup: static.

    Raises:
      ValueError: The number of frames does not fit.
    """
    frames, policy = latents.shape[1], setup.policy
    if not policy.remembers:
        raise ValueError(
            "this policy stores no past frames, so it cannot continue a clip"
        )
    if frames % policy.block or not 0 < frames <= policy.window:
        raise ValueError(
            f"got {frames} latent frames to continue; must be a multiple of the block"
            f" of {policy.block}, at most the window of {policy.window}"
        )
    return _resume(variables, state, latents, setup=setup)


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def _resume(variables, state, latents, *, setup: StreamSetup):
    split = spread.videos(setup, latents.shape[0])
    specs = spread.state(setup, split)
    resume = sharding.spread(
        functools.partial(_resumed, setup=setup), variables, (specs, P(split)), specs
    )
    return resume(variables, state, latents)


def _resumed(variables, state, latents, *, setup: StreamSetup):
    frames = latents.shape[1]
    index = state.cache.index.replace(start=jnp.int32(frames))
    recent = _remember(state.recent, latents, jnp.int32(0))
    state = state.replace(cache=state.cache.replace(index=index), recent=recent)
    cache, _ = _recache(
        variables, state, state.context, setup, RecachePass(frames, True)
    )
    return _same_form(state.replace(cache=cache), state)


def _recache(variables, state, context, setup: StreamSetup, recache: RecachePass):
    """Returns the cache after a re-cache of the newest clean frames, and that pass."""
    policy, cache = setup.policy, state.cache
    plan = policy.read_recache(cache.index, recache)
    write, index = policy.write_recache(cache.index, recache)
    picked = (plan.start + jnp.arange(recache.frames)) % setup.recent
    latents = jnp.take(state.recent, picked, axis=1)
    memory = _memory(setup, cache, plan, recache)
    flow, own = _forward(setup, variables, context, plan)(
        latents, jnp.float32(0), memory.past(memory.carried())
    )
    cache = cache.replace(slots=store.commit(cache.slots, own, write), index=index)
    return cache, Block(latents, plan, None, flow)


def _forward(setup: StreamSetup, variables, context, plan: ReadPlan):
    """Returns a function (latents, timestep, past) -> (guided flow, own)."""
    model = setup.network
    everything = not setup.policy.remembers
    visible = bidirectional(plan.query.shape[0]) if everything else Prefix(plan.frames)

    def forward(latents, timestep, past):
        if setup.copies == 2:
            latents = jnp.concatenate([latents, latents])
        times = jnp.full(latents.shape[:2], timestep, jnp.float32)
        flow, own = model.apply(
            variables, latents, times, context, visible, plan.query, plan.own, past
        )
        return guide(flow, setup.guidance) if setup.copies == 2 else flow, own

    return forward


def _memory(
    setup: StreamSetup,
    cache: KVCache,
    plan: ReadPlan,
    recache: RecachePass | None = None,
) -> Memory:
    kernel = setup.network.attention
    return Memory(setup.policy, setup.model, kernel, setup.tokens, cache, plan, recache)


def _remember(recent: jax.Array, latents: jax.Array, start) -> jax.Array:
    size = recent.shape[1]
    if not size:
        return recent
    kept = latents[:, -size:]
    first = start + latents.shape[1] - kept.shape[1]
    place = (first + jnp.arange(kept.shape[1])) % size
    return recent.at[:, place].set(kept.astype(recent.dtype))
