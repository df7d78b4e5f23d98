"""One stage of training as a command runs it: weights, data, folder, loop."""

import contextlib
import dataclasses
import json
import operator
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from anchor_jax import ownership
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, naming, shown, suggest
from anchor_jax.experiment import parse_size
from anchor_jax.io import expand, scratch_folder, write_json
from anchor_jax.training import (
    build,
    files,
    fresh,
    placement,
    reports,
    samples,
    sources,
    world_data,
)
from anchor_jax.training.build import Prepared, TrainConfig
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor, memory_gb
from anchor_jax.training.order import Share
from anchor_jax.training.programs import Cursor, DistillStage
from anchor_jax.training.samples import Sampler
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.lineage import write_run
from anchor_jax.weights.load import load_bundle
from anchor_jax.weights.trained import CRITIC

FRESH = "fresh"
# What may change from one start of a run to the next.
_FREE = (
    *("save_every", "keep", "keep_best", "best_of", "log_every", "sample_every"),
    *("samples", "mesh", "remat", "out", "data.cache"),
)
_TOLD = ("optimizer", "critic_optimizer")
_BEST = {
    "regression": ("loss", "gradient_norm"),
    "distillation": (
        *("critic_loss", "generator_loss", "score_gap"),
        *("critic_gradient_norm", "generator_gradient_norm"),
    ),
}
_STEPS, _LAST = 10, 5


