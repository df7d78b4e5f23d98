"""`anchor-jax train`: runs or resumes a training stage."""

import shlex
import signal

from absl import flags

from anchor_jax import interrupts
from anchor_jax.cli import jobs
from anchor_jax.cli.output import own_line
from anchor_jax.config import define_config_flag
from anchor_jax.errors import Stopped

SUMMARY = "Run a stage: teacher, causal initialisation, distillation, long tuning."
USAGE = """\
anchor-jax train --config=configs/train_teacher.py --config.out=runs/teacher6
anchor-jax train --config=configs/train_dmd.py:tiny --config.out=runs/dmd \\
    --config.weights=runs/guided --config.teacher=runs/teacher
anchor-jax train --config=configs/train_dmd.py:tiny --config.weights=tiny \\
    --config.teacher=tiny --config.out=runs/try --config.steps=3 --dry_run
anchor-jax sample --config=configs/tiny.py --config.weights=runs/dmd
anchor-jax sample --config=configs/tiny.py --config.weights=runs/dmd/400
tensorboard --logdir runs

Several processes: the same command on each host or for each accelerator, and
    --coordinator=10.0.0.1:1234 --num_processes=2 --process_id=0    # and 1
which are found under Slurm (srun), on TPU slices and in indexed Kubernetes jobs. A
process that is terminated stops all; 75 means "start me again". The coordinator's port
has no password: use a private network. The page of launch/ says more.

The same command resumes a stopped run, bit for bit. Ctrl-C or SIGTERM writes a
checkpoint and stops with status 130 (SIGTERM in a job: 75). A second Ctrl-C stops at
once.
OUT/log.jsonl has a line of metrics every --config.log_every steps. OUT/events has the
same for TensorBoard (pip install tensorboard). OUT/samples has a video and
a contact sheet every --config.sample_every steps, of the prompts in --config.samples.
The command "kill -USR1 PID", or the file OUT/profile ("touch OUT/profile"), makes a
profile of the next --config.profile.steps steps in OUT/profiles.
OUT/400 is the checkpoint of step 400. The newest --config.keep checkpoints are
retained, and the --config.keep_best checkpoints with the lowest --config.best_of.
Files of prompts or captions hold text, JSON lines, a JSON list or a table (.csv, .tsv
with a column prompt). A text that is too long for the text encoder is reported before
the first step. --dry_run prints sizes and hours and leaves no files; it times a few
steps if the folder has no log. For chips you don't have: anchor-jax plan --help."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag()
    jobs.define_flags()
    flags.DEFINE_bool("dry_run", False, "Print the plan without training.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, the folder holds another run, a loss was not
        finite, or other processes of a cluster are missing.
      Stopped: It stopped on request before the last step.
    """
    del argv
    # The signal requests a profile; before the loop starts it must end nothing.
    with interrupts.counting(signal.SIGUSR1):
        _train()


def _train() -> None:
    from anchor_jax.cli import allocator, compile_cache

    jobs.join("train")
    compile_cache.enable()
    allocator.keep_freed_memory()
    from anchor_jax.training import run

    config = run.read_config(FLAGS.config)
    if FLAGS.dry_run:
        run.dry_run(config, tell=print)
        return
    training = run.open_training(config, tell=print, say=own_line)
    print(training.describe())
    step = training.run()
    _report(training)
    if step < config.steps:
        raise Stopped(
            f"Stopped at {step}/{config.steps}. Rerun this command to resume."
        )
    print(f"Done. Sample with: {_sampling(training)}")


def _report(training) -> None:
    """Prints where the run's files are."""
    out = training.config.out
    from anchor_jax.training.files import LOG
    from anchor_jax.training.monitor import EVENTS

    print(f"metrics: {training.folder / LOG}")
    if (training.folder / EVENTS).is_dir():
        print(f"curves: tensorboard --logdir {out} (pip install tensorboard)")
    if training.sampler is not None and training.sampler.folder.is_dir():
        print(f"sample videos: {training.sampler.folder}")


def _sampling(training) -> str:
    """Returns a command that samples from the trained weights."""
    line = ["anchor-jax", "sample", "--config=configs/interactive.py"]
    line.append(f"--config.weights={training.config.out}")
    if training.config.size is not None:
        line.append(f"--config.size={training.config.size}")
    shown = "PROMPT[5s]"
    if training.sampler is not None:
        shown = training.sampler.videos[0].script.inline()
    line.append(f"--config.prompt={shown}")
    return shlex.join(line)
