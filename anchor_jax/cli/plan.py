"""`anchor-jax plan`: memory and programs on a chip that is not there."""

import dataclasses
import os
import sys

from absl import flags

from anchor_jax.errors import UserError, suggest
from anchor_jax.wan.spec import GRIDS, PRESETS

SUMMARY = "Compile a stream for a chip that is not there: memory, kernels, speed."
USAGE = """\
anchor-jax plan --target=h100
anchor-jax plan --target=v5e --size=320x576
anchor-jax plan --target=all --model=1.3B --size=480x832 --json=plan.json"""

# The process stays on the CPU; the TPU's variables keep its compiler from asking for
# a machine that is not there.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
AUTOTUNING = "--xla_gpu_autotune_level=0"  # needs a device

FLAGS = flags.FLAGS
_MODELS = ("1.3B", "14B")
_STEPS, _SHIFT = (1000, 750, 500, 250), 5.0
_GB = 10**9


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("target", "all", "Chip: h100, h200, v5e, v5p, v6e, or all.")
    flags.DEFINE_string("model", "1.3B", f"Generator: {' or '.join(_MODELS)}.")
    flags.DEFINE_string("size", "480x832", f"Pixels: {', '.join(GRIDS)}.")
    flags.DEFINE_string("policy", "anchor_forcing", "What the stream remembers.")
    flags.DEFINE_string("json", None, "File for the numbers, or none.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: A name is unknown, or a target's compiler is not installed.
    """
    del argv
    _prepare_environment()
    from anchor_jax import aot, media

    setup, text, vae = _sizes()
    summaries = {}
    for name in _targets(aot):
        report = aot.plan(name, setup, text, vae, _say(name))
        summaries[name] = report.summary()
        print("\n".join(table(name, summaries[name])), flush=True)
    if FLAGS.json:
        media.write_json(FLAGS.json, summaries)
        print(f"written to {FLAGS.json}")


def table(name: str, summary: dict) -> list[str]:
    """Returns the lines that show a `Report.summary()`."""
    memory = summary["memory"]
    lines = [
        f"{name}: {summary['chip']}, {memory / _GB:.0f} GB",
        "  program       compile s  inputs GB  outputs GB  working GB  peak GB  fused",
    ]
    lines += [_row(part, made) for part, made in summary["programs"].items()]
    parts = [f"{part} {n / _GB:.2f}" for part, n in summary["resident"].items()]
    lines.append(f"  stays in memory, GB: {', '.join(parts)}")
    lines.append(
        f"  needed at most: {summary['needed'] / _GB:.1f} GB;"
        f" {summary['needed_encoder_freed'] / _GB:.1f} GB with text_encoder=free"
    )
    lines.append(
        f"  roofline: {summary['frames_per_second_peak']:.1f} frames/s without decoding"
        f" at full speed; with it at 40 %: {summary['frames_per_second']:.1f} frames/s,"
        f" a switch {summary['switch_seconds']:.2f} s,"
        f" the first block {summary['first_seconds']:.2f} s"
    )
    return lines + [f"  problem: {line}" for line in summary["problems"]]


def _row(part: str, made: dict) -> str:
    if "reason" in made:
        return f"  {part:<13} {made['reason']}"
    sizes = (made[key] / _GB for key in ("arguments", "outputs", "temporaries", "peak"))
    inputs, outputs, working, peak = sizes
    return (
        f"  {part:<13} {made['seconds']:9.1f}  {inputs:9.2f}  {outputs:10.2f}"
        f"  {working:10.2f}  {peak:7.2f}  {made['fused']:5}"
    )


def _prepare_environment() -> None:
    os.environ |= ENVIRONMENT
    given = os.environ.get("XLA_FLAGS", "")
    if AUTOTUNING not in given:
        os.environ["XLA_FLAGS"] = f"{given} {AUTOTUNING}".strip()


def _sizes():
    """Returns the stream's setup, and the sizes of text encoder and VAE."""
    from anchor_jax.cache.policies import POLICIES
    from anchor_jax.flow import few_step_levels
    from anchor_jax.streaming.types import StreamSetup
    from anchor_jax.wan.text import TextConfig
    from anchor_jax.wan.vae import VaeConfig

    held = {"param_dtype": "bfloat16"}
    model = PRESETS[_one_of("model", _MODELS)]
    setup = StreamSetup(
        model=dataclasses.replace(model, **held),
        grid=GRIDS[_one_of("size", GRIDS)],
        policy=POLICIES[_one_of("policy", POLICIES)],
        levels=few_step_levels(_STEPS, _SHIFT),
    )
    return setup, TextConfig(**held), VaeConfig(**held)


def _one_of(flag: str, known) -> str:
    """Returns a flag's value.

    Raises:
      UserError: It is not one of the known ones.
    """
    value = FLAGS[flag].value
    if value not in known:
        raise UserError(f"--{flag}={value!r}{suggest(value, known, 'choices')}")
    return value


def _targets(aot) -> list[str]:
    """Returns the targets asked for; of all, those whose compiler is installed."""
    if FLAGS.target != "all":
        aot.find_target(FLAGS.target)
        return [FLAGS.target]
    found, missing = [], {}
    for name in aot.TARGETS:
        try:
            aot.find_target(name)
            found.append(name)
        except UserError as error:
            missing[name] = error
    if not found:
        raise next(iter(missing.values()))
    for error in missing.values():
        print(f"left out: {error}", file=sys.stderr)
    return found


def _say(name: str):
    return lambda part: print(f"{name}: compiling {part}", file=sys.stderr, flush=True)
