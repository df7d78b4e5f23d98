"""Runs one training stage: loads weights and data, owns the folder, trains."""

import contextlib
import dataclasses
import json
import operator
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax

from anchor_jax import devices, io, ownership, places, processes, supervisor
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, naming, suggest
from anchor_jax.io import scratch_folder, write_json
from anchor_jax.plugins import Registry
from anchor_jax.training import files, placement, reports, resume, samples
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.data import kinds, sources
from anchor_jax.training.data.order import Share
from anchor_jax.training.data.prefetch import Prefetch
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor, beside_bar, memory_gb
from anchor_jax.training.samples import Sampler
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Cursor, Prepared
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.registry import STAGES
from anchor_jax.training.state import TrainState
from anchor_jax.training.watch import preflight
from anchor_jax.training.watch.observer import Gauge, Watch, open_watch
from anchor_jax.training.watch.times import DATA, Times
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.lineage import write_run
from anchor_jax.weights.load import load_bundle
from anchor_jax.weights.trained import CRITIC

INITIAL: Registry[Callable[[pathlib.Path, int, int], None]] = Registry(
    "initial weights"
)
"""Functions (folder, seed, data seed) that write random weights, by name."""
_STEPS, _LAST = 10, 5


def read_config(config) -> TrainConfig:
    """Returns the config as a dataclass, after checking types and ranges.

    Raises:
      UserError: A field is missing or unknown, or has the wrong type or range.
    """
    read = from_config(TrainConfig, config, "config")
    least = {"steps": 1, "batch": 1, "keep": 1, "save_every": 1, "log_every": 1}
    least |= {"microbatches": 1, "prefetch": 0}
    least |= {"keep_best": 0, "sample_every": 0, "lora.rank": 0, "data.size": 1}
    least |= dict.fromkeys(("watchdog.medians", "watchdog.least", "watchdog.most"), 0)
    least |= {"profile.steps": 0, "preflight.slow": 0, "preflight.seconds": 1}
    for stage in STAGES.values():
        least |= stage.least
    for name, smallest in least.items():
        value = operator.attrgetter(name)(read)
        if value < smallest:
            raise UserError(f"config.{name}={value}: must be at least {smallest}")
    if not read.keep_best or read.stage not in STAGES:
        return read
    known = STAGES[read.stage].numbers
    if read.best_of not in known:
        found = suggest(read.best_of, known, f"numbers of {read.stage}")
        raise UserError(f"config.best_of={read.best_of!r}{found}")
    return read


