"""`anchor-jax export`: converts a checkpoint into a published layout."""

from absl import flags
from tqdm import tqdm

from anchor_jax import interrupts
from anchor_jax.errors import UserError, suggest

SUMMARY = "Write a checkpoint in a published layout, as safetensors."
USAGE = """\
anchor-jax export --weights=weights/anchor --out=export --layout=diffusers
anchor-jax export --weights=weights/anchor --out=export --layout=wan --lora=merged
anchor-jax export --weights=weights/anchor --out=export --layout=generator
anchor-jax export --weights=runs/streaming --out=tiny --layout=bundle

All files are safetensors, including the text encoder and the VAE. Pickles (.pt, .pth)
are not written."""

BUNDLE = "bundle"

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("weights", None, "Folder of weights, or tiny (as a bundle).")
    flags.DEFINE_string("out", None, "Folder for the files.")
    flags.DEFINE_string(
        "layout",
        "wan",
        "Names and files: wan, diffusers, generator (only the transformer, with the"
        " names of training checkpoints), or bundle (a whole tiny model in one folder,"
        " like the shipped one).",
    )
    flags.DEFINE_string(
        "item",
        None,
        "Network to write: generator, ema or fake_score. Default: ema if a training"
        " saved one, otherwise generator.",
    )
    flags.DEFINE_string(
        "lora",
        "separate",
        "Adapters: separate (as PEFT files), or merged into the weights.",
    )


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The checkpoint lacks the requested network, or the folder is in use.
    """
    del argv
    from anchor_jax import ownership
    from anchor_jax.porting import export

    for name in ("weights", "out"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing; give --{name}=FOLDER")
    layouts = (*export.LAYOUTS, BUNDLE)
    if FLAGS.layout not in layouts:
        found = suggest(FLAGS.layout, layouts, "layouts")
        raise UserError(f"--layout={FLAGS.layout!r}{found}")
    if FLAGS.layout == BUNDLE:
        from anchor_jax.porting.port import check_free
        from anchor_jax.weights.load import load_bundle
        from anchor_jax.weights.single_file import save_loaded

        if FLAGS.item not in (None, export.default_item(FLAGS.weights)):
            raise UserError(
                f"--item={FLAGS.item}: --layout=bundle writes only the network that"
                " samples; leave --item out, or choose --layout=generator"
            )
        with ownership.own_target(FLAGS.out, tell=print):
            check_free(FLAGS.out)
            loaded = load_bundle(FLAGS.weights, lora="merged")
            save_loaded(loaded, FLAGS.out)
        print(f"Wrote {FLAGS.out}")
        return
    item = FLAGS.item or export.default_item(FLAGS.weights)
    total = export.total_bytes(FLAGS.weights, FLAGS.layout, item)
    with (
        ownership.own_target(FLAGS.out, tell=print),
        tqdm(total=total, unit="B", unit_scale=True, desc="export") as bar,
    ):
        update = interrupts.checking(bar.update)
        notes = export.export(
            FLAGS.weights, FLAGS.out, FLAGS.layout, item, FLAGS.lora, update
        )
    print(f"Wrote {FLAGS.out}")
    for note in notes:
        print(note)
