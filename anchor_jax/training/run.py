"""One stage of training as a command runs it: weights, data, folder, loop."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from anchor_jax import bundle as bundles
from anchor_jax.bundle import Bundle
from anchor_jax.config import from_config
from anchor_jax.errors import UserError
from anchor_jax.experiment import parse_size
from anchor_jax.media import write_json
from anchor_jax.training import build, sources, world_clips, world_data
from anchor_jax.training.build import Prepared, TrainConfig
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.programs import Cursor
from anchor_jax.training.tiny import init_params
from anchor_jax.world.words import train_tokenizer

FRESH = "fresh"
_CONFIG = "config.json"
# What may change from one start of a run to the next.
_FREE = ("save_every", "keep", "log_every", "sample_every", "mesh", "out")
_TOLD = ("optimizer", "critic_optimizer")


def read_config(config) -> TrainConfig:
    """Returns the config with every field of the type that it must have.

    Raises:
      UserError: A field is missing, unknown or of another type or range.
    """
    read = from_config(TrainConfig, config, "config")
    least = {"steps": 1, "batch": 1, "keep": 1, "save_every": 1, "log_every": 1}
    for name, smallest in least.items():
        if getattr(read, name) < smallest:
            raise UserError(
                f"config.{name}={getattr(read, name)}: expected {smallest}+"
            )
    return read


@dataclasses.dataclass(eq=False)
class Job:
    """A stage that is ready to run.

    Attributes:
      config: of the training.
      folder: checkpoints, logs, samples.
      prepared: the stage.
      checkpoints: in the folder.
      tell: is given lines to show.
    """

    config: TrainConfig
    folder: pathlib.Path
    prepared: Prepared
    checkpoints: Checkpoints
    tell: Callable[[str], None]

    def plan(self) -> str:
        """Returns what will be trained, as text."""
        config, counts = self.config, self.prepared.counts
        lines = [
            f"stage {config.stage}, {config.steps} steps of {config.batch} videos,"
            f" rules {config.rules}, mesh {dict(self.prepared.stage.mesh.shape)}",
            "parameters: "
            + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
            f"state: {_gigabytes(self.prepared.state):.2f} GB, frozen weights:"
            f" {_gigabytes(self.prepared.stage.frozen):.2f} GB, over all devices",
        ]
        return "\n".join(lines)

    def run(self) -> None:
        """Trains to the last step, from the last checkpoint if there is one."""
        stage, state = self.prepared.stage, self.prepared.state
        found = self.checkpoints.restore(state, stage.places)
        state, cursor = found or (state, Cursor())
        first = int(state.step)
        if first:
            self.tell(f"goes on at step {first}")
        config = self.config
        loop = Loop(
            config.steps, config.save_every, config.log_every, config.sample_every
        )
        monitor = Monitor(
            self.folder,
            config.steps,
            first,
            config.log_every,
            quiet=jax.process_index() > 0,
        )
        try:
            train(stage, state, cursor, loop, self.checkpoints, monitor)
        finally:
            monitor.close()
            self.checkpoints.close()


def open_job(config: TrainConfig, tell: Callable[[str], None]) -> Job:
    """Returns a stage with its weights, data and folder.

    Raises:
      UserError: Something of the config is wrong, or the folder holds another run.
    """
    folder = sources.check_folder(config.out)
    check_config(config, folder, tell)
    base = _base(config, folder)
    generator = _load(config, base if base != f"./{FRESH}" else str(folder / FRESH))
    teacher = _load(config, config.teacher) if config.teacher else None
    critic = _load(config, config.critic) if config.critic else None
    distills = config.stage == "distillation"
    section = config.distillation if distills else config.regression
    frames = section.frames if distills else section.block * section.blocks
    batches = sources.open_source(
        config.data,
        generator,
        config.batch,
        frames,
        config.distillation.negative_prompt if distills else "",
    )
    prepared = build.prepare(config, generator, batches, teacher, critic)
    bundles.write_run(folder, base)
    meta = {"training": _json(config)}
    checkpoints = Checkpoints(folder, meta, config.keep, tell)
    return Job(config, folder, prepared, checkpoints, tell)


def _base(config: TrainConfig, folder: pathlib.Path) -> str:
    """Returns the name of the weights that a run begins with; makes fresh ones."""
    if config.weights != FRESH:
        inside = pathlib.Path(config.weights).expanduser()
        return str(inside.resolve()) if inside.exists() else config.weights
    place = folder / FRESH
    if not (place / "model.safetensors").exists():
        words = train_tokenizer(world_clips.captions())
        codec = world_data.fit_codec(config.data.seed, 16)
        params = {**init_params(config.seed), "codec": codec}
        bundles.save_bundle(params, words, place, {})
    return f"./{FRESH}"


def _load(config: TrainConfig, name: str) -> Bundle:
    grid = None if config.size is None else parse_size(config.size)
    return bundles.load_bundle(name, grid=grid, dtype=config.dtype)


def check_config(
    config: TrainConfig, folder: pathlib.Path, tell: Callable[[str], None]
) -> None:
    """Writes a new run's config; of one that goes on, checks that it is the same.

    Raises:
      UserError: The run in the folder has another config, or none that can be read.
    """
    path, given = folder / _CONFIG, _json(config)
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}), so the run in {folder} cannot go on;"
                " choose another --config.out"
            ) from error
        changed = _changed(stored if isinstance(stored, dict) else {}, given)
        refused = [name for name in changed if name.split(".")[0] not in _TOLD]
        if refused:
            raise UserError(
                f"{folder} holds a run of another config: {', '.join(refused)} differ;"
                " choose another --config.out, or the values that it began with"
            )
        if changed:
            tell(f"changed since the run began: {', '.join(changed)}")
    write_json(path, given)


def _changed(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns the fields that differ and may not simply do so."""
    found = []
    for name, value in given.items():
        old = stored.get(name)
        if name in _FREE or old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            found += [
                f"{name}.{inner}" for inner in value if old.get(inner) != value[inner]
            ]
        else:
            found.append(name)
    return found


def _json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _gigabytes(tree) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e9
