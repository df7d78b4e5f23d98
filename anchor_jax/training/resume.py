"""Whether a config and its inputs can resume the run in a folder."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from anchor_jax import places
from anchor_jax.errors import UserError, shown
from anchor_jax.io import write_json
from anchor_jax.training import files
from anchor_jax.training.data import kinds, sources
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.weights import checkpoint
from anchor_jax.weights.bundle import Bundle

# Fields that may differ when a run is resumed.
_FREE = (
    *("save_every", "keep", "keep_best", "best_of", "log_every", "sample_every"),
    *("samples", "mesh", "microbatches", "prefetch", "remat", "out", "data.cache"),
    *("watchdog", "preflight", "profile"),
)
_REPORTED = ("optimizer", "critic_optimizer")


def compare_config(
    config: TrainConfig, folder: pathlib.Path, tell: Callable[[str], None]
) -> None:
    """Raises UserError unless a config can resume the run in a folder, if any.

    Fields that an older run lacks count as their defaults.

    Raises:
      UserError: The run in the folder has another config, or its config is damaged.
    """
    sections = [name for name, value in as_json(config).items() if type(value) is dict]
    stored = files.read_config(folder, sections)
    if stored is None:
        return
    changed = _changed(stored, as_json(config))
    decay = _decay(stored) or _decay(as_json(config))
    free = _REPORTED if decay else (*_REPORTED, "steps")
    refused = {
        name: values
        for name, values in changed.items()
        if name.split(".")[0] not in free
    }
    if refused:
        fields = (
            f"{name} (was {shown(old, 200)}, got {shown(new, 200)})"
            for name, (old, new) in refused.items()
        )
        raise UserError(
            f"{folder} holds a run with another config: {', '.join(fields)}"
            f"{_why_not_steps(refused, decay)}; give the"
            " old values to resume it, or choose another --config.out; a new run can"
            f" start from its weights with --config.weights={folder}"
        )
    _tell_changes(changed, finished_step(config, folder), tell)


def _decay(config: Mapping[str, Any]) -> str:
    """Returns the field by which the learning rate depends on `steps`, or ""."""
    for section in _REPORTED:
        value = config.get(section, {}).get("decay", 0)
        if value:
            return f"{section}.decay={value}"
    return ""


def _why_not_steps(refused: Mapping[str, Any], decay: str) -> str:
    if "steps" not in refused:
        return ""
    return (
        f"; steps cannot change, because with {decay} the learning rate of every run"
        " falls towards its own last step"
    )


def _tell_changes(
    changed: Mapping[str, tuple[Any, Any]],
    finished: int | None,
    tell: Callable[[str], None],
) -> None:
    """Prints what is different from the start of a run."""
    others = [
        f"{name} was {shown(old, 200)} and is now {shown(new, 200)}"
        for name, (old, new) in changed.items()
        if name != "steps"
    ]
    no_effect = f"ignored, because the run is already at step {finished}"
    if others:
        ignored = "" if finished is None else f"; {no_effect}"
        tell(f"changed since this run started: {', '.join(others)}{ignored}")
    if "steps" in changed:
        old, new = changed["steps"]
        how = "extended" if new > old else "shortened"
        change = f"config.steps was {old} and is now {new}"
        ended = finished is not None
        tell(f"{change}; {no_effect}" if ended else f"The run is {how}: {change}.")


def finished_step(config: TrainConfig, folder: pathlib.Path) -> int | None:
    """Returns the last step of a finished run; None for other runs."""
    kept = checkpoint.steps(folder) if checkpoint.is_checkpoint(folder) else []
    return max(kept) if kept and max(kept) >= config.steps else None


def write_config(config: TrainConfig, folder: pathlib.Path) -> None:
    """Writes the config of a run, against which a resumed run is checked.

    The config of a finished run stays unchanged, because a change has no effect.
    """
    path = folder / files.CONFIG
    if not places.exists(path) or finished_step(config, folder) is None:
        write_json(path, as_json(config))


def inputs(config: TrainConfig, generator: Bundle, teacher, critic) -> dict[str, Any]:
    """Returns hashes of the inputs that every step reads and no checkpoint contains.

    These are the data, the teacher, and the untrained parts of the initial weights,
    such as the text encoder and the codec.
    """
    found = {
        "data": sources.identity(config.data),
        "weights": generator.digest,
    }
    if teacher is not None:
        found["teacher"] = teacher.digest
    if config.lora.rank:
        found["critic"] = (critic or teacher or generator).digest
    version = kinds.find_kind(config.data).version
    if version is not None:
        found["data.kind"] = version
    return json.loads(json.dumps(found))


def compare_inputs(folder: pathlib.Path, given: Mapping[str, Any]) -> None:
    """Checks that a run's inputs are unchanged since it started.

    Raises:
      UserError: An input changed.
    """
    stored = files.read_inputs(folder)
    changed = [
        name for name, value in given.items() if stored.get(name, value) != value
    ]
    if changed:
        raise UserError(
            f"{folder}: the files named by config.{', config.'.join(changed)} changed"
            " since this run started; restore them, or choose another --config.out"
        )


def _changed(
    stored: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns old and new values of changed fields, except freely changeable ones."""
    found, defaults = {}, as_json(TrainConfig())
    for name, value in given.items():
        old = stored.get(name, defaults[name])
        if name in _FREE or old == value:
            continue
        if isinstance(value, dict):
            old = {**defaults[name], **old}
            found |= {
                f"{name}.{inner}": (old[inner], value[inner])
                for inner in value
                if old[inner] != value[inner] and f"{name}.{inner}" not in _FREE
            }
        else:
            found[name] = old, value
    return found


def as_json(config: TrainConfig) -> dict[str, Any]:
    """Returns a config in its stored form, as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
