"""Recorded training on long sequences, chunk by chunk."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import numpy as np
from einops import rearrange

from anchor_jax.cache.types import EMPTY
from anchor_jax.errors import shown
from anchor_jax.training import rollout
from anchor_jax.training.rollout import Chunk, ChunkSwitch, Rollout
from anchor_jax.training.schedule import ChunkSpan, SequencePlan
from anchor_jax.verify.case import TIME, Case, CaseError, Checks, whole
from anchor_jax.verify.networks import CLOSE, vae_params, vae_sizes
from anchor_jax.verify.streaming import (
    LONGEST,
    NO_JUNCTION,
    as_stored,
    frames_first,
    plan_positions,
)
from anchor_jax.verify.training import (
    KEPT_GRADIENTS,
    LOSS,
    Draws,
    RecordedNetworks,
    block_noise,
    compare_distillation,
    compare_gradients,
    load_networks,
    load_prompts,
    loss_draws,
    official,
    per_frame,
    pull_back,
    roll,
    trained_policy,
)
from anchor_jax.wan import vae


def verify_streaming_training(case: Case, checks: Checks) -> None:
    """Compares a long sequence, chunk by chunk: read plans, losses, gradients."""
    networks = load_networks(case, trained_policy(case))
    sizes = vae_sizes(case, "vae")
    codec = vae_params(case, sizes, "vae.")
    renew = functools.partial(
        jax.jit(rollout.renew_last, static_argnames="codec"),
        codec,
        codec=vae.VaeCodec(sizes),
    )
    plan = SequencePlan(
        frames=case.size("num_training_frames"),
        block=networks.setup.policy.block,
        length=case.size("max_length"),
        switches=(),
    )
    chunks, more = _recorded_chunks(case)
    switch = None
    if case.setting("switch_frame_index", default=None) is not None:
        switch = case.size("switch_frame_index", low=0) or None
    spans = plan.chunks(switch)
    if len(spans) < len(chunks):
        raise CaseError(f"trace.json: {len(chunks)} chunks, expected {len(spans)}")
    checks.equal("trace.more can be generated", len(spans) > len(chunks), more)
    second = "cond" if switch is None else "switch"
    batch = len(case.inputs["draw.0000.randn"])
    run = _Sequence(
        case,
        checks,
        networks,
        renew,
        rollout.begin(networks.setup, batch, plan.frames),
        load_prompts(case, networks.setup.model, "cond", second, "uncond"),
        switch,
    )
    for record, span in zip(chunks, spans, strict=False):
        run.chunk(record, span)


def _recorded_chunks(case: Case) -> tuple[list[dict], bool]:
    trace = case.trace
    chunks = trace.get("chunks") if isinstance(trace, dict) else None
    if not isinstance(chunks, list) or not all(isinstance(x, dict) for x in chunks):
        raise CaseError("trace.json must hold an object with a list of chunks")
    return chunks, bool(trace.get("can_generate_more_after"))


@dataclasses.dataclass
class _Sequence:
    """A running long sequence beside its recording."""

    case: Case
    checks: Checks
    networks: RecordedNetworks
    renew: Callable
    state: Rollout
    prompts: tuple[np.ndarray, ...]
    switch: int | None

    def chunk(self, record: dict, span: ChunkSpan) -> None:
        """Makes the next chunk, and compares all of its recorded values."""
        checks, setup = self.checks, self.networks.setup
        name = f"chunk{whole(record.get('index'), 'trace: index', 0, LONGEST)}"
        first, end = (
            whole(x, "trace: draws", 0, LONGEST) for x in record.get("draws", ())
        )
        draws = Draws(self.case, first, end)
        noise = draws.take("randn")
        exit_level = int(draws.take("randint")[0])
        previous = self.state.previous
        noise = block_noise(draws, noise, exit_level, setup)
        prompts = self.prompts[span.prompt : span.last_prompt + 1]
        switch = None
        if span.switch_at is not None:
            block = (span.switch_at - span.start) // setup.policy.block
            switch = ChunkSwitch(block, setup.policy.recache(span.switch_at))
        given = (self.networks.generator, self.state, prompts, noise, exit_level)
        self.state, chunk = roll(
            *given, setup=setup, switch=switch, requested=self.switch or 0
        )
        clip, mask = rollout.window(previous, chunk.latents, self.renew)
        for what, value in (("new_frames", chunk.latents), ("loss_chunk", clip)):
            checks.compare(f"{name}.{what}", frames_first(value), absolute=CLOSE)
        self._compare_plan(f"trace.{name}", record, span, mask, exit_level)
        self._compare_calls(f"trace.{name}", record, chunk, span)
        self._compare_cache(name)
        prompt = self.prompts[span.last_prompt]
        loss = loss_draws(draws, self.case)
        role = record.get("role")
        if role == "critic":
            self._criticise(name, clip, mask, prompt, loss)
        elif role == "generator":
            self._distill(name, clip, mask, prompt, loss, chunk, exit_level)
        else:
            raise CaseError(f"trace.json: role {shown(role)} is unknown")

    def _distill(
        self, name: str, clip, mask, prompt, drawn, chunk: Chunk, exit_level: int
    ):
        timestep, noise = drawn
        checks, networks = self.checks, self.networks
        prompts = (prompt, self.prompts[2])
        found = networks.distill(clip, noise, timestep, mask, prompts)
        compare_distillation(checks, f"{name}.dmd.", found)
        times = per_frame(timestep, clip.shape[1])
        checks.compare(f"{name}.dmd.timestep", times, relative=TIME)
        checks.compare(f"{name}.generator_loss", found.loss, relative=LOSS)
        frames = chunk.noisy.shape[0] * chunk.noisy.shape[2]
        cotangent = found.gradient[:, -frames:]
        given = (networks.generator, {}, chunk, prompt, exit_level, cotangent)
        gradient = official(pull_back(*given, setup=networks.setup), networks.setup)
        detached = f"{name}.generator_grad_detached_cache."
        compare_gradients(checks, detached, gradient)
        checks.leave_out(rf"{name}\.generator_grad\..*", KEPT_GRADIENTS)

    def _criticise(self, name: str, clip, mask, prompt, drawn):
        timestep, noise = drawn
        loss, gradient = self.networks.criticise(clip, noise, timestep, mask, prompt)
        times = per_frame(timestep, clip.shape[1])
        self.checks.compare(f"{name}.critic_timestep", times, relative=TIME)
        self.checks.compare(f"{name}.critic_loss", loss, relative=LOSS)
        compare_gradients(self.checks, f"{name}.critic_grad.", gradient)

    def _compare_plan(
        self, name: str, record, span: ChunkSpan, mask, exit_level: int
    ) -> None:
        """Compares the integers of a chunk."""
        previous = self.state.previous.shape[1]
        steps = [*self.case.sizes("denoising_step_list"), 0]
        ours = {
            "chunk_start_frame": span.start,
            "chunk_frames": len(mask),
            "new_frames": span.new,
            "overlap_frames": previous - span.new,
            "current_length_after": span.end,
            "gradient_mask_per_frame": mask.astype(int).tolist(),
            "denoised_timestep_from": steps[exit_level],
            "denoised_timestep_to": steps[exit_level + 1],
            "has_switched_after": span.last_prompt == 1,
            "previous_frames_kept": previous,
            "loss_prompt": ("cond", "switch")[span.last_prompt],
        }
        for what, value in ours.items():
            if what in record:
                self.checks.equal(f"{name}.{what}", value, record[what])

    def _compare_calls(self, name: str, record, chunk: Chunk, span: ChunkSpan) -> None:
        """Compares the read plan of every call of the generator."""
        size = self.networks.setup.policy.block
        blocks = {
            span.start + size * number: jax.tree.map(lambda x, n=number: x[n], plans)
            for plans in (jax.device_get(chunk.plans),)
            for number in range(span.new // size)
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
            switched = span.prompt == 1 or (
                span.switch_at is not None
                and (recaching or plan.start >= span.switch_at)
            )
            prompt = ("cond", "switch")[int(switched)]
            self.checks.equal(f"{label}.prompt", prompt, call["prompt"])

    def _compare_positions(self, label: str, call, plan, recaching: bool) -> None:
        """Compares first RoPE positions of local, query, sink and junction frames.

        If keys are stored rotated, a pass rotates only its own frames.
        """
        policy = self.networks.setup.policy
        regions = ("local", "query", "sink", "junction")
        if policy.positions.range is None:
            regions = ("query", "key_new")
        recorded = call["rope_frames_start_calls_in_order"]
        for region, pair in zip(regions, recorded, strict=False):
            size, first = (whole(x, "trace: rope", 0, LONGEST) for x in pair)
            # The keys of a first block are recorded as local.
            early = region == "local" and int(plan.frames) == len(plan.own)
            ours = plan_positions(policy, plan, region)
            ours = np.asarray(plan.own).tolist() if early else ours
            expected = list(range(first, first + size))
            if recaching and region in ("query", "key_new"):
                expected = expected[-len(ours) :]
            self.checks.equal(f"{label}.{region}", ours, expected)

    def _compare_cache(self, name: str) -> None:
        """Compares the keys and values that a later block can read."""
        policy, outputs = self.networks.setup.policy, self.checks.outputs
        if policy.junction is None:
            self.checks.leave_out(rf"{name}\.junction\..*", NO_JUNCTION)
        for part in [part for part in outputs if part.startswith(name)]:
            match = re.fullmatch(rf"{name}\.(cache|junction)\.layer(\d+)\.(k|v)", part)
            if not match or (match[1] == "junction" and policy.junction is None):
                continue
            slots = self.state.cache.slots
            held = np.asarray(getattr(slots, match[3])[int(match[2])])
            theirs = rearrange(
                outputs[part], "b (f t) h d -> b f t (h d)", t=held.shape[2]
            )
            ours = held[:, policy.sink + policy.local :]
            if match[1] == "cache":
                ours, theirs = self._readable(held, theirs, match[3] == "k")
            self.checks.compare(part, ours, theirs, absolute=CLOSE)

    def _readable(self, held: np.ndarray, theirs: np.ndarray, are_keys: bool):
        """Returns a layer's sink and local frames, in order of time, ours and theirs.

        The recorded ones are the sink and the newest filled rows. Their keys are
        rotated if positions are absolute.
        """
        setup, index = self.networks.setup, self.state.cache.index
        policy, end = setup.policy, int(index.start)
        frame = np.asarray(index.frame)[: policy.sink + policy.local]
        local = policy.sink + np.argsort(frame[policy.sink :])
        local = local[frame[local] != EMPTY]
        slots = np.concatenate([np.arange(policy.sink), local])
        ours, filled = held[:, slots], min(end, theirs.shape[1])
        if are_keys:
            ours = as_stored(setup, ours, frame[slots].tolist())
        newest = theirs[:, filled - len(local) : filled]
        return ours, np.concatenate([theirs[:, : policy.sink], newest], axis=1)
