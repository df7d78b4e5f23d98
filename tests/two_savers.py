"""A process of a job of two, which saves a state of four devices into a folder.

Run as `python two_savers.py PORT NUMBER FOLDER`.
"""

import sys

import jax
import stage_runs

from anchor_jax import io, ownership
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.stages.base import Cursor


def main():
    port, number, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        f"localhost:{port}", 2, int(number), cluster_detection_method="deactivate"
    )
    prepared = stage_runs.make(stage_runs.REGRESS, mesh=(1, 4, 1, 1))
    state = jax.tree.map(
        lambda x: x if x.dtype == bool else x + 1, prepared.state
    ).replace(step=prepared.state.step + 7)
    with ownership.own(folder, "job", (number,)):
        checkpoints = Checkpoints(io.place(folder), {}, 2)
        checkpoints.save(state, Cursor(3))
        checkpoints.close()


if __name__ == "__main__":
    main()