def read_config(config) -> TrainConfig:
    """Returns the config with every field of the type that it must have.

    Raises:
      UserError: A field is missing, unknown or of another type or range.
    """
    read = from_config(TrainConfig, config, "config")
    least = {"steps": 1, "batch": 1, "keep": 1, "save_every": 1, "log_every": 1}
    least |= {"keep_best": 0, "sample_every": 0, "lora.rank": 0, "data.size": 1}
    least |= {"regression.block": 1, "regression.blocks": 1, "distillation.every": 1}
    for name, smallest in least.items():
        value = operator.attrgetter(name)(read)
        if value < smallest:
            raise UserError(f"config.{name}={value}: must be at least {smallest}")
    known = _BEST.get(read.stage, (read.best_of,))
    if read.keep_best and read.best_of not in known:
        found = suggest(read.best_of, known, f"numbers of {read.stage}")
        raise UserError(f"config.best_of={read.best_of!r}{found}")
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
      sampler: makes sample videos, or None.
      lease: on the folder.
    """

    config: TrainConfig
    folder: pathlib.Path
    prepared: Prepared
    checkpoints: Checkpoints
    tell: Callable[[str], None]
    sampler: Sampler | None = None
    lease: ownership.Lease | None = None

    def plan(self) -> str:
        """Returns what will be trained, as text."""
        config, counts = self.config, self.prepared.counts
        mesh = dict(self.prepared.stage.mesh.shape)
        lines = [
            f"stage {config.stage}, {config.steps} steps of {config.batch} videos,"
            f" {self._frames()}, rules {config.rules}, mesh {mesh}",
            "parameters: "
            + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
            f"on each device: state {_gigabytes(self.prepared.state):.2f} GB, frozen"
            f" weights {_gigabytes(self.prepared.stage.frozen):.2f} GB, plus"
            " activations",
            f"sample videos: {self._shown()}",
        ]
        return "\n".join(lines)

    def _frames(self) -> str:
        """Says how long videos are."""
        section, distillation = self.config.regression, self.config.distillation
        if self.config.stage == "regression":
            return f"{section.block * section.blocks} latent frames"
        sequence = f"sequences of {distillation.length}"
        return f"{distillation.frames} latent frames at once of {sequence}"

    def _shown(self) -> str:
        if self.sampler is None:
            return "none (sample_every is 0, there are no prompts, or many processes)"
        texts = [" | ".join(one.script.prompts) for one in self.sampler.videos]
        return f"every {self.config.sample_every} steps, " + "; ".join(texts)

    def run(self) -> int:
        """Trains to the last step, from the last checkpoint if there is one.

        The folder is others' afterwards.

        Returns:
          The step that it got to; a request to stop ends it early.
        """
        with self.lease or contextlib.nullcontext():
            return self._run()

    def _run(self) -> int:
        stage, state = self.prepared.stage, self.prepared.state
        found = self.checkpoints.restore(state, stage.places)
        state, cursor = found or (state, Cursor())
        first = int(state.step)
        if first:
            done = first >= self.config.steps
            finished = f"Already finished at step {first}; nothing to do."
            self.tell(finished if done else f"Resuming at step {first}.")
        config = self.config
        loop = Loop(
            config.steps, config.save_every, config.log_every, config.sample_every
        )
        monitor = Monitor(
            self.folder,
            config.steps,
            first,
            config.log_every,
            self.prepared.frames,
            quiet=jax.process_index() > 0,
        )
        if self.sampler is not None:
            self.sampler.show = monitor.show
        try:
            state = train(
                stage, state, cursor, loop, self.checkpoints, monitor, self.sampler
            )
            self._tell_best()
        finally:
            try:
                monitor.close()
            finally:
                self.checkpoints.close()
        return int(state.step)

    def _tell_best(self) -> None:
        best = self.checkpoints.best()
        if best is not None:
            step, value = best
            self.tell(
                f"lowest {self.config.best_of}, {value:.6g}: step {step}, weights"
                f" {self.folder / str(step)}"
            )

    def seconds_per_step(self) -> float:
        """Returns how long a step takes here: runs some, and throws them away."""
        stage, state, cursor = self.prepared.stage, self.prepared.state, Cursor()
        kinds, shares = [0], [1.0]
        if isinstance(stage, DistillStage):
            if stage.every > 1:
                kinds, shares = [0, 1], [1 / stage.every, 1 - 1 / stage.every]
            # Of a long sequence nearly all chunks come after the first.
            state, cursor, _ = stage.advance(state, cursor, 1)
        seconds = []
        for kind in (*kinds, *kinds):
            began = time.monotonic()
            # The same chunks each time, so that the second time nothing is compiled.
            state, _, watch = stage.advance(state, cursor, kind)
            jax.block_until_ready((state, watch))
            seconds.append(time.monotonic() - began)
        timed = seconds[len(kinds) :]
        return sum(one * share for one, share in zip(timed, shares, strict=True))


def open_job(
    config: TrainConfig,
    tell: Callable[[str], None],
    most: int | None = None,
    patience: float = 0.0,
) -> Job:
    """Returns a stage with its weights, data and folder, which is owned by it.

    Args:
      config: of the training.
      tell: is given lines to show.
      most: examples that are read of data that take long to prepare; None: all.
      patience: seconds to wait for another training in the folder to end.

    Raises:
      UserError: Something of the config is wrong, or the folder holds another run, or
        is in use by another job.
    """
    place = expand(config.out)
    missing = [one for one in (place / "data", place) if not one.exists()]
    folder = sources.check_folder(config.out)
    # Processes of one training share its folder, each with a number of its own.
    lease = ownership.own(
        folder,
        ownership.job_id("train", jax.process_count(), {**_json(config), "out": ""}),
        (str(jax.process_index()),),
        patience,
        tell,
        "wait for it, end it, or choose another --config.out",
    )
    try:
        job = _open_job(config, folder, tell, most)
    except BaseException:
        lease.release()
        # A start that is refused leaves no folder that looks like a training's.
        for empty in missing:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise
    job.lease = lease
    return job


def _open_job(config: TrainConfig, folder: pathlib.Path, tell, most: int | None) -> Job:
    files.check(folder)
    compare_config(config, folder, tell)
    base = _base(config, folder)
    begun = base if base != f"./{FRESH}" else str(folder / FRESH)
    with naming("config.weights"):
        generator = _load(config, begun, trained=True)
    with naming("config.teacher"):
        teacher = _load(config, config.teacher) if config.teacher else None
    with naming("config.critic"):
        critic = _load_critic(config)
    rows = placement.rows_of_process(build.make_mesh(config), config.batch)
    share = Share(config.batch, rows)
    with naming("config.data"):
        batches = sources.open_source(config, generator, folder, share, most)
    with _on_host():
        prepared = build.prepare(config, generator, batches, teacher, critic)
    for bundle in (generator, teacher, critic):
        _forget_variables(bundle)
    read = inputs(config, generator, teacher, critic) if most is None else {}
    compare_inputs(folder, read)
    sampler = samples.make_sampler(config, prepared, folder)
    write_run(folder, base)
    write_config(config, folder)
    write_json(folder / files.INPUTS, read)
    _warn_of_chunks(prepared.stage, tell)
    _warn_of_words(config, generator, folder, tell)
    own = _own_texts(config, sampler)
    for line in reports.report_texts(config.data, generator.tokenizer, own):
        tell(line)
    meta = {"training": _json(config)}
    if config.stage == "distillation":
        sizes = dataclasses.asdict((critic or teacher).model)
        meta[CRITIC] = json.loads(json.dumps(sizes))
    checkpoints = Checkpoints(
        folder, meta, config.keep, tell, config.keep_best, config.best_of
    )
    return Job(config, folder, prepared, checkpoints, tell, sampler)


def _warn_of_chunks(stage, tell: Callable[[str], None]) -> None:
    """Tells of chunks of sequences that the generator does not learn from."""
    if not isinstance(stage, DistillStage):
        return
    plan = stage.stage.plan
    visited = plan.visited(stage.every)
    others = [one.start for one in plan.pieces(None) if one.start not in visited]
    if others:
        tell(
            "warning: the generator is updated on the chunks from frames"
            f" {', '.join(map(str, visited))} only, never on those from"
            f" {', '.join(map(str, others))}; choose a distillation.length with a"
            " number of chunks that has no divisor in common with"
            f" distillation.every + 1 = {stage.every + 1}"
        )


def _warn_of_words(config: TrainConfig, bundle: Bundle, folder, tell) -> None:
    """Tells of words in files of prompts that the text encoder does not know."""
    if config.data.kind != "prompts" or not hasattr(bundle.tokenizer, "unknown_words"):
        return
    texts = sources.open_texts(config.data, folder)
    prompts = (text for n in range(sources.LOOKED_AT) for text in texts(n))
    found = {word for text in prompts for word in bundle.tokenizer.unknown_words(text)}
    if found:
        tell(f"warning: words that the model does not know: {', '.join(sorted(found))}")


def _own_texts(config: TrainConfig, sampler) -> Iterator[tuple[str, str]]:
    """Yields the texts that the config itself has, after their fields."""
    if config.stage == "distillation":
        section = config.distillation
        yield "config.distillation.negative_prompt", section.negative_prompt
    elif config.regression.guidance is not None:
        yield "config.regression.negative_prompt", config.regression.negative_prompt
    for video in sampler.videos if sampler else ():
        for prompt in video.script.prompts:
            yield "config.samples", prompt


def dry_run(config: TrainConfig, tell: Callable[[str], None]) -> None:
    """Tells what a training would be and how long it would take; leaves no files.

    Raises:
      UserError: Something of the config is wrong, or the folder holds another run.
    """
    folder = expand(config.out)
    files.check(folder)
    compare_config(config, folder, tell)
    with scratch_folder() as scratch:
        # What is built stays in the scratch folder.
        data = dataclasses.replace(config.data, cache=None)
        trial = dataclasses.replace(config, out=str(scratch), data=data)
        job = open_job(trial, tell, most=config.batch)
        tell(job.plan())
        where, logged = f"as {folder / files.LOG} has it", _logged(folder)
        if logged is None:
            tell("times a few steps, the first of which compile")
            logged, where = (job.seconds_per_step(), memory_gb()), "here"
    seconds, memory = logged
    tell(f"most memory in use: {memory:.2f} GB {where}")
    whole = config.steps * seconds
    time = f"{whole / 60:.1f} min" if whole < 3600 else f"{whole / 3600:.1f} h"
    tell(f"a step takes {seconds:.3g} s {where}; {config.steps} steps: {time}")


def _logged(folder: pathlib.Path) -> tuple[float, float] | None:
    """Returns a step's seconds and the most memory (GB), of a log's end, or None."""
    try:
        lines = files.read_log(folder)
        seconds, steps, spent, before = [], 0, 0.0, 0
        for line in lines:
            count, before = line["step"] - before, line["step"]
            steps, spent = steps + count, spent + count * line["seconds_per_step"]
            # Steps are noted a few together, so that single ones say little.
            if steps >= _STEPS or line is lines[-1]:
                seconds.append(spent / steps)
                steps, spent = 0, 0.0
        # The first steps compile, those after a resumption too.
        typical = statistics.median((seconds[1:] or seconds)[-_LAST:])
        return typical, max(line["memory_gb"] for line in lines)
    except (ValueError, LookupError, ArithmeticError):
        return None


def _base(config: TrainConfig, folder: pathlib.Path) -> str:
    """Returns the name of the weights that a run begins with; makes fresh ones."""
    if config.weights != FRESH:
        inside = expand(config.weights)
        return str(inside.resolve()) if inside.exists() else config.weights
    fresh.save_fresh(folder / FRESH, config.seed, config.data.seed)
    return f"./{FRESH}"


def _load(
    config: TrainConfig, name: str, trained: bool = False, network: str = "generator"
) -> Bundle:
    """Returns weights; without updates to train, those there are are added to them.

    What is trained as a whole comes in float32, as its masters are.
    """
    masters = trained and not config.lora.rank
    return load_bundle(
        name,
        grid=None if config.size is None else parse_size(config.size),
        dtype=config.dtype,
        lora="separate" if config.lora.rank else "merged",
        param_dtype="float32" if masters else None,
        network=network,
    )


def _load_critic(config: TrainConfig) -> Bundle | None:
    """Returns where the fake score begins; None: as the teacher that is loaded."""
    if config.critic:
        return _load(config, config.critic, trained=True, network="critic")
    if config.stage == "distillation" and config.teacher and not config.lora.rank:
        return _load(config, config.teacher, trained=True)
    return None


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """Makes arrays in the host's memory: they are put onto the mesh in pieces.

    A device of a large mesh has no room for whole networks.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        host = None
    with jax.default_device(host):
        yield