@dataclasses.dataclass(eq=False)
class TrainingRun:
    """A stage that is ready to run.

    Attributes:
      config: the training's config.
      folder: the folder of checkpoints, logs and samples.
      prepared: the compiled stage.
      checkpoints: the checkpoints in the folder.
      tell: a function that prints a line.
      sampler: makes sample videos, or None.
      lease: the lease on the folder.
      times: the seconds since the training was opened, by cause.
      say: a function that prints a line in every process. None takes `tell`.
    """

    config: TrainConfig
    folder: pathlib.Path
    prepared: Prepared
    checkpoints: Checkpoints
    tell: Callable[[str], None]
    sampler: Sampler | None = None
    lease: ownership.Lease | None = None
    times: Times = dataclasses.field(default_factory=Times)
    say: Callable[[str], None] | None = None

    def describe(self) -> str:
        """Returns a description of the training, as text."""
        config, counts = self.config, self.prepared.counts
        length = build.find_stage(config).describe_frames(config)
        mesh = dict(self.prepared.compiled.mesh.shape)
        lines = [
            f"stage {config.stage}, {config.steps} steps of {config.batch} videos,"
            f" {length}, rules {config.rules}, mesh {mesh}",
            "parameters: "
            + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
            f"on each device: state {_gigabytes(self.prepared.state):.2f} GB, frozen"
            f" weights {_gigabytes(self.prepared.compiled.frozen):.2f} GB, plus"
            " activations",
            f"sample videos: {self._shown()}",
        ]
        return "\n".join(lines)

    def _shown(self) -> str:
        if self.sampler is None:
            return "none (sample_every is 0, or there are no prompts)"
        texts = [" | ".join(one.script.prompts) for one in self.sampler.videos]
        often = f"every {self.config.sample_every} steps and at the end"
        return f"{often}, {'; '.join(texts)}"

    def run(self) -> int:
        """Trains to the last step, from the last checkpoint if there is one.

        The lease on the folder is released at the end.

        Returns:
          The step that was reached. A request to stop ends the training early.
        """
        with self.lease or contextlib.nullcontext():
            return self._run()

    def _run(self) -> int:
        stage, state = self.prepared.compiled, self.prepared.state
        found = self.checkpoints.restore(state, stage.places)
        state, cursor = found or (state, Cursor())
        first = int(state.step)
        done = first >= self.config.steps
        if first:
            finished = f"Already finished at step {first}; nothing to do."
            self.tell(finished if done else f"Resuming at step {first}.")
        config = self.config
        loop = Loop(
            config.steps, config.save_every, config.log_every, config.sample_every
        )
        watch, gauge = Watch.nothing(self.folder), None
        if not done:
            self._preflight(state)
            watch, gauge = self._open_watch(first)
        monitor = Monitor(
            self.folder,
            config.steps,
            first,
            config.log_every,
            self.prepared.frames,
            quiet=done or not processes.is_first(),
            gauge=gauge,
        )
        if self.sampler is not None:
            self.sampler.show = monitor.show
        try:
            with watch:
                state = train(
                    *(stage, state, cursor, loop, self.checkpoints, monitor),
                    *(self.sampler, watch),
                )
            self._tell_best()
        finally:
            try:
                monitor.close()
            finally:
                self.checkpoints.close()
        return int(state.step)

    def _preflight(self, state: TrainState) -> None:
        """Checks disk, devices and hosts."""
        config = self.config
        kept = len(self.checkpoints.manager.all_steps())
        # The next one is written before the oldest is removed.
        missing = max(1, config.keep + config.keep_best + 1 - kept)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        preflight.check(config.preflight, self.folder, size, missing, self.tell)

    def _open_watch(self, first: int) -> tuple[Watch, Gauge]:
        config = self.config
        return open_watch(
            config,
            lambda: build.find_stage(config).uses(config, self.prepared),
            self.folder,
            first,
            self.times,
            beside_bar(self.tell),
            beside_bar(self.say or self.tell),
        )

    def _tell_best(self) -> None:
        best = self.checkpoints.best()
        if best is not None:
            step, value = best
            self.tell(
                f"best checkpoint: {self.folder / str(step)} (lowest"
                f" {self.config.best_of}, {value:.6g}, step {step})"
            )

    def seconds_per_step(self) -> float:
        """Returns the measured seconds per step; the measured steps are discarded."""
        stage, state = self.prepared.compiled, self.prepared.state
        state, cursor = stage.settle(state, Cursor())
        first_of = {stage.updates(step): step for step in reversed(range(stage.cycle))}
        made = [stage.updates(step) for step in range(stage.cycle)]
        seconds = {}
        for updates, step in (*first_of.items(), *first_of.items()):
            began = time.monotonic()
            # The chunks are the same each time, so that nothing is compiled the second
            # time.
            state, _, metrics = stage.advance(state, cursor, step)
            jax.block_until_ready((state, metrics))
            seconds[updates] = time.monotonic() - began
        return sum(seconds[updates] for updates in made) / len(made)


