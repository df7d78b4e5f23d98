"""Checkpoints of a training, saved in the background.

A checkpoint holds everything that the next step needs. `OUT/<step>/` holds one Orbax
item per network, in the layout that `anchor_jax.weights.checkpoint` reads.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from anchor_jax import io, ownership, places, processes
from anchor_jax.cache import memory
from anchor_jax.errors import UserError
from anchor_jax.io import write_json
from anchor_jax.training import placement
from anchor_jax.training.files import SKIPPED, read_skipped
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.state import TrainState
from anchor_jax.weights import checkpoint
from anchor_jax.weights.checkpoint import FORMAT_VERSION, ITEMS, shapes

TREES = ITEMS[: ITEMS.index("data")]


class NotSaved(UserError):
    """A checkpoint could not be written, and another attempt would fail too."""


@dataclasses.dataclass(eq=False)
class Checkpoints:
    """The checkpoints in a training's folder.

    Attributes:
      folder: the training's folder.
      meta: metadata of each checkpoint: the config, and sizes needed to read weights.
      keep: number of the newest checkpoints to retain.
      tell: a function that prints a line if a checkpoint cannot be used.
      keep_best: number of checkpoints to retain also for their metric. If it is 0,
        checkpoints have no metric.
      best_of: name of the metric; lower is better.
    """

    folder: io.Place
    meta: Mapping[str, Any]
    keep: int = 2
    tell: Callable[[str], None] = lambda line: None
    keep_best: int = 0
    best_of: str = "loss"
    _part: contextlib.ExitStack = dataclasses.field(
        default_factory=contextlib.ExitStack, init=False
    )

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's manager; its threads start with the first use."""
        is_remote = places.is_remote(self.folder)
        if is_remote:
            self._remove_incomplete()
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
            # Without best_fn Orbax does not write metrics, which the policy needs when
            # a run is resumed.
            best_fn=self._metric if self.keep_best else None,
            best_mode="min",
            # In a bucket Orbax would remove every folder that is not a checkpoint.
            cleanup_tmp_directories=not is_remote,
            create=True,
        )
        return ocp.CheckpointManager(places.absolute(self.folder), options=options)

    def _remove_incomplete(self) -> None:
        """Removes the incomplete steps in a bucket, which a killed process has left."""
        if processes.is_first():
            ownership.check(self.folder)
            is_there = places.is_dir(self.folder)
            for one in list(self.folder.iterdir()) if is_there else ():
                is_step = one.name.isdecimal() and places.is_dir(one)
                if is_step and not checkpoint.is_complete(one):
                    one.rmtree(missing_ok=True)
        processes.barrier(f"{self.folder} has complete steps")

    def save(
        self,
        state: TrainState,
        cursor: Cursor,
        means: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving a checkpoint, after the previous save has finished.

        Args:
          state: the training's state.
          cursor: the data position that belongs to it.
          means: means of the logged metrics since the previous save.
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
        self.wait()
        # Otherwise Orbax leaves incomplete files if it fails or the process ends. In a
        # bucket it leaves them too, but without the mark of a complete checkpoint.
        if not places.is_remote(self.folder):
            part = self.folder / f"{step}.orbax-checkpoint-tmp"
            self._part.enter_context(io.unfinished(part, is_ours=False))
        args = ocp.args.Composite(
            **items, data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
        )
        with self._writing():
            self.manager.save(step, metrics=metrics, args=args)

    def skip(self, *numbers: int) -> None:
        """Records batches, or sequences, that are skipped after a restore."""
        if processes.is_first():
            known = dict.fromkeys([*self.skipped(), *numbers])
            write_json(self.folder / SKIPPED, list(known))
        processes.barrier(SKIPPED)

    def skipped(self) -> list[int]:
        """Returns the numbers of the skipped batches, or sequences."""
        return read_skipped(self.folder)

    def newest_first(
        self, state: TrainState, places: TrainState
    ) -> Iterator[tuple[int, tuple[TrainState, Cursor] | None]]:
        """Yields each step with its state and cursor, or None if it is incomplete.

        Args:
          state: a state of the same shapes.
          places: the state's shardings.
        """
        for step in self._steps():
            try:
                read = self._restore(step, state, places)
            except Exception:  # noqa: BLE001
                read = None
            yield step, read if _is_read_by_all(read is not None) else None

    def restore(
        self, state: TrainState, places: TrainState
    ) -> tuple[TrainState, Cursor] | None:
        """Returns the newest complete state and its cursor, or None without any.

        Newer incomplete checkpoints are moved aside.

        Args:
          state: a state of the same shapes.
          places: the state's shardings.

        Raises:
          UserError: There are checkpoints, but none can be used.
        """
        reasons = {}
        for step in self._steps():
            try:
                found, cursor = self._restore(step, state, places)
            # A damaged or foreign file may raise any error. An older one may be
            # complete.
            except Exception as error:  # noqa: BLE001
                reasons[step] = " ".join(str(error).split())[:200]
            if not _is_read_by_all(step not in reasons):
                reasons.setdefault(step, "another process could not read it")
                continue
            for torn, reason in reasons.items():
                place = self.set_aside(torn, "torn")
                self.tell(f"skipped an incomplete checkpoint, now {place}: {reason}")
            skipped = set(self.skipped())
            while cursor.number in skipped:
                cursor = Cursor(cursor.number + 1)
            return found, cursor
        if reasons:
            raise UserError(
                f"{self.folder} holds the checkpoints {str(list(reasons))[:100]}, but"
                " this config can resume none of them: they are damaged, or another"
                f" config made them ({next(iter(reasons.values()))}); give the config"
                " that made them, or choose another --config.out"
            )
        return None

    def _steps(self) -> list[int]:
        """Returns the steps of all checkpoints, newest first, as process 0 sees them.

        Processes on other hosts may see a shared disk a little later.
        """
        return processes.share(sorted(map(int, self.manager.all_steps()), reverse=True))

    def best(self) -> tuple[int, float] | None:
        """Returns the step and metric of the best retained checkpoint."""
        if not self.keep_best:
            return None
        ranked = []
        for step in self.manager.all_steps():
            with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
                ranked.append((float(self.manager.metrics(step)[self.best_of]), step))
        return min(ranked)[::-1] if ranked else None

    def is_saving(self) -> bool:
        """Returns whether a checkpoint is being written."""
        return self.manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          NotSaved: A checkpoint could not be written, for example on a full disk.
        """
        with self._part, self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and closes the manager.

        Raises:
          NotSaved: A checkpoint could not be written.
        """
        with self._part, self._writing():
            self.manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Converts failures to write a checkpoint into NotSaved with a remedy."""
        try:
            yield
        except (OSError, ValueError) as error:
            # Orbax's array library converts system errors into ValueError.
            if not isinstance(error, OSError) and "os_error_code" not in str(error):
                raise
            reason = " ".join(str(error).split())
            raise NotSaved(
                f"{self.folder}: a checkpoint cannot be written (...{reason[-200:]});"
                " free disk space or repair the disk, then rerun this command to resume"
                " from the previous checkpoint"
            ) from error

    def _metric(self, metrics: Mapping[str, float]) -> float:
        """Returns a checkpoint's metric; infinity if it has another metric."""
        return metrics.get(self.best_of, math.inf)

    def set_aside(self, step: int, reason: str) -> io.Place:
        """Renames an unusable checkpoint, so that its step can be saved again.

        Args:
          step: the checkpoint's step.
          reason: prefix of the new name. An existing folder of that name is replaced.
        """
        self.manager.close()
        place = self.folder / f"{reason}-{step}"
        if processes.is_first():
            io.move_folder(self.folder / str(step), place)
        processes.barrier(str(place))
        del self.manager
        return place

    def _stored_rollout(self, step: int, rollout):
        """Returns the shapes of a sequence as they are stored, perhaps in layout 1."""
        if rollout is None:
            return None
        stored = shapes(self.folder / str(step), "rollout")["cache"]["slots"]["k"]
        if len(stored.shape) == rollout.cache.slots.k.ndim:
            return rollout
        cache = memory.shapes_in_layout_1(rollout.cache, stored.shape[-1])
        return rollout.replace(cache=cache)

    def _restore(self, step: int, state: TrainState, places: TrainState):
        stored = state.replace(rollout=self._stored_rollout(step, state.rollout))
        items = {}
        for name in present(state):
            abstract = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                getattr(stored, name),
                getattr(places, name),
            )
            items[name] = ocp.args.StandardRestore(abstract)
        found = self.manager.restore(
            step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore())
        )
        data = _checked(found["data"], step, state)
        scalars = {
            "step": np.int32(data["step"]),
            "updates": np.int32(data["updates"]),
            "rng": np.asarray(data["rng"], np.uint32),
        }
        placed = {
            name: placement.put(value, getattr(places, name))
            for name, value in scalars.items()
        }
        trees = {name: found[name] for name in items}
        if stored.rollout is not state.rollout:
            upgrade = jax.jit(memory.from_layout_1, out_shardings=places.rollout.cache)
            cache = upgrade(trees["rollout"].cache)
            trees["rollout"] = trees["rollout"].replace(cache=cache)
        return state.replace(**placed, **trees), Cursor(**data["cursor"])


def _is_read_by_all(is_read: bool) -> bool:
    """Returns whether every process could read a checkpoint."""
    return all(processes.gather(is_read, processes.LOADING))


def _checked(data: Any, step: int, state: TrainState) -> dict[str, Any]:
    """Returns a checkpoint's integers; raises ValueError if they are invalid."""
    cursor = data["cursor"]
    numbers = [data["step"], data["updates"], cursor["number"], cursor["start"]]
    whole = all(type(one) is int and 0 <= one < 2**31 for one in numbers)
    if not whole or data["step"] != step or len(cursor) != 2:
        raise ValueError(f"invalid integers: {str(data)[:100]}")
    if np.shape(data["rng"]) != state.rng.shape:
        raise ValueError("invalid random key")
    return data


def present(state: TrainState) -> tuple[str, ...]:
    """Returns the names of the trees that a state has."""
    return tuple(name for name in TREES if getattr(state, name) is not None)
