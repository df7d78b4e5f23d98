"""Compiles the stream's programs for an absent chip, and estimates their time."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax import trees
from anchor_jax.perf import compiling, roofline, targets
from anchor_jax.perf.compiling import Compiled, Program, Refused
from anchor_jax.perf.links import Layout
from anchor_jax.perf.targets import Target, Topology
from anchor_jax.streaming import stream
from anchor_jax.streaming.decode import decode, decode_next
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.wan import kernels, shapes
from anchor_jax.wan.spec import LatentGrid
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeCodec, VaeConfig

ENCODER = "text encoder"
_ATTENDING = ("step", "switch")


def programs(
    target: Target,
    setup: StreamSetup,
    text: TextConfig | None = None,
    codec: VaeCodec | None = None,
) -> tuple[dict[str, Program], dict[str, int]]:
    """Returns a stream's programs by name, and its long-lived arrays' bytes by name.

    Args:
      target: chip, which determines the attention kernel.
      setup: the stream; its `kernel` is replaced.
      text: the text encoder, or None to leave it out.
      codec: the codec, or None to leave it out.
    """
    model = setup.model
    kernel = kernels.choose(target.platform, model.dtype, model.head_dim)
    setup = dataclasses.replace(setup, kernel=kernel)
    found, resident = _generator(setup)
    if text:
        found["text"], resident[ENCODER] = text_program(text, setup.copies)
    if codec:
        decoders, sizes = _decoders(codec, setup)
        found |= decoders
        resident |= sizes
    return found, resident


def _generator(setup: StreamSetup) -> tuple[dict[str, Program], dict[str, int]]:
    """Returns the generator's programs, and the bytes of its arrays.

    They include the prompt switch of a long stream if it has a re-cache.
    """
    model, policy = setup.model, setup.policy
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = {"params": shapes.of(model)}
    shape = (setup.copies, model.text_len, model.text_dim)
    embedding = jax.ShapeDtypeStruct(shape, model.dtype)
    context = jax.eval_shape(
        functools.partial(stream.project, setup=setup), variables, embedding
    )
    state = jax.eval_shape(functools.partial(stream.start, setup=setup), context)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rows, columns = setup.tokens
    common = {
        "reads": frozenset({"generator", "cache"}),
        "tokens": policy.block * rows * columns,
        "features": features_of(model),
    }
    step = (variables, state, key, number)
    found = {"step": Program(stream.make_block, step, {"setup": setup}, **common)}
    recache = policy.recache(2 * policy.window)
    if recache:
        cut = jax.ShapeDtypeStruct((), jnp.bool_)
        switch = (variables, state, context, number, cut)
        static = {"setup": setup, "recache": recache}
        found["switch"] = Program(stream.switch, switch, static, **common)
    return found, {"generator": trees.nbytes(variables), "cache": trees.nbytes(state)}


def features_of(model, rank: int = 0) -> frozenset[int]:
    """Returns dimensions of a generator that are not token axes.

    Args:
      model: sizes of the generator.
      rank: rank of its low-rank updates.
    """
    # Layers with one input may run together, and their updates too.
    widths = (model.dim, model.dim + rank)
    joined = {count * width for count in range(1, 7) for width in widths}
    wide = {model.ffn_dim, model.ffn_dim + rank}
    return frozenset(joined | wide | {model.text_dim})


def text_program(config: TextConfig, prompts: int) -> tuple[Program, int]:
    """Returns the text encoder's program, and the bytes of its weights."""
    encoder = Umt5Encoder(config)
    ids = jax.ShapeDtypeStruct((prompts, config.text_len), jnp.int32)
    params = shapes.of(config)

    @jax.jit
    def encode(params, ids, mask):
        return encoder.apply({"params": params}, ids, mask)

    sizes = {config.dim, config.attention_dim, config.ffn_dim, config.vocab}
    return Program(
        encode,
        (params, ids, ids),
        {},
        reads=frozenset({ENCODER}),
        # Score matrices of one prompt are small and intended.
        tokens=config.text_len + 1,
        features=frozenset(sizes),
    ), trees.nbytes(params)


