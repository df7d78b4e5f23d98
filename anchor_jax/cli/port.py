"""`anchor-jax port`: published weights into a checkpoint of ours."""

import contextlib

from absl import flags
from tqdm import tqdm

from anchor_jax import interrupts
from anchor_jax.errors import UserError

SUMMARY = "Bring published weights (.pt, .pth, safetensors) into JAX."
USAGE = """\
anchor-jax port --wan=Wan2.1-T2V-1.3B --out=weights/wan
anchor-jax port --wan=Wan2.1-T2V-1.3B --generator=base.pt --lora=final.pt \\
  --method=anchor_forcing --out=weights/anchor
anchor-jax port --wan=Wan2.1-T2V-1.3B --generator=ll.pt --method=longlive --dry_run"""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "wan", None, "Folder of Wan2.1, as published or in the layout of diffusers."
    )
    flags.DEFINE_string(
        "generator", None, "Checkpoint (.pt) whose generator replaces that of --wan."
    )
    flags.DEFINE_string(
        "key",
        None,
        "Its entry to take; unless given, the first of generator, generator_ema, model"
        " that is there.",
    )
    flags.DEFINE_boolean("critic", False, "Port its critic too, as fake_score.")
    flags.DEFINE_string(
        "lora", None, "Adapters for the generator: a file or the folder of one."
    )
    flags.DEFINE_float(
        "alpha",
        None,
        "Alpha of the adapters, in place of the one that their files say.",
    )
    flags.DEFINE_string(
        "method",
        None,
        "How the generator was trained: wan, self_forcing, causvid, longlive, memflow"
        " or anchor_forcing. Needed with --generator and --lora.",
    )
    flags.DEFINE_string("out", None, "Folder for the checkpoint.")
    flags.DEFINE_boolean("overwrite", False, "Replace a checkpoint that is there.")
    flags.DEFINE_boolean(
        "allow_nonfinite", False, "Port weights that hold NaN or infinite values."
    )
    flags.DEFINE_boolean("dry_run", False, "Check and print the plan; write nothing.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The weights are not whole, or do not fit; nothing is then written.
    """
    del argv
    from anchor_jax import ownership

    if not FLAGS.out and not FLAGS.dry_run:
        raise UserError("out is missing; give --out=FOLDER, or --dry_run to only check")
    owned = contextlib.nullcontext()
    if not FLAGS.dry_run:
        owned = ownership.own_target(FLAGS.out, tell=print)
    with owned:
        _port()


def _port() -> None:
    from anchor_jax.porting import port
    from anchor_jax.porting.finite import Watch

    if FLAGS.out and not FLAGS.overwrite:
        port.check_free(
            FLAGS.out, "choose another folder, remove it, or give --overwrite"
        )
    plan = port.plan(
        FLAGS.wan,
        FLAGS.generator,
        FLAGS.lora,
        key=FLAGS.key,
        critic=FLAGS.critic,
        alpha=FLAGS.alpha,
        method=FLAGS.method,
    )
    _print_totals(plan)
    if not FLAGS.dry_run:
        _write(plan, port.run, Watch(keeps=FLAGS.allow_nonfinite))
    for name, how in plan.missing().items():
        print(f"without {name}, which sampling needs; port it along, with {how}")


def _write(plan, run, watch) -> None:
    total = plan.read_bytes + plan.write_bytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="port") as bar:
        update = interrupts.checking(bar.update)
        meta = run(plan, FLAGS.out, update, FLAGS.overwrite, watch)
    for source in meta["sources"]:
        for file in source["files"]:
            print(f"{source['item']}: {file['name']} sha256 {file['sha256'][:16]}...")
    for network, count in watch.found.items():
        print(f"warning: {network} has {count:,} values that are not finite")
    print(f"written to {FLAGS.out}; to sample:")
    whole = meta.get("method") == "wan"
    prompt = ' --config.prompt="a red fox in the snow[5s]"' if whole else ""
    print(
        "  anchor-jax sample --config=configs/interactive.py"
        f" --config.weights={FLAGS.out}{prompt}"
    )


def _print_totals(plan) -> None:
    print(f"method {plan.meta['method']}")
    for item, total in plan.meta["totals"].items():
        count = f"{total['tensors']:,} tensors, {total['parameters']:,} parameters"
        print(f"{item}: {count}")
    for note in plan.notes:
        print(f"note: {note}")
    print(
        f"to read {_size(plan.read_bytes)}, to write {_size(plan.write_bytes)},"
        f" peak memory about {_size(plan.peak_bytes)} and the program itself"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
