"""Parts that domains add to the core."""

import subprocess
import sys

import pytest

from anchor_jax import plugins, tiny_world
from anchor_jax.plugins import Registry


def test_a_domain_adds_parts_beside_those_of_the_core(monkeypatch):
    monkeypatch.setitem(tiny_world.PARTS, "shapes", {"ring": "math:tau"})

    known = Registry("shapes", {"line": "math:e"})

    assert list(known) == ["line", "ring"] and len(known) == 2
    assert known["ring"] == pytest.approx(6.2831853)
    assert "ring" in known and "square" not in known
    with pytest.raises(KeyError):
        known["square"]


def test_a_name_has_one_part(monkeypatch):
    monkeypatch.setitem(tiny_world.PARTS, "shapes", {"line": "math:tau"})

    with pytest.raises(ValueError, match="shapes line exist already"):
        list(Registry("shapes", {"line": "math:e"}))


def test_every_part_of_a_domain_can_be_loaded():
    for named in tiny_world.PARTS.values():
        for place in named.values():
            assert plugins.load(place) is not None


def test_names_are_known_before_a_part_is_imported():
    program = """
import sys
from anchor_jax.plugins import DOMAINS, Registry
for role in __import__(DOMAINS[0], fromlist=["PARTS"]).PARTS:
    assert list(Registry(role))
heavy = {"jax", "flax", "numpy", "tensorflow_datasets"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
