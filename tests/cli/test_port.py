"""The commands port and export, as typed."""

import pytest
from layouts import write_layout

from anchor_jax.cli.main import main


@pytest.mark.slow
def test_port_and_export(tmp_path, capsys):
    folder, _ = write_layout(tmp_path / "in", "diffusers")
    base, _ = write_layout(tmp_path / "base", "generator")
    out, back = tmp_path / "out", tmp_path / "back"
    flags = [f"--wan={folder}", f"--generator={base}", "--method=memflow"]

    assert main(["port", *flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "generator: 96 tensors, 14,184 parameters" in printed
    assert "peak memory" in printed

    assert main(["port", *flags, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "base.pt sha256" in printed
    assert f"--config.weights={out}" in printed
    assert "which sampling needs" not in printed

    assert main(["port", *flags, f"--out={out}"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["port", *flags, f"--out={out}", "--overwrite"]) == 0

    export = ["export", f"--weights={out}", f"--out={back}", "--layout=diffusers"]
    capsys.readouterr()
    assert main([*export, "--item=ema"]) == 2
    assert "no item 'ema'; has: generator\n" in capsys.readouterr().err
    assert main(export) == 0
    names = {path.name for path in back.iterdir()}
    parts = {"transformer", "text_encoder", "vae", "tokenizer", "scheduler"}
    assert names == parts | {"model_index.json"}
    assert "max_sequence_length=512" not in capsys.readouterr().out


def test_what_is_missing_is_listed(tmp_path, capsys):
    base, _ = write_layout(tmp_path / "base", "generator")
    flags = [f"--generator={base}", "--method=causvid", "--dry_run"]
    assert main(["port", *flags]) == 0
    printed = capsys.readouterr().out
    assert (
        "the checkpoint has no text_encoder, vae, tokenizer, which sampling" in printed
    )
    assert printed.count("sampling needs") == 1


def test_weights_that_cannot_sample_are_not_offered_for_sampling(tmp_path, capsys):
    base, _ = write_layout(tmp_path / "base", "generator")
    flags = [f"--generator={base}", "--method=causvid", f"--out={tmp_path / 'out'}"]

    assert main(["port", *flags]) == 0

    printed = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'out'}." in printed
    assert printed.count("sampling needs") == 1 and "To sample:" not in printed


def test_a_folder_must_be_named(capsys):
    assert main(["port", "--wan=x"]) == 2
    assert "out is missing" in capsys.readouterr().err
    assert main(["export", "--weights=x"]) == 2
    assert "out is missing" in capsys.readouterr().err