def open_training(
    config: TrainConfig,
    tell: Callable[[str], None],
    most: int | None = None,
    patience: float = 0.0,
    say: Callable[[str], None] | None = None,
) -> TrainingRun:
    """Returns a stage with its weights and data, and a lease on its folder.

    Args:
      config: the training's config.
      tell: a function that prints a line.
      most: number of examples to read from data that is slow to prepare. Default: all.
      patience: seconds to wait for another training in the folder to end.
      say: a function that prints a line in every process. None takes `tell`.

    Raises:
      UserError: The config is wrong, the folder holds another run, or another job uses
        the folder.
    """
    times = Times()
    devices.check_processes()
    missing = _missing(io.place(config.out))
    folder = files.make_folder(config.out)
    # The processes of one training share its folder; each has its own number.
    lease = ownership.own(
        folder,
        ownership.job_id(
            "train", processes.count(), {**resume.as_json(config), "out": ""}
        ),
        (str(processes.index()),),
        patience,
        tell,
        "wait until it ends, stop it, or choose another --config.out",
    )
    try:
        training = _open_training(config, folder, tell, most, times)
    except BaseException:
        lease.release()
        # If the start is refused, no folder that looks like a training may stay.
        for empty in missing:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise
    training.lease, training.say = lease, say
    supervisor.tell(folder=str(io.resolved(folder)))
    return training


def _missing(folder: io.Place) -> list[pathlib.Path]:
    """Returns the folders of a training that its start makes; a bucket has none."""
    if places.is_remote(folder):
        return []
    return [one for one in (folder / "data", folder) if not one.exists()]


def _open_training(
    config: TrainConfig, folder: pathlib.Path, tell, most: int | None, times: Times
) -> TrainingRun:
    is_trial = most is not None  # in a temporary folder of each process
    if not is_trial:
        files.check_shared(folder)
    files.check(folder)
    resume.compare_config(config, folder, tell)
    stage = build.find_stage(config)
    base = _base(config, folder, is_trial or processes.is_first())
    initial = str(folder / base) if config.weights in INITIAL else base
    with naming("config.weights"):
        generator = _load(config, initial, trained=True)
    with naming("config.teacher"):
        teacher = _load(config, config.teacher) if config.teacher else None
    with naming("config.critic"):
        critic = _load_critic(config)
    rows = placement.rows_of_process(build.make_mesh(config), config.batch)
    share = Share(config.batch, rows)
    with naming("config.data"):
        batches = build.open_source(config, generator, folder, share, most)
    batches = times.counted(DATA, Prefetch(batches, config.prefetch))
    with _on_host():
        prepared = build.prepare(config, generator, batches, teacher, critic)
    for bundle in (generator, teacher, critic):
        _forget_variables(bundle)
    read = {} if is_trial else resume.inputs(config, generator, teacher, critic)
    resume.compare_inputs(folder, read)
    sampler = samples.make_sampler(config, prepared, folder)
    processes.agree(read, processes.LOADING)
    if is_trial or processes.is_first():
        write_run(folder, base)
        resume.write_config(config, folder)
        write_json(folder / files.INPUTS, read)
    processes.barrier("the run's files")
    for line in stage.warnings(prepared):
        tell(line)
    _warn_of_words(config, generator, folder, tell)
    own = _own_texts(config, sampler)
    for line in reports.report_texts(config.data, generator.tokenizer, own):
        tell(line)
    meta = {"training": resume.as_json(config)}
    if stage.has_critic:
        sizes = dataclasses.asdict((critic or teacher).model)
        meta[CRITIC] = json.loads(json.dumps(sizes))
    checkpoints = Checkpoints(
        folder, meta, config.keep, tell, config.keep_best, config.best_of
    )
    return TrainingRun(
        config, folder, prepared, checkpoints, tell, sampler, times=times
    )


def _warn_of_words(config: TrainConfig, bundle: Bundle, folder, tell) -> None:
    """Warns about words in prompt files that the text encoder does not know."""
    kind = kinds.find_kind(config.data)
    is_free_text = isinstance(kind, kinds.PromptKind) and kind.is_free_text
    if not is_free_text or not hasattr(bundle.tokenizer, "unknown_words"):
        return
    texts = sources.open_texts(config.data, folder)
    prompts = (text for n in range(sources.LOOKED_AT) for text in texts(n))
    found = {word for text in prompts for word in bundle.tokenizer.unknown_words(text)}
    if found:
        tell(f"warning: words that the model does not know: {', '.join(sorted(found))}")


def _own_texts(config: TrainConfig, sampler) -> Iterator[tuple[str, str]]:
    """Yields (field, text) for the texts in the config itself."""
    yield from build.find_stage(config).texts(config)
    for video in sampler.videos if sampler else ():
        for prompt in video.script.prompts:
            yield "config.samples", prompt


