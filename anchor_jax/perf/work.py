"""Operations, memory and collectives of a mean training step, by arithmetic only.

The memory of activations is a fit to programs that were compiled for H100 and v5p; it
is right to about a third. A compiled program replaces it.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from anchor_jax.perf import roofline
from anchor_jax.perf.hlo import Collective, Groups
from anchor_jax.perf.links import Layout, Traffic
from anchor_jax.wan.spec import ModelConfig

ERROR = 1 / 3
"""Largest error of `working_bytes`, as a share, where it was compared."""
WIDTH = 2
"""Bytes of a weight in products, and of an activation."""
_SUMS = 3
"""Sums over `tensor` in a layer: after two attentions and the feed-forward."""
_EXCHANGES = 6
"""All-to-alls over `context` in a layer: q, k, v and output of self-attention, q and
output of cross-attention."""


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
      gathers: how often split weights are gathered. Each part of a batch repeats them,
        as it repeats the passes.
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
    read *= setting.microbatches
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


def along(mesh: Mapping[str, int], *axes: str) -> Groups:
    """Returns the positions of the devices along axes of a mesh."""
    names, shape = list(mesh), tuple(mesh.values())
    numbers = np.arange(np.prod(shape)).reshape(shape)
    last = range(-len(axes), 0)
    rows = np.moveaxis(numbers, [names.index(axis) for axis in axes], last)
    rows = rows.reshape(-1, math.prod(mesh[axis] for axis in axes))
    return tuple(tuple(int(number) for number in row) for row in rows)


def _traffic(uses, setting: Setting, trained: Mapping[str, float]):
    """Returns a mean step's collectives: weights, activations, gradients."""
    moved = [one for use in uses for one in _moved(use, setting)]
    reduced = [one for size in trained.values() for one in _reduced(size, setting)]
    found = []
    for kind, nbytes, axes, times in (*moved, *reduced):
        groups = along(setting.mesh, *axes)
        if len(groups[0]) > 1 and nbytes and times:
            found.append(Collective(kind, nbytes, groups, "", times=times))
    return setting.layout.traffic(found)


_Moved = tuple[str, float, tuple[str, ...], float]
"""Kind of a collective, bytes, mesh axes, times."""


def _moved(use: Use, setting: Setting) -> Iterator[_Moved]:
    """Yields the collectives of a use: weights, then activations.

    The keys and values of prompts are left out.
    """
    if use.model is None:
        return
    model, mesh = use.model, setting.mesh
    gathers = use.gathers * setting.microbatches
    yield "all-gather", _weights(use, setting), ("fsdp",), use.each * gathers
    whole = use.tokens * setting.videos * WIDTH  # of one feature
    own = whole / mesh["context"] * model.dim
    # A repeated forward pass, beside the forward and backward pass, exchanges again.
    heads, layers = own / mesh["tensor"], use.each * model.num_layers
    layers *= 1.5 if use.again else 1
    yield "all-reduce", own, ("tensor",), _SUMS * layers
    yield "all-to-all", heads, ("context",), _EXCHANGES * layers
    latents = whole * model.patch_size * model.latent_channels
    yield "all-gather", latents, ("context",), use.each


def _reduced(nbytes: float, setting: Setting) -> Iterator[_Moved]:
    """Yields the sums of a network's gradient, for each part of a batch."""
    part, times = nbytes / setting.mesh["tensor"], setting.microbatches
    yield "reduce-scatter", part, ("fsdp",), times
    yield "all-reduce", part / setting.mesh["fsdp"], ("data", "context"), times


def working_bytes(uses: Iterable[Use], setting: Setting) -> float:
    """Returns a rough size of the working memory of a step's largest program.

    It holds the weights of two layers or of the whole network, the arrays of one layer,
    and for a backward pass what the rematerialisation policy keeps of all layers.
    """
    models = (one for one in uses if one.model is not None)
    return max((_working(one, setting) for one in models), default=0.0)


def _working(use: Use, setting: Setting) -> float:
    model, mesh = use.model, setting.mesh
    tokens = use.live * setting.videos / setting.microbatches / mesh["context"]
    held = 1.0 if use.whole else 2.0 / model.num_layers
    weights = held * WIDTH * roofline.model_params(model) + use.gradient
    token = _bytes(model, _BACKWARD if use.backward else _FORWARD, mesh["tensor"])
    if use.backward:
        kept = _bytes(model, _kept(setting.remat), mesh["tensor"])
        token += kept * model.num_layers
    return weights / mesh["tensor"] + tokens * token


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """How many arrays of a token a layer holds, by width.

    `stream` are as wide as the model, and whole on each device along `tensor`. `heads`
    are too, but have the features of heads; `wide` are those of the feed-forward layer.
    Both are split.
    """

    stream: int
    heads: int
    wide: int


# The sums of `stream` and `heads` are fits. About half have the features of heads.
_FORWARD = _Arrays(stream=7, heads=8, wide=2)
_BACKWARD = _Arrays(stream=10, heads=10, wide=5)


def _kept(remat: str) -> _Arrays:
    """Returns what a layer keeps for the backward pass."""
    if remat == "nothing_saveable":
        return _Arrays(stream=1, heads=0, wide=0)
    if remat.startswith("dots"):
        # Outputs of q, k, v and the text's q; of two attentions and the feed-forward.
        return _Arrays(stream=3, heads=4, wide=1)
    return _Arrays(stream=26, heads=26, wide=5)


def _bytes(model: ModelConfig, arrays: _Arrays, tensor: int) -> float:
    """Returns the bytes of a token's arrays on a device."""
    split = arrays.heads * model.dim + arrays.wide * model.ffn_dim
    return WIDTH * (arrays.stream * model.dim + split / tensor)


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
