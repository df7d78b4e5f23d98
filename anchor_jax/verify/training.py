"""Recorded training: losses, their gradients, rollouts and long sequences."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import flow
from anchor_jax.cache.policies import Junction, Policy, Recache, as_trained
from anchor_jax.cache.positions import Absolute, Relative
from anchor_jax.porting.convert import export
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.training import losses, rollout
from anchor_jax.training.losses import Distillation, ReleaseTables, Score
from anchor_jax.verify.case import TIME, Case, CaseError, Checks
from anchor_jax.verify.networks import (
    CLOSE,
    block_sizes,
    dit_params,
    dit_table,
    model_config,
)
from anchor_jax.verify.primitives import score_timestep
from anchor_jax.verify.streaming import (
    LONGEST,
    RANGE,
    frames_first,
    padded,
)
from anchor_jax.wan.attention import block_causal
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import LatentGrid, ModelConfig

LOSS = 1e-5  # relative
GRADIENT = 1e-4  # of the largest entry
SCORE = 1e-4  # relative: clean latents, and values from their differences
KEPT_GRADIENTS = "gradients through cached keys, which are constants here"


@dataclasses.dataclass(frozen=True)
class RecordedNetworks:
    """The networks of a recorded training, with their settings.

    The real score is with + guidance (with - without).
    """

    generator: dict
    fake: dict
    real: dict
    setup: StreamSetup
    critic: Score
    teacher: Score
    guidance: float

    def distill(self, latents, noise, timestep, mask, prompts) -> Distillation:
        """Returns the generator's loss; `prompts` are the prompt and the negative."""
        return _distill(
            *(latents, noise, timestep, mask, prompts),
            (self.fake, self.real),
            self.guidance,
            scores=(self.critic, self.teacher),
        )

    def criticise(self, latents, noise, timestep, mask, prompt):
        """Returns the critic's loss, and its gradient under official names."""
        given = (latents, noise, timestep, prompt, mask)
        loss, found = _criticise(self.fake, *given, score=self.critic)
        return loss, official(found, self.setup)


@functools.partial(jax.jit, static_argnames="scores")
def _distill(latents, noise, timestep, mask, prompts, weights, guidance, *, scores):
    return losses.distribution_matching(
        latents,
        noise,
        timestep,
        mask,
        fake=(scores[0], weights[0], prompts[0]),
        real=(scores[1], weights[1], *prompts),
        guidance=guidance,
    )


@functools.partial(jax.jit, static_argnames="score")
def _criticise(variables, *given, score: Score):
    return jax.value_and_grad(losses.score_flow)(variables, score, *given)


roll = jax.jit(rollout.roll, static_argnames=("setup", "switch"))
pull_back = jax.jit(rollout.pull_back, static_argnames="setup")


def load_networks(case: Case, policy: Policy) -> RecordedNetworks:
    """Returns the networks of a case, whose generator has a cache policy."""
    config, teacher = model_config(case), model_config(case, "teacher")
    if case.number("fake_guidance_scale", default=0.0) != 0.0:
        raise CaseError(
            "config.json: fake_guidance_scale can only be 0; the critic is not guided"
        )
    guidance = case.number("guidance_scale", default=3.0)
    shift = case.number("timestep_shift")
    steps = case.sizes("denoising_step_list", high=flow.TRAIN_STEPS)
    rows, columns = case.sizes("latent_hw", low=1, high=LONGEST)
    score_shift = case.number("score_shift", default=ReleaseTables.score_shift)
    tables = ReleaseTables(shift, score_shift)
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
    scores = (Score(sizes, tables) for sizes in (config, teacher))
    guidance = case.number("real_guidance_scale", default=guidance)
    return RecordedNetworks(*collections, setup, *scores, guidance)


def load_prompts(
    case: Case, config: ModelConfig, *names: str
) -> tuple[np.ndarray, ...]:
    """Returns embeddings [batch, text_len, text_dim], short ones padded with zeros."""
    return tuple(padded(case.inputs[name], config.text_len) for name in names)


def official(found, setup: StreamSetup) -> dict[str, np.ndarray]:
    """Returns a gradient under the official names of its parameters."""
    return export(jax.tree.map(np.asarray, found["params"]), dit_table(setup.model))


def _frames_last(latents) -> np.ndarray:
    """Returns [B, F, H, W, C] of a recorded [B, F, C, H, W]."""
    return np.moveaxis(np.asarray(latents), 2, -1)


def per_frame(timestep, frames: int) -> np.ndarray:
    """Returns [batch, frame] of a clip's timesteps [batch]."""
    return np.broadcast_to(np.asarray(timestep)[:, None], (len(timestep), frames))


