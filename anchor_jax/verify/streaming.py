"""Recorded streams: every pass of every block, what it saw, and the cache after it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from anchor_jax import flow
from anchor_jax.cache.policies import (
    Flush,
    Keep,
    PeriodicJunction,
    Policy,
    Recache,
    ReleaseJunction,
)
from anchor_jax.cache.positions import Absolute, Ranked, Relative
from anchor_jax.cache.types import EMPTY
from anchor_jax.porting import convert, rules
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.verify.case import Case, Checks
from anchor_jax.verify.networks import model_config
from anchor_jax.wan.rope import Rotary, rotary, rotate
from anchor_jax.wan.spec import LatentGrid

JUNCTION_FRAMES = 3
LATENT = 1e-4


@dataclasses.dataclass
class Run:
    """A stream under way, and what its recording says about it."""

    case: Case
    checks: Checks
    setup: StreamSetup
    variables: dict
    contexts: list
    state: object
    prompt: int = 0

    @property
    def policy(self) -> Policy:
        return self.setup.policy


def verify_stream(case: Case, checks: Checks) -> None:
    """Compares a recorded stream of the official sampler with ours."""
    config = case.config
    run = _begin(case, checks, _policy(config))
    checks.compare(
        "denoising_timesteps", np.asarray(run.setup.levels.timestep), absolute=LATENT
    )
    requests = list(config.get("switch_frame_indices", []))
    latents = []
    for number in range(config["num_frames"] // run.policy.block):
        first = number * run.policy.block
        if requests and first >= requests[0]:
            _switch(run, requests.pop(0), first)
        latents.append(_block(run, number))
    checks.compare(
        "latents", _frames_first(np.concatenate(latents, 1)), absolute=LATENT
    )
    _leave_out_buffers(checks)


def verify_flush(case: Case, checks: Checks) -> None:
    """Compares a recorded Infinity-RoPE stream, flush and scene cut, with ours."""
    config = case.config
    window, sink = config["local_attn_size"], config["sink_size"]
    policy = Policy(
        block=config["num_frame_per_block"],
        sink=sink,
        window=window,
        positions=Ranked(range=window, cut=45),
        on_switch=Flush(last=2),
    )
    run = _begin(case, checks, policy)
    scenes = np.repeat(np.arange(len(config["scenes_blocks"])), config["scenes_blocks"])
    latents = []
    for number, scene in enumerate(scenes):
        if scene != run.prompt:
            cut = bool(config["scene_cut_to_next"][scene - 1])
            _switch(run, number * policy.block, number * policy.block, cut)
        latents.append(_block(run, number))
    checks.compare(
        "latents", _frames_first(np.concatenate(latents, 1)), absolute=LATENT
    )
    _leave_out_buffers(checks)


def _policy(config: dict) -> Policy:
    """Returns the policy that a recorded configuration stands for."""
    window = config["local_attn_size"]
    junction = None
    if config["use_prompt_cache"]:
        single = config.get("pipeline") == "single_prompt"
        kind = PeriodicJunction if single else ReleaseJunction
        junction = kind(JUNCTION_FRAMES)
    rerun = Recache(rewrite_sink=not config["global_sink"])
    return Policy(
        block=config["num_frame_per_block"],
        sink=config["sink_size"],
        window=config["num_frames"] if window == -1 else window,
        junction=junction,
        positions=Relative(range=21) if config["rope_enhance"] else Absolute(),
        on_switch=rerun if config["recache"] else Keep(),
    )


def _begin(case: Case, checks: Checks, policy: Policy) -> Run:
    config = case.config
    model = model_config(config["model"])
    setup = StreamSetup(
        model=model,
        grid=LatentGrid(*config["latent_hw"]),
        policy=policy,
        levels=flow.few_step_levels(
            tuple(config["denoising_step_list"]), config["timestep_shift"], table=True
        ),
    )
    params = convert.convert(case.weights(), rules.DIT)
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    names = sorted(
        (name for name in case.inputs if re.fullmatch(r"prompt_embeds\.\d+", name)),
        key=lambda name: int(name.split(".")[1]),
    )
    contexts = [
        stream.project(variables, case.inputs[name], setup=setup) for name in names
    ]
    state = stream.start(contexts[0], setup=setup)
    return Run(case, checks, setup, variables, contexts, state)


def _switch(run: Run, requested: int, first: int, cut: bool = False) -> None:
    number, run.prompt = run.prompt, run.prompt + 1
    rerun = run.policy.rerun(first)
    run.state, block = stream.switch(
        run.variables,
        run.state,
        run.contexts[run.prompt],
        requested,
        cut,
        setup=run.setup,
        rerun=rerun,
    )
    if block is None:
        return
    recorded = run.checks.outputs.get(f"flow.recache{number}")
    if recorded is not None:
        # The official pass also runs frames whose keys are not stored; the newest
        # ones are ours.
        ours = _frames_first(block.committed)
        run.checks.compare(
            f"flow.recache{number}", ours, absolute=LATENT, newest=ours.shape[1]
        )
    _compare_trace(run, block.plan, kind="recache", recache=number)
    run.checks.seen |= {}
    _compare_cache(run, f"after_recache{number}", first)


def _block(run: Run, number: int) -> np.ndarray:
    """Returns a block's latents after comparing everything recorded about it."""
    size = run.policy.block
    first = number * size
    noise = run.case.inputs["noise"][:, first : first + size]
    fresh = run.case.inputs["renoise"][number]
    batch = noise.shape[0]
    fresh = rearrange(fresh, "s (b f) c h w -> s b f h w c", b=batch)
    noise = BlockNoise(
        jnp.asarray(_channels_last(noise)),
        jnp.asarray(fresh[: len(run.setup.levels) - 1]),
    )
    run.state, block = stream.step(run.variables, run.state, noise, setup=run.setup)
    name = f"block{number:03d}"
    compare = functools.partial(run.checks.compare_if_recorded, absolute=LATENT)
    for level in range(len(run.setup.levels)):
        compare(f"flow.{name}.step{level}", _frames_first(block.passes.flow[level]))
        compare(f"x0.{name}.step{level}", _frames_first(block.passes.x0[level]))
    compare(f"flow.{name}.context", _frames_first(block.committed))
    _compare_trace(run, block.plan, kind=("denoise", "context"), block=number)
    _compare_cache(run, f"after_{name}", first + size)
    return np.asarray(block.latents)


