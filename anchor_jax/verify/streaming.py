"""Recorded streams: each pass of each block, its read plan, and the cache after it."""

import dataclasses
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
from anchor_jax.cache.types import EMPTY, ReadPlan
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import (
    BlockNoise,
    PromptChange,
    StreamSetup,
    StreamState,
)
from anchor_jax.verify.case import TIME, Case, CaseError, Checks, whole
from anchor_jax.verify.networks import CLOSE, dit_params, model_config
from anchor_jax.wan.rope import Rotary, rotary, rotate
from anchor_jax.wan.spec import LatentGrid

RANGE = 21
SCENE_CUT = 45
FLUSH_KEEPS = 2
JUNCTION_FRAMES = 3
LONGEST = 4096
NO_JUNCTION = "junction buffers of a stream whose policy has no junction"
_PART = re.compile(r"(cache|junction)\.(after_\w+)\.layer(\d+)\.(k|v)(_prior)?")


@dataclasses.dataclass
class Run:
    """A running stream beside its recording.

    `buffer` lists the latent frame in each filled slot of the official in-place
    buffer: sink first, then in order of time.
    """

    case: Case
    checks: Checks
    setup: StreamSetup
    variables: dict
    contexts: list
    state: StreamState
    prompt: int = 0
    buffer: list[int] = dataclasses.field(default_factory=list)

    @property
    def policy(self) -> Policy:
        return self.setup.policy

    @property
    def trace(self) -> list:
        """The recorded calls of the generator; empty without a trace."""
        trace = self.case.trace or []
        if not isinstance(trace, list):
            raise CaseError("trace.json must hold a list of records")
        return trace


def verify_stream(case: Case, checks: Checks) -> None:
    """Compares a recorded stream of the official sampler with ours."""
    run = _begin(case, checks, _policy(case))
    times = np.asarray(run.setup.levels.timestep, np.float32)
    checks.compare("denoising_timesteps", times, relative=TIME)
    requests = list(case.sizes("switch_frame_indices", default=()))
    latents = []
    for number in range(_num_blocks(run)):
        first = number * run.policy.block
        if requests and first >= requests[0]:
            _switch(run, requests.pop(0), first)
        latents.append(_block(run, number))
    _finish(run, latents)


def verify_flush(case: Case, checks: Checks) -> None:
    """Compares a recorded Infinity-RoPE stream, flushes and scene cuts, with ours."""
    window = case.size("local_attn_size")
    policy = Policy(
        block=case.size("num_frame_per_block"),
        sink=case.size("sink_size", low=0),
        window=window,
        positions=Ranked(range=window, cut=SCENE_CUT),
        on_switch=Flush(last=FLUSH_KEEPS),
    )
    run = _begin(case, checks, policy)
    lengths = case.sizes("scenes_blocks", low=1, high=LONGEST)
    cuts = case.setting("scene_cut_to_next")
    if not isinstance(cuts, list) or len(cuts) < len(lengths) - 1:
        raise CaseError("config.json: scene_cut_to_next needs a flag for every scene")
    scenes = [scene for scene, length in enumerate(lengths) for _ in range(length)]
    latents = []
    for number, scene in enumerate(scenes[: _num_blocks(run)]):
        if scene != run.prompt:
            first = number * policy.block
            _switch(run, first, first, cut=bool(cuts[scene - 1]))
            run.buffer = [*run.buffer[: policy.sink], *run.buffer[-FLUSH_KEEPS:]]
        latents.append(_block(run, number))
    _finish(run, latents)


def _finish(run: Run, latents: list[np.ndarray]) -> None:
    whole = np.concatenate(latents, axis=1)
    run.checks.compare("latents", frames_first(whole), absolute=CLOSE)
    run.checks.leave_out(r"junction\..*", NO_JUNCTION)


