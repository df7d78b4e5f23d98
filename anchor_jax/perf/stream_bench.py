"""Measures the phases of a stream against a matmul in the same run."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import flow, trees
from anchor_jax.config import from_config, with_field
from anchor_jax.errors import UserError
from anchor_jax.flow import Levels
from anchor_jax.perf import roofline
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling.resolve import make_policy
from anchor_jax.streaming import decode, stream
from anchor_jax.streaming.types import PromptChange, StreamSetup
from anchor_jax.wan import kernels, shapes
from anchor_jax.wan.spec import LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeCodec, VaeConfig

_CPU_MATMUL, _MATMUL = 1024, 8192


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """The fields of a config of `bench`; `configs/bench_medium.py` explains them."""

    model: ModelConfig
    text: TextConfig
    vae: VaeConfig
    height: int
    width: int
    policy: str
    rules: str
    rope: str | None
    on_switch: str | None
    window: int | None
    sink: int | None
    block: int | None
    attention: str
    steps: tuple[int, ...]
    shift: float
    guidance: float
    frames: int
    switch_frame: int
    repeats: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """The workload of a benchmark, with random weights.

    Attributes:
      setup: static setup of the stream.
      text: sizes of the text encoder.
      codec: the VAE.
      frames: latent frames of the stream.
      switch_frame: latent frame of the prompt switch, at a block's start.
      repeats: number of measurements of phases outside the stream.
    """

    setup: StreamSetup
    text: TextConfig
    codec: VaeCodec
    frames: int
    switch_frame: int
    repeats: int = 3


def make_workload(config) -> Workload:
    """Returns the workload of a config.

    Raises:
      UserError: A field is wrong.
    """
    # Configs of older versions lack this field.
    config = with_field(config, "vae", "pixel_patch", VaeConfig.pixel_patch)
    read = from_config(BenchConfig, config, "config")
    model, block = read.model, read.block or 3
    if read.switch_frame % block or not 0 < read.switch_frame < read.frames:
        raise UserError(
            f"config.switch_frame={read.switch_frame}: must be a multiple of the block"
            f" of {block} between 0 and frames={read.frames}"
        )
    if read.repeats < 1 or len(read.steps) < 2:
        raise UserError(
            f"config.repeats={read.repeats}, config.steps={read.steps}: needs at"
            " least 1 repeat, and 2 steps to separate a level from the clean pass"
        )
    if read.frames % block:
        raise UserError(
            f"config.frames={read.frames}: expected a multiple of the block of {block}"
        )
    segments = (Segment("one", 0), Segment("two", read.switch_frame))
    policy = make_policy(read, Script(segments, read.frames))
    if policy.restart or (policy.limit is not None and read.frames > policy.limit):
        raise UserError(
            f"config.policy={read.policy!r} cannot make frames={read.frames} in one"
            " stream; choose a policy without restarts, or frames up to its limit of"
            f" {policy.limit}"
        )
    grid = LatentGrid(read.height, read.width)
    try:
        grid.tokens(model.patch)
    except ValueError as error:
        raise UserError(f"config.height, config.width: {error}") from error
    setup = StreamSetup(
        model=model,
        grid=grid,
        policy=policy,
        levels=flow.few_step_levels(read.steps, read.shift),
        guidance=read.guidance,
        kernel=kernels.named(read.attention, model.dtype, model.head_dim),
    )
    codec = VaeCodec(read.vae)
    counts = (read.frames, read.switch_frame, read.repeats)
    return Workload(setup, read.text, codec, *counts)


@dataclasses.dataclass
class Times:
    """Wall and CPU seconds of repeated calls."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    def of(self, clock: str) -> float:
        """Returns the median on one of the two clocks."""
        return statistics.median(getattr(self, clock))

    def summary(self) -> dict[str, Any]:
        """Returns medians and spreads."""
        return {
            clock: {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for clock, values in dataclasses.asdict(self).items()
        }


def measure(workload: Workload, progress: Callable[[str], None]) -> dict[str, Any]:
    """Returns the measurements of one stream as plain values.

    Efficiency is a phase's model FLOP/s divided by those of a matmul in the same run,
    by CPU seconds on a CPU and by wall seconds elsewhere. FLOPs count matrix products
    and convolutions over the visible keys.

    Args:
      workload: the workload.
      progress: called with the name of each part before it starts.
    """
    run = _Run(workload, progress)
    run.stream()
    run.others()
    return run.report()


class _Run:
    """The arrays and phase times of one run."""

    def __init__(self, workload: Workload, progress: Callable[[str], None]):
        self.workload, self.progress = workload, progress
        self.setup = workload.setup
        self.on_cpu = jax.default_backend() == "cpu"
        self.clock = "cpu_seconds" if self.on_cpu else "seconds"
        self.times: dict[str, Times] = {}
        self.first: dict[str, float] = {}
        self.keys: list[int] = []
        self.traces: dict[str, int] = {}
        progress("weights")
        setup, text = self.setup, workload.text
        self.variables = {"params": _random(setup.model)}
        ids = jnp.zeros((1, text.text_len), jnp.int32)
        self.ids = ids, jnp.ones_like(ids)
        self.text_params = _random(text)
        self.codec_params = _random(workload.codec.config)
        size = _CPU_MATMUL if self.on_cpu else _MATMUL
        self.factor = jnp.ones((size, size), setup.model.dtype) / size
        self.matmul = jax.jit(jnp.matmul)

    def time(self, phase: str, run: Callable[[], Any]) -> Any:
        """Returns the result of `run`; the first call compiles and is kept apart."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = jax.block_until_ready(run())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if phase not in self.first:
            self.first[phase] = wall
            return result
        kept = self.times.setdefault(phase, Times())
        kept.seconds.append(wall)
        kept.cpu_seconds.append(cpu)
        return result

    def stream(self) -> None:
        """Runs the stream twice, with a switch; the first run compiles."""
        workload, setup = self.workload, self.setup
        key = jax.random.key(0)
        before = _traces()
        for name in ("compile", "stream"):
            self.progress(name)
            self.keys = []
            for phase in ("block", "switch", "decode"):
                self.times.pop(phase, None)
            state, decoder = self._begin()
            for frame in range(0, workload.frames, setup.policy.block):
                if frame == workload.switch_frame:
                    state = self._switch(state, frame)
                self._measure_matmul()
                state, latents, plan = self.time(
                    "block",
                    lambda state=state, frame=frame: stream.make_block(
                        self.variables, state, key, np.int32(frame), setup=setup
                    ),
                )
                self.keys.append(int(plan.frames))
                phase = "decode" if frame else "first decode"
                decoder = self._decode(phase, decoder, latents)
            self.state = state
        self.traces = {k: n - before[k] for k, n in _traces().items()}

    def others(self) -> None:
        """Measures a noise level alone, which the stream cannot show."""
        self.progress("phases")
        setup = self.setup
        levels = setup.levels
        one = Levels(levels.timestep[:1], levels.sigma[:1])
        short = dataclasses.replace(setup, levels=one)
        key, frame = jax.random.key(0), np.int32(self.workload.frames)
        for _ in range(1 + max(2, self.workload.repeats)):
            self._measure_matmul()
            for phase, chosen in (("short block", short), ("same block", setup)):
                copy = jax.block_until_ready(jax.tree.map(jnp.array, self.state))
                self.time(
                    phase,
                    lambda copy=copy, chosen=chosen: stream.make_block(
                        self.variables, copy, key, frame, setup=chosen
                    ),
                )

    def _begin(self):
        """Returns a new stream; a prompt is encoded once per measurement."""
        for _ in range(1 + self.workload.repeats):
            context = self._context()
        return stream.start(context, setup=self.setup), None

    def _context(self):
        embedding = self.time(
            "text",
            lambda: _encode(self.text_params, *self.ids, config=self.workload.text),
        )
        rows = jnp.repeat(embedding, self.setup.copies, axis=0)
        return self.time(
            "project", lambda: stream.project(self.variables, rows, setup=self.setup)
        )

    def _switch(self, state, frame: int):
        for _ in range(1 + self.workload.repeats):
            copy = jax.block_until_ready(jax.tree.map(jnp.array, state))
            context = jax.block_until_ready(jax.tree.map(jnp.array, state.context))
            result, _ = self.time(
                "switch",
                lambda copy=copy, context=context: stream.change_prompt(
                    self.variables,
                    copy,
                    PromptChange(context),
                    frame,
                    setup=self.setup,
                ),
            )
        return result

    def _decode(self, phase: str, state, latents):
        _, state = self.time(
            phase,
            lambda: decode.decode_next(
                self.codec_params, state, latents, codec=self.workload.codec
            ),
        )
        return state

    def _measure_matmul(self) -> None:
        for _ in range(3):
            self.time("matmul", lambda: self.matmul(self.factor, self.factor))

    def report(self) -> dict[str, Any]:
        """Returns the measurements."""
        setup, times = self.setup, self.times
        count = len(setup.levels)
        whole, short = times.pop("same block"), times.pop("short block")
        phases = {name: _phase(times[name]) for name in ("text", "project", "switch")}
        phases["decode"] = _phase(times["decode"])
        level = {c: (whole.of(c) - short.of(c)) / max(1, count - 1) for c in _CLOCKS}
        phases["levels"] = {c: count * level[c] for c in _CLOCKS}
        phases["clean pass"] = {c: short.of(c) - level[c] for c in _CLOCKS}
        self._add_efficiency(phases)
        block = self._blocks()
        latency = ("text", "project", "switch")
        waits = sum(times[name].of("seconds") for name in latency)
        start = sum(times[name].of("seconds") for name in ("text", "project"))
        begin = times["block"].seconds[0] + times.get("first decode", Times([0.0])).of(
            "seconds"
        )
        pixels = setup.model.family.strides[0] * setup.policy.block
        decoding = times["decode"].of("seconds")
        return {
            "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(),
            "jax": jax.__version__,
            "attention": type(setup.network.attention).__name__,
            "matmul": {"size": self.factor.shape[0], "flops_per_second": self._peak()},
            "block": block,
            "phases": phases,
            "frames_per_second": {
                "without decoding": pixels / block["seconds"]["median"],
                "with decoding": pixels / (block["seconds"]["median"] + decoding),
            },
            "first_frame_seconds": start + begin,
            "switch_latency_seconds": waits,
            "switch_latency_blocks": waits / block["seconds"]["median"],
            "first_call_seconds": self.first,
            "traces": self.traces,
            "cache_bytes": trees.nbytes(self.state.cache),
            "weight_bytes": trees.nbytes(self.variables),
        }

    def _peak(self) -> float:
        """Returns the matmul's FLOP/s."""
        work = 2.0 * self.factor.shape[0] ** 3
        return work / self.times["matmul"].of(self.clock)

    def _flops(self, frames: int, keys: int) -> float:
        setup = self.setup
        one = roofline.pass_flops(setup.model, setup.grid, frames, keys)
        return setup.copies * one.total

    def _blocks(self) -> dict[str, Any]:
        """Returns the blocks of the stream, each with its FLOPs."""
        setup, times = self.setup, self.times["block"]
        passes = len(setup.levels) + 1
        flops = [passes * self._flops(setup.policy.block, keys) for keys in self.keys]
        taken = getattr(times, self.clock)
        reached = [work / used for work, used in zip(flops, taken, strict=True)]
        return times.summary() | {
            "flops": flops,
            "keys": self.keys,
            "efficiency": statistics.median(reached) / self._peak(),
        }

    def _add_efficiency(self, phases: dict[str, dict[str, Any]]) -> None:
        setup, workload = self.setup, self.workload
        policy = setup.policy
        keys = min(self.keys[-1], policy.window + policy.junction_frames)
        one = self._flops(policy.block, keys)
        recache = policy.recache(workload.switch_frame)
        work = {
            "levels": len(setup.levels) * one,
            "clean pass": one,
            "text": roofline.text_flops(workload.text),
            "project": setup.copies * roofline.context_flops(setup.model),
            "decode": policy.block
            * roofline.decode_flops(workload.codec.config, setup.grid),
        }
        if recache:
            seen = recache.frames + (0 if recache.sink else policy.sink)
            work["switch"] = self._flops(recache.frames, seen)
        for name, flops in work.items():
            used = phases[name][self.clock]
            phases[name] |= {"flops": flops, "efficiency": flops / used / self._peak()}


_CLOCKS = ("seconds", "cpu_seconds")


def _phase(times: Times) -> dict[str, Any]:
    return {clock: times.of(clock) for clock in _CLOCKS}


def _traces() -> dict[str, int]:
    """Returns the number of traces of each program of a stream so far."""
    programs = {
        "advance": stream.make_block,
        "switch": stream.switch,
        "decode": decode.decode_next,
    }
    return {name: one._cache_size() for name, one in programs.items()}  # noqa: SLF001


@functools.partial(jax.jit, static_argnames="config")
def _encode(params, ids, mask, *, config: TextConfig) -> jax.Array:
    return Umt5Encoder(config).apply({"params": params}, ids, mask)


def _random(config: ModelConfig | TextConfig | VaeConfig):
    """Returns random parameters of a network's sizes, made on the device."""
    leaves, tree = jax.tree.flatten(shapes.of(config))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, leaf):
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([draw(*pair) for pair in zip(keys, leaves, strict=True)])
