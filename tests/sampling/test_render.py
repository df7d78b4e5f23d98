import numpy as np
import pytest

from anchor_jax.errors import UserError
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling import render
from anchor_jax.sampling.render import describe_switches, tile_frames
from anchor_jax.streaming.recipe import Switch


@pytest.mark.parametrize("block", [1, 3, 7])
def test_tiles_are_few_and_evenly_spaced(block):
    segments = (Segment("a", 0), Segment("b", block), Segment("c", 20 * block))
    script = Script(segments, 10_000 * block)

    rows = tile_frames(script, block)

    assert [len(row) for row in rows] == [min(8, 4 * block - 3), 8, 8]
    assert rows[0][0] == 0 and rows[1][0] == 4 * block - 3
    assert rows[-1][-1] == 4 * script.frames - 4
    assert np.ptp(np.diff(rows[-1])) <= 1


def test_switches_that_waited_are_printed():
    switches = [Switch("a", 0, landed=0), Switch("b", 16, landed=18), Switch("c", 21)]

    (line,) = describe_switches(switches[:2])

    assert line == "Switch requested at frame 16; starts at 18, the next block."
    assert describe_switches([switches[0]]) == []


def test_several_processes_need_a_named_folder(monkeypatch):
    render._check_job(None)
    monkeypatch.setattr(render.processes, "count", lambda: 3)
    render._check_job("out")
    with pytest.raises(UserError, match="--out is missing.*all 3 processes"):
        render._check_job(None)
