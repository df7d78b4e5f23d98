"""Commands as several processes of one job on this machine."""

import os
import socket
import subprocess
import sys
import tempfile

import jax

from anchor_jax import processes


def start(line, program=("-m", "anchor_jax"), **variables):
    # Another test may have changed the setting of this process.
    cache = jax.config.jax_compilation_cache_dir or tempfile.gettempdir() + "/jobs"
    return subprocess.Popen(
        [sys.executable, *program, *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "ANCHOR_JAX_CACHE": cache,
            # The command sets it itself.
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(processes.SAME_ORDER, ""),
            "JAX_NUM_CPU_DEVICES": "1",
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
