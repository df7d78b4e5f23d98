"""A batch over two processes, each of which makes its own rows."""

import json
import socket
import subprocess
import sys

import pytest

PROCESS = """
import json, sys
import jax, numpy as np
number, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(address, 2, number)
from anchor_jax.sharding import make_mesh
from anchor_jax.training.data.order import Share
from anchor_jax.training.placement import everywhere, put, put_batch, rows_of_process
batch = {"prompt": np.arange(8.0).reshape(4, 2), "position": np.arange(3)}
mesh = make_mesh((1, 2, 1, 1))
own = Share(4, rows_of_process(mesh, 4)).of(batch)
assert len(own["prompt"]) == 2, own
found = put_batch(own, mesh)
rows = {name: x.addressable_shards[0].data.tolist() for name, x in found.items()}
# A local array on the device of one process, as the initial networks are.
local = jax.numpy.arange(6.0)
halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
whole, half = put((local, local), (everywhere(mesh), halves))
again = put(half, everywhere(mesh))
put_in = [x.addressable_shards[0].data.tolist() for x in (whole, half, again)]
print(json.dumps([list(found["prompt"].shape), rows, put_in]))
"""


@pytest.mark.slow
def test_each_process_puts_its_rows_of_the_batch():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    line = [sys.executable, "-c", PROCESS]
    running = [
        subprocess.Popen([*line, str(number), address], stdout=subprocess.PIPE)
        for number in range(2)
    ]
    printed = [one.communicate(timeout=200)[0].splitlines() for one in running]
    found = [json.loads(lines[-1]) for lines in printed]  # Gloo prints lines too.

    rows = [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]]
    for number, (shape, held, put_in) in enumerate(found):
        assert shape == [4, 2]
        everything = [float(x) for x in range(6)]
        half = everything[3 * number : 3 * number + 3]
        assert put_in == [everything, half, everything]
        assert held == {"prompt": rows[number], "position": [0, 1, 2]}
