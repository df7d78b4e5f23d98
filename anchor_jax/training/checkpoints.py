"""Checkpoints of a training: everything the next step needs, saved in the background.

`OUT/<step>/` holds one Orbax item per network, as `anchor_jax.checkpoint` reads it.
"""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from anchor_jax import ownership
from anchor_jax.checkpoint import FORMAT_VERSION, ITEMS
from anchor_jax.errors import UserError
from anchor_jax.io import write_json
from anchor_jax.training.programs import Cursor
from anchor_jax.training.state import TrainState

TREES = ITEMS[: ITEMS.index("data")]
SKIPPED = "skipped.json"


@dataclasses.dataclass(eq=False)
class Checkpoints:
    """The checkpoints in a training's folder.

    Attributes:
      folder: of the training.
      meta: goes into each checkpoint: the config and what reads the weights.
      keep: how many of the last ones stay.
      tell: is given a line when a checkpoint cannot be used.
      keep_best: how many stay besides for their metric; 0: checkpoints have none.
      best_of: the metric; lower is better.
    """

    folder: pathlib.Path
    meta: Mapping[str, Any]
    keep: int = 2
    tell: Callable[[str], None] = lambda line: None
    keep_best: int = 0
    best_of: str = "loss"

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's own; its threads begin with its first use."""
        kept = [policies.LatestN(self.keep)]
        if self.keep_best:
            best = policies.BestN(
                n=self.keep_best,
                get_metric_fn=self._metric,
                reverse=True,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # Without it Orbax does not write metrics, which the policy needs again
            # when a run goes on.
            best_fn=self._metric if self.keep_best else None,
            best_mode="min",
            cleanup_tmp_directories=True,
            create=True,
        )
        return ocp.CheckpointManager(self.folder.absolute(), options=options)

    def save(
        self,
        state: TrainState,
        cursor: Cursor,
        means: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save; what is still being saved is finished first.

        Args:
          state: of the training.
          cursor: that belongs to it.
          means: what was logged, as means since the save before.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        ownership.check(self.folder)
        items = {
            name: ocp.args.StandardSave(getattr(state, name)) for name in present(state)
        }
        data = {
            "step": step,
            "updates": int(state.updates),
            "rng": np.asarray(state.rng).tolist(),
            "cursor": dataclasses.asdict(cursor),
        }
        meta = {"format_version": FORMAT_VERSION, **self.meta}
        metrics = None
        if self.keep_best and means and self.best_of in means:
            metrics = {self.best_of: means[self.best_of]}
        self.manager.save(
            step,
            metrics=metrics,
            args=ocp.args.Composite(
                **items, data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
            ),
        )

    def skip(self, *numbers: int) -> None:
        """Leaves batches, or sequences, out of what comes after a restore."""
        write_json(self.folder / SKIPPED, [*self._skipped(), *numbers])

    def _skipped(self) -> list[int]:
        path = self.folder / SKIPPED
        return json.loads(path.read_text("utf-8")) if path.exists() else []

    def restore(
        self, state: TrainState, places: TrainState
    ) -> tuple[TrainState, Cursor] | None:
        """Returns the last state that is whole and its cursor; None if there is none.

        Checkpoints that come after it are set aside.

        Args:
          state: of the same shapes.
          places: its shardings.

        Raises:
          UserError: There are checkpoints, and none can be used.
        """
        reasons = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                found, cursor = self._restore(step, state, places)
            # Whatever a torn or foreign file raises; the one before it may be whole.
            except Exception as error:  # noqa: BLE001
                reasons[step] = " ".join(str(error).split())[:200]
                continue
            for torn, reason in reasons.items():
                self.tell(f"{self._set_aside(torn)} is left out, not whole: {reason}")
            skipped = self._skipped()
            while cursor.number in skipped:
                cursor = Cursor(cursor.number + 1)
            return found, cursor
        if reasons:
            raise UserError(
                f"{self.folder} holds the checkpoints {list(reasons)}, and none can be"
                f" continued by this config ({next(iter(reasons.values()))}); choose"
                " another --config.out, or the config that it began with"
            )
        return None

    def best(self) -> tuple[int, float] | None:
        """Returns the step of the best checkpoint that stayed, and its metric."""
        if not self.keep_best:
            return None
        metrics = {x: self.manager.metrics(x) or {} for x in self.manager.all_steps()}
        ranked = [
            (found[self.best_of], step)
            for step, found in metrics.items()
            if self.best_of in found
        ]
        return min(ranked)[::-1] if ranked else None

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Ends the writing."""
        self.manager.close()

    def _metric(self, metrics: Mapping[str, float]) -> float:
        """Returns what ranks a checkpoint; last, if it was saved for another number."""
        return metrics.get(self.best_of, math.inf)

    def _set_aside(self, step: int) -> pathlib.Path:
        """Renames a checkpoint that cannot be used, so that its step can be saved."""
        self.manager.close()
        place = self.folder / f"torn-{step}"
        shutil.rmtree(place, ignore_errors=True)
        (self.folder / str(step)).rename(place)
        del self.manager
        return place

    def _restore(self, step: int, state: TrainState, places: TrainState):
        items = {}
        for name in present(state):
            abstract = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                getattr(state, name),
                getattr(places, name),
            )
            items[name] = ocp.args.StandardRestore(abstract)
        found = self.manager.restore(
            step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore())
        )
        data = found["data"]
        scalars = {
            "step": np.int32(data["step"]),
            "updates": np.int32(data["updates"]),
            "rng": np.asarray(data["rng"], np.uint32),
        }
        placed = {
            name: jax.device_put(value, getattr(places, name))
            for name, value in scalars.items()
        }
        trees = {name: found[name] for name in items}
        return state.replace(**placed, **trees), Cursor(**data["cursor"])


def present(state: TrainState) -> tuple[str, ...]:
    """Returns the trees that a state has."""
    return tuple(name for name in TREES if getattr(state, name) is not None)
