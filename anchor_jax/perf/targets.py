"""Chips to plan for, their links, and how many of them: `h100:7x8`, `v5p:4x4x4`.

Source: the chips' data sheets; half of the bidirectional numbers. NVLink; for GPU nodes
the network of DGX A100, H100 and B200, one port of 200 or 400 Gb/s for each chip; for
TPUs the inter-chip interconnect, for v4 table 4 of https://arxiv.org/abs/2304.01433.
Descriptions of GPUs are those of XLA, xla/backends/gpu/target_config/specs.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from anchor_jax.errors import UserError, suggest
from anchor_jax.perf import roofline

NODE = 8
"""Most chips of a GPU node."""
_GB = 10**9

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_most}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: {units}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_HOPPER = {
    **{"shared": 233472, "shared_most": 232448, "cores": 132, "units": 128},
    **{"cache": 52428800, "clock": 1.98, "major": 9, "link": 450, "network": 50},
}
_BLACKWELL = {
    **{"shared": 233472, "shared_most": 232448, "cores": 148, "units": 128},
    **{"cache": 132644864, "clock": 1.965, "major": 10, "link": 900, "network": 50},
}
_AMPERE = {
    **{"shared": 167936, "shared_most": 166912, "cores": 108, "units": 64},
    **{"cache": 41943040, "clock": 1.41, "major": 8, "link": 300, "network": 25},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Attributes:
      platform: `tpu` or `cuda`.
      kind: the compiler's name of the chip.
      chip: its data sheet.
      axes: number of axes of a pod's network; 0 means nodes of up to 8 chips.
      largest: longest sides of a pod.
      ring: least side of a slice whose ends are connected.
      link: bytes per second that a chip sends to the others of its node, or over all of
        its links to the others of its slice.
      network: bytes per second that a chip sends to other nodes.
      clock: cycles per second in the compiler's estimates; 0 if it makes none.
      description: description of a GPU for its compiler.
      conv: the fastest form of the VAE's convolutions on the chip.
    """

    platform: str
    kind: str
    chip: roofline.Chip
    axes: int = 0
    largest: tuple[int, ...] = ()
    ring: int = 0
    link: float = 0.0
    network: float = 0.0
    clock: float = 0.0
    description: str = ""
    conv: str = "taps"

    def shape(self, count: int) -> tuple[int, ...]:
        """Returns the usual shape of `count` chips: nodes and chips, or a pod's sides.

        Raises:
          UserError: No machine has this number of chips.
        """
        if not self.axes:
            if count < 1 or (count > NODE and count % NODE):
                raise UserError(
                    f"chips={count}: must be 1 to {NODE}, or a multiple of {NODE};"
                    " --topology=CHIP:NODESxCHIPS takes other nodes"
                )
            return max(1, count // NODE), min(count, NODE)
        if count < 1 or count & (count - 1):
            raise UserError(
                f"chips={count}: must be a power of two; --topology takes other slices"
            )
        doublings, sides = count.bit_length() - 1, []
        for left in range(self.axes, 0, -1):
            sides.append(2 ** (doublings // left))
            doublings -= doublings // left
        return tuple(sorted(sides, key=lambda side: (side == 1, side)))


def _tpu(
    name: str, largest: tuple[int, ...], ring: int, link: int, clock: float
) -> Target:
    chip = roofline.find(f"TPU {name}")
    speeds = {"link": link * _GB, "clock": clock * 1e9}
    return Target("tpu", name, chip, len(largest), largest, ring, **speeds)


def _gpu(name: str, family: dict, bandwidth: int, memory: int) -> Target:
    text = _GPU.format(name=name, bandwidth=bandwidth, memory=memory, **family)
    speeds = {name: family[name] * _GB for name in ("link", "network")}
    chip = roofline.find(name)
    return Target("cuda", name, chip, description=text, conv="native", **speeds)


TARGETS = {
    "a100": _gpu("NVIDIA A100-SXM4-80GB", _AMPERE, 2039000000000, 85094825984),
    "h100": _gpu("NVIDIA H100 80GB HBM3", _HOPPER, 3352320000000, 84942979072),
    "h200": _gpu("NVIDIA H200", _HOPPER, 4800000000000, 151397597184),
    "v5e": _tpu("v5e", (16, 16), ring=16, link=200, clock=1.5),
    "v5p": _tpu("v5p", (16, 16, 24), ring=4, link=600, clock=1.75),
    "v6e": _tpu("v6e", (16, 16), ring=16, link=400, clock=1.75),
    # The compilers have not been tried for these.
    "b200": _gpu("NVIDIA B200", _BLACKWELL, 7672320000000, 191514411008),
    "v4": _tpu("v4", (16, 16, 16), ring=4, link=300, clock=1.05),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips, and how they are connected.

    Attributes:
      name: name of the target.
      target: the chip.
      sides: nodes and chips per node, or the sides of a TPU slice.
    """

    name: str
    target: Target
    sides: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def label(self) -> str:
        """The name, as `parse_topology` reads it."""
        return f"{self.name}:{'x'.join(map(str, self.sides))}"

    @property
    def hosts(self) -> int:
        """Number of GPU nodes. All chips of a TPU slice are on one network: 1."""
        return 1 if self.target.axes else self.sides[0]

    def host(self, device: int) -> int:
        """Returns the number of a device's node."""
        return device // (self.chips // self.hosts)

    def links_of(self, devices: int) -> float:
        """Returns the share of a chip's links that a group of this many chips uses.

        On a slice these are the links along the sides that it needs, longest first.
        Without a ring half of them are busy. A GPU reaches every chip of its node with
        all links.
        """
        if not self.target.axes:
            return 1.0
        found, reached = 0.0, 1
        for side in sorted(self.sides, reverse=True):
            if reached < devices and side > 1:
                found += 1.0 if side >= self.target.ring else 0.5
                reached *= side
        return found / self.target.axes

    def compiler(self) -> tuple[str, dict[str, Any]]:
        """Returns the compiler's name of the topology, and further options."""
        target = self.target
        if not target.axes:
            shape = f"{self.sides[0]}x1x{self.sides[1]}"
            return target.kind, {
                "topology": shape,
                "target_config": target.description,
            }
        one = {"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {}
        return self.label.replace(self.name, target.kind, 1), one


def named(name: str) -> Target:
    """Returns the target of a name, whether or not its compiler is installed.

    Raises:
      UserError: The target is unknown.
    """
    if name not in TARGETS:
        raise UserError(f"target={name!r}{suggest(name, [*TARGETS, 'all'], 'targets')}")
    return TARGETS[name]


def topology(name: str, count: int = 1) -> Topology:
    """Returns the usual topology of a number of chips.

    Raises:
      UserError: The target is unknown, or no machine has this number of chips.
    """
    target = named(name)
    return Topology(name, target, target.shape(count))


def parse_topology(text: str) -> Topology:
    """Returns the topology of a name such as `h100:7x8`, `v5p:4x4x4` or `v6e`.

    Raises:
      UserError: The chip is unknown, or it has no such topology.
    """
    name, colon, shape = text.partition(":")
    if name not in TARGETS:
        known = suggest(name, TARGETS, "chips")
        raise UserError(f"--topology={text!r}: unknown chip {name!r}{known}")
    target = TARGETS[name]
    if not colon:
        return topology(name)
    form = "NODESxCHIPS, such as h100:7x8" if not target.axes else _slice(name, target)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--topology={text!r}: {shape!r} must be {form}")
    sides = tuple(map(int, shape.split("x")))
    if not target.axes and len(sides) == 1:
        sides = (1, *sides)
    if len(sides) != (target.axes or 2):
        raise UserError(f"--topology={text!r}: {shape!r} must be {form}")
    _check_sides(text, target, sides)
    return Topology(name, target, sides)


def _slice(name: str, target: Target) -> str:
    examples = {2: ("2x4", "8x8"), 3: ("2x2x1", "4x4x4")}[target.axes]
    listed = " or ".join(f"{name}:{one}" for one in examples)
    return f"{target.axes} sides of a slice, such as {listed}"


def _check_sides(text: str, target: Target, sides: tuple[int, ...]) -> None:
    """Raises UserError if nodes or slices of these sides do not exist."""
    if not target.axes:
        if sides[1] > NODE:
            raise UserError(
                f"--topology={text!r}: {sides[1]} chips per node; a node has at most"
                f" {NODE}, so write {text.partition(':')[0]}:NODESx{NODE}"
            )
        return
    odd = [side for side in sides if side > 2 and side % 2]
    too_long = any(
        side > most for side, most in zip(sorted(sides), target.largest, strict=True)
    )
    if odd or too_long:
        most = "x".join(map(str, target.largest))
        raise UserError(
            f"--topology={text!r}: the sides of a slice are 1 or even, and at most"
            f" {most}; choose {_slice(text.partition(':')[0], target)}"
        )


def file_name(topology: Topology, *parts: str) -> str:
    """Returns the name of a file for a program, such as `h100-7x8-critic.txt`."""
    words = re.findall(r"[\w.]+", " ".join((topology.label, *parts)))
    return f"{'-'.join(words)}.txt"


def find_target(name: str) -> Target:
    """Returns the target of a name.

    Raises:
      UserError: The target is unknown, or its compiler is not installed.
    """
    target = named(name)
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


def devices_of(topology: Topology):
    """Returns the descriptions of a topology's devices.

    Raises:
      UserError: The installed compiler does not support it.
    """
    jax.devices()  # Plug-ins are found when the first backend starts.
    name, options = topology.compiler()
    platform = topology.target.platform
    try:
        found = topologies.get_topology_desc(name, platform=platform, **options)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the compiler for {topology.target.chip.name} does not start for"
            f" {topology.label}: {reason}; it must suit the installed jax, and only one"
            " process at a time can use it"
        ) from error
    return found.devices


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device of a chip without a compiler, for shardings and not for programs."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int = 0
    client: Any = None


_KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
}
"""What jax calls a TPU."""


def stand_ins(topology: Topology) -> list[StandIn]:
    """Returns a device for each chip of a topology, in the order of a real one."""
    target, sides = topology.target, topology.sides
    found = []
    for number in range(topology.chips):
        if target.axes:
            place = np.unravel_index(number, sides[::-1])[::-1]  # x moves fastest
            coords = (*(int(n) for n in place), 0)[:3]
            one = ("tpu", _KINDS[target.kind], coords)
        else:
            one = ("gpu", target.chip.name, (topology.host(number), 0, number))
        found.append(StandIn(number, topology.host(number), *one))
    return found
