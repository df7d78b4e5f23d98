"""What files are by their first bytes."""

import bundles
import pytest

from anchor_jax.errors import UserError
from anchor_jax.filetypes import check_start, describe_start
from anchor_jax.weights.load import load_bundle

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"{}", b"\x80\x02", b"\0" * 1024])
def test_other_files_are_not_described(start):
    assert describe_start(start) is None


@pytest.mark.parametrize(
    "start, kind",
    [
        (b"", "empty"),
        (POINTER, "Git LFS"),
        (b"<!doctype HTML>", "web page"),
        (b"7z\xbc\xaf\x27\x1c", "compressed"),
        (bytes(257) + b"ustar", "tar"),
    ],
)
def test_files_in_the_place_of_others_are_described(start, kind):
    assert kind in describe_start(start)[0]


def test_an_unfinished_download_is_named_by_what_is_beside_it(tmp_path):
    path = tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors.incomplete").touch()
    with pytest.raises(
        UserError, match=r"unfinished, because model.safetensors.incomplete"
    ):
        check_start(path)
    path.write_bytes(b"whole")
    assert check_start(path) == b"whole"
    # aria2 makes the file first, with its full length.
    (tmp_path / "model.safetensors.aria2").touch()
    with pytest.raises(UserError, match="unfinished"):
        check_start(path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_pointer_in_a_bundle_is_named(tmp_path, name):
    bundles.save(tmp_path)
    (tmp_path / name).write_bytes(POINTER)

    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        load_bundle(str(tmp_path))
