"""`anchor-jax plan`: estimates memory and time for chips you don't have."""

import dataclasses
import functools
import os
import sys

from absl import flags

from anchor_jax import interrupts
from anchor_jax.config import define_config_flag
from anchor_jax.errors import UserError, suggest
from anchor_jax.wan.spec import GRIDS, PRESETS, REMAT, WAN_2_1

SUMMARY = "Estimate memory and time for chips you don't have, by compiling for them."
USAGE = """\
anchor-jax plan --target=h100
anchor-jax plan --target=v5e --size=320x576
anchor-jax plan --target=all --model=1.3B --size=480x832 --json=plan.json
anchor-jax plan --config=configs/train_dmd.py --target=v5p --chips=64
anchor-jax plan --config=configs/train_streaming.py --target=h100 --chips=64 \\
    --remat=none,nothing_saveable
Without --config it plans a stream. With the config of a training it plans that
training's steps on --chips of the target, with the config's mesh, batch and LoRA. The
text encoder is on the first chip of each machine."""

# The process stays on the CPU. The TPU variables keep the TPU compiler from looking for
# a real TPU.
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
_HELD = {"param_dtype": "bfloat16"}  # as weights are stored
_HEADER = (
    "  program                 compile s  inputs GB  outputs GB  working GB  peak GB"
    "  fused"
)


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("target", "all", "Chip: h100, h200, v5e, v5p, v6e, or all.")
    flags.DEFINE_string("model", "1.3B", f"Generator: {' or '.join(_MODELS)}.")
    flags.DEFINE_string(
        "size", WAN_2_1.size, f"Size of a stream in pixels: {', '.join(GRIDS)}."
    )
    flags.DEFINE_string("policy", "anchor_forcing", "Cache policy of a stream.")
    define_config_flag("")
    flags.DEFINE_integer("chips", 64, "Chips of a training, a power of two.", 1)
    flags.DEFINE_string(
        "teacher", "14B", f"Real score of a training: {' or '.join(_MODELS)}."
    )
    flags.DEFINE_list(
        "remat",
        [],
        "Rematerialisation policies of a training, planned one after another. Default:"
        " the config's.",
    )
    flags.DEFINE_string("json", None, "JSON file for the numbers. Default: no file.")


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: A name is unknown, or a target's compiler is not installed.
    """
    del argv
    _prepare_environment()
    from anchor_jax import io

    path = FLAGS.json and io.expand(FLAGS.json)
    if FLAGS.config:
        summaries = _plan_training()
    else:
        summaries = _plan_stream()
    if path:
        io.write_json(path, summaries)
        print(f"Wrote {path}")


def _plan_stream() -> dict:
    from anchor_jax.perf import aot

    setup, text, vae = _sizes()
    summaries = {}
    for name in _targets():
        report = aot.plan(name, setup, text, vae, _say(name))
        summaries[name] = report.summary()
        print("\n".join(table(name, summaries[name])), flush=True)
    return summaries


def _plan_training() -> dict:
    from anchor_jax.perf import train_plan as plan
    from anchor_jax.training.run import read_config
    from anchor_jax.wan.text import TextConfig
    from anchor_jax.wan.vae import VaeConfig

    config = read_config(FLAGS.config)
    models = (_stored(flag) for flag in ("model", "teacher"))
    report = functools.partial(
        plan.plan,
        chips=FLAGS.chips,
        networks=plan.NetworkSizes(*models, VaeConfig(**_HELD), TextConfig(**_HELD)),
    )
    summaries = {}
    for name in _targets():
        for remat in FLAGS.remat or [config.remat]:
            chosen = dataclasses.replace(config, remat=_remat(remat))
            title = f"{name}, remat {remat}"
            made = report(name, config=chosen, progress=_say(title))
            summaries[title] = made.summary()
            print("\n".join(training_table(title, summaries[title])), flush=True)
    return summaries


def _remat(name: str) -> str:
    if name not in REMAT:
        raise UserError(f"--remat={name!r}{suggest(name, REMAT, 'choices')}")
    return name


def training_table(title: str, summary: dict) -> list[str]:
    """Returns the lines that show a `TrainingReport.summary()`."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in summary["mesh"].items() if n > 1)
    chip, memory = summary["chip"], summary["memory"] / _GB
    is_refused = any("reason" in made for made in summary["programs"].values())
    those = " (only programs that fit are counted)" if is_refused else ""
    lines = [
        f"{title}: {chip}, {memory:.0f} GB, {mesh or 'one chip'}",
        _HEADER,
        *[_row(part, made) for part, made in summary["programs"].items()],
        _resident(summary),
        f"  needed per chip: {summary['needed'] / _GB:.1f} GB{those}",
    ]
    return lines + [f"  problem: {line}" for line in summary["problems"]]