def dry_run(config: TrainConfig, tell: Callable[[str], None]) -> None:
    """Prints the plan, memory and duration of a training; leaves no files.

    Raises:
      UserError: The config is wrong, or the folder holds another run.
    """
    folder = io.place(config.out)
    files.check(folder)
    resume.compare_config(config, folder, tell)
    with scratch_folder() as scratch:
        # Datasets are built in the scratch folder.
        data = dataclasses.replace(config.data, cache=None)
        temporary = dataclasses.replace(config, out=str(scratch), data=data)
        training = open_training(temporary, tell, most=config.batch)
        tell(training.describe())
        where, logged = f"(from {folder / files.LOG})", _logged(folder)
        if logged is None:
            tell("timing a few steps; the first ones compile")
            logged, where = (
                (training.seconds_per_step(), memory_gb()),
                "on this machine",
            )
    seconds, memory = logged
    tell(f"peak memory: {memory:.2f} GB {where}")
    whole = config.steps * seconds
    time = f"{whole / 60:.1f} min" if whole < 3600 else f"{whole / 3600:.1f} h"
    tell(f"a step takes {seconds:.3g} s {where}; {config.steps} steps: {time}")


def _logged(folder: pathlib.Path) -> tuple[float, float] | None:
    """Returns the seconds per step and the peak memory in GB from a log, or None."""
    try:
        lines = files.read_log(folder)
        seconds, steps, spent, before = [], 0, 0.0, 0
        for line in lines:
            count, before = line["step"] - before, line["step"]
            steps, spent = steps + count, spent + count * line["seconds_per_step"]
            # Each line of the log is a mean over few steps, so single lines vary.
            if steps >= _STEPS or line is lines[-1]:
                seconds.append(spent / steps)
                steps, spent = 0, 0.0
        # The first steps compile, also those after a restart.
        typical = statistics.median((seconds[1:] or seconds)[-_LAST:])
        return typical, max(line["memory_gb"] for line in lines)
    except (ValueError, LookupError, ArithmeticError):
        return None


def _base(config: TrainConfig, folder: pathlib.Path, writes: bool) -> str:
    """Returns the name of a run's initial weights; makes random ones if needed.

    Random weights are in the run's folder, and their name begins with "./".
    """
    if config.weights not in INITIAL:
        inside = io.place(config.weights)
        is_path = places.exists(inside)
        return str(io.resolved(inside)) if is_path else config.weights
    save = INITIAL[config.weights]
    if writes:
        save(folder / config.weights, config.seed, config.data.seed)
    processes.barrier("initial weights", processes.LOADING)
    return f"./{config.weights}"


def _load(
    config: TrainConfig, name: str, trained: bool = False, network: str = "generator"
) -> Bundle:
    """Returns weights. LoRA adapters are merged unless adapters are trained.

    Weights that are trained as a whole are loaded in float32, like the master weights.
    """
    masters = trained and not config.lora.rank
    return load_bundle(
        name,
        grid=config.size,
        dtype=config.dtype,
        lora="separate" if config.lora.rank else "merged",
        param_dtype="float32" if masters else None,
        network=network,
    )


def _load_critic(config: TrainConfig) -> Bundle | None:
    """Returns the initial fake score; None means the loaded teacher."""
    if config.critic:
        return _load(config, config.critic, trained=True, network="critic")
    has_critic = build.find_stage(config).has_critic
    if has_critic and config.teacher and not config.lora.rank:
        return _load(config, config.teacher, trained=True)
    return None


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """Creates new arrays in host memory; they move to the mesh in shards.

    A single device of a large mesh cannot hold whole networks.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        host = None
    with jax.default_device(host):
        yield


def _forget_variables(bundle: Bundle | None) -> None:
    """Drops a network's weights in host memory; only those on the mesh are used."""
    if bundle is not None:
        bundle.__dict__.pop("variables", None)


def _gigabytes(tree) -> float:
    """Returns the gigabytes of some arrays on the first device."""
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
