"""The notebook runs as it stands: its code cells, in order."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from PIL import Image

from anchor_jax import media

NOTEBOOK = pathlib.Path(__file__).parents[1] / "launch" / "first_stream.ipynb"
PROGRAM = """
import json, pathlib, sys
names = {}
for cell in json.loads(pathlib.Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
print(sorted({x for block in names["blocks"] for x in names["regions"](block.plan)}))
"""


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_holds_no_results_and_begins_with_the_installation(cells):
    programs = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in programs)
    assert all(cell["execution_count"] is None for cell in programs)
    first = "".join(programs[0]["source"])
    assert "# %pip install" in first
    lines = [line for cell in programs for line in cell["source"]]
    assert not [line for line in lines if line.startswith(("%", "!"))]


@pytest.mark.slow
def test_it_makes_a_video_and_a_picture_of_the_memory(tmp_path):
    kept = jax.config.jax_compilation_cache_dir
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(NOTEBOOK)],
        cwd=tmp_path,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": kept},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "compiling (once)" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"first.mp4", "first.png", "memory.png"}
    frames = list(media.decoded(tmp_path / "first.mp4"))
    assert len(frames) == 1 + 4 * 41 and frames[0].shape == (256, 256, 3)
    # What the last blocks read; README.md, "How it works".
    seen = eval(done.stdout.splitlines()[-1])
    assert max(position for _, position, _ in seen) == 20
    assert (0, 0, "sink") in seen and (2, 2, "sink") in seen
    junction = {(frame, position) for frame, position, name in seen if name[0] == "j"}
    assert {frame for frame, _ in junction} == {21, 22, 23}
    assert {position for _, position in junction} == {6, 7, 8}
    own = {position for frame, position, name in seen if name == "own" and frame > 30}
    assert own == {18, 19, 20}
    with Image.open(tmp_path / "memory.png") as picture:
        assert picture.size == (30 * (21 + 3), 30 * (14 + 1))
        colors = picture.convert("RGB").getcolors(2**20)
    shown = {color for _, color in colors}
    for color in ((242, 209, 107), (127, 192, 138), (143, 184, 232), (232, 143, 143)):
        assert color in shown
