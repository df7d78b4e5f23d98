"""Paths that start with ~, for a user whose home folder is unknown."""

import pathlib

import pytest

from anchor_jax.cli.main import main
from anchor_jax.compile_cache import CACHE_VARIABLE


@pytest.mark.parametrize(
    "line",
    [
        ("sample", "--config=~/x.py"),
        ("sample", "--config=tiny", "--config.weights=~/x"),
        ("sample", "--config=tiny", "--config.prompt=", "--config.prompt_file=~/x"),
        ("sample", "--config=tiny", "--config.sampler.negative_prompt_file=~/x"),
        ("sample", "--config=tiny", "--out=~/x"),
        ("replay", "~/x.json"),
        ("verify", "~/x"),
        ("train", "--config=train_teacher", "--config.out=~/x"),
        ("sweep", "--config=train_teacher", "--config.out=~/x", "--vary=seed=1"),
        ("trajectories", "--config.weights=~/x"),
        ("score", "--config=tiny", "--out=~/x"),
        ("ablate", "--config=tiny", "--out=~/x"),
        ("port", "--wan=~/x", "--dry_run"),
        ("port", "--wan=x", "--out=~/x"),
        ("export", "--weights=~/x", "--out=y"),
        ("export", "--weights=tiny", "--layout=bundle", "--out=~/x"),
        ("bench", "--config=bench_medium", "--out=~/x"),
        ("bench", "--config=bench_medium", "--profile=~/x"),
        ("plan", "--target=h100", "--json=~/x"),
    ],
    ids=lambda line: f"{line[0]} {line[-1]}",
)
def test_a_path_in_an_unknown_home_is_refused(line, tmp_path, monkeypatch, capsys):
    def expand(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(pathlib.Path, "expanduser", expand)
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    monkeypatch.chdir(tmp_path)

    assert main(line) == 2

    message = capsys.readouterr().err
    assert (
        "~/x" in message and "home folder of this user is unknown; set HOME" in message
    )
    assert list(tmp_path.iterdir()) == []
