"""`anchor-jax bench`: measures a stream or a training step on this machine."""

import functools
import json
import os
import sys
from collections.abc import Sequence

from absl import flags

from anchor_jax import config as configs
from anchor_jax import interrupts
from anchor_jax.cli import allocator
from anchor_jax.errors import UserError
from anchor_jax.io import expand

SUMMARY = "Measure each phase of a stream on random weights, relative to a matmul."
USAGE = """
anchor-jax bench --config=configs/bench_medium.py --threads=1
anchor-jax bench --config=configs/bench_medium.py --threads=2 --out=bench.json
anchor-jax bench --config=configs/bench_full.py --profile=out/trace   # an accelerator
anchor-jax bench --config=bench_medium --config.attention=plain
anchor-jax bench --config=configs/train_dmd.py:tiny --threads=1   # steps of a training

# Prints one JSON object: seconds and CPU-seconds per block and per phase (median and
# spread), frames per second, time to the first frame, switch latency (text encoding,
# projection, re-cache), compile seconds, number of traces, and bytes of the cache.
# "efficiency" is the model's FLOP/s divided by the FLOP/s of a matmul in the same run.
# It uses CPU-seconds on a CPU and wall-clock time elsewhere.
"""


def define_flags() -> None:
    """Defines the command's flags."""
    configs.define_config_flag()
    flags.DEFINE_integer(
        "threads", None, "CPU cores to pin the process to. Default: all.", lower_bound=1
    )
    flags.DEFINE_string("out", None, "File for the JSON, which is also printed.")
    flags.DEFINE_string(
        "profile", None, "Folder for a trace of the run, for XProf or Perfetto."
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, or the machine has fewer cores.
    """
    del argv
    threads = _pin(flags.FLAGS.threads)
    import contextlib

    import jax
    from tqdm import tqdm

    from anchor_jax import devices, io, ownership
    from anchor_jax.perf import stream_bench as bench

    devices.check()
    is_training = "stage" in flags.FLAGS.config
    if is_training:
        allocator.keep_freed_memory()
    else:
        workload = bench.make_workload(flags.FLAGS.config)
    out, folder = (
        path and expand(path) for path in (flags.FLAGS.out, flags.FLAGS.profile)
    )
    trace = owned = contextlib.nullcontext()
    if folder:
        owned, trace = ownership.own(folder), jax.profiler.trace(folder)
    with owned, trace, tqdm(disable=None, bar_format="{desc} {elapsed}") as bar:
        show = functools.partial(print, file=sys.stderr) if bar.disable else None
        show = interrupts.checking(show or bar.set_description_str)
        if is_training:
            measured = _measure_training(show)
        else:
            measured = bench.measure(workload, show)
    measured = {"config": flags.FLAGS.config.to_dict(), "threads": threads} | measured
    print(json.dumps(measured, indent=2))
    if out:
        io.write_json(out, measured)


def _measure_training(show):
    from anchor_jax.perf import train_bench as bench
    from anchor_jax.training import run

    return bench.measure(run.read_config(flags.FLAGS.config), show)


def _pin(threads: int | None) -> int | None:
    """Pins this process to `threads` cores, before jax counts the cores."""
    if threads is None:
        return None
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(
            "--threads: this system cannot pin a process to cores; leave it out"
        )
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(
            f"--threads={threads}: only {len(cores)} cores are available; give at most"
            f" {len(cores)}"
        )
    os.sched_setaffinity(0, cores[-threads:])
    return threads
