"""`anchor-jax score`: match rates of generated tiny-world videos."""

from absl import flags

from anchor_jax.config import define_config_flag

SUMMARY = "Measure how often tiny-world videos show what their captions say."
USAGE = """\
anchor-jax score --config=configs/tiny.py
anchor-jax score --config=configs/tiny.py:longlive --count=240
anchor-jax score --config=configs/tiny.py --out=score.json"""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/tiny.py")
    flags.DEFINE_integer("count", 240, "Videos, each with one switch.", lower_bound=1)
    flags.DEFINE_integer("batch", 40, "Videos generated side by side.", lower_bound=1)
    flags.DEFINE_integer("blocks", 5, "Blocks before and after the switch.")
    flags.DEFINE_integer("seed", 1, "Of captions and noise.")
    flags.DEFINE_string("out", None, "JSON file for the rates, or none.")


def main(argv) -> None:
    """Runs the command."""
    del argv
    from anchor_jax import bundle, experiment, media
    from anchor_jax.evaluation import world
    from anchor_jax.prompts import Script, Segment

    config = FLAGS.config
    model = bundle.load_bundle(config.weights)
    whole = config.policy == experiment.TEACHER
    frames = config.frames or world.CLIP_FRAMES
    starts = (0,) if whole else (0, 3)
    script = Script(tuple(Segment("", start) for start in starts), frames)
    setup = experiment.make_setup(config, model, script)
    batch = min(FLAGS.batch, FLAGS.count)
    blocks = (1,) if whole else (FLAGS.blocks,) * 2
    trial = world.Trial(FLAGS.count, batch, blocks, FLAGS.seed)
    run = world.score_clips if whole else world.score_switches
    result = run(model, setup, trial)
    print(world.table(result))
    if FLAGS.out:
        media.write_json(FLAGS.out, result)
        print(f"written to {FLAGS.out}")
