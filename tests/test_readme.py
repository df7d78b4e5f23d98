"""The READMEs: short, with links that lead somewhere and commands that exist."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from anchor_jax.cli import COMMANDS
from anchor_jax.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md"] + [
    path
    for folder in ("anchor_jax", "launch")
    for path in sorted((ROOT / folder).rglob("README.md"))
]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """Returns the code of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path):
    """Returns the command lines of anchor-jax on a page, as arguments."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    lines = re.findall(r"anchor-jax (?!COMMAND)[^\n]*", text)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    for target in targets:
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_and_fields_exist(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, *flags in commands(path):
        assert name in COMMANDS or name == "--help", name
        given = [flag.partition("=")[2] for flag in flags if flag[:9] == "--config="]
        fields = [flag for flag in flags if flag.startswith("--config.")]
        for config in given:
            load_config(config, fields)
        assert given or not fields


PROGRAMS = [(path, code) for path in PAGES for code in blocks(path, "python")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "program"), PROGRAMS, ids=[name_of(path) for path, _ in PROGRAMS]
)
def test_programs_run_as_they_stand(path, program, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    written = {file.name for file in tmp_path.iterdir()}
    assert written == set(re.findall(r'"(\w+\.(?:mp4|safetensors))"', program))
