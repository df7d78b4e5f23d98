"""Commands as several processes of one job on this machine."""

import os
import socket
import subprocess
import sys

import jax

from anchor_jax import compile_cache


def start(line, **variables):
    cache = jax.config.jax_compilation_cache_dir
    return subprocess.Popen(
        [sys.executable, "-m", "anchor_jax", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "ANCHOR_JAX_CACHE": cache,
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {compile_cache.SAME_ORDER}",
            **variables,
        },
    )


def ends(running):
    outputs = [one.communicate(timeout=240)[0] for one in running]
    return [one.returncode for one in running], outputs


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_flags(line, port, number):
    own = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    return start([*line, *own, f"--process_id={number}"])
