import json

import pytest

from anchor_jax.cli import main
from anchor_jax.errors import UserError
from anchor_jax.training import tiny

CONFIG = tiny.TinyConfig()


def test_a_run_goes_on_with_its_own_config_only(tmp_path):
    tiny.check_config(CONFIG, tmp_path)
    tiny.check_config(CONFIG, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["clips"] == 4096

    with pytest.raises(UserError, match=r"clips, .*another --out"):
        tiny.check_config(CONFIG.scaled(0.1), tmp_path)
    with pytest.raises(UserError, match="another config: seed differ"):
        tiny.check_config(tiny.TinyConfig(seed=1), tmp_path)


def test_a_run_from_before_there_was_a_config_goes_on(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "checkpoint").write_text("x")

    tiny.check_config(CONFIG, tmp_path)

    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(UserError, match="another --out"):
        tiny.check_config(CONFIG, tmp_path)


@pytest.mark.parametrize("scale", ["nan", "-1", "0", "inf"])
def test_a_scale_that_means_nothing_is_refused(tmp_path, capsys, scale):
    out = tmp_path / "out"
    status = main.main(["train-tiny", f"--out={out}", f"--scale={scale}"])

    assert status == 2
    assert "expected a number above 0" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")

    assert main.main(["train-tiny", f"--out={tmp_path / 'taken'}"]) == 2
    assert "expected a folder" in capsys.readouterr().err
