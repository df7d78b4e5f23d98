"""Recorded training: losses, their gradients, rollouts and long sequences."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from anchor_jax import flow
from anchor_jax.cache.policies import Junction, Policy, Recache, as_trained
from anchor_jax.cache.positions import Absolute, Relative
from anchor_jax.porting.convert import export
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.training import losses, rollout
from anchor_jax.training.losses import Distillation, ReleaseTables, Score
from anchor_jax.training.rollout import Chunk, Rollout, Turn
from anchor_jax.training.schedule import Piece, Plan
from anchor_jax.verify.case import Case, CaseError, Checks, short, whole
from anchor_jax.verify.networks import (
    CLOSE,
    dit_params,
    dit_rules,
    model_config,
    vae_params,
    vae_sizes,
)
from anchor_jax.verify.streaming import (
    LONGEST,
    RANGE,
    frames_first,
    padded,
    plan_positions,
)
from anchor_jax.wan import vae
from anchor_jax.wan.attention import block_causal
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import LatentGrid, ModelConfig

LOSS = 1e-5  # relative
GRADIENT = 1e-4  # of the largest entry
SCORE = 1e-4  # relative: clean latents, and what is made of their differences
_KEPT_GRADIENTS = "gradients through cached keys, which are constants here"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a recorded training, and how they are set up."""

    generator: dict
    fake: dict
    real: dict
    setup: StreamSetup
    critic: Score
    teacher: Score

    def distill(self, latents, noise, timestep, mask, prompts) -> Distillation:
        """Returns the generator's loss; `prompts` are the prompt and the negative."""
        weights, scores = (self.fake, self.real), (self.critic, self.teacher)
        return _distill(latents, noise, timestep, mask, prompts, weights, scores=scores)

    def criticise(self, latents, noise, timestep, mask, prompt):
        """Returns the critic's loss, and its gradient under official names."""
        given = (latents, noise, timestep, prompt, mask)
        loss, found = _criticise(self.fake, *given, score=self.critic)
        return loss, _official(found, self.setup)


@functools.partial(jax.jit, static_argnames="scores")
def _distill(latents, noise, timestep, mask, prompts, weights, *, scores):
    return losses.distribution_matching(
        latents,
        noise,
        timestep,
        mask,
        fake=(scores[0], weights[0], prompts[0]),
        real=(scores[1], weights[1], *prompts),
    )


@functools.partial(jax.jit, static_argnames="score")
def _criticise(variables, *given, score: Score):
    return jax.value_and_grad(losses.score_flow)(variables, score, *given)


_roll = jax.jit(rollout.roll, static_argnames=("setup", "turn"))
_pull_back = jax.jit(rollout.pull_back, static_argnames="setup")


def _networks(case: Case, policy: Policy) -> Networks:
    config, teacher = model_config(case), model_config(case, "teacher")
    if case.number("guidance_scale", default=3.0) != 3.0:
        raise CaseError("config.json: guidance_scale can only be 3.0")
    shift = case.number("timestep_shift")
    steps = case.sizes("denoising_step_list", high=flow.TRAIN_STEPS)
    rows, columns = case.sizes("latent_hw", low=1, high=LONGEST)
    tables = ReleaseTables(shift=shift)
    setup = StreamSetup(
        model=config,
        grid=LatentGrid(rows, columns),
        policy=policy,
        levels=flow.few_step_levels(steps, shift, table=True),
        floor=float(flow.lookup_sigma(jnp.float32(0), shift)),
    )
    named = (("generator.", config), ("fake_score.", config), ("real_score.", teacher))
    collections = (
        {"params": jax.tree.map(jnp.asarray, dit_params(case, sizes, prefix))}
        for prefix, sizes in named
    )
    return Networks(*collections, setup, Score(config, tables), Score(teacher, tables))


def _prompts(case: Case, config: ModelConfig, *names: str) -> tuple[np.ndarray, ...]:
    return tuple(padded(case.inputs[name], config.text_len) for name in names)


def _official(found, setup: StreamSetup) -> dict[str, np.ndarray]:
    """Returns a gradient under the official names of its parameters."""
    return export(jax.tree.map(np.asarray, found["params"]), dit_rules(setup.model))