def _forget_variables(bundle: Bundle | None) -> None:
    """Drops a network's weights; the ones on the mesh are those that are used."""
    if bundle is not None:
        bundle.__dict__.pop("variables", None)


def compare_config(
    config: TrainConfig, folder: pathlib.Path, tell: Callable[[str], None]
) -> None:
    """Raises unless the run in a folder, if there is one, can go on with a config.

    Fields that the run's version did not have yet count as their default.

    Raises:
      UserError: The run in the folder has another config, or none that can be read.
    """
    sections = [name for name, value in _json(config).items() if type(value) is dict]
    stored = files.read_config(folder, sections)
    if stored is None:
        return
    changed = _changed(stored, _json(config))
    refused = {
        name: values
        for name, values in changed.items()
        if name.split(".")[0] not in _TOLD
    }
    if refused:
        fields = (
            f"{name} (began with {shown(old, 200)}, got {shown(new, 200)})"
            for name, (old, new) in refused.items()
        )
        raise UserError(
            f"{folder} holds a run of another config: {', '.join(fields)}; give the"
            " values that it began with, or another --config.out, which may begin with"
            f" its weights: --config.weights={folder}"
        )
    if changed:
        tell(f"changed since the run began: {', '.join(changed)}")


def write_config(config: TrainConfig, folder: pathlib.Path) -> None:
    """Writes the config of a run, with which alone it then goes on."""
    write_json(folder / files.CONFIG, _json(config))


