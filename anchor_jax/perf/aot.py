"""Compiles the stream's programs for an absent chip.

No device is used. The compiler of a plug-in gets shapes and the description of a chip,
and reports the memory and the operations of each program.
"""

import dataclasses
import functools
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from anchor_jax import trees
from anchor_jax.errors import UserError, suggest
from anchor_jax.perf import roofline
from anchor_jax.streaming import stream
from anchor_jax.streaming.decode import decode, decode_next
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.wan import kernels, shapes
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeCodec, VaeConfig

ENCODER = "text encoder"
_ATTENDING = ("step", "switch")
_FUSED = ("tpu_custom_call", "__cudnn$fmha")
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Attributes:
      platform: `tpu` or `cuda`.
      kind: the compiler's name of the chip.
      chip: its data sheet.
      axes: number of axes of a pod's network; 0 means hosts of 8 chips.
      description: description of a GPU for its compiler.
      conv: the fastest form of the VAE's convolutions on the chip.
    """

    platform: str
    kind: str
    chip: roofline.Chip
    axes: int = 0
    description: str = ""
    conv: str = "taps"

    def name(self, count: int) -> tuple[str, dict[str, Any]]:
        """Returns the compiler's name of `count` chips, and further options.

        Raises:
          UserError: No machine has this number of chips.
        """
        if count < 1 or count & (count - 1):
            raise UserError(f"chips={count}: must be a power of two")
        if not self.axes:
            machines, each = max(1, count // 8), min(count, 8)
            shape = f"{machines}x1x{each}"
            return self.kind, {"topology": shape, "target_config": self.description}
        doublings, sides = count.bit_length() - 1, []
        for left in range(self.axes, 0, -1):
            sides.append(2 ** (doublings // left))
            doublings -= doublings // left
        sides.sort(key=lambda side: (side == 1, side))
        one = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        return f"{self.kind}:{'x'.join(map(str, sides))}", one


def _tpu(kind: str, name: str, axes: int) -> Target:
    return Target("tpu", name, roofline.find(kind), axes)


def _hopper(name: str, bandwidth: int, memory: int) -> Target:
    text = _GPU.format(name=name, bandwidth=bandwidth, memory=memory)
    chip = roofline.find(name)
    return Target("cuda", name, chip, description=text, conv="native")


TARGETS = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 3352320000000, 84942979072),
    "h200": _hopper("NVIDIA H200", 4800000000000, 151397597184),
    "v5e": _tpu("TPU v5e", "v5e", 2),
    "v5p": _tpu("TPU v5p", "v5p", 3),
    "v6e": _tpu("TPU v6e", "v6e", 2),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of its arguments.

    `reads` names the long-lived arrays among arguments and results. `tokens` is the
    least number of tokens per side of a score matrix, and `features` are dimensions
    that are not token axes.
    """

    function: Any
    args: tuple
    kwargs: dict
    reads: frozenset[str]
    tokens: int
    features: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program; sizes in bytes on one device.

    Attributes:
      seconds: time of lowering and compiling.
      arguments: size of the inputs, weights included.
      outputs: size of outputs that do not reuse an input.
      temporaries: size of the working memory.
      code: size of the executable.
      fused: number of calls of a fused attention kernel. None if the compiler could not
        print the program.
      scores: shapes of score matrices (tokens by tokens) in memory. It should be empty.
      reads: names of long-lived arrays among arguments and results.
    """

    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    fused: int | None
    scores: tuple[str, ...]
    reads: frozenset[str]

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code

    def problems(self) -> tuple[str, ...]:
        """Returns the faults of its attention over tokens."""
        if self.fused is None:
            return ("the compiler cannot print it, so its attention was not checked",)
        found = () if self.fused else ("no fused attention kernel",)
        scores = (f"score matrices {', '.join(self.scores)}",) if self.scores else ()
        return found + scores

    def summary(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        values = dataclasses.asdict(self) | {"peak": self.peak}
        return values | {"reads": sorted(self.reads), "scores": list(self.scores)}


@dataclasses.dataclass(frozen=True)
class Refused:
    """The compiler's reason for a program that does not fit; `peak` is a bound."""

    reason: str
    peak: int
    reads: frozenset[str]

    def summary(self) -> dict[str, Any]:
        return {"reason": self.reason, "peak": self.peak}


def find_target(name: str) -> Target:
    """Returns the target of a name.

    Raises:
      UserError: The target is unknown, or its compiler is not installed.
    """
    if name not in TARGETS:
        raise UserError(f"target={name!r}{suggest(name, [*TARGETS, 'all'], 'targets')}")
    target = TARGETS[name]
    modules, extra = {
        "tpu": (("libtpu",), "plan-tpu"),
        "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "plan-gpu"),
    }[target.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise UserError(
            f"target={name!r} needs its compiler, {' or '.join(modules)}, which is not"
            f" installed; run: pip install 'anchor_jax[{extra}]'"
        )
    return target


def devices_of(target: Target, count: int = 1):
    """Returns the descriptions of a number of devices of the target.

    Raises:
      UserError: The installed compiler does not support it, or no machine has this
        number.
    """
    jax.devices()  # Plug-ins are found when the first backend starts.
    name, options = target.name(count)
    try:
        found = topologies.get_topology_desc(name, platform=target.platform, **options)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the compiler for {target.chip.name} does not start: {reason}; it must"
            " suit the installed jax, and only one process at a time can use it"
        ) from error
    return found.devices


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


