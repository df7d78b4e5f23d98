"""Streams 2,000 blocks of a small random model and reports growth, which is a fault.

    python launch/endurance.py [--blocks=2000]

Prints one JSON: traces of each program, live arrays and bytes, resident memory and
CPU-seconds per window of 200 blocks. A prompt switch falls on every 40th block.
"""

import argparse
import gc
import json
import resource
import sys
import time

import jax
import numpy as np

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import PromptChange, StreamSetup
from anchor_jax.wan import dit
from anchor_jax.wan.spec import LatentGrid, ModelConfig

MODEL = ModelConfig(
    dim=64,
    ffn_dim=128,
    num_heads=2,
    num_layers=2,
    freq_dim=32,
    text_dim=16,
    text_len=8,
    dtype="float32",
)
WINDOW = 200
SWITCH_EVERY = 40


def resident_bytes() -> int:
    """Returns the present memory of the process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure() -> dict:
    """Returns counts that must not grow."""
    gc.collect()
    arrays = jax.live_arrays()
    return {
        "arrays": len(arrays),
        "bytes": sum(x.nbytes for x in arrays),
        "resident": resident_bytes(),
    }


def run(blocks: int) -> dict:
    """Returns measurements at blocks 50, 250, 450, ... of one stream."""
    levels = flow.few_step_levels((1000, 750, 500, 250), 5.0)
    setup = StreamSetup(MODEL, LatentGrid(8, 8), POLICIES["anchor_forcing"], levels)
    params = jax.jit(lambda rng: dit.init_params(MODEL, rng))(jax.random.key(0))
    variables, rng = {"params": params}, jax.random.key(1)
    texts = np.random.default_rng(0).normal(size=(2, 1, 8, 16)).astype(np.float32)
    contexts = [stream.project(variables, text, setup=setup) for text in texts]
    size, rows, began = setup.policy.block, [], None
    changes = {
        number * size: PromptChange(contexts[number // SWITCH_EVERY % 2])
        for number in range(SWITCH_EVERY, blocks, SWITCH_EVERY)
    }
    state = stream.start(contexts[0], setup=setup)
    frames = range(0, blocks * size, size)
    made = stream.run(variables, state, rng, frames, changes, setup=setup)
    for number, (state, _, _) in enumerate(made, 1):
        if number >= 50 and (number - 50) % WINDOW == 0:
            jax.block_until_ready(state)
            now = time.process_time()
            seconds = None if began is None else now - began
            rows.append({"block": number, **measure(), "cpu_seconds": seconds})
            began = time.process_time()
    jax.block_until_ready(state)
    rows.append({"block": blocks, **measure()})
    programs = {"step": stream.make_block, "switch": stream.switch}
    traces = {name: program._cache_size() for name, program in programs.items()}  # noqa: SLF001
    return {"traces": traces, "windows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2000)
    json.dump(run(parser.parse_args().blocks), sys.stdout, indent=1)
