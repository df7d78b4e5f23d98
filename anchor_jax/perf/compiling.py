"""Compiles a program for an absent chip, and reads what the compiler says of it.

No device is used. The compiler of a plug-in gets shapes and the description of a chip,
and reports the memory, the operations and the collectives of the program.
"""

import dataclasses
import pathlib
import re
import time
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from anchor_jax import trees
from anchor_jax.errors import UserError
from anchor_jax.perf import hlo
from anchor_jax.perf.links import Layout, Traffic

_FUSED = ("tpu_custom_call", "__cudnn$fmha")
_LONGEST = 200  # characters of a compiler's reason


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
      traffic: what a chip sends, by kind of collective. Passes that may be left out
        count as run.
      estimate: the compiler's own estimate of the seconds outside custom calls, and so
        without attention in a kernel. None if it makes none.
    """

    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    fused: int | None
    scores: tuple[str, ...]
    reads: frozenset[str]
    traffic: tuple[Traffic, ...] = ()
    estimate: float | None = None

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


def link_seconds(program: Compiled) -> float:
    """Returns the seconds of a program's collectives, one after another."""
    return sum(one.seconds for one in program.traffic)


@dataclasses.dataclass(frozen=True)
class Refused:
    """The compiler's reason for refusing a program; `peak` is a lower bound."""

    reason: str
    peak: int
    reads: frozenset[str]

    def summary(self) -> dict[str, Any]:
        return {"reason": self.reason, "peak": self.peak}


def _reason(message: str) -> str:
    """Returns the part of a compiler's message that says why it refused a program."""
    if kernel := re.search(r"size ([\d.]+\w) and limit ([\d.]+\w).*vmem", message):
        return f"a kernel needs {kernel[1]} of vector memory, but has {kernel[2]}"
    if used := re.search(r"Used [\w.]+ of [\w.]+ \w+", message):
        return f"does not fit: {used[0]}"
    if "RESOURCE_EXHAUSTED" in message:
        return "does not fit in memory"
    short = " ".join(message.split())
    more = "..." if len(short) > _LONGEST else ""
    return f"the compiler failed: {short[:_LONGEST]}{more}"


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
    except Exception:  # noqa: BLE001 - backends differ in what they raise
        return None


def compile_program(
    program: Program, layout: Layout | None = None, keep: pathlib.Path | None = None
) -> Compiled | Refused:
    """Compiles a program for described devices.

    The arguments carry their shardings.

    Args:
      program: the program.
      layout: the devices of its mesh, for the collectives. None counts none.
      keep: file that gets the text of the compiled program, or None.
    """
    began = time.perf_counter()
    try:
        compiled = program.function.lower(*program.args, **program.kwargs).compile()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - errors of kernels share no class
        message = str(error) or type(error).__name__
        return Refused(_reason(message), trees.nbytes(program.args), program.reads)
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), _text(compiled)
    if keep and text is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(text, encoding="utf-8")
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=max(0, outputs),
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        reads=program.reads,
        **_read(text, program, layout),
    )


def _read(text: str | None, program: Program, layout: Layout | None) -> dict[str, Any]:
    """Returns the fields of `Compiled` that the program's text says."""
    if text is None:
        return {"fused": None, "scores": ()}
    calls = [f'custom_call_target="{name}' for name in _FUSED]
    found = {
        "fused": sum(text.count(call) for call in calls),
        "scores": hlo.score_shapes(text, program.tokens, program.features),
    }
    if layout:
        work, clock = hlo.read(text), layout.topology.target.clock
        found["traffic"] = layout.traffic(work.collectives)
        found["estimate"] = work.cycles / clock if clock and work.cycles else None
    return found
