"""`launch/kill_processes.py`: it notices a checkpoint that a stopped job has lost."""

import pytest


@pytest.mark.parametrize(
    ("statuses", "output", "is_lost"),
    [
        ([75, 75], "step 3\nStopped at 3/20. Rerun this command to resume.\n", False),
        ([75, 75], "step 20\nDone. Sample with: anchor-jax sample\n", False),
        ([0, 0], "", False),
        ([75, 75], "step 3\ninterrupted\n", True),
        ([130, 130], "Stopped without a checkpoint, because\n", True),
    ],
)
def test_a_stop_without_a_checkpoint_is_a_fault(launcher, statuses, output, is_lost):
    found = launcher("kill_processes").unsaved(statuses, output)

    assert bool(found) is is_lost
    assert not found or output in found[0]