def _decoders(codec: VaeCodec, setup: StreamSetup):
    grid, frames = setup.grid, setup.policy.block
    config = codec.config
    shape = (1, frames, grid.height, grid.width, config.z_dim)
    latents = jax.ShapeDtypeStruct(shape, setup.model.dtype)
    params = shapes.of(config)
    call = functools.partial(decode, codec=codec)
    _, state = jax.eval_shape(call, params, None, latents)
    widths = {config.base_dim * factor for factor in config.dim_mult}
    common = {
        "tokens": grid.height * grid.width,
        "features": frozenset(widths | {3 * max(widths)}),
    }
    reads = frozenset({"decoder", "decoder state"})
    first, later = (params, None, latents), (params, state, latents)
    static = {"codec": codec}
    found = {
        "decode first": Program(decode, first, static, reads, **common),
        "decode": Program(decode_next, later, static, reads, **common),
    }
    return found, {
        "decoder": trees.nbytes(params),
        "decoder state": trees.nbytes(state),
    }


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """A stream's programs on one chip; sizes in bytes.

    Attributes:
      target: name of the chip.
      stream: its sizes, for the roofline.
      programs: programs by name, or the compiler's reason for a refusal. Without a
        compiler there are none, and memory is a formula.
      resident: bytes of long-lived arrays by name.
      efficiency: share of the chip's peak that products are assumed to reach.
    """

    target: Target
    stream: roofline.Stream
    programs: Mapping[str, Compiled | Refused]
    resident: Mapping[str, int]
    efficiency: float = roofline.EFFICIENCY

    def needed(self, keep_encoder: bool) -> int:
        """Returns the peak memory.

        Args:
          keep_encoder: whether the text encoder stays beside the generator. If false,
            it encodes first and is then freed.
        """
        away = set() if keep_encoder else {ENCODER}
        beside = {name: n for name, n in self.resident.items() if name not in away}
        if not self.programs:
            return round(sum(beside.values()) + roofline.working_bytes(self.stream))
        totals = [0]
        for made in self.programs.values():
            kept = sum(n for name, n in beside.items() if name not in made.reads)
            alone = made.reads <= away
            totals.append(made.peak + (0 if alone else kept))
        return max(totals)

    def problems(self) -> tuple[str, ...]:
        """Returns the problems of the programs and the memory, with remedies."""
        found = []
        memory, chip = self.target.chip.memory, self.target.chip.name
        for name, made in self.programs.items():
            if isinstance(made, Refused):
                found.append(f"{name}: {made.reason}")
            elif name in _ATTENDING:
                found += [f"{name}: {problem}" for problem in made.problems()]
        if self.needed(keep_encoder=False) > memory:
            size = self._smaller()
            remedy = (
                f"choose a smaller size, such as --size={size}, or a larger chip"
                if size
                else "choose a larger chip; no smaller size fits"
            )
            found.append(f"{chip} has too little memory; {remedy}")
        elif self.needed(keep_encoder=True) > memory:
            found.append(
                f"the text encoder does not fit beside the rest on {chip}; use"
                " text_encoder=free, which frees it after encoding, or sharded"
            )
        return tuple(found)

    def _smaller(self) -> str | None:
        """Returns the largest smaller size that fits without the text encoder."""
        stream = dataclasses.replace(self.stream, text=None)
        grids, here = stream.model.family.grids, _area(stream.grid)
        fitting = {}
        for size, grid in grids.items():
            smaller = dataclasses.replace(stream, grid=grid)
            needed = sum(roofline.resident_bytes(smaller).values())
            needed += roofline.working_bytes(smaller)
            if _area(grid) < here and needed <= self.target.chip.memory:
                fitting[size] = _area(grid)
        return max(fitting, key=fitting.get, default=None)

    def estimates(self) -> dict[str, float]:
        """Returns the seconds of programs by the compiler, with attention by formula.

        The compiler leaves out kernels. Their attention counts with the assumed share
        of the peak.
        """
        chip = self.target.chip
        attention = roofline.attention_seconds(self.stream, chip, self.efficiency)
        return {
            name: made.estimate + attention.get(name, 0.0)
            for name, made in self.programs.items()
            if isinstance(made, Compiled) and made.estimate
        }

    def cost(self, price: float | None) -> dict[str, float | None]:
        """Returns what an hour of video takes, if it is made as fast as possible.

        Args:
          price: price of a chip-hour, or None.
        """
        chip, stream = self.target.chip, self.stream
        made = roofline.frames_per_second(stream, chip, self.efficiency)
        hours = stream.model.family.frames_per_second / made
        total = None if price is None else price * hours
        return {"chip_hours": hours, "price": price, "total": total}

    def summary(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        chip, stream = self.target.chip, self.stream
        without = dataclasses.replace(stream, codec=None)
        speed = functools.partial(roofline.frames_per_second, chip=chip)
        given = {"chip": chip, "efficiency": self.efficiency}
        return {
            "chip": chip.name,
            "memory": chip.memory,
            "programs": {k: v.summary() for k, v in self.programs.items()},
            "resident": dict(self.resident),
            "needed": self.needed(keep_encoder=True),
            "needed_encoder_freed": self.needed(keep_encoder=False),
            "efficiency": self.efficiency,
            "seconds": roofline.program_seconds(stream, **given),
            "seconds_compiler": self.estimates(),
            "frames_per_second_peak": speed(without),
            "frames_per_second": speed(stream, efficiency=self.efficiency),
            "switch_seconds": roofline.switch_seconds(stream, **given),
            "first_seconds": roofline.first_seconds(stream, **given),
            "problems": list(self.problems()),
        }


def _area(grid: LatentGrid) -> int:
    return grid.height * grid.width


def plan(
    name: str,
    setup: StreamSetup,
    text: TextConfig | None = None,
    vae: VaeConfig | None = None,
    progress: Callable[[str], None] = lambda _: None,
    *,
    compiles: bool = True,
    efficiency: float = roofline.EFFICIENCY,
    keep: pathlib.Path | None = None,
) -> StreamReport:
    """Estimates a stream on one chip of a target, and compiles its programs.

    Args:
      name: name of the target.
      setup: the stream.
      text: sizes of the text encoder, or None to leave it out.
      vae: sizes of the VAE, or None to leave it out.
      progress: called with each program's name before it is compiled.
      compiles: whether to compile. If false, everything is a formula.
      efficiency: share of the chip's peak that products are assumed to reach.
      keep: folder for the texts of the compiled programs, or None.

    Raises:
      UserError: The target is unknown, or its compiler is not installed.
    """
    target = targets.find_target(name) if compiles else targets.named(name)
    if vae:
        vae = dataclasses.replace(vae, conv=target.conv)
    found, resident = programs(target, setup, text, VaeCodec(vae) if vae else None)
    one = targets.topology(name)
    made = _compiled(found, one, progress, keep) if compiles else {}
    stream = roofline.make_stream(
        setup.model, setup.grid, setup.policy, len(setup.levels), text=text, codec=vae
    )
    return StreamReport(target, stream, made, resident, efficiency)


def _compiled(
    found: Mapping[str, Program],
    one: Topology,
    progress: Callable[[str], None],
    keep: pathlib.Path | None,
) -> dict[str, Compiled | Refused]:
    """Returns programs compiled for a topology of one chip."""
    (device,) = targets.devices_of(one)
    made = {}
    for part, program in found.items():
        progress(part)
        file = keep and keep / targets.file_name(one, part)
        placed = compiling.on_device(program, device)
        made[part] = compiling.compile_program(placed, Layout(one), file)
    return made