def inputs(config: TrainConfig, generator: Bundle, teacher, critic) -> dict[str, Any]:
    """Returns what every step reads and no checkpoint holds.

    Of the weights that a run began with it is the text encoder and the codec, and what
    has no gradient.
    """
    found = {"data": sources.identity(config.data), "weights": generator.digest}
    if teacher is not None:
        found["teacher"] = teacher.digest
    if config.lora.rank:
        found["critic"] = (critic or teacher or generator).digest
    if config.data.kind.startswith("world_"):
        found["data.kind"] = world_data.VERSION
    return json.loads(json.dumps(found))


def compare_inputs(folder: pathlib.Path, given: Mapping[str, Any]) -> None:
    """Raises unless a run's inputs are those that it began with.

    Raises:
      UserError: Some are not.
    """
    stored = files.read_inputs(folder)
    changed = [
        name for name, value in given.items() if stored.get(name, value) != value
    ]
    if changed:
        raise UserError(
            f"{folder}: what config.{', config.'.join(changed)} names holds something"
            " else than when the run began; put it back, or choose another"
            " --config.out"
        )


def _changed(
    stored: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns old and new values of the fields that differ and may not simply do so."""
    found, defaults = {}, _json(TrainConfig())
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


def _json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _gigabytes(tree) -> float:
    """Returns what the first device holds of some arrays."""
    device = jax.local_devices()[0]
    return (
        sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        / 1e9
    )
