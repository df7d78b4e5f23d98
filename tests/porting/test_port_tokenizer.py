"""The tokenizer's files in a folder of Wan2.1: which counts, and what is refused."""

import bundles
import layouts
import pytest
from layouts import write_layout

from anchor_jax.cli import main
from anchor_jax.errors import UserError
from anchor_jax.io import write_json
from anchor_jax.porting import port
from anchor_jax.wan.tokenizer import FastTokenizer, load_tokenizer

HOMES = {"wan": "google/umt5-xxl", "diffusers": "tokenizer"}


def files(folder, kind, keep):
    """Writes a folder and returns its tokenizer's, with only one of the files."""
    place, _ = write_layout(folder, kind)
    home = place / HOMES[kind]
    for name in {"tokenizer.json", "spiece.model"} - set(keep):
        (home / name).unlink()
    return place, home


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOMES)
def test_a_json_alone_is_ported_and_used(tmp_path, kind, capsys):
    """As transformers 5 writes it, beside the config of the tokenizer."""
    folder, home = files(tmp_path / "in", kind, ["tokenizer.json"])
    write_json(home / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})

    assert main.main(["port", f"--wan={folder}", f"--out={tmp_path / 'out'}"]) == 0

    found = load_tokenizer(tmp_path / "out" / "tokenizer", 8)
    assert isinstance(found, FastTokenizer)
    assert found.encode(["a"])[0].tolist() == [[4, 1, 0, 0, 0, 0, 0, 0]]
    printed = capsys.readouterr().out
    assert "without tokenizer" not in printed and "spiece" not in printed


@pytest.mark.slow
def test_a_model_alone_is_reported(tmp_path, capsys):
    folder, home = files(tmp_path / "in", "wan", ["spiece.model"])
    content = bundles.train_tokenizer(["a red ring"])
    (home / "spiece.model").write_bytes(content)

    assert main.main(["port", f"--wan={folder}", "--dry_run"]) == 0

    assert "tokenizer: token ids come from spiece.model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", b"{", "tokenizer.json is not a tokenizer of UMT5.*damaged"),
        ("tokenizer.json", layouts.tokenizer_json(["x"] * 9), "has 4 pieces|12 pieces"),
        ("spiece.model", b"pieces", "spiece.model is not a tokenizer of UMT5"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_first(
    tmp_path, name, content, message
):
    folder, home = files(tmp_path / "in", "wan", [name])
    if isinstance(content, bytes):
        (home / name).write_bytes(content)
    else:
        write_json(home / name, content)

    with pytest.raises(UserError, match=message):
        port.plan(folder)
