"""`anchor-jax ablate`: the paper's ablations, on the tiny world."""

import dataclasses
import pathlib

from absl import flags

from anchor_jax import interrupts
from anchor_jax.cli import compile_cache
from anchor_jax.config import define_config_flag, load_config
from anchor_jax.errors import Stopped, UserError
from anchor_jax.io import expand

SUMMARY = "Swap parts of the method, or train without them, and compare."
USAGE = """\
anchor-jax ablate --config=configs/tiny.py --out=runs/swaps
anchor-jax ablate --config=configs/tiny.py --part=trained --out=runs/arms \\
    --config.weights=launch/ladder/dmd --teacher=launch/ladder/teacher --steps=700
anchor-jax ablate --config=configs/tiny.py --scripts=10 --starts=1
swaps: one generator, streamed with other RoPE rules and switch actions. trained: arms
that begin as the same generator, one that no arm's memory was tuned on, and are tuned
alike, but for what they remember; processes may share them by --arms, without it the
same command then makes the table. Arms: baseline (absolute RoPE, re-cache), bounded,
tri_region, flush, anchors, both (the method); trained: baseline, tri_region, both.
The same command goes on where it was ended; the table is written beside the numbers."""

PARTS = ("swaps", "trained")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/tiny.py")
    flags.DEFINE_enum("part", PARTS[0], PARTS, "What to compare.")
    flags.DEFINE_string("out", "runs/ablation", "Folder of numbers and tables.")
    flags.DEFINE_list("arms", [], "Names of arms; without a value all of the part.")
    flags.DEFINE_integer("scripts", 100, "Scripts with events.", lower_bound=2)
    flags.DEFINE_integer("starts", 3, "Noise seeds; trainings of an arm.", 1)
    flags.DEFINE_integer("segments", 4, "Of a script.", lower_bound=2)
    flags.DEFINE_integer("blocks", 7, "Of a segment.", lower_bound=1)
    flags.DEFINE_integer("batch", 25, "Streams side by side.", lower_bound=1)
    flags.DEFINE_integer("seed", 7, "Of the scripts.", lower_bound=0)
    flags.DEFINE_string(
        "train",
        "configs/train_streaming.py:tiny",
        "Config of the arms' training; it begins with the weights of --config.",
    )
    flags.DEFINE_string("teacher", None, "Of that training; else the config's.")
    flags.DEFINE_integer("steps", None, "Of that training; else the config's.", 1)


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, or an arm is unknown.
      Stopped: It was asked to.
    """
    del argv
    compile_cache.enable()
    from anchor_jax import ownership
    from anchor_jax.evaluation import ablation

    for name in ("steps", "teacher"):
        if FLAGS.part != PARTS[1] and FLAGS[name].value is not None:
            raise UserError(f"--{name}: nothing is trained but by --part={PARTS[1]}")
    names = _arms(ablation)
    folder = expand(FLAGS.out)
    config = FLAGS.config.to_json_best_effort()
    others = [FLAGS.train, FLAGS.teacher, FLAGS.steps]
    trial = dataclasses.asdict(_one_start(ablation))
    job = ownership.job_id("ablate", config, trial, others)
    remedy = "wait for it, end it, choose another --out, or share the work by --arms"
    with ownership.own(folder / FLAGS.part, job, names, tell=print, remedy=remedy):
        _compare(ablation, folder, names)


def _compare(ablation, folder: pathlib.Path, names: list[str]) -> None:
    """Measures arms, and writes their table."""
    from anchor_jax import io

    run = _measure_swap if FLAGS.part == PARTS[0] else _measure_trained
    measured = {
        name: [run(ablation, folder, name, start) for start in range(FLAGS.starts)]
        for name in names
    }
    summary = ablation.summarize(measured)
    text = ablation.table(summary)
    print(text)
    result = {"trial": dataclasses.asdict(_trial(ablation)), "arms": summary}
    io.write_json(folder / f"{FLAGS.part}.json", result)
    io.write_text(folder / f"{FLAGS.part}.md", text + "\n")
    if FLAGS.part == PARTS[0]:
        print("probe: the loss of a block, by its past (half a minute)")
        result["probe"] = ablation.probe(*_model(FLAGS.config))
        print(ablation.probe_table(result["probe"]))
        io.write_json(folder / f"{FLAGS.part}.json", result)
    print(f"written to {folder / FLAGS.part}.json and .md")


def _arms(ablation) -> list[str]:
    known = ablation.ARMS if FLAGS.part == PARTS[0] else ablation.TRAINED
    for name in FLAGS.arms:
        if name not in known:
            raise UserError(
                f"--arms: {name!r} is none of --part={FLAGS.part}; choose of"
                f" {', '.join(known)}"
            )
    return FLAGS.arms or list(known)


def _trial(ablation):
    return ablation.Trial(
        scripts=FLAGS.scripts,
        starts=FLAGS.starts,
        segments=FLAGS.segments,
        blocks=FLAGS.blocks,
        batch=FLAGS.batch,
        seed=FLAGS.seed,
    )


def _one_start(ablation):
    """Returns the trial, as far as the numbers of one start depend on it."""
    return dataclasses.replace(_trial(ablation), starts=1, batch=1)


def _model(config):
    """Returns the weights, and the setup of their streams."""
    from anchor_jax import experiment
    from anchor_jax.prompts import Script, Segment

    given = experiment.read_config(config)
    model = experiment.load_weights(given)
    resolved = experiment.resolve(given, model.metadata)
    script = Script((Segment("", 0), Segment("", 3)), 6)
    return model, experiment.make_setup(resolved, model, script)


def _measure_swap(ablation, folder: pathlib.Path, name: str, start: int):
    return _measure(ablation, folder / "swaps", name, start, FLAGS.config)


def _measure_trained(ablation, folder: pathlib.Path, name: str, start: int):
    from anchor_jax.training import run

    place = folder / "trained" / f"{name}-{start}"
    chosen = load_config(FLAGS.train)
    chosen.weights = FLAGS.config.weights
    chosen.out, chosen.seed, chosen.sample_every = str(place), start, 0
    chosen.distillation.policy = ablation.TRAINED[name]
    if FLAGS.steps is not None:
        chosen.steps = FLAGS.steps
    if FLAGS.teacher is not None:
        chosen.teacher = FLAGS.teacher
    print(f"{name}, start {start}: trains in {place}")
    reached = run.open_job(run.read_config(chosen), tell=print).run()
    if reached < chosen.steps:
        raise Stopped(
            f"{place}: stopped at step {reached} of {chosen.steps}; the same command"
            " goes on"
        )
    config = FLAGS.config.copy_and_resolve_references()
    config.weights = str(place)
    return _measure(ablation, folder / "trained", name, start, config)


def _measure(ablation, folder: pathlib.Path, name: str, start: int, config):
    trial = _trial(ablation)
    model, setup = _model(config)
    about = {
        "weights": model.digest,
        "trial": dataclasses.asdict(_one_start(ablation)),
        "config": config.to_json_best_effort(),
        "arm": repr(ablation.ARMS[name].policy),
        "start": start,
    }

    def run():
        interrupts.check()
        print(f"{name}, start {start}: {trial.scripts} streams")
        arm = dataclasses.replace(setup, policy=ablation.ARMS[name].policy)
        return ablation.measure(model, arm, trial, start)

    return ablation.measure_once(folder / f"{name}-{start}.json", about, run)
