"""`anchor-jax port`: converts published weights into a checkpoint."""

import contextlib

from absl import flags
from tqdm import tqdm

from anchor_jax import interrupts
from anchor_jax.errors import UserError
from anchor_jax.wan.spec import FAMILIES, WAN_2_1

SUMMARY = "Convert published weights (.pt, .pth, safetensors) into a checkpoint."
USAGE = """\
anchor-jax port --wan=Wan2.1-T2V-1.3B --out=weights/wan
anchor-jax port --wan=Wan2.1-T2V-1.3B --generator=base.pt --lora=final.pt \\
  --method=anchor_forcing --out=weights/anchor
anchor-jax port --wan=Wan2.1-T2V-1.3B --generator=ll.pt --method=longlive --dry_run"""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "wan", None, "Folder of Wan2.1, in the official or the diffusers layout."
    )
    flags.DEFINE_string(
        "generator",
        None,
        "Checkpoint (.pt) of a generator that replaces that of --wan.",
    )
    flags.DEFINE_string(
        "key",
        None,
        "Entry of that checkpoint to convert. Default: the first of generator,"
        " generator_ema and model that exists.",
    )
    flags.DEFINE_boolean(
        "critic", False, "Also convert that checkpoint's critic, as fake_score."
    )
    flags.DEFINE_string(
        "lora", None, "LoRA adapters of the generator: a file, or its folder."
    )
    flags.DEFINE_float(
        "alpha",
        None,
        "Alpha of the adapters. Default: the value in their files.",
    )
    flags.DEFINE_string(
        "method",
        None,
        "How the generator was trained: wan, self_forcing, causvid, longlive, memflow"
        " or anchor_forcing. Needed with --generator or --lora.",
    )
    flags.DEFINE_string(
        "family", WAN_2_1.name, f"Model family: {' or '.join(FAMILIES)}."
    )
    flags.DEFINE_string("out", None, "Folder for the checkpoint.")
    flags.DEFINE_boolean("overwrite", False, "Replace an existing checkpoint.")
    flags.DEFINE_boolean(
        "allow_nonfinite", False, "Accept weights with NaN or infinite values."
    )
    flags.DEFINE_boolean("dry_run", False, "Check and print the plan; write nothing.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The weights are incomplete or do not fit. Nothing is written.
    """
    del argv
    from anchor_jax import ownership

    if not FLAGS.out and not FLAGS.dry_run:
        raise UserError(
            "--out is missing; give --out=FOLDER, or --dry_run to check only"
        )
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
            FLAGS.out, "choose another --out, remove it, or give --overwrite"
        )
    plan = port.plan(
        FLAGS.wan,
        FLAGS.generator,
        FLAGS.lora,
        key=FLAGS.key,
        critic=FLAGS.critic,
        alpha=FLAGS.alpha,
        method=FLAGS.method,
        family=FLAGS.family,
    )
    _print_totals(plan)
    if not FLAGS.dry_run:
        _write(plan, port.run, Watch(keeps=FLAGS.allow_nonfinite))
    missing = plan.missing()
    if missing:
        remedies = dict.fromkeys(missing.values())
        print(
            f"warning: the checkpoint has no {', '.join(missing)}, which sampling"
            f" needs; port again, together with the rest: {'; '.join(remedies)}"
        )
    elif not FLAGS.dry_run:
        _print_sampling(plan)


def _write(plan, run, watch) -> None:
    total = plan.read_bytes + plan.write_bytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="port") as bar:
        update = interrupts.checking(bar.update)
        meta = run(plan, FLAGS.out, update, FLAGS.overwrite, watch)
    for source in meta["sources"]:
        for file in source["files"]:
            print(f"{source['item']}: {file['name']} sha256 {file['sha256'][:16]}...")
    for network, count in watch.found.items():
        print(f"warning: {network} has {count:,} NaN or infinite values")
    print(f"Wrote {FLAGS.out}.")


def _print_sampling(plan) -> None:
    print("To sample:")
    whole = plan.meta.get("method") == "wan"
    prompt = ' --config.prompt="a red fox in the snow[5s]"' if whole else ""
    print(
        "  anchor-jax sample --config=configs/interactive.py"
        f" --config.weights={FLAGS.out}{prompt}"
    )


def _print_totals(plan) -> None:
    print(f"method: {plan.meta['method']}")
    for item, total in plan.meta["totals"].items():
        count = f"{total['tensors']:,} tensors, {total['parameters']:,} parameters"
        print(f"{item}: {count}")
    for note in plan.notes:
        print(f"note: {note}")
    print(
        f"reads {_size(plan.read_bytes)}, writes {_size(plan.write_bytes)},"
        f" peak memory about {_size(plan.peak_bytes)} plus the program itself"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
