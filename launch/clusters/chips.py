"""TPU slices and GPU hosts under the names that Google Cloud gives them."""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence

CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of TPU.

    Attributes:
      prefix: begin of an accelerator type, before the number.
      per_chip: what that number counts for one chip: cores, or chips.
      selector: label of GKE's nodes.
      runtime: software of TPU VMs.
      largest: longest sides of a slice, sorted; their number is that of its dimensions.
      example: a slice, for messages.
    """

    prefix: str
    per_chip: int
    selector: str
    runtime: str
    largest: tuple[int, ...]
    example: str


TPUS = {
    "v4": Kind(
        "v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", (16, 16, 16), "v4:4x4x4"
    ),
    "v5e": Kind(
        "v5litepod",
        1,
        "tpu-v5-lite-podslice",
        "v2-alpha-tpuv5-lite",
        (16, 16),
        "v5e:8x8",
    ),
    "v5p": Kind("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", (16, 16, 24), "v5p:4x4x4"),
    "v6e": Kind("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", (16, 16), "v6e:8x8"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice, such as v5p:4x4x4."""

    kind: Kind
    sizes: Sequence[int]

    @property
    def topology(self) -> str:
        """The sizes as GKE writes them."""
        return "x".join(map(str, self.sizes))

    @property
    def chips(self) -> int:
        """All chips of the slice."""
        return math.prod(self.sizes)

    @property
    def hosts(self) -> int:
        """Machines of the slice."""
        return max(1, self.chips // CHIPS_PER_HOST)

    @property
    def chips_per_host(self) -> int:
        """Chips of each machine."""
        return self.chips // self.hosts

    @property
    def type(self) -> str:
        """The accelerator type of gcloud and xpk, such as v5p-128."""
        return f"{self.kind.prefix}-{self.chips * self.kind.per_chip}"


@dataclasses.dataclass(frozen=True)
class Gpus:
    """Hosts with 8 GPUs each, such as h100:7x8.

    Attributes:
      hosts: number of hosts.
      selector: label of GKE's nodes.
      device: xpk's name of such a host; empty if xpk does not know it.
    """

    hosts: int
    selector: str
    device: str

    @property
    def chips_per_host(self) -> int:
        """GPUs of each host."""
        return GPUS_PER_HOST


GPUS_PER_HOST = 8
GPUS = {
    "a100": ("nvidia-a100-80gb", ""),
    "h100": ("nvidia-h100-80gb", "h100-80gb-8"),
    "h100-mega": ("nvidia-h100-mega-80gb", "h100-mega-80gb-8"),
    "h200": ("nvidia-h200-141gb", "h200-141gb-8"),
    "b200": ("nvidia-b200", "b200-8"),
}


def topology(text: str) -> Slice | Gpus:
    """Returns the chips that KIND:SHAPE names, as in `plan`; an argparse type."""
    kind, _, shape = text.partition(":")
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape, re.ASCII):
        kind = ""
    sizes = [int(size) for size in shape.split("x")] if kind else []
    if kind in TPUS:
        return _slice(text, TPUS[kind], sizes)
    if kind in GPUS:
        if len(sizes) != 2 or sizes[1] != GPUS_PER_HOST:
            raise argparse.ArgumentTypeError(
                f"{text!r}: GPUs are given as KIND:HOSTSx{GPUS_PER_HOST}, such as"
                f" {kind}:7x{GPUS_PER_HOST}"
            )
        return Gpus(sizes[0], *GPUS[kind])
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a topology; give a TPU slice such as v5p:4x4x4 or v6e:8x8, or"
        f" hosts x GPUs such as h100:7x8; kinds: {', '.join((*TPUS, *GPUS))}"
    )


def tpu(text: str) -> Slice:
    """Returns the TPU slice that KIND:SHAPE names; an argparse type."""
    found = topology(text)
    if isinstance(found, Gpus):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a TPU slice such as v5p:4x4x4; kinds: {', '.join(TPUS)}"
        )
    return found


def _slice(text: str, kind: Kind, sizes: list[int]) -> Slice:
    if len(sizes) != len(kind.largest):
        raise argparse.ArgumentTypeError(
            f"{text!r}: a slice of this kind has {len(kind.largest)} dimensions;"
            f" example: {kind.example}"
        )
    # The rule of `plan`, in anchor_jax/perf/targets.py.
    odd = [size for size in sizes if size > 2 and size % 2]
    longest = zip(sorted(sizes), kind.largest, strict=True)
    if odd or any(size > most for size, most in longest):
        raise argparse.ArgumentTypeError(
            f"{text!r}: the sides of a slice are 1 or even, and at most"
            f" {'x'.join(map(str, kind.largest))}; example: {kind.example}"
        )
    found = Slice(kind, sizes)
    if found.chips > CHIPS_PER_HOST and found.chips % CHIPS_PER_HOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} has {found.chips} chips; a slice of several hosts has a multiple"
            f" of {CHIPS_PER_HOST}; example: {kind.example}"
        )
    return found
