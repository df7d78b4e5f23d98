"""`anchor-jax ablate`: runs the paper's ablations on the tiny world."""

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
--part=swaps streams one generator with different RoPE rules and switch actions.
--part=trained tunes every arm from the same generator, which was not tuned for any arm.
The arms are tuned alike and differ only in their policy. Several processes can share
the arms with --arms; the same command without --arms then makes the table.
Arms of swaps: baseline (absolute RoPE, re-cache), bounded, tri_region, flush, anchors,
both (the method). Arms of trained: baseline, tri_region, both.
The same command resumes a stopped run. Tables are written beside the numbers."""

PARTS = ("swaps", "trained")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/tiny.py")
    flags.DEFINE_enum("part", PARTS[0], PARTS, "Which comparison to run.")
    flags.DEFINE_string("out", "runs/ablation", "Folder for numbers and tables.")
    flags.DEFINE_list("arms", [], "Names of arms. Default: all arms of the part.")
    flags.DEFINE_integer("scripts", 100, "Number of scripts.", lower_bound=2)
    flags.DEFINE_integer("starts", 3, "Noise seeds (swaps), or trainings per arm.", 1)
    flags.DEFINE_integer("segments", 4, "Segments per script.", lower_bound=2)
    flags.DEFINE_integer("blocks", 7, "Blocks per segment.", lower_bound=1)
    flags.DEFINE_integer("batch", 25, "Streams generated together.", lower_bound=1)
    flags.DEFINE_integer("seed", 7, "Random seed of the scripts.", lower_bound=0)
    flags.DEFINE_string(
        "train",
        "configs/train_streaming.py:tiny",
        "Training config of the arms. It starts from the weights of --config.",
    )
    flags.DEFINE_string(
        "teacher", None, "Teacher of that training. Default: the training config's."
    )
    flags.DEFINE_integer(
        "steps", None, "Steps of that training. Default: the training config's.", 1
    )


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, or an arm is unknown.
      Stopped: It stopped on request.
    """
    del argv
    compile_cache.enable()
    from anchor_jax import ownership
    from anchor_jax.tiny_world import ablation

    for name in ("steps", "teacher"):
        if FLAGS.part != PARTS[1] and FLAGS[name].value is not None:
            raise UserError(
                f"--{name} needs --part={PARTS[1]}; --part={FLAGS.part} trains nothing"
            )
    names = _arms(ablation)
    folder = expand(FLAGS.out)
    config = FLAGS.config.to_json_best_effort()
    others = [FLAGS.train, FLAGS.teacher, FLAGS.steps]
    trial = dataclasses.asdict(_one_start(ablation))
    job = ownership.job_id("ablate", config, trial, others)
    remedy = (
        "wait until it ends, stop it, choose another --out, or share the work with"
        " --arms"
    )
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
        print("probe: loss of a block with different pasts (takes half a minute)")
        result["probe"] = ablation.probe(*_model(FLAGS.config))
        print(ablation.probe_table(result["probe"]))
        io.write_json(folder / f"{FLAGS.part}.json", result)
    print(f"Wrote {folder / FLAGS.part}.json and .md")


def _arms(ablation) -> list[str]:
    known = ablation.ARMS if FLAGS.part == PARTS[0] else ablation.TRAINED
    for name in FLAGS.arms:
        if name not in known:
            raise UserError(
                f"--arms: {name!r} is not an arm of --part={FLAGS.part}; choose from"
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
    """Returns the parts of the trial on which the numbers of one start depend."""
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
    print(f"{name}, start {start}: training in {place}")
    reached = run.open_job(run.read_config(chosen), tell=print).run()
    if reached < chosen.steps:
        raise Stopped(
            f"{place}: Stopped at {reached}/{chosen.steps}. Rerun this command to"
            " resume."
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
