"""Compiled programs are kept only where nobody else can put them."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import warnings

import fake_gcs
import jax
import pytest

from anchor_jax import compile_cache, compile_writes, processes
from anchor_jax.cli.output import to_stderr
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.errors import UserError

ROOT = pathlib.Path(compile_cache.__file__).parents[1]


def enable():
    return compile_cache.enable(to_stderr)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Jax as it begins, and as it was afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = tmp_path / "cache"
    made.mkdir(mode=0o700)
    monkeypatch.setenv(CACHE_VARIABLE, str(made))
    return made


def refused(capsys):
    """Enables the cache, and returns the one line that says why it is not used."""
    assert enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not cached: ")
    assert CACHE_VARIABLE in line
    return line


def test_compiled_programs_go_into_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    assert enable() is None

    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert enable() == tmp_path / "anchor_jax"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "anchor_jax")
    assert list((tmp_path / "anchor_jax").iterdir()) == []


def test_folders_are_made_for_the_user_alone(tmp_path, monkeypatch):
    made = tmp_path / "a" / "b"
    monkeypatch.setenv(CACHE_VARIABLE, str(made))
    before = os.umask(0)
    try:
        assert enable() == made
    finally:
        os.umask(before)

    assert {one.stat().st_mode & 0o777 for one in (made, made.parent)} == {0o700}


def test_a_folder_that_jax_was_given_is_kept_and_checked(folder, capsys):
    jax.config.update("jax_compilation_cache_dir", str(folder))
    assert enable() == folder

    folder.chmod(0o777)
    assert "other users can write to" in refused(capsys)


@pytest.fixture
def store():
    with fake_gcs.serving() as (store, _):
        yield store


BUCKET = f"gs://{fake_gcs.BUCKET}/cache"


@pytest.mark.parametrize("is_of_jax", [False, True])
def test_a_bucket_keeps_programs(store, is_of_jax, monkeypatch):
    if is_of_jax:
        jax.config.update("jax_compilation_cache_dir", BUCKET)
    else:
        monkeypatch.setenv(CACHE_VARIABLE, BUCKET)

    assert str(enable()) == jax.config.jax_compilation_cache_dir == BUCKET
    assert store.objects == {}, "the test of the permission is removed"

    cache = compile_writes.lru_cache.LRUCache(BUCKET, max_size=-1)
    cache.put("jit_a", b"first")
    cache.put("jit_a", b"second")
    assert cache.get("jit_a") == b"first" and cache.get("jit_b") is None
    assert store.objects.keys() == {"cache/jit_a-cache"}


def test_a_bucket_that_cannot_be_used_is_named(store, monkeypatch, capsys):
    monkeypatch.setenv(CACHE_VARIABLE, "gs://nobodys/cache")
    assert "the bucket nobodys does not exist" in refused(capsys)

    monkeypatch.setenv(CACHE_VARIABLE, BUCKET)
    store.forbids = True
    assert f"{BUCKET} cannot be reached" in refused(capsys)

    monkeypatch.setenv(CACHE_VARIABLE, "s3://bucket/cache")
    assert "the scheme s3:// is unknown" in refused(capsys)


def test_without_a_home_nothing_is_kept(monkeypatch, capsys):
    def unknown(path):
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", unknown)

    assert "home folder of this user is unknown" in refused(capsys)


def test_a_folder_that_cannot_be_written_to_is_not_used(folder, monkeypatch, capsys):
    def fail(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)

    assert f"{folder}: Permission denied" in refused(capsys)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(folder, mode, capsys):
    folder.chmod(mode)

    assert f"chmod -R go-w {folder}" in refused(capsys)


def test_a_folder_that_others_can_replace_is_refused(folder, capsys):
    folder.parent.chmod(0o777)
    assert "other users could replace" in refused(capsys)

    folder.parent.chmod(0o1777)
    assert enable() == folder


def test_a_folder_on_a_volume_of_the_users_own_group_is_used(tmp_path, monkeypatch):
    """As on Kubernetes, where `fsGroup` is the number of the user."""
    volume = tmp_path / "volume"
    volume.mkdir()
    if volume.stat().st_gid != os.geteuid():
        pytest.skip("needs a user whose group has the same number")
    volume.chmod(0o2770)
    monkeypatch.setenv(CACHE_VARIABLE, str(volume / "cache"))

    for _ in range(2):
        assert enable() == volume / "cache"
        jax.config.update("jax_compilation_cache_dir", None)


def test_a_link_is_followed_to_what_it_names(folder, tmp_path, monkeypatch, capsys):
    folder.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.setenv(CACHE_VARIABLE, str(link))

    assert "other users can write to" in refused(capsys)


def test_a_folder_of_another_user_is_refused(folder, monkeypatch, capsys):
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(compile_cache, "_ROOT", owner + 2)

    assert "belongs to another user" in refused(capsys)


def test_a_program_that_others_could_write_is_refused(folder, capsys):
    (folder / "x").write_bytes(b"x")
    (folder / "x").chmod(0o666)
    assert enable() == folder  # they cannot reach it

    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o755)
    assert "holds x, which other users can write" in refused(capsys)


def test_a_program_of_another_user_is_refused(folder):
    if os.geteuid():
        pytest.skip("needs root, which can give a file away")
    (folder / "x").write_bytes(b"x")
    os.chown(folder / "x", 12345, 12345)

    with pytest.raises(UserError, match="holds x, which belongs to another user"):
        compile_cache.check(folder)


def test_programs_without_content_are_removed(folder):
    (folder / "jit_a-cache").touch()
    (folder / "jit_b-cache").write_bytes(b"x")
    (folder / "__init__.py").touch()

    assert enable() == folder
    assert {one.name for one in folder.iterdir()} == {"jit_b-cache", "__init__.py"}


def test_files_that_other_processes_remove_meanwhile_do_not_matter(folder, monkeypatch):
    (folder / "jit_a-cache").write_bytes(b"x")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: [*listed(place), "gone-cache"])

    assert enable() == folder


def test_warnings_of_jax_become_one_line(folder, capsys):
    assert enable() == folder
    text = "Error writing persistent compilation cache entry for 'jit_{}': OSError: x"

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for number in range(3):
            warnings.showwarning(text.format(number), UserWarning, "file", 1)

    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and "jit_0" in line


def test_other_warnings_are_shown_as_before(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *given: shown.append(given[0]))
    assert enable() == folder

    warnings.showwarning("something else", UserWarning, "file", 1)

    assert shown == ["something else"]


def test_old_incomplete_programs_are_removed(folder):
    for name in ("new", "old"):
        (folder / f".jit_{name}-cache.0123456789ab-0.part").write_bytes(b"x")
    long_ago = time.time() - 100_000
    os.utime(folder / ".jit_old-cache.0123456789ab-0.part", (long_ago, long_ago))

    assert enable() == folder

    assert [one.name for one in folder.iterdir()] == [
        ".jit_new-cache.0123456789ab-0.part"
    ]


def test_another_version_of_jax_is_left_as_it_is(monkeypatch):
    def other(key):
        pass

    monkeypatch.setattr(compile_writes.compiler, "_cache_write", other)

    assert not compile_writes.install()
    assert compile_writes.compiler._cache_write is other


def test_a_program_that_exists_is_kept_and_a_new_one_is_whole(folder):
    assert compile_writes.install()
    cache = compile_writes.lru_cache.LRUCache(str(folder), max_size=-1)

    cache.put("jit_a", b"first")
    cache.put("jit_a", b"second")

    assert cache.get("jit_a") == b"first"
    assert [one.name for one in folder.iterdir()] == ["jit_a-cache"]


def start_both(folders):
    """Runs a job of two processes; returns (asked, found) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = str(ROOT / "tests" / "two_processes.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(number)],
            env={**os.environ, CACHE_VARIABLE: str(folder), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, folder in enumerate(folders)
    ]
    outputs = [one.communicate(timeout=120)[0] for one in running]
    assert [one.returncode for one in running] == [0, 0], "\n".join(outputs)
    return [tuple(map(int, one.splitlines()[-1].split())) for one in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "one a host"])
