"""`anchor-jax train-tiny`: reproduces the embedded model."""

import pathlib

from absl import flags

from anchor_jax.errors import UserError

SUMMARY = "Train the embedded tiny model from nothing; about 0.9 CPU-hours."
USAGE = """\
anchor-jax train-tiny --out=DIR          all stages; run again to resume
anchor-jax train-tiny --out=DIR --until=teacher
anchor-jax sample --config=configs/tiny.py --config.weights=DIR"""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("out", None, "Folder of checkpoints and the result.")
    stages = ["teacher", "causal", "student"]
    flags.DEFINE_enum("until", "student", stages, "The last stage to run.")
    flags.DEFINE_integer("seed", 0, "Of data, weights and noise.", lower_bound=0)
    flags.DEFINE_float("scale", 1.0, "Multiplies every stage's steps; for trials.")
    flags.mark_flag_as_required("out")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: `--out` is not a folder of this run, or a number is out of range.
    """
    del argv
    folder = pathlib.Path(FLAGS.out).expanduser()
    _check_flags(folder, FLAGS.scale)
    import dataclasses

    from anchor_jax import bundle
    from anchor_jax.training import tiny, world_data
    from anchor_jax.wan.tokenizer import SentencePieceTokenizer
    from anchor_jax.world.words import train_tokenizer

    words = train_tokenizer(world_data.captions())
    tokenizer = SentencePieceTokenizer(words, tiny.TEXT.text_len)
    config = tiny.TinyConfig(seed=FLAGS.seed).scaled(FLAGS.scale)
    params = tiny.train(config, tokenizer, folder, FLAGS.until)
    bundle.save_bundle(params, words, folder, dataclasses.asdict(config))
    print(f"written to {folder}; sample with --config.weights={folder}")


def _check_flags(folder: pathlib.Path, scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise UserError(f"--scale={scale}: expected a number above 0; 1 is the default")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out={folder}: expected a folder that can be written to"
            f" ({error.strerror}); choose another"
        ) from error
