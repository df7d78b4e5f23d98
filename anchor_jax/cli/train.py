"""`anchor-jax train`: runs a stage of training, and resumes it."""

from absl import flags

from anchor_jax.config import define_config_flag

SUMMARY = "Train a stage: teacher, causal initialisation, distillation, long tuning."
USAGE = """\
anchor-jax train --config=configs/train_teacher.py --config.out=runs/teacher
anchor-jax train --config=configs/train_dmd.py --config.out=runs/dmd \\
    --config.weights=runs/causal --config.teacher=runs/teacher
anchor-jax train --config=configs/train_dmd.py --config.out=runs/dmd --dry_run
anchor-jax sample --config=configs/tiny.py --config.weights=runs/dmd
The same command goes on where a run was ended, bit for bit."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag()
    flags.DEFINE_bool("dry_run", False, "Print the plan, and train nothing.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, the folder holds another run, or a loss was not
        finite.
    """
    del argv
    from anchor_jax.cli import sample

    sample.enable_compilation_cache()
    from anchor_jax.training import run

    config = run.read_config(FLAGS.config)
    job = run.open_job(config, tell=print)
    print(job.plan())
    if not FLAGS.dry_run:
        job.run()
        print(f"done; sample with --config.weights={config.out}")