def test_a_second_start_compiles_nothing_on_any_process(tmp_path, shared):
    folders = [tmp_path / "a"] * 2 if shared else [tmp_path / "a", tmp_path / "b"]

    first, second = start_both(folders), start_both(folders)

    assert all(found < asked for asked, found in first)
    assert all(found == asked >= 3 for asked, found in second), second


@pytest.mark.slow
def test_a_user_without_name_and_home(tmp_path):
    """As in a container that was started with `--user 12345`."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() or setpriv is None:
        pytest.skip("needs root and setpriv")
    user = "--reuid=12345 --regid=12345 --clear-groups"
    # So that the interpreter can be read, wherever it is.
    user += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    program = "from anchor_jax.cli import compile_cache\nprint(compile_cache.enable())"

    done = subprocess.run(
        [setpriv, *user.split(), sys.executable, "-c", program],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert "home folder of this user is unknown" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_several_processes_on_cpus_cache_nothing_that_could_block_them(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("ANCHOR_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    updated = {}
    monkeypatch.setattr(
        jax.config, "update", lambda name, value: updated.update({name: value})
    )

    monkeypatch.setenv("XLA_FLAGS", "")
    assert compile_cache.enable() is None
    assert updated == {"jax_enable_compilation_cache": False}
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {processes.SAME_ORDER}")
    assert compile_cache.enable() is not None
