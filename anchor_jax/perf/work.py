"""Operations, memory and collectives of a mean training step, by arithmetic only.

The memory of activations is a fit to programs that were compiled for H100 and v5p; it
is right to about a third. A compiled program replaces it.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from anchor_jax.perf import roofline
from anchor_jax.perf.hlo import Collective, Groups
from anchor_jax.perf.links import Layout, Traffic
from anchor_jax.wan.spec import ModelConfig

ERROR = 1 / 3
"""Largest error of `working_bytes`, as a share, where it was compared."""
WIDTH = 2
"""Bytes of a weight in products, and of an activation."""
_ACROSS_HEADS = 3
"""Sums over split heads in a layer: after two attentions and the feed-forward."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a network in a training step, for one video.

    Attributes:
      name: what it does.
      role: first word of the programs' names that contain it.
      each: how often a step contains it, on average.
      model: sizes of the network, or None for the codec.
      flops: operations of the model. Repeated ones do not count.
      again: operations that are repeated to save memory.
      attention: operations of self-attention, repeated ones too.
      passes: calls of the network; a backward pass is one more.
      tokens: tokens of all passes.
      live: tokens of one pass.
      gathers: how often split weights are gathered.
      backward: whether activations are stored for a backward pass.
      whole: whether all layers are gathered at once, and stay.
      gradient: bytes of a gradient that is added up whole on each device.
    """

    name: str
    role: str
    each: float = 1.0
    model: ModelConfig | None = None
    flops: float = 0.0
    again: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    tokens: float = 0.0
    live: int = 0
    gathers: int = 0
    backward: bool = False
    whole: bool = False
    gradient: float = 0.0


def repeated(remat: str, forward: roofline.Pass) -> float:
    """Returns the operations of a backward pass that repeat the forward pass."""
    if remat == "nothing_saveable":
        return forward.total
    if remat.startswith("dots"):
        return forward.self_attention  # Its products are in a kernel, not in dots.
    return 0.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step's time and memory depend on, beside its operations.

    Attributes:
      layout: the chips.
      mesh: devices by axis: data, fsdp, context, tensor.
      batch: videos per step, over all devices.
      remat: rematerialisation policy.
      microbatches: parts of a batch that follow one another.
      efficiency: share of the peak that products are assumed to reach.
    """

    layout: Layout
    mesh: Mapping[str, int]
    batch: int
    remat: str
    microbatches: int = 1
    efficiency: float = roofline.EFFICIENCY

    @property
    def videos(self) -> float:
        """Videos of one device."""
        return self.batch / (self.mesh["data"] * self.mesh["fsdp"])

    @property
    def chips(self) -> int:
        return self.layout.topology.chips


@dataclasses.dataclass(frozen=True)
class Step:
    """A mean training step by formula.

    Attributes:
      flops: operations of the models for all videos, as MFU counts them.
      again: repeated operations for all videos.
      compute: seconds of products at the assumed share of the peak.
      memory: seconds in which weights are read.
      traffic: what a chip sends, by kind of collective.
      peak: operations per second of all chips.
      efficiency: the assumed share of the peak.
    """

    flops: float
    again: float
    compute: float
    memory: float
    traffic: tuple[Traffic, ...]
    peak: float
    efficiency: float

    @property
    def links(self) -> float:
        """Seconds of collectives."""
        return sum(one.seconds for one in self.traffic)

    @property
    def seconds(self) -> float:
        """Seconds of a step in which collectives overlap with nothing."""
        return max(self.compute, self.memory) + self.links

    @property
    def mfu(self) -> float:
        """Share of the peak that the models' operations reach."""
        return self.flops / (self.seconds * self.peak)


def step_flops(uses: Iterable[Use], batch: int) -> float:
    """Returns the operations of the models in a mean step, as MFU counts them."""
    return batch * sum(one.each * one.flops for one in uses)


