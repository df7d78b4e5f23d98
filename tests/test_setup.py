import pathlib
import runpy
import sys

import pytest

SETUP = pathlib.Path(__file__).parents[1] / "setup.py"


def test_an_older_python_is_refused_with_the_version_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))

    with pytest.raises(SystemExit, match="needs Python 3.11 or newer.*3.10.14"):
        runpy.run_path(str(SETUP))