def compare_gradients(checks: Checks, prefix: str, ours: dict) -> None:
    """Compares the recorded values whose names start with a prefix."""
    for name in [name for name in checks.outputs if name.startswith(prefix)]:
        parameter = name.removeprefix(prefix)
        if parameter in ours:
            checks.compare(name, ours[parameter], relative=GRADIENT)


def compare_distillation(checks: Checks, prefix: str, found: Distillation) -> None:
    """Compares the recorded intermediates of a loss."""
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
    """Compares both losses of a given clip, their intermediates, and gradients."""
    networks = load_networks(case, trained_policy(case))
    setup, inputs = networks.setup, case.inputs
    shift = case.number("timestep_shift")
    latents = _frames_last(inputs["generated_latent"])
    frames = latents.shape[1]
    mask = np.arange(frames) >= case.size("mask_first", low=0, default=0)
    prompts = load_prompts(case, setup.model, "cond", "uncond")
    times = {}
    for role, prefix in (("generator", ""), ("critic", "critic_")):
        raw = np.float32(inputs[f"{prefix}raw_timestep"][:, 0])
        times[role] = score_timestep(case, raw, shift)
    found = networks.distill(
        latents, _frames_last(inputs["dmd_noise"]), times["generator"], mask, prompts
    )
    compare_distillation(checks, "", found)
    checks.compare("timestep", per_frame(times["generator"], frames), relative=TIME)
    checks.compare("dmd_loss", found.loss, relative=LOSS)
    by_latents = frames_first(found.gradient)
    checks.compare("dmd_loss_grad_wrt_latent", by_latents, relative=GRADIENT)
    noise, whole = _frames_last(inputs["critic_noise"]), np.ones(frames, bool)
    loss, gradient = networks.criticise(
        latents, noise, times["critic"], whole, prompts[0]
    )
    checks.compare("critic_loss", loss, relative=LOSS)
    compare_gradients(checks, "critic_grad.", gradient)
    _compare_critic(checks, networks, latents, noise, times["critic"], prompts[0])
    for name, number in (("generator", shift), ("score", networks.critic.tables)):
        number = number if name == "generator" else number.score_shift
        table = flow.sigma_table(number)
        checks.compare(f"{name}_scheduler.sigmas", table, absolute=1e-6)


def _compare_critic(
    checks, networks: RecordedNetworks, latents, noise, timestep, prompt
):
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
    times = per_frame(timestep, latents.shape[1])
    checks.compare("critic.timestep", times, relative=TIME)


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
    blocks = block_sizes(case, stored.shape[2])
    if sum(blocks) != stored.shape[2]:
        raise CaseError(f"inputs: {stored.shape[2]} frames do not divide into blocks")
    # The draw of a block's first frame applies to the whole block.
    first = np.cumsum([0, *blocks[:-1]])
    index = np.repeat(drawn[:, first], blocks, axis=1)
    noisy = np.take_along_axis(stored, index[:, None, :, None, None, None], 1)[:, 0]
    window = case.size("local_attn_size", low=-1)
    spans = block_causal(blocks, None if window == -1 else window)
    params = jax.tree.map(jnp.asarray, dit_params(case, config, "generator."))
    (prompt,) = load_prompts(case, config, "cond")
    sigma = np.asarray(levels.sigma, np.float32)[index]
    given = (noisy, times[index], sigma, stored[:, -1], prompt)
    (loss, x0), found = _regress(params, *given, spans=spans, config=config)
    checks.compare("denoising_timesteps", times, relative=TIME)
    checks.compare("loss", loss, relative=LOSS)
    checks.compare("noisy_input", frames_first(noisy), absolute=0)
    checks.compare("pred_x0", frames_first(x0), absolute=CLOSE)
    checks.compare("mean_timestep", times[index].mean(axis=1), relative=TIME)
    each = np.square(np.asarray(x0) - stored[:, -1]).mean(axis=(1, 2, 3, 4))
    checks.compare("unnormalized_loss", each, relative=LOSS)
    gradient = export(jax.tree.map(np.asarray, found), dit_table(config))
    compare_gradients(checks, "grad.", gradient)


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