def _frames_last(latents) -> np.ndarray:
    """Returns [B, F, H, W, C] of a recorded [B, F, C, H, W]."""
    return np.moveaxis(np.asarray(latents), 2, -1)


def _per_frame(timestep, frames: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(timestep)[:, None], (len(timestep), frames))


def _compare_gradients(checks: Checks, prefix: str, ours: dict) -> None:
    """Compares those that were recorded, of the names that start with a prefix."""
    for name in [name for name in checks.outputs if name.startswith(prefix)]:
        parameter = name.removeprefix(prefix)
        if parameter in ours:
            checks.compare(name, ours[parameter], relative=GRADIENT)


def _compare_distillation(checks: Checks, prefix: str, found: Distillation) -> None:
    """Compares what was recorded of a loss's making."""
    ours = {
        "kl_grad": found.direction,
        "kl_grad_unnormalized": found.difference,
        "fake_x0": found.fake,
        "real_x0_cond": found.real_with,
        "real_x0_uncond": found.real_without,
        "real_x0_cfg": found.real,
        "noisy_latent": found.noisy,
    }
    for name, value in ours.items():
        if prefix + name in checks.outputs:
            checks.compare(prefix + name, frames_first(value), absolute=CLOSE)
    if prefix + "normalizer" in checks.outputs:
        checks.compare(prefix + "normalizer", found.normalizer, absolute=CLOSE)


def verify_dmd(case: Case, checks: Checks) -> None:
    """Compares both losses of a given clip, how they came about, and gradients."""
    networks = _networks(case, _policy(case))
    setup, inputs = networks.setup, case.inputs
    shift = case.number("timestep_shift")
    latents = _frames_last(inputs["generated_latent"])
    frames = latents.shape[1]
    mask = np.arange(frames) >= case.size("mask_first", low=0, default=0)
    prompts = _prompts(case, setup.model, "cond", "uncond")
    times = {}
    for role, prefix in (("generator", ""), ("critic", "critic_")):
        raw = np.float32(inputs[f"{prefix}raw_timestep"][:, 0])
        times[role] = flow.dmd_timestep(raw, shift)
    found = networks.distill(
        latents, _frames_last(inputs["dmd_noise"]), times["generator"], mask, prompts
    )
    _compare_distillation(checks, "", found)
    checks.compare("timestep", _per_frame(times["generator"], frames), absolute=CLOSE)
    checks.compare("dmd_loss", found.loss, relative=LOSS)
    by_latents = frames_first(found.gradient)
    checks.compare("dmd_loss_grad_wrt_latent", by_latents, relative=GRADIENT)
    noise, whole = _frames_last(inputs["critic_noise"]), np.ones(frames, bool)
    loss, gradient = networks.criticise(
        latents, noise, times["critic"], whole, prompts[0]
    )
    checks.compare("critic_loss", loss, relative=LOSS)
    _compare_gradients(checks, "critic_grad.", gradient)
    _compare_critic(checks, networks, latents, noise, times["critic"], prompts[0])
    for name, number in (("generator", shift), ("score", networks.critic.tables)):
        number = number if name == "generator" else number.score_shift
        table = flow.sigma_table(number)
        checks.compare(f"{name}_scheduler.sigmas", table, absolute=1e-6)


def _compare_critic(checks, networks: Networks, latents, noise, timestep, prompt):
    score = networks.critic
    sigma = score.tables.noising(timestep)
    noisy = flow.add_noise(latents, noise, sigma)
    context = score.project(networks.fake, prompt)
    x0 = score.x0(networks.fake, noisy, timestep, context)
    predicted = flow.flow_from_x0(x0, noisy, sigma)
    raw = flow.flow_from_x0(x0, noisy, score.tables.scoring(timestep))
    ours = {
        "noisy_latent": noisy,
        "fake_x0": x0,
        "fake_flow": raw,
        "flow_from_x0_with_generator_scheduler": predicted,
    }
    for name, value in ours.items():
        checks.compare(f"critic.{name}", frames_first(value), absolute=CLOSE)
    times = _per_frame(timestep, latents.shape[1])
    checks.compare("critic.timestep", times, absolute=CLOSE)


