"""`anchor-jax score`: measures how well tiny-world videos match their captions."""

import functools

from absl import flags

from anchor_jax.cli import compile_cache, jobs
from anchor_jax.config import define_config_flag
from anchor_jax.errors import UserError

SUMMARY = "Measure sampled videos: whether they show what their captions say, and more."
USAGE = """\
anchor-jax score --config=configs/tiny.py
anchor-jax score --config=configs/tiny.py:longlive --count=240
anchor-jax score --config=configs/tiny.py --out=score.json
anchor-jax score --config=configs/tiny.py --trial=events --count=200
anchor-jax score --config=configs/tiny.py --trial=minute --count=40
anchor-jax score --config=configs/tiny.py --metrics=temporal_flickering
The rates are shares of videos:
shape_iou: the outline has an IoU above 0.7. motion: the direction is right.
smooth: no step across a latent border is longer than 2.3 times the commanded step.
steady: there is no seam at all. adopted_soon: an event is visible within two blocks.
on_its_way: the motion continues. recalled: the object that returns is the hidden one.
persists: the first object is still visible.
temporal_flickering: 1 minus the mean difference of neighbouring frames.
Several processes of a job (--num_processes) share the batches; the rates are those of
one process, and process 0 prints and writes them. With --batch=B there are COUNT / B
batches, so more processes than that are idle."""

_SLOWEST = 7 * 86400.0  # seconds that the first process waits for the last one
TRIALS = ("switch", "events", "minute")

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/tiny.py")
    jobs.define_flags()
    flags.DEFINE_enum(
        "trial",
        TRIALS[0],
        TRIALS,
        "switch: one attribute or all attributes change. events: in addition a second"
        " object enters, or all objects hide and return without being named. minute:"
        " 60 s with five switches.",
    )
    flags.DEFINE_integer("count", 240, "Number of videos.", lower_bound=1)
    flags.DEFINE_integer("batch", 40, "Videos generated together.", lower_bound=1)
    flags.DEFINE_integer("blocks", 5, "Blocks per segment. Not used by minute.", 1)
    flags.DEFINE_integer("seed", 1, "Random seed of captions and noise.", lower_bound=0)
    flags.DEFINE_list(
        "metrics",
        [],
        "Metrics of all generated videos, such as temporal_flickering. Default: none.",
    )
    flags.DEFINE_string("out", None, "JSON file for the rates. Default: no file.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, or its policy cannot make the trial's videos.
    """
    del argv
    jobs.join("score")
    compile_cache.enable()
    from anchor_jax import io, processes, shares
    from anchor_jax.cache.catalog import TEACHER
    from anchor_jax.evaluation import registry
    from anchor_jax.evaluation.protocol import TrialSizes
    from anchor_jax.prompts import Script, Segment, Timing
    from anchor_jax.sampling.config import negative_prompt, read_config
    from anchor_jax.sampling.resolve import load_weights, make_setup, resolve

    out = FLAGS.out and io.expand(FLAGS.out)
    trial, metrics = registry.TRIALS[FLAGS.trial], registry.Collector(FLAGS.metrics)
    given = read_config(FLAGS.config)
    model = load_weights(given)
    shares.agree({"hash of the weights": model.digest})
    config = resolve(given, model.metadata)
    is_clip = config.policy == TEACHER
    if is_clip and not trial.takes_clips:
        raise UserError(
            f"--trial={FLAGS.trial} needs a streaming policy, but {config.policy} makes"
            f" whole clips; choose another policy, or --trial={TRIALS[0]}"
        )
    frames = trial.clip_frames if config.frames is None else config.frames
    Timing(block=1, frames=frames)
    starts = (0,) if is_clip else (0, 3)
    script = Script(tuple(Segment("", start) for start in starts), frames)
    setup = make_setup(config, model, script)
    _check_policy(config.policy, setup.policy, trial.segments(FLAGS.blocks, is_clip))
    sizes = TrialSizes(
        FLAGS.count,
        min(FLAGS.batch, FLAGS.count),
        FLAGS.blocks,
        FLAGS.seed,
        negative_prompt(config),
        _division(),
    )
    result = trial.run(model, setup, sizes, is_clip, metrics)
    metrics.join(sizes.division)
    print(trial.table(result))
    if FLAGS.metrics:
        result = {**result, "metrics": metrics.summary()}
        print(registry.table(result["metrics"]))
    if out and processes.is_printing():
        io.write_json(out, result)
        print(f"Wrote {out}")


def _division():
    """Returns the division of the batches among the processes of the job."""
    from anchor_jax import processes
    from anchor_jax.evaluation.protocol import Division

    if not processes.is_joined():
        return Division()
    gather = functools.partial(processes.gather, seconds=_SLOWEST)
    return Division(processes.index(), processes.count(), gather)


def _check_policy(name: str, policy, segments: tuple[int, ...]) -> None:
    """Raises UserError unless a stream of the policy can be as long as the trial."""
    others = "choose a policy without a limit, such as anchor_forcing or longlive"
    if policy.restart:
        raise UserError(
            f"{name} restarts every {policy.restart.every} latent frames, which score"
            f" does not support; {others}"
        )
    frames = sum(segments) * policy.block
    if policy.limit is not None and frames > policy.limit:
        fit = policy.limit // policy.block // len(segments)
        shorter = f"--blocks={fit}" if fit else "a smaller block"
        raise UserError(
            f"{name} is limited to {policy.limit} latent frames, but the trial has"
            f" {frames}; choose {shorter}, or {others}"
        )