def step(uses: Iterable[Use], setting: Setting, trained: Mapping[str, float]) -> Step:
    """Returns a mean step.

    Args:
      uses: what the step does.
      setting: chips, mesh and batch.
      trained: bytes of trained arrays whose gradients are reduced in a mean step, by
        network.
    """
    uses = tuple(uses)
    chip = setting.layout.topology.target.chip
    peak = chip.flops * setting.chips
    flops = step_flops(uses, setting.batch)
    again = setting.batch * sum(one.each * one.again for one in uses)
    read = sum(one.each * one.passes * _weights(one, setting) for one in uses)
    return Step(
        flops=flops,
        again=again,
        compute=(flops + again) / (peak * setting.efficiency),
        memory=read / chip.bandwidth,
        traffic=_traffic(uses, setting, trained),
        peak=peak,
        efficiency=setting.efficiency,
    )


def _weights(use: Use, setting: Setting) -> float:
    """Returns the bytes of a network's weights on a device that gathered them."""
    if use.model is None:
        return 0.0
    return WIDTH * roofline.model_params(use.model) / setting.mesh["tensor"]


def along(mesh: Mapping[str, int], axis: str) -> Groups:
    """Returns the positions of the devices along an axis of a mesh."""
    shape = tuple(mesh.values())
    numbers = np.arange(np.prod(shape)).reshape(shape)
    rows = np.moveaxis(numbers, list(mesh).index(axis), -1).reshape(-1, mesh[axis])
    return tuple(tuple(int(number) for number in row) for row in rows)


def _traffic(uses, setting: Setting, trained: Mapping[str, float]):
    """Returns a mean step's collectives: weights, activations, gradients."""
    mesh, found = setting.mesh, []

    def add(kind: str, nbytes: float, axis: str, times: float) -> None:
        if mesh[axis] > 1 and nbytes and times:
            groups = along(mesh, axis)
            found.append(Collective(kind, nbytes, groups, "", times=times))

    for one in uses:
        if one.model is None:
            continue
        add("all-gather", _weights(one, setting), "fsdp", one.each * one.gathers)
        sums = one.tokens * one.model.dim * WIDTH * setting.videos
        layers = _ACROSS_HEADS * one.model.num_layers
        add("all-reduce", sums, "tensor", one.each * layers)
    for nbytes in trained.values():
        part = nbytes / mesh["tensor"]
        add("reduce-scatter", part, "fsdp", 1)
        add("all-reduce", part / mesh["fsdp"], "data", 1)
    return setting.layout.traffic(found)


def working_bytes(uses: Iterable[Use], setting: Setting) -> float:
    """Returns a rough size of the working memory of a step's largest program.

    It holds the weights of two layers or of the whole network, the arrays of one layer,
    and for a backward pass what the rematerialisation policy keeps of all layers.
    """
    split = setting.mesh["tensor"]
    return max(
        (_working(one, setting) / split for one in uses if one.model is not None),
        default=0.0,
    )


def _working(use: Use, setting: Setting) -> float:
    model, tokens = use.model, use.live * setting.videos / setting.microbatches
    tokens /= setting.mesh["context"]
    held = 1.0 if use.whole else 2.0 / model.num_layers
    weights = held * WIDTH * roofline.model_params(model) + use.gradient
    arrays, wide = (20, 5) if use.backward else (15, 2)
    layer = WIDTH * (arrays * model.dim + wide * model.ffn_dim)
    kept = _kept(setting.remat, model) * model.num_layers if use.backward else 0
    return weights + tokens * (layer + kept)


def _kept(remat: str, model: ModelConfig) -> float:
    """Returns the bytes of a token that a layer keeps for the backward pass."""
    if remat == "nothing_saveable":
        return WIDTH * model.dim
    if remat.startswith("dots"):
        return WIDTH * (7 * model.dim + model.ffn_dim)
    return WIDTH * (52 * model.dim + 5 * model.ffn_dim)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
      steps: number of steps.
      chips: number of chips.
      seconds: seconds per step.
      price: price of a chip-hour, or None.
    """

    steps: int
    chips: int
    seconds: float
    price: float | None = None

    @property
    def hours(self) -> float:
        """Hours from the first step to the last."""
        return self.steps * self.seconds / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.chips

    @property
    def total(self) -> float | None:
        """The price of all chip-hours, in its currency."""
        return None if self.price is None else self.price * self.chip_hours

    def summary(self) -> dict[str, float | None]:
        """Returns the fields and results as plain values."""
        results = {name: getattr(self, name) for name in ("hours", "chip_hours")}
        return dataclasses.asdict(self) | results | {"total": self.total}