def _reason(message: str) -> str:
    """Returns the part of a compiler's message that says how much memory is missing."""
    if kernel := re.search(r"size ([\d.]+\w) and limit ([\d.]+\w).*vmem", message):
        return f"a kernel needs {kernel[1]} of vector memory, but has {kernel[2]}"
    used = re.search(r"Used [\w.]+ of [\w.]+ \w+", message)
    return f"does not fit: {used[0]}" if used else "does not fit in memory"


def on_device(program: Program, device) -> Program:
    """Returns a program with its arguments on one described device."""
    sharding = SingleDeviceSharding(device)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return dataclasses.replace(program, args=jax.tree.map(place, program.args))


def _text(compiled) -> str | None:
    """Returns a compiled program as text; some TPU programs cannot be printed."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def compile_program(program: Program) -> Compiled | Refused:
    """Compiles a program for a described device.

    The arguments carry their shardings.
    """
    began = time.perf_counter()
    lowered = program.function.lower(*program.args, **program.kwargs)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Refused(_reason(str(error)), trees.nbytes(program.args), program.reads)
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), _text(compiled)
    calls = [f'custom_call_target="{name}' for name in _FUSED]
    sizes = program.tokens, program.features
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=max(0, outputs),
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        fused=None if text is None else sum(text.count(call) for call in calls),
        scores=() if text is None else score_shapes(text, *sizes),
        reads=program.reads,
    )


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """A stream's programs on one chip; sizes in bytes.

    Attributes:
      target: name of the chip.
      stream: its sizes, for the roofline.
      programs: programs by name, or the compiler's reason for a refusal.
      resident: bytes of long-lived arrays by name.
    """

    target: Target
    stream: roofline.Stream
    programs: Mapping[str, Compiled | Refused]
    resident: Mapping[str, int]

    def needed(self, keep_encoder: bool) -> int:
        """Returns the peak memory.

        Args:
          keep_encoder: whether the text encoder stays beside the generator. If false,
            it encodes first and is then freed.
        """
        away = set() if keep_encoder else {ENCODER}
        beside = {name: n for name, n in self.resident.items() if name not in away}
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
            found.append(
                f"{chip} has too little memory; choose a smaller size, such as"
                " --size=320x576, or a larger chip"
            )
        elif self.needed(keep_encoder=True) > memory:
            found.append(
                f"the text encoder does not fit beside the rest on {chip}; use"
                " text_encoder=free, which frees it after encoding, or sharded"
            )
        return tuple(found)

    def summary(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        chip, stream = self.target.chip, self.stream
        without = dataclasses.replace(stream, codec=None)
        speed = functools.partial(roofline.frames_per_second, chip=chip)
        return {
            "chip": chip.name,
            "memory": chip.memory,
            "programs": {k: v.summary() for k, v in self.programs.items()},
            "resident": dict(self.resident),
            "needed": self.needed(keep_encoder=True),
            "needed_encoder_freed": self.needed(keep_encoder=False),
            "frames_per_second_peak": speed(without),
            "frames_per_second": speed(stream, efficiency=roofline.EFFICIENCY),
            "switch_seconds": roofline.switch_seconds(stream, chip),
            "first_seconds": roofline.first_seconds(stream, chip),
            "problems": list(self.problems()),
        }


def plan(
    name: str,
    setup: StreamSetup,
    text: TextConfig | None = None,
    vae: VaeConfig | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> StreamReport:
    """Compiles a stream's programs for a target.

    Args:
      name: name of the target.
      setup: the stream.
      text: sizes of the text encoder, or None to leave it out.
      vae: sizes of the VAE, or None to leave it out.
      progress: called with each program's name before it is compiled.

    Raises:
      UserError: The target is unknown, or its compiler is not installed.
    """
    target = find_target(name)
    (device,) = devices_of(target)
    if vae:
        vae = dataclasses.replace(vae, conv=target.conv)
    found, resident = programs(target, setup, text, VaeCodec(vae) if vae else None)
    made = {}
    for part, program in found.items():
        progress(part)
        made[part] = compile_program(on_device(program, device))
    stream = roofline.make_stream(
        setup.model, setup.grid, setup.policy, len(setup.levels), text=text, codec=vae
    )
    return StreamReport(target, stream, made, resident)


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]")
_CALLS = re.compile(r" fusion\(.*\bcalls=%?([\w.\-]+)")


def score_shapes(
    text: str, tokens: int, features: Iterable[int] = ()
) -> tuple[str, ...]:
    """Returns the shapes of score matrices in the memory of a compiled program.

    Arrays inside a fusion are not in memory.

    Args:
      text: text of `compiled.as_text()`.
      tokens: least number of tokens per side of a score matrix.
      features: dimensions that are not token axes.
    """
    features, inner = set(features), set(_CALLS.findall(text))
    held, fused = {}, False
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            fused = start[1] in inner
        elif not fused:
            made = line.partition(" = ")[2]
            for shape in _SHAPE.finditer(made[: made.find("(", 1)]):
                sizes = [int(size) for size in shape[1].split(",")]
                long = [n for n in sizes if n >= tokens and n not in features]
                if len(long) > 1:
                    held[shape[0]] = None
    return tuple(held)
