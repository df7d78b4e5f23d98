"""Ranks the meshes and rematerialisation policies of a training by formula."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from anchor_jax.errors import UserError
from anchor_jax.perf import roofline, train_plan, work
from anchor_jax.perf.targets import Topology
from anchor_jax.perf.train_plan import NetworkSizes, TrainingReport
from anchor_jax.training.stages.build import TrainConfig

REMAT = ("none", "dots_with_no_batch_dims_saveable", "nothing_saveable")
"""Policies that a sweep compares."""

Mesh = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and a policy, with the step that they give by formula.

    Attributes:
      config: the config with this mesh and policy.
      seconds: seconds per step.
      report: its plan without compiling, or None before it is made.
    """

    config: TrainConfig
    seconds: float
    report: TrainingReport | None = None

    @property
    def name(self) -> str:
        """The flags that choose it."""
        shown = ",".join(map(str, self.config.mesh))
        return f'--config.mesh="({shown})" --remat={self.config.remat}'

    def summary(self) -> dict[str, Any]:
        """Returns the numbers as plain values."""
        return {
            "name": self.name,
            "mesh": list(self.config.mesh),
            "remat": self.config.remat,
            "seconds": self.seconds,
            "needed": self.report and self.report.needed,
            "fits": self.report and self.report.fits,
        }


def meshes(chips: int, config: TrainConfig, networks: NetworkSizes) -> Iterator[Mesh]:
    """Yields the meshes of a number of chips that divide the batch and the heads.

    Every part of the batch must have videos for all devices. If the config gives the
    axis `context` a size above 1, it stays.
    """
    context = config.mesh[2]
    common = math.gcd(chips, networks.generator.num_heads, networks.teacher.num_heads)
    for shared in _divisors(common):
        split = chips // shared
        if config.batch % (split * config.microbatches):
            continue
        for tokens in (context,) if context > 1 else _divisors(shared):
            if shared % tokens:
                continue
            for data in _divisors(split):
                yield data, split // data, tokens, shared // tokens


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def rank(
    topology: Topology,
    config: TrainConfig,
    networks: NetworkSizes,
    *,
    efficiency: float = roofline.EFFICIENCY,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Candidate]:
    """Returns meshes and policies, the fastest by formula first.

    Args:
      topology: the chips.
      config: config of the training, with its batch.
      networks: sizes of the networks.
      efficiency: share of the chips' peak that products are assumed to reach.
      progress: called with the name of each policy.

    Raises:
      UserError: No mesh divides the batch.
    """
    found = []
    shapes = list(meshes(topology.chips, config, networks))
    if not shapes:
        raise UserError(_no_mesh(topology.chips, config, networks))
    for remat in REMAT:
        progress(remat)
        chosen = dataclasses.replace(config, remat=remat)
        first = _first(topology, chosen, networks, shapes, efficiency)
        for shape in shapes:
            other = dataclasses.replace(chosen, mesh=shape)
            found.append(Candidate(other, _seconds(first, shape)))
    return sorted(found, key=lambda one: one.seconds)


def _no_mesh(chips: int, config: TrainConfig, networks: NetworkSizes) -> str:
    """Returns why no mesh of a number of chips suits a config, and what to change."""
    parts, context = config.microbatches, max(1, config.mesh[2])
    given = f"config.batch={config.batch}"
    given += f" with config.microbatches={parts}" if parts > 1 else ""
    given += f" and context={context} in config.mesh" if context > 1 else ""
    heads = {networks.generator.num_heads, networks.teacher.num_heads}
    wrong = f"{given}: no mesh of {chips} chips divides the batch and the heads"
    if chips % context or any(count % context for count in heads):
        shown = " and ".join(map(str, sorted(heads)))
        return f"{wrong}; context must divide the chips and the {shown} heads"
    whole = chips // context * parts
    return (
        f"{wrong}; choose a batch that is a multiple of {whole}, such as"
        f" {-(-config.batch // whole) * whole}"
    )


def _first(topology, config, networks, shapes, efficiency: float) -> TrainingReport:
    """Returns the plan of the first mesh that a config can have.

    Raises:
      UserError: It can have none.
    """
    for shape in shapes:
        chosen = dataclasses.replace(config, mesh=shape)
        try:
            return train_plan.plan(
                topology, chosen, networks, compiles=False, efficiency=efficiency
            )
        except UserError as error:
            reason = error
    raise reason


def _seconds(report: TrainingReport, shape: Mesh) -> float:
    """Returns the seconds of a step with a mesh that is not the report's."""
    made = report.estimate
    mesh = dict(zip(report.mesh, shape, strict=True))
    setting = dataclasses.replace(made.setting, mesh=mesh)
    return work.step(made.uses, setting, made.trained).seconds


def best(
    topology: Topology,
    config: TrainConfig,
    networks: NetworkSizes,
    count: int = 3,
    *,
    efficiency: float = roofline.EFFICIENCY,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Candidate], list[Candidate]]:
    """Returns the fastest candidates that fit, and the faster ones that do not.

    Args:
      topology: the chips.
      config: config of the training, with its batch.
      networks: sizes of the networks.
      count: most candidates that fit.
      efficiency: share of the chips' peak that products are assumed to reach.
      progress: called with the name of each policy, and of each candidate.

    Raises:
      UserError: No mesh divides the batch.
    """
    ranked = rank(topology, config, networks, efficiency=efficiency, progress=progress)
    fitting, others = [], []
    for one in ranked:
        progress(one.name)
        try:
            report = train_plan.plan(
                topology, one.config, networks, compiles=False, efficiency=efficiency
            )
        except UserError:  # The network's sizes do not divide by this mesh.
            continue
        kept = fitting if report.fits else others
        kept.append(dataclasses.replace(one, report=report))
        if len(fitting) == count:
            break
    return fitting, others
