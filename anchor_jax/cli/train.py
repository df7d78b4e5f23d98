"""`anchor-jax train`: runs a stage of training, and resumes it."""

import shlex

from absl import flags

from anchor_jax.config import define_config_flag
from anchor_jax.errors import Stopped

SUMMARY = "Train a stage: teacher, causal initialisation, distillation, long tuning."
USAGE = """\
anchor-jax train --config=configs/train_teacher.py --config.out=runs/teacher6
anchor-jax train --config=configs/train_dmd.py:tiny --config.out=runs/dmd \\
    --config.weights=runs/guided --config.teacher=runs/teacher
anchor-jax train --config=configs/train_dmd.py:tiny --config.weights=tiny \\
    --config.teacher=tiny --config.out=runs/try --config.steps=3 --dry_run
anchor-jax sample --config=configs/tiny.py --config.weights=runs/dmd
anchor-jax sample --config=configs/tiny.py --config.weights=runs/dmd/400
tensorboard --logdir runs

The same command goes on where a run was ended, bit for bit; Ctrl-C or SIGTERM ends it
with a checkpoint, and status 130; a second Ctrl-C ends it at once. Where to look:
OUT/log.jsonl has a line of numbers every --config.log_every steps, OUT/events the same
for TensorBoard (pip install tensorboard tensorboardX), OUT/samples a video and a sheet
of frames every --config.sample_every steps; --config.samples.* says what they show.
OUT/400 is the checkpoint of step 400: the last --config.keep stay, and the
--config.keep_best lowest in --config.best_of. Files of prompts or captions hold text,
JSON lines, a JSON list or a table (.csv, .tsv with the column prompt); a text longer
than the text encoder reads is named before the first step. --dry_run tells sizes and
hours, leaves no files, and times a few steps if the folder has no log; what a step
needs on chips that are not here: anchor-jax plan --help."""

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
      Stopped: It was asked to, before its end.
    """
    del argv
    from anchor_jax.cli import allocator, compile_cache

    compile_cache.enable()
    allocator.keep_freed_memory()
    from anchor_jax.training import run

    config = run.read_config(FLAGS.config)
    if FLAGS.dry_run:
        run.dry_run(config, tell=print)
        return
    job = run.open_job(config, tell=print)
    print(job.plan())
    step = job.run()
    _report(job)
    if step < config.steps:
        raise Stopped(
            f"stopped at step {step} of {config.steps}; the same command goes on"
        )
    print(f"done; sample with: {_sampling(job)}")


def _report(job) -> None:
    """Prints where things are."""
    out = job.config.out
    from anchor_jax.training.files import LOG
    from anchor_jax.training.monitor import EVENTS

    print(f"numbers: {job.folder / LOG}")
    if (job.folder / EVENTS).is_dir():
        print(f"curves: tensorboard --logdir {out} (pip install tensorboard)")
    if job.sampler is not None and job.sampler.folder.is_dir():
        print(f"sample videos: {job.sampler.folder}")


def _sampling(job) -> str:
    """Returns the command that samples from what was trained."""
    line = ["anchor-jax", "sample", "--config=configs/interactive.py"]
    line.append(f"--config.weights={job.config.out}")
    if job.config.size is not None:
        line.append(f"--config.size={job.config.size}")
    shown = "PROMPT[5s]"
    if job.sampler is not None:
        shown = job.sampler.videos[0].script.inline()
    line.append(f"--config.prompt={shown}")
    return shlex.join(line)
