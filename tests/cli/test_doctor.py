import json
import time

import pytest

from anchor_jax.cli import compile_cache, main


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty home, so that no cache of another run is looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "enable", lambda: tmp_path)
    (tmp_path / "program").write_bytes(b"x" * 1000)
    return tmp_path


@pytest.mark.slow
def test_it_runs_on_this_machine_without_weights(cache, capsys):
    began = time.perf_counter()

    assert main.main(["doctor"]) == 0

    shown = capsys.readouterr().out
    assert time.perf_counter() - began < 60
    assert "(cpu, " in shown
    assert "heads for tiny" in shown
    assert f"compiled   {cache}, 0.0 MB" in shown
    assert "do: use a GPU or TPU" in shown
    assert shown.count("1.3B ") == 3


@pytest.mark.slow
def test_json_is_one_object_with_every_number(cache, capsys):
    assert main.main(["doctor", "--json", "--weights=tiny"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["compiled"]["bytes"] == 1000
    assert report["weights"]["items"]["generator"] > 1_000_000
    assert report["speed"]["flops"] > 1e8
    assert len(report["sizes"]) == 6
    assert report["device"]["memory"] > 0