def verify_ode_regression(case: Case, checks: Checks) -> None:
    """Compares the regression of clean latents from stored trajectories."""
    config, inputs = model_config(case), case.inputs
    steps = case.sizes("denoising_step_list", high=flow.TRAIN_STEPS)
    levels = flow.few_step_levels(
        steps, case.number("timestep_shift"), case.is_set("warp_denoising_step"), True
    )
    times = np.asarray(levels.timestep, np.float32)
    stored = np.moveaxis(inputs["ode_latent"], 3, -1)
    drawn = next((v for k, v in inputs.items() if k.endswith("randint")), None)
    if drawn is None or drawn.shape != (len(stored), stored.shape[2]):
        raise CaseError("inputs: no draw of a level for every frame")
    # Of each block the first frame's draw counts for all.
    size = case.size("num_frame_per_block")
    index = np.repeat(drawn[:, ::size], size, axis=1)
    noisy = np.take_along_axis(stored, index[:, None, :, None, None, None], 1)[:, 0]
    window = case.size("local_attn_size", low=-1)
    blocks = (size,) * (stored.shape[2] // size)
    spans = block_causal(blocks, None if window == -1 else window)
    params = jax.tree.map(jnp.asarray, dit_params(case, config, "generator."))
    (prompt,) = _prompts(case, config, "cond")
    sigma = np.asarray(levels.sigma, np.float32)[index]
    given = (noisy, times[index], sigma, stored[:, -1], prompt)
    (loss, x0), found = _regress(params, *given, spans=spans, config=config)
    checks.compare("denoising_timesteps", times, absolute=CLOSE)
    checks.compare("loss", loss, relative=LOSS)
    checks.compare("noisy_input", frames_first(noisy), absolute=0)
    checks.compare("pred_x0", frames_first(x0), absolute=CLOSE)
    checks.compare("mean_timestep", times[index].mean(axis=1), absolute=CLOSE)
    each = np.square(np.asarray(x0) - stored[:, -1]).mean(axis=(1, 2, 3, 4))
    checks.compare("unnormalized_loss", each, relative=LOSS)
    gradient = export(jax.tree.map(np.asarray, found), dit_rules(config))
    _compare_gradients(checks, "grad.", gradient)


@functools.partial(jax.jit, static_argnames=("spans", "config"))
def _regress(params, noisy, times, sigma, target, prompt, *, spans, config):
    def loss(params):
        model, variables = WanDit(config), {"params": params}
        context = model.apply(variables, prompt, method="project")
        position = jnp.arange(noisy.shape[1])
        predicted, _ = model.apply(variables, noisy, times, context, spans, position)
        x0 = flow.x0_from_flow(predicted, noisy, sigma)
        return losses.clean_regression(x0, target, times), x0

    return jax.value_and_grad(loss, has_aux=True)(params)


def _policy(case: Case) -> Policy:
    """Returns the policy of a recorded rollout, by the rules of training."""
    bounded = case.is_set("rope_enhance")
    policy = Policy(
        block=case.size("num_frame_per_block"),
        sink=case.size("sink_size", low=0),
        window=case.size("local_attn_size"),
        junction=Junction() if case.is_set("use_prompt_cache") else None,
        positions=Relative(range=RANGE) if bounded else Absolute(),
        on_switch=Recache(),
    )
    return as_trained(policy)


class Draws:
    """Recorded random numbers, taken in the order in which they were drawn."""

    def __init__(self, case: Case, first: int = 0, end: int | None = None):
        found = (re.fullmatch(r"draw\.(\d+)\.(\w+)", name) for name in case.inputs)
        self.left = sorted((int(x[1]), x[2], x[0]) for x in found if x)[first:end]
        self.inputs = case.inputs

    def take(self, kind: str) -> np.ndarray:
        """Returns the next draw of a kind; others before it are passed over."""
        while self.left:
            _, found, name = self.left.pop(0)
            if found == kind:
                return self.inputs[name]
        raise CaseError(f"inputs: no draw of {kind} is left")

    def last(self, kind: str) -> np.ndarray:
        """Returns the last draw of a kind and passes over all before it."""
        found = self.take(kind)
        while any(kind == other for _, other, _ in self.left):
            found = self.take(kind)
        return found


def _noise(draws: Draws, noise, leave: int, setup: StreamSetup) -> BlockNoise:
    """Returns the noise of a chunk's blocks."""
    size, levels = setup.policy.block, len(setup.levels)
    batch, frames, *rest = noise.shape
    blocks = frames // size
    fresh = np.zeros((blocks, levels - 1, batch, size, *rest), np.float32)
    floor = np.zeros((blocks, batch, size, *rest), np.float32)
    for block in range(blocks):
        for level in range(leave):
            fresh[block, level] = draws.take("randn_like").reshape(batch, size, *rest)
        floor[block] = draws.take("randn_like").reshape(batch, size, *rest)
    initial = np.moveaxis(noise.reshape(batch, blocks, size, *rest), 1, 0)
    channels_last = (np.moveaxis(x, -3, -1) for x in (initial, fresh, floor))
    return BlockNoise(*map(jnp.asarray, channels_last))


def _loss_draws(draws: Draws, shift: float) -> tuple[jax.Array, np.ndarray]:
    """Returns timestep and noise of a loss, the last numbers that a step draws."""
    return (
        flow.dmd_timestep(np.float32(draws.last("randint")[:, 0]), shift),
        _frames_last(draws.take("randn_like")),
    )


def verify_self_forcing(case: Case, checks: Checks) -> None:
    """Compares a rollout from nothing, its loss, and the generator's gradient."""
    networks, draws = _networks(case, _policy(case)), Draws(case)
    setup = networks.setup
    noise = draws.take("randn")
    leave = int(draws.take("randint")[0])
    prompts = _prompts(case, setup.model, "cond", "uncond")
    before = rollout.begin(setup, len(noise), noise.shape[1])
    noise = _noise(draws, noise, leave, setup)
    given = (networks.generator, before, prompts[:1], noise, leave)
    _, chunk = _roll(*given, setup=setup)
    checks.compare("generated_latent", frames_first(chunk.latents), absolute=CLOSE)
    timestep, noise = _loss_draws(draws, case.number("timestep_shift"))
    frames = chunk.latents.shape[1]
    mask = np.ones(frames, bool)
    found = networks.distill(chunk.latents, noise, timestep, mask, prompts)
    _compare_distillation(checks, "dmd.", found)
    checks.compare("dmd.timestep", _per_frame(timestep, frames), absolute=CLOSE)
    checks.compare("generator_loss", found.loss, relative=LOSS)
    gradient = _pull_back(
        networks.generator, {}, chunk, prompts[0], leave, found.gradient, setup=setup
    )
    gradient = _official(gradient, setup)
    _compare_gradients(checks, "grad_detached_cache.", gradient)
    checks.leave_out(r"grad\..*", _KEPT_GRADIENTS)
    steps = [*case.sizes("denoising_step_list"), 0]
    checks.equal("denoised_timestep_from_to", steps[leave : leave + 2])
    exits = np.asarray([call["grad"] for call in case.setting("_generator_calls")])
    ours = np.tile(np.arange(leave + 2) == leave, frames // setup.policy.block)
    checks.equal("calls with a gradient", ours, exits)


def verify_streaming_training(case: Case, checks: Checks) -> None:
    """Compares a long sequence, chunk by chunk: what it sees, losses, gradients."""
    networks = _networks(case, _policy(case))
    sizes = vae_sizes(case, "vae")
    codec = vae_params(case, sizes, "vae.")
    renew = functools.partial(
        jax.jit(rollout.renew_last, static_argnames="codec"),
        codec,
        codec=vae.VaeCodec(sizes),
    )
    plan = Plan(
        frames=case.size("num_training_frames"),
        block=networks.setup.policy.block,
        length=case.size("max_length"),
        switches=(),
    )
    chunks, more = _recorded_chunks(case)
    switch = case.size("switch_frame_index", low=0, default=0) or None
    pieces = plan.pieces(switch)
    if len(pieces) < len(chunks):
        raise CaseError(f"trace.json: {len(chunks)} chunks, expected {len(pieces)}")
    checks.equal("trace.more can be generated", len(pieces) > len(chunks), more)
    batch = len(case.inputs["draw.0000.randn"])
    run = _Sequence(
        case,
        checks,
        networks,
        renew,
        rollout.begin(networks.setup, batch, plan.frames),
        _prompts(case, networks.setup.model, "cond", "switch", "uncond"),
        switch,
    )
    for record, piece in zip(chunks, pieces, strict=False):
        run.chunk(record, piece)


def _recorded_chunks(case: Case) -> tuple[list[dict], bool]:
    trace = case.trace
    chunks = trace.get("chunks") if isinstance(trace, dict) else None
    if not isinstance(chunks, list) or not all(isinstance(x, dict) for x in chunks):
        raise CaseError("trace.json must hold an object with a list of chunks")
    return chunks, bool(trace.get("can_generate_more_after"))


@dataclasses.dataclass
class _Sequence:
    """A long sequence under way beside its recording."""

    case: Case
    checks: Checks
    networks: Networks
    renew: Callable
    state: Rollout
    prompts: tuple[np.ndarray, ...]
    switch: int | None

    def chunk(self, record: dict, piece: Piece) -> None:
        """Makes the next chunk, and compares all that was recorded of it."""
        checks, setup = self.checks, self.networks.setup
        name = f"chunk{whole(record.get('index'), 'trace: index', 0, LONGEST)}"
        first, end = (
            whole(x, "trace: draws", 0, LONGEST) for x in record.get("draws", ())
        )
        draws = Draws(self.case, first, end)
        noise = draws.take("randn")
        leave = int(draws.take("randint")[0])
        previous = self.state.previous
        noise = _noise(draws, noise, leave, setup)
        prompts = self.prompts[piece.prompt : piece.last_prompt + 1]
        turn = None
        if piece.turn is not None:
            block = (piece.turn - piece.start) // setup.policy.block
            turn = Turn(block, setup.policy.rerun(piece.turn))
        given = (self.networks.generator, self.state, prompts, noise, leave)
        self.state, chunk = _roll(
            *given, setup=setup, turn=turn, requested=self.switch or 0
        )
        clip, mask = rollout.window(previous, chunk.latents, self.renew)
        for what, value in (("new_frames", chunk.latents), ("loss_chunk", clip)):
            checks.compare(f"{name}.{what}", frames_first(value), absolute=CLOSE)
        self._compare_plan(f"trace.{name}", record, piece, mask, leave)
        self._compare_calls(f"trace.{name}", record, chunk, piece)
        self._compare_cache(name)
        prompt = self.prompts[piece.last_prompt]
        loss = _loss_draws(draws, self.case.number("timestep_shift"))
        role = record.get("role")
        if role == "critic":
            self._criticise(name, clip, mask, prompt, loss)
        elif role == "generator":
            self._distill(name, clip, mask, prompt, loss, chunk, leave)
        else:
            raise CaseError(f"trace.json: role {short(role)} is unknown")

    def _distill(self, name: str, clip, mask, prompt, drawn, chunk: Chunk, leave: int):
        timestep, noise = drawn
        checks, networks = self.checks, self.networks
        prompts = (prompt, self.prompts[2])
        found = networks.distill(clip, noise, timestep, mask, prompts)
        _compare_distillation(checks, f"{name}.dmd.", found)
        times = _per_frame(timestep, clip.shape[1])
        checks.compare(f"{name}.dmd.timestep", times, absolute=CLOSE)
        checks.compare(f"{name}.generator_loss", found.loss, relative=LOSS)
        frames = chunk.noisy.shape[0] * chunk.noisy.shape[2]
        cotangent = found.gradient[:, -frames:]
        given = (networks.generator, {}, chunk, prompt, leave, cotangent)
        gradient = _official(_pull_back(*given, setup=networks.setup), networks.setup)
        detached = f"{name}.generator_grad_detached_cache."
        _compare_gradients(checks, detached, gradient)
        checks.leave_out(rf"{name}\.generator_grad\..*", _KEPT_GRADIENTS)

    def _criticise(self, name: str, clip, mask, prompt, drawn):
        timestep, noise = drawn
        loss, gradient = self.networks.criticise(clip, noise, timestep, mask, prompt)
        times = _per_frame(timestep, clip.shape[1])
        self.checks.compare(f"{name}.critic_timestep", times, absolute=CLOSE)
        self.checks.compare(f"{name}.critic_loss", loss, relative=LOSS)
        _compare_gradients(self.checks, f"{name}.critic_grad.", gradient)

    def _compare_plan(self, name: str, record, piece: Piece, mask, leave: int) -> None:
        """Compares the integers of a chunk."""
        previous = self.state.previous.shape[1]
        steps = [*self.case.sizes("denoising_step_list"), 0]
        ours = {
            "chunk_start_frame": piece.start,
            "chunk_frames": len(mask),
            "new_frames": piece.new,
            "overlap_frames": previous - piece.new,
            "current_length_after": piece.end,
            "gradient_mask_per_frame": mask.astype(int).tolist(),
            "denoised_timestep_from": steps[leave],
            "denoised_timestep_to": steps[leave + 1],
            "has_switched_after": piece.last_prompt == 1,
            "previous_frames_kept": previous,
            "loss_prompt": ("cond", "switch")[piece.last_prompt],
        }
        for what, value in ours.items():
            if what in record:
                self.checks.equal(f"{name}.{what}", value, record[what])

    def _compare_calls(self, name: str, record, chunk: Chunk, piece: Piece) -> None:
        """Compares what every call of the generator saw."""
        size = self.networks.setup.policy.block
        blocks = {
            piece.start + size * number: jax.tree.map(lambda x, n=number: x[n], plans)
            for plans in (jax.device_get(chunk.plans),)
            for number in range(piece.new // size)
        }
        for number, call in enumerate(record.get("generator_calls", ())):
            recaching = call["kind"] == "recache"
            plan = jax.device_get(chunk.recache) if recaching else None
            plan = plan or blocks.get(call["start_frame"])
            if plan is None:
                raise CaseError(f"trace.json: {name} has a call at another frame")
            label = f"{name}.call{number}"
            frames = call["kv_frames_attended"]
            self.checks.equal(f"{label}.frames", int(plan.frames), frames)
            self._compare_positions(label, call, plan, recaching)
            turned = piece.prompt == 1 or (
                piece.turn is not None and (recaching or plan.start >= piece.turn)
            )
            prompt = ("cond", "switch")[int(turned)]
            self.checks.equal(f"{label}.prompt", prompt, call["prompt"])

    def _compare_positions(self, label: str, call, plan, recaching: bool) -> None:
        """Compares first RoPE positions of local, query, sink and junction frames."""
        policy = self.networks.setup.policy
        regions = ("local", "query", "sink", "junction")
        recorded = call["rope_frames_start_calls_in_order"]
        for region, pair in zip(regions, recorded, strict=False):
            size, first = (whole(x, "trace: rope", 0, LONGEST) for x in pair)
            # A first block's keys are called local, whatever they become.
            early = region == "local" and int(plan.frames) == len(plan.own)
            ours = plan_positions(policy, plan, region)
            ours = np.asarray(plan.own).tolist() if early else ours
            expected = list(range(first, first + size))
            if recaching and region == "query":
                expected = expected[-len(ours) :]
            self.checks.equal(f"{label}.{region}", ours, expected)

    def _compare_cache(self, name: str) -> None:
        """Compares keys and values that a later block can read."""
        policy, cache = self.networks.setup.policy, self.state.cache
        ring = policy.sink + policy.local
        end = int(cache.index.start)
        for part in [part for part in self.checks.outputs if part.startswith(name)]:
            match = re.fullmatch(rf"{name}\.(cache|junction)\.layer(\d+)\.(k|v)", part)
            if not match:
                continue
            held = np.asarray(getattr(cache.slots, match[3])[int(match[2])])
            theirs = rearrange(
                self.checks.outputs[part],
                "b (f t) h d -> b f t h d",
                t=held.shape[2],
            )
            if match[1] == "junction":
                self.checks.compare(part, held[:, ring:], theirs, absolute=CLOSE)
                continue
            filled = min(end, theirs.shape[1])
            order = np.argsort(np.asarray(cache.index.frame)[policy.sink : ring])
            local = held[:, policy.sink : ring][:, order]
            newest = theirs[:, filled - policy.local : filled]
            ours = np.concatenate([held[:, : policy.sink], local], axis=1)
            theirs = np.concatenate([theirs[:, : policy.sink], newest], axis=1)
            self.checks.compare(part, ours, theirs, absolute=CLOSE)