def _compare_trace(run: Run, plan, kind, **which) -> None:
    """Compares frames seen and RoPE positions with the trace's records."""
    kinds = (kind,) if isinstance(kind, str) else kind
    for record in run.case.trace or []:
        named = all(record.get(key) == value for key, value in which.items())
        if not named or record.get("kind") not in kinds:
            continue
        label = f"trace.{record['kind']}.{record['start_frame']}"
        if "kv_frames_attended" in record:
            run.checks.equal(
                f"{label}.frames", int(plan.frames), record["kv_frames_attended"]
            )
        for region, expected in _recorded_positions(run, record).items():
            ours = _positions(run, plan, region, len(expected))
            run.checks.equal(f"{label}.{region}", ours, expected)


def _recorded_positions(run: Run, record: dict) -> dict[str, list[int]]:
    """Returns {region: positions} of a record."""
    starts = dict(record.get("rope_frames_start", {}))
    pair = record.get("rope_frames_start_cut_query_then_key")
    if pair is not None:
        (size, first, cut), (keys, key_first, key_cut) = pair
        return {
            "query": _with_cut(size, first, cut),
            "window": _with_cut(keys, key_first, key_cut),
        }
    return {
        region: list(range(first, first + size))
        for region, (size, first) in starts.items()
    }


def _with_cut(size: int, first: int, cut: bool) -> list[int]:
    positions = list(range(first, first + size))
    if cut:
        positions[-3:] = [45, 46, 47]
    return positions


def _positions(run: Run, plan, region: str, size: int) -> list[int]:
    """Returns the positions of a region of the plan as the trace names it."""
    policy, own = run.policy, np.asarray(plan.own).tolist()
    past, query = np.asarray(plan.past).tolist(), np.asarray(plan.query).tolist()
    if region in ("query", "key_new"):
        # A short re-cache runs only the newest frames of the official one.
        chosen = query if region == "query" else own
        return (
            list(range(chosen[-1] - size + 1, chosen[-1] + 1))
            if (len(chosen) < size)
            else chosen
        )
    ring = policy.sink + policy.local
    if region == "junction":
        return past[ring:] if bool(plan.junction) else []
    before = int(plan.frames) - len(own) - int(plan.junction) * policy.junction_frames
    sink = past[: policy.sink] if before else own[: policy.sink]
    local = sorted(past[policy.sink : max(before, policy.sink)])
    local += own if before else own[policy.sink :]
    return {"sink": sink, "local": local, "window": sink + local}[region]


