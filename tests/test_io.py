"""Files that are whole or not there, and errors that name them."""

import shutil
import threading

import pytest

from anchor_jax import io
from anchor_jax.errors import UserError


def test_temporary_names_differ_and_keep_the_suffix(tmp_path):
    names = {io.temporary_name(tmp_path / "a.mp4") for _ in range(100)}
    assert len(names) == 100
    assert all(one.suffix == ".mp4" and one.name.startswith(".a.") for one in names)


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    with io.replacing(path) as one, io.replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_what_is_unfinished_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".b.0123.part").mkdir()
    with pytest.raises(ValueError, match="stop"), io.replacing(tmp_path / "a") as part:
        part.write_text("half")
        with io.making_folder(tmp_path / "b") as folder:
            (folder / "c").write_text("half")
            thread = threading.Thread(target=io.remove_unfinished)
            thread.start()
            thread.join()
            assert [file.name for file in tmp_path.iterdir()] == [".b.0123.part"]
            raise ValueError("stop")
    assert [file.name for file in tmp_path.iterdir()] == [".b.0123.part"]


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(UserError, match="b cannot be written"),
        io.making_folder(tmp_path / "b"),
    ):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "theirs").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["b", "theirs"]


@pytest.mark.parametrize(
    "content",
    [b"", b"[1,", b"\xff\n", b"[" * 100_000, b"[1]", b"null"],
    ids=["empty", "cut", "bytes", "deep", "list", "null"],
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json .*; remove it"):
        io.read_json(path, remedy="remove it")


def test_a_home_that_is_unknown_is_an_error_of_the_user(monkeypatch, tmp_path):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(io.pathlib.Path, "expanduser", unknown)
    with pytest.raises(UserError, match="set HOME"):
        io.expand("~/a")


@pytest.fixture
def listed(tmp_path):
    """A folder with a list, and one beside it."""
    for name in ("list/a", "list/below/b", "other/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "list"


@pytest.mark.parametrize("name", ["a", "./below/b", "below/../a", "here", "below/up"])
def test_a_file_of_a_list_is_in_its_folder(listed, name):
    (listed / "here").symlink_to("below/b")
    (listed / "below" / "up").symlink_to("../a")

    assert io.inside(listed, name).read_text().startswith("list/")
    assert io.inside(listed, str(listed / name)).read_text().startswith("list/")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../other/c", "leads to .*other/c, outside .*list;"),
        ("/etc/hostname", "leads to /etc/hostname, outside"),
        ("below/../../other/c", "leads to .*other/c"),
        ("link", "'link' is a link to .*other/c, outside .*list; put the file itself"),
        ("folder/c", "is a link to .*other/c, outside"),
        ("folder/../other/c", "is a link to .*other/c, outside"),
        ("missing", "is a link to .*list/none, which is missing"),
        ("around", "is not a file in .*around"),
        ("none", "is not a file in .*; put it there"),
        ("below", "is not a file in"),
        ("a\0", "is not a file in .*null"),
        ("\udcff", "is not a file in"),
        ("\ud800", "is not a file in .*surrogates"),
        ("x" * 5000, "is not a file in .*too long"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(listed, name, reason):
    links = {"link": "../other/c", "folder": "../other", "missing": "none"}
    for one, target in {**links, "around": "around"}.items():
        (listed / one).symlink_to(target)

    with pytest.raises(UserError, match=reason) as caught:
        io.inside(listed, name)

    assert len(str(caught.value)) < 1000


def test_a_path_with_a_nul_is_refused():
    with pytest.raises(UserError, match="cannot contain a NUL"):
        io.expand("a\0b")


def test_temporary_files_stay_until_the_end(tmp_path):
    part = tmp_path / "part"

    with io.removed_at_end(part):
        part.touch()
        io.remove_unfinished()
        assert not part.exists()
        part.touch()

    io.remove_unfinished()
    assert part.exists()


def test_without_a_place_for_temporary_files_the_remedy_is_named(monkeypatch):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(io.tempfile, "mkdtemp", fail)

    with pytest.raises(UserError, match="set TMPDIR"), io.scratch_folder():
        pass


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{\0}\0", "is not JSON"),
        (b'{"a": "\xed\xa0\x80"}', "is not JSON"),
        (b'{"a": {"b": NaN}}', "a.b=NaN is not a number"),
        (b'{"a": [1, -Infinity]}', "a=-Infinity is not a number"),
        (b'{"a": 1e999}', "a=Infinity is not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate name 'a'"),
        (rb'{"a": ["\ud800"]}', r"a has U+D800, a lone surrogate"),
        (rb'{"\udc00": 1}', r"U+DC00, a lone surrogate"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 levels deep"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "got list, expected a JSON object"),
    ],
)
def test_json_of_others_is_read_strictly(content, part):
    with pytest.raises(UserError, match=r"^a\.json.*; copy it") as caught:
        io.parse_json(content, "a.json", "copy it")

    assert part in str(caught.value)


def test_right_json_of_others_is_read():
    content = '\ufeff{"a": [1, 2.5, "é \\ud83d\\ude00", null, true], "b": {}}'.encode()

    assert io.parse_json(content, "a.json") == {
        "a": [1, 2.5, "é 😀", None, True],
        "b": {},
    }


def test_errors_of_another_file_are_not_attributed_to_this_one(tmp_path):
    for error in (
        FileNotFoundError(2, "No such file", str(tmp_path / "weights" / "w")),
        BrokenPipeError(32, "Broken pipe"),
    ):
        with (
            pytest.raises(type(error)),
            io.replacing(tmp_path / "out" / "video.json"),
        ):
            raise error
    with (
        pytest.raises(UserError, match=r"video\.json: cannot be written \(Denied\)"),
        io.replacing(tmp_path / "out" / "video.json") as part,
    ):
        raise PermissionError(13, "Denied", str(part))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_removed_at_the_end_cannot_get_its_name(tmp_path, monkeypatch):
    part, removed = tmp_path / "8.tmp", io.remove

    def finish_meanwhile(path):
        with pytest.raises(FileNotFoundError):
            part.rename(tmp_path / "8")
        removed(path)

    monkeypatch.setattr(io, "remove", finish_meanwhile)
    with io.removed_at_end(part):
        part.mkdir()
        (part / "array").touch()
        io.remove_unfinished()
    assert list(tmp_path.iterdir()) == []


def test_a_thread_cannot_make_a_folder_again_that_is_removed_at_the_end(
    tmp_path, monkeypatch
):
    removed = io.remove

    def write_meanwhile(path):
        removed(path)
        if path.name != folder.name:
            with pytest.raises((FileExistsError, NotADirectoryError)):
                (folder / "0").mkdir(parents=True)

    with io.making_folder(tmp_path / "weights") as folder:
        (folder / "0").mkdir()
        monkeypatch.setattr(io, "remove", write_meanwhile)
        io.remove_unfinished()
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []
        folder.mkdir()


def test_a_folder_is_removed_though_a_thread_still_writes_into_it(
    tmp_path, monkeypatch
):
    folder = tmp_path / "part"
    folder.mkdir()
    rmtree = shutil.rmtree

    def beside_a_writer(path, **options):
        rmtree(path, **options)
        if not beside_a_writer.written:
            beside_a_writer.written = True
            folder.mkdir()
            (folder / "late").write_text("")

    beside_a_writer.written = False
    monkeypatch.setattr(shutil, "rmtree", beside_a_writer)
    io.remove(folder)

    assert beside_a_writer.written and not folder.exists()