def trained_policy(case: Case) -> Policy:
    """Returns the policy of a recorded rollout, under the rules of training."""
    if case.is_set("independent_first_frame"):
        raise CaseError("config.json: independent_first_frame can only be false")
    bounded = case.is_set("rope_enhance")
    window = case.size("local_attn_size", low=-1)
    if window == -1:
        frames = case.size("num_training_frames", high=LONGEST)
        window = case.size("max_length", high=LONGEST, default=frames)
    policy = Policy(
        block=case.size("num_frame_per_block"),
        sink=case.size("sink_size", low=0),
        window=window,
        junction=Junction() if case.is_set("use_prompt_cache") else None,
        positions=Relative(range=RANGE) if bounded else Absolute(),
        on_switch=Recache(),
    )
    return as_trained(policy)


class Draws:
    """Recorded random numbers, returned in the order of their draws."""

    def __init__(self, case: Case, first: int = 0, end: int | None = None):
        found = (re.fullmatch(r"draw\.(\d+)\.(\w+)", name) for name in case.inputs)
        self.left = sorted((int(x[1]), x[2], x[0]) for x in found if x)[first:end]
        self.inputs = case.inputs

    def take(self, kind: str) -> np.ndarray:
        """Returns the next draw of a kind; draws before it are skipped."""
        while self.left:
            _, found, name = self.left.pop(0)
            if found == kind:
                return self.inputs[name]
        raise CaseError(f"inputs: no draw of {kind} is left")

    def last(self, kind: str) -> np.ndarray:
        """Returns the last draw of a kind, and skips all before it."""
        found = self.take(kind)
        while any(kind == other for _, other, _ in self.left):
            found = self.take(kind)
        return found


def block_noise(draws: Draws, noise, exit_level: int, setup: StreamSetup) -> BlockNoise:
    """Returns the noise of a chunk's blocks."""
    size, levels = setup.policy.block, len(setup.levels)
    batch, frames, *rest = noise.shape
    blocks = frames // size
    fresh = np.zeros((blocks, levels - 1, batch, size, *rest), np.float32)
    floor = np.zeros((blocks, batch, size, *rest), np.float32)
    for block in range(blocks):
        for level in range(exit_level):
            fresh[block, level] = draws.take("randn_like").reshape(batch, size, *rest)
        floor[block] = draws.take("randn_like").reshape(batch, size, *rest)
    initial = np.moveaxis(noise.reshape(batch, blocks, size, *rest), 1, 0)
    channels_last = (np.moveaxis(x, -3, -1) for x in (initial, fresh, floor))
    return BlockNoise(*map(jnp.asarray, channels_last))


def loss_draws(draws: Draws, case: Case) -> tuple[jax.Array, np.ndarray]:
    """Returns the timestep and the noise of a loss, which a step draws last."""
    raw = np.float32(draws.last("randint")[:, 0])
    timestep = score_timestep(case, raw, case.number("timestep_shift"))
    return timestep, _frames_last(draws.take("randn_like"))


def verify_self_forcing(case: Case, checks: Checks) -> None:
    """Compares a rollout from an empty cache, its loss, and the gradient."""
    networks, draws = load_networks(case, trained_policy(case)), Draws(case)
    setup = networks.setup
    noise = draws.take("randn")
    exit_level = int(draws.take("randint")[0])
    prompts = load_prompts(case, setup.model, "cond", "uncond")
    before = rollout.begin(setup, len(noise), noise.shape[1])
    noise = block_noise(draws, noise, exit_level, setup)
    given = (networks.generator, before, prompts[:1], noise, exit_level)
    _, chunk = roll(*given, setup=setup)
    checks.compare("generated_latent", frames_first(chunk.latents), absolute=CLOSE)
    timestep, noise = loss_draws(draws, case)
    frames = chunk.latents.shape[1]
    mask = np.ones(frames, bool)
    found = networks.distill(chunk.latents, noise, timestep, mask, prompts)
    compare_distillation(checks, "dmd.", found)
    checks.compare("dmd.timestep", per_frame(timestep, frames), relative=TIME)
    checks.compare("generator_loss", found.loss, relative=LOSS)
    gradient = pull_back(
        networks.generator,
        {},
        chunk,
        prompts[0],
        exit_level,
        found.gradient,
        setup=setup,
    )
    gradient = official(gradient, setup)
    compare_gradients(checks, "grad_detached_cache.", gradient)
    checks.leave_out(r"grad\..*", KEPT_GRADIENTS)
    steps = [*case.sizes("denoising_step_list"), 0]
    checks.equal("denoised_timestep_from_to", steps[exit_level : exit_level + 2])
    exits = np.asarray([call["grad"] for call in case.setting("_generator_calls")])
    ours = np.tile(
        np.arange(exit_level + 2) == exit_level, frames // setup.policy.block
    )
    checks.equal("calls with a gradient", ours, exits)