def _compare_cache(run: Run, name: str, end: int) -> None:
    """Compares recorded keys and values frame by frame with the slots that hold them.

    Only frames that a later block can still read are held, and compared.
    """
    pattern = re.compile(rf"(cache|junction)\.{name}\.layer(\d+)\.(k|v)(_prior)?")
    for recorded in list(run.checks.outputs):
        match = pattern.fullmatch(recorded)
        if not match:
            continue
        part, layer, which, prior = match.groups()
        take = _junction if part == "junction" else _cached
        result = take(run, int(layer), which, bool(prior), end, recorded)
        if result is not None:
            ours, frames = result
            run.checks.compare(recorded, ours, absolute=LATENT, frames=frames)


def _junction(run: Run, layer: int, which: str, prior: bool, end: int, name: str):
    del end, name
    cache, policy = run.state.cache, run.policy
    if prior and cache.prior is None:
        return None
    held = getattr(cache.prior if prior else cache.slots, which)[layer]
    if not prior:
        held = held[:, policy.sink + policy.local :]
    return np.asarray(rearrange(held, "b f t h d -> b (f t) h d")), None


def _cached(run: Run, layer: int, which: str, prior: bool, end: int, name: str):
    """Returns what we hold of a recorded buffer, and its [frame] mask of held ones."""
    del prior
    policy, cache = run.policy, run.state.cache
    held = np.asarray(getattr(cache.slots, which)[layer])
    frame_of = np.asarray(cache.index.frame)
    tokens = held.shape[2]
    recorded = run.checks.outputs[name]
    slots = recorded.shape[1] // tokens
    filled = run.filled if hasattr(run, "filled") else None
    frames = _buffer_frames(run, slots, end) if filled is None else filled
    ours = np.zeros((recorded.shape[0], slots, *held.shape[2:]), held.dtype)
    compared = np.zeros(slots, bool)
    ring = policy.sink + policy.local
    usable = np.arange(len(frame_of)) < policy.sink
    usable |= (np.arange(len(frame_of)) >= policy.sink) & (
        np.arange(len(frame_of)) < ring
    )
    for slot, frame in enumerate(frames):
        where = np.flatnonzero(usable & (frame_of == frame))
        if frame == EMPTY or not len(where):
            continue
        ours[:, slot], compared[slot] = held[:, where[0]], True
    if which == "k":
        ours = _as_stored(run, ours, frames)
    return rearrange(ours, "b f t h d -> b (f t) h d"), compared


def _buffer_frames(run: Run, slots: int, end: int) -> list[int]:
    """Returns the latent frame in each slot of the official buffer after `end` frames.

    Sink first, then the newest frames in time order.
    """
    sink = run.policy.sink
    if run.policy.on_switch == Recache(rewrite_sink=True):
        first = [int(x) for x in np.asarray(run.state.cache.index.frame)[:sink]]
    else:
        first = list(range(min(sink, end)))
    rest = min(slots - sink, end - sink)
    frames = first + list(range(end - rest, end))
    return frames + [EMPTY] * (slots - len(frames))


def _as_stored(run: Run, keys: np.ndarray, frames: list[int]) -> np.ndarray:
    """Returns keys rotated where the official buffer holds them rotated."""
    rule, config = run.policy.positions, run.setup.model
    if isinstance(rule, Absolute):
        turned = frames
    elif isinstance(rule, Ranked):
        # Official behaviour: frame 0 is stored rotated, the rest is not.
        turned = [frame if frame == 0 else EMPTY for frame in frames]
    else:
        return keys
    position = jnp.asarray(np.maximum(turned, 0), jnp.int32)
    turn = rotary(position, run.setup.tokens, config.head_dim, config.rope_theta)
    is_turned = np.asarray(turned) != EMPTY
    turn = Rotary(
        cos=jnp.where(is_turned[:, None, None], turn.cos, 1.0),
        sin=jnp.where(is_turned[:, None, None], turn.sin, 0.0),
    )
    return np.asarray(rotate(jnp.asarray(keys), turn))


def _leave_out_buffers(checks: Checks) -> None:
    checks.leave_out(
        r"junction\..*", "junction of a block without one, or never captured"
    )


def _channels_last(latents: np.ndarray) -> np.ndarray:
    return np.moveaxis(latents, 2, -1)


def _frames_first(latents) -> np.ndarray:
    """Returns [B, F, H, W, C] as the recorded [B, F, C, H, W]."""
    return np.moveaxis(np.asarray(latents), -1, 2)
