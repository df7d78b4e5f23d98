"""The metrics, trials and ablations that commands can name.

A metric of any video is a module in `evaluation/metrics` with the metric's name and a
`METRIC`. Domains of `anchor_jax.plugins` add their own parts.
"""

import dataclasses
import pkgutil
from collections.abc import Sequence

import numpy as np

from anchor_jax.errors import UserError, suggest
from anchor_jax.evaluation import metrics
from anchor_jax.evaluation.protocol import Ablation, Division, Metric, Row, Trial
from anchor_jax.plugins import Registry

METRICS: Registry[Metric] = Registry(
    "metrics",
    {
        module.name: f"{metrics.__name__}.{module.name}:METRIC"
        for module in pkgutil.iter_modules(metrics.__path__)
    },
)
TRIALS: Registry[Trial] = Registry("trials")
ABLATIONS: Registry[Ablation] = Registry("ablations")


@dataclasses.dataclass(eq=False)
class Collector:
    """Measures videos as they are generated.

    Attributes:
      names: names of the metrics.
      rows: the rows of each metric, in the order of the videos.
      batches: the same rows, for each call.
    """

    names: Sequence[str]
    rows: dict[str, list[Row]] = dataclasses.field(default_factory=dict, init=False)
    batches: list[dict[str, list[Row]]] = dataclasses.field(
        default_factory=list, init=False
    )

    def __post_init__(self):
        for name in self.names:
            if name not in METRICS:
                known = suggest(name, METRICS, "metrics")
                raise UserError(f"unknown metric {name!r}{known}")

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str]) -> None:
        """Measures videos; arguments as for `Metric`."""
        self.batches.append(
            {name: METRICS[name](pixels, prompts) for name in self.names}
        )
        self._add(self.batches[-1])

    def join(self, division: Division) -> None:
        """Adds the rows of the other processes of a job, in the order of the videos."""
        if not division.is_used:
            return
        self.batches = division.join(self.batches)
        self.rows = {}
        for rows in self.batches:
            self._add(rows)

    def _add(self, rows: dict[str, list[Row]]) -> None:
        for name, measured in rows.items():
            self.rows.setdefault(name, []).extend(measured)

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Returns mean and count of each number, by metric and name."""
        return {name: _means(rows) for name, rows in self.rows.items()}


def table(summary: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns `Collector.summary()` as text, a line for each number."""
    return "\n".join(
        f"{metric}, {name}: {cell['mean']:.4f} (n={cell['n']})"
        if name != metric
        else f"{name}: {cell['mean']:.4f} (n={cell['n']})"
        for metric, numbers in summary.items()
        for name, cell in numbers.items()
    )


def _means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {
        name: {"mean": float(np.mean(values)), "n": len(values)}
        for name, values in found.items()
    }
