"""`anchor-jax ablate`: runs the paper's ablations on the tiny world."""

from absl import flags

from anchor_jax.cli import compile_cache
from anchor_jax.config import define_config_flag, load_config
from anchor_jax.errors import UserError
from anchor_jax.io import expand

SUMMARY = "Swap parts of the method, or train without them, and compare."
USAGE = """\
anchor-jax ablate --config=configs/tiny.py --out=runs/swaps
anchor-jax ablate --config=configs/tiny.py --part=trained --out=runs/arms \\
    --config.weights=launch/ladder/dmd --teacher=launch/ladder/teacher --steps=700
anchor-jax ablate --config=configs/tiny.py --scripts=10 --starts=1
--part=swaps streams one generator with different RoPE rules and switch actions.
--part=trained tunes every arm from the same generator, which was not tuned for any arm.
All arms are tuned in the same way and differ only in their policy. Several processes
can share the arms with --arms; the same command without --arms then makes the table.
Arms of swaps: baseline (absolute RoPE, re-cache), bounded, tri_region, flush, anchors,
both (the method). Arms of trained: baseline, tri_region, both. The same command resumes
a stopped run. Tables are written beside the numbers."""

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
    from anchor_jax.evaluation.registry import ABLATIONS

    for name in ("steps", "teacher"):
        if FLAGS.part != PARTS[1] and FLAGS[name].value is not None:
            raise UserError(
                f"--{name} needs --part={PARTS[1]}; --part={FLAGS.part} trains nothing"
            )
    folder = expand(FLAGS.out)
    ablation = ABLATIONS["paper"]
    trial = ablation.make_trial(
        scripts=FLAGS.scripts,
        starts=FLAGS.starts,
        segments=FLAGS.segments,
        blocks=FLAGS.blocks,
        batch=FLAGS.batch,
        seed=FLAGS.seed,
    )
    compared = ablation.make_comparison(
        FLAGS.part, trial, FLAGS.config, _training(), folder, print
    )
    names = compared.arms(FLAGS.arms)
    config = FLAGS.config.to_json_best_effort()
    others = [FLAGS.train, FLAGS.teacher, FLAGS.steps]
    job = ownership.job_id("ablate", config, compared.identity(), others)
    remedy = (
        "wait until it ends, stop it, choose another --out, or share the work with"
        " --arms"
    )
    with ownership.own(folder / FLAGS.part, job, names, tell=print, remedy=remedy):
        compared.run(names)


def _training():
    """Returns the config of the trainings, or None if there are none."""
    if FLAGS.part != PARTS[1]:
        return None
    chosen = load_config(FLAGS.train)
    chosen.weights = FLAGS.config.weights
    if FLAGS.steps is not None:
        chosen.steps = FLAGS.steps
    if FLAGS.teacher is not None:
        chosen.teacher = FLAGS.teacher
    return chosen