def _resident(summary: dict) -> str:
    parts = [f"{part} {n / _GB:.2f}" for part, n in summary["resident"].items()]
    return f"  stays in memory, GB: {', '.join(parts)}"


def table(name: str, summary: dict) -> list[str]:
    """Returns the lines that show a `StreamReport.summary()`."""
    memory = summary["memory"]
    lines = [
        f"{name}: {summary['chip']}, {memory / _GB:.0f} GB",
        _HEADER,
    ]
    lines += [_row(part, made) for part, made in summary["programs"].items()]
    lines.append(_resident(summary))
    lines.append(
        f"  needed: {summary['needed'] / _GB:.1f} GB;"
        f" {summary['needed_encoder_freed'] / _GB:.1f} GB with text_encoder=free"
    )
    lines.append(
        f"  roofline: {summary['frames_per_second_peak']:.1f} frames/s at full speed"
        f" without decoding; {summary['frames_per_second']:.1f} frames/s at 40 % with"
        f" decoding, prompt switch {summary['switch_seconds']:.2f} s,"
        f" first block {summary['first_seconds']:.2f} s"
    )
    return lines + [f"  problem: {line}" for line in summary["problems"]]


def _row(part: str, made: dict) -> str:
    if "reason" in made:
        return f"  {part:<23} {made['reason']}"
    sizes = (made[key] / _GB for key in ("arguments", "outputs", "temporaries", "peak"))
    inputs, outputs, working, peak = sizes
    fused = "-" if made["fused"] is None else made["fused"]
    return (
        f"  {part:<23} {made['seconds']:9.1f}  {inputs:9.2f}  {outputs:10.2f}"
        f"  {working:10.2f}  {peak:7.2f}  {fused:>5}"
    )


def _prepare_environment() -> None:
    os.environ |= ENVIRONMENT
    import jax

    # A config file may have imported jax already, and jax then ignores the environment.
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
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

    setup = StreamSetup(
        model=_stored("model"),
        grid=GRIDS[_one_of("size", GRIDS)],
        policy=POLICIES[_one_of("policy", POLICIES)],
        levels=few_step_levels(_STEPS, _SHIFT),
    )
    return setup, TextConfig(**_HELD), VaeConfig(**_HELD)


def _stored(flag: str):
    """Returns the sizes of the network that a flag names."""
    return dataclasses.replace(PRESETS[_one_of(flag, _MODELS)], **_HELD)


def _one_of(flag: str, known) -> str:
    """Returns a flag's value.

    Raises:
      UserError: The value is unknown.
    """
    value = FLAGS[flag].value
    if value not in known:
        raise UserError(f"--{flag}={value!r}{suggest(value, known, 'choices')}")
    return value


def _targets() -> list[str]:
    """Returns the requested targets; for "all", those with an installed compiler."""
    from anchor_jax.perf import aot

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
        print(f"skipped: {error}", file=sys.stderr)
    return found


def _say(name: str):
    def say(part: str) -> None:
        print(f"{name}: compiling {part}", file=sys.stderr, flush=True)

    return interrupts.checking(say)