def _policy(case: Case) -> Policy:
    """Returns the policy of a recorded configuration."""
    window = case.size("local_attn_size", low=-1)
    junction = None
    if case.is_set("use_prompt_cache"):
        single = case.setting("pipeline", default=None) == "single_prompt"
        kind = PeriodicJunction if single else ReleaseJunction
        junction = kind(JUNCTION_FRAMES)
    bounded = case.is_set("rope_enhance")
    renew = Recache(rewrite_sink=not case.is_set("global_sink"))
    return Policy(
        block=case.size("num_frame_per_block"),
        sink=case.size("sink_size", low=0),
        window=case.size("num_frames") if window == -1 else window,
        junction=junction,
        positions=Relative(range=RANGE) if bounded else Absolute(),
        on_switch=renew if case.is_set("recache") else Keep(),
    )


def _begin(case: Case, checks: Checks, policy: Policy) -> Run:
    config = model_config(case)
    steps = case.sizes("denoising_step_list", high=flow.TRAIN_STEPS)
    shift = case.number("timestep_shift")
    if case.number("context_noise", default=0):
        raise CaseError("config.json: context_noise can only be 0")
    rows, columns = case.sizes("latent_hw", low=1, high=LONGEST)
    setup = StreamSetup(
        model=config,
        grid=LatentGrid(rows, columns),
        policy=policy,
        levels=flow.few_step_levels(steps, shift, table=True),
    )
    variables = {"params": jax.tree.map(jnp.asarray, dit_params(case, config))}
    count = sum(bool(re.fullmatch(r"prompt_embeds\.\d+", name)) for name in case.inputs)
    contexts = []
    for number in range(max(1, count)):
        text = padded(case.inputs[f"prompt_embeds.{number}"], config.text_len)
        text = np.repeat(text, len(case.inputs["noise"]) // len(text), axis=0)
        contexts.append(stream.project(variables, text, setup=setup))
    state = stream.start(contexts[0], setup=setup)
    return Run(case, checks, setup, variables, contexts, state)


def padded(text: np.ndarray, length: int) -> np.ndarray:
    """Returns prompts [batch, text, dim] with rows of zeros up to a length."""
    missing = length - text.shape[1]
    if text.ndim != 3 or missing < 0:
        raise CaseError(
            f"inputs: a prompt has shape {text.shape}, text_len is {length}"
        )
    return np.pad(text, ((0, 0), (0, missing), (0, 0)))


def _num_blocks(run: Run) -> int:
    frames, block = run.case.size("num_frames", high=LONGEST), run.policy.block
    if frames % block:
        raise CaseError(f"config.json: num_frames={frames} must divide by {block}")
    return frames // block


def _switch(run: Run, requested: int, first: int, cut: bool = False) -> None:
    number, run.prompt = run.prompt, run.prompt + 1
    if run.prompt >= len(run.contexts):
        raise CaseError(f"inputs: no prompt_embeds.{run.prompt} to switch to")
    change = PromptChange(run.contexts[run.prompt], requested, cut)
    run.state, block = stream.change_prompt(
        run.variables, run.state, change, first, setup=run.setup
    )
    if block is None:
        return
    if run.policy.on_switch == Recache(rewrite_sink=True):
        run.buffer = list(range(first - len(run.buffer), first))
    name = f"flow.recache{number}"
    if name in run.checks.outputs:
        # The official pass also runs frames whose keys it does not store; the newest
        # frames are stored.
        ours = frames_first(block.committed)
        theirs = run.checks.outputs[name][:, -ours.shape[1] :]
        run.checks.compare(name, ours, theirs, absolute=CLOSE)
    _compare_trace(run, block.plan, ("recache",), "recache", number)
    _compare_cache(run, f"after_recache{number}")


def _block(run: Run, number: int) -> np.ndarray:
    """Returns a block's latents after comparing all of its recorded values."""
    noise = _block_noise(run, number)
    run.state, block = stream.step(run.variables, run.state, noise, setup=run.setup)
    _append(run, number)
    name, outputs = f"block{number:03d}", run.checks.outputs
    # Infinity-RoPE's recording numbers the clean pass as one more step.
    clean = (f"flow.{name}.context", f"flow.{name}.step{len(run.setup.levels)}")
    ours = dict.fromkeys(clean, block.committed)
    for level in range(len(run.setup.levels)):
        ours[f"flow.{name}.step{level}"] = block.passes.flow[level]
        ours[f"x0.{name}.step{level}"] = block.passes.x0[level]
    for key in ours.keys() & outputs.keys():
        run.checks.compare(key, frames_first(ours[key]), absolute=CLOSE)
    _compare_trace(run, block.plan, ("denoise", "context"), "block", number)
    _compare_cache(run, f"after_{name}")
    return np.asarray(block.latents)


def _block_noise(run: Run, number: int) -> BlockNoise:
    inputs, size = run.case.inputs, run.policy.block
    noise = inputs["noise"][:, number * size : (number + 1) * size]
    grid, channels = run.setup.grid, run.setup.model.latent_channels
    shape = (channels, grid.height, grid.width)
    if noise.ndim != 5 or noise.shape[1:] != (size, *shape):
        raise CaseError(f"inputs: the noise of block {number} has shape {noise.shape}")
    batch, passes = noise.shape[0], len(run.setup.levels) - 1
    fresh = inputs["renoise"]
    if len(fresh) <= number or fresh.shape[1] < passes:
        raise CaseError(f"inputs: renoise of shape {fresh.shape} ends before {number}")
    fresh = fresh[number, :passes].reshape(passes, batch, size, *shape)
    return BlockNoise(
        jnp.asarray(rearrange(noise, "b f c h w -> b f h w c")),
        jnp.asarray(rearrange(fresh, "s b f c h w -> s b f h w c")),
    )


def _append(run: Run, number: int) -> None:
    """Adds a block to the official buffer, which drops the oldest after the sink."""
    size, sink = run.policy.block, run.policy.sink
    first = number * size
    buffer = [*run.buffer, *range(first, first + size)]
    excess = max(0, len(buffer) - run.policy.window)
    run.buffer = buffer[:sink] + buffer[sink + excess :]


def _compare_trace(run: Run, plan: ReadPlan, kinds, key: str, number: int) -> None:
    """Compares frames seen and RoPE positions with the records of some passes."""
    for record in run.trace:
        if not isinstance(record, dict) or record.get(key) != number:
            continue
        if record.get("kind") not in kinds:
            continue
        label = f"trace.{key}{number}.{record['kind']}.{record.get('timestep')}"
        if "kv_frames_attended" in record:
            seen = record["kv_frames_attended"]
            run.checks.equal(f"{label}.frames", int(plan.frames), seen)
        found = _recorded_positions(record, run.policy.block)
        for region, expected in found.items():
            ours = plan_positions(run.policy, plan, region)
            if kinds == ("recache",) and region in ("query", "key_new"):
                expected = expected[-len(ours) :]
            run.checks.equal(f"{label}.{region}", ours, expected)


def _recorded_positions(record: dict, block: int) -> dict[str, list[int]]:
    """Returns {region: RoPE positions} of a record.

    A record holds the first position and the number of frames of each region. A record
    of Infinity-RoPE holds those of the queries and the window, and whether a scene cut
    moves the newest block.
    """
    pair = record.get("rope_frames_start_cut_query_then_key")
    named = record.get("rope_frames_start", {})
    if pair is not None:
        named = dict(zip(("query", "window"), pair, strict=True))
    found = {}
    for region, (size, first, *cut) in named.items():
        size = whole(size, f"trace: {region}", 0, LONGEST)
        found[region] = list(range(first, first + size))
        if any(cut):
            moved = min(block, size)
            found[region][-moved:] = range(SCENE_CUT, SCENE_CUT + moved)
    return found


def plan_positions(policy: Policy, plan: ReadPlan, region: str) -> list[int]:
    """Returns the positions of one region of a plan, in order of time."""
    own = np.asarray(plan.own).tolist()
    if region in ("query", "key_new"):
        return np.asarray(plan.query if region == "query" else plan.own).tolist()
    ring, past = policy.sink + policy.local, np.asarray(plan.past).tolist()
    if region == "junction":
        return past[ring:] if bool(plan.junction) else []
    remembered = int(plan.frames) - len(own)
    remembered -= int(plan.junction) * policy.junction_frames
    sink, local = own[: policy.sink], own[policy.sink :]
    if remembered:
        # A ring is not in order of time, but its positions are.
        sink, local = (
            past[: policy.sink],
            [*sorted(past[policy.sink : remembered]), *own],
        )
    return {"sink": sink, "local": local, "window": sink + local}[region]


def _compare_cache(run: Run, moment: str) -> None:
    """Compares the recorded keys and values of every frame in our cache.

    A later block can read these frames. The official buffer also holds frames that no
    block will read.
    """
    for name in list(run.checks.outputs):
        match = _PART.fullmatch(name)
        if not match or match[2] != moment:
            continue
        part, _, layer, which, prior = match.groups()
        if part == "junction":
            _compare_junction(run, name, int(layer), which, bool(prior))
        else:
            _compare_buffer(run, name, int(layer), which)


def _compare_junction(run: Run, name: str, layer: int, which: str, prior: bool):
    cache = run.state.cache
    if not run.policy.keeps_prior:
        return
    held = getattr(cache.prior if prior else cache.slots, which)[layer]
    if not prior:
        held = held[:, run.policy.sink + run.policy.local :]
    run.checks.compare(name, _by_head(run.setup, held), absolute=CLOSE)


def _compare_buffer(run: Run, name: str, layer: int, which: str) -> None:
    cache, policy = run.state.cache, run.policy
    held = np.asarray(getattr(cache.slots, which)[layer])
    window = policy.sink + policy.local
    where = {
        int(frame): slot
        for slot, frame in enumerate(np.asarray(cache.index.frame)[:window])
        if frame != EMPTY
    }
    slots = [slot for slot, frame in enumerate(run.buffer) if frame in where]
    frames = [run.buffer[slot] for slot in slots]
    ours = held[:, [where[frame] for frame in frames]]
    if which == "k":
        ours = as_stored(run.setup, ours, frames)
    tokens = held.shape[2]
    recorded = run.checks.outputs[name]
    theirs = rearrange(recorded, "b (f t) h d -> b f t (h d)", t=tokens)[:, slots]
    run.checks.compare(name, ours, theirs, absolute=CLOSE)


def _by_head(setup: StreamSetup, held) -> np.ndarray:
    """Returns frames [batch, frame, token, dim] in the recorded layout."""
    head_dim = setup.model.head_dim
    return rearrange(np.asarray(held), "b f t (h d) -> b (f t) h d", d=head_dim)


def as_stored(setup: StreamSetup, keys: np.ndarray, frames: list[int]) -> np.ndarray:
    """Returns keys, rotated where the official buffer's are."""
    rule, config = setup.policy.positions, setup.model
    position = jnp.asarray(frames, jnp.int32)
    is_rotated = rule.rotates_stored(position)[:, None, None]
    if not is_rotated.any():
        return keys
    rotation = rotary(position, setup.tokens, config.head_dim, config.rope_theta)
    cos = jnp.where(is_rotated, rotation.cos, 1.0)
    sin = jnp.where(is_rotated, rotation.sin, 0.0)
    rotation = Rotary(cos=cos, sin=sin)
    return np.asarray(rotate(jnp.asarray(keys), rotation))


def frames_first(latents) -> np.ndarray:
    """Returns [B, F, H, W, C] as the recorded [B, F, C, H, W]."""
    return np.moveaxis(np.asarray(latents), -1, 2)
