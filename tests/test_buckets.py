"""Paths in object storage: which are allowed, what is written, and who may write."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import bundles
import fake_gcs
import jax
import numpy as np
import pytest
from stage_runs import REGRESS, leaves, make

from anchor_jax import io, ownership, places, remote, supervisor
from anchor_jax.errors import UserError
from anchor_jax.prompt_files import PromptFile
from anchor_jax.training import files
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.data.digests import digest
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.monitor import EVENTS, Monitor
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.watch.observer import open_watch
from anchor_jax.training.watch.times import Times
from anchor_jax.watchdog import Watchdog, WatchdogConfig
from anchor_jax.weights import checkpoint, lineage
from anchor_jax.weights.load import load_bundle

ROOT = f"gs://{fake_gcs.BUCKET}"


@pytest.fixture(scope="module")
def server():
    with fake_gcs.serving() as (store, _):
        yield store


@pytest.fixture
def store(server):
    server.objects.clear()
    server.asked.clear()
    server.read.clear()
    server.forbids = False
    return server


@pytest.mark.parametrize(
    "path", ["s3://b/run", "memory://run", "http://a/b", "gcs://b/x"]
)
def test_unknown_schemes_are_refused_with_what_is_allowed(path):
    for read in (io.place, io.expand, places.local, places.given):
        with pytest.raises(UserError) as caught:
            read(path)
        assert "is unknown" in str(caught.value)
        assert "a mounted disk, and gs://BUCKET/..." in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        *("gs:/bucket/run", "gs://", "gs://bucket", "gs://bucket/", "gs://b/run"),
        *("gs://bucket/a/../b", "gs://bucket/./a", "gs://bucket//a", "gs://bucket/.."),
        *("gs://bucket/a*", "gs://bucket/a?b", "gs://bucket/a#b", "gs://bucket/[a]"),
        *("gs://bucket/a\0b", "gs://bucket/a\nb", "gs://bucket/%2e%2e/a"),
        *("gs://../a", "gs://Bucket/a", "gs://user@host/a", "gs://bucket/{a}"),
    ],
)
def test_names_that_libraries_read_in_another_way_are_refused(path):
    with pytest.raises(UserError, match="give gs://BUCKET/NAME"):
        io.place(path)


def test_a_path_in_a_bucket_is_refused_by_name_elsewhere():
    with pytest.raises(UserError, match="gs://bucket/a: this cannot be in a bucket"):
        io.expand("gs://bucket/a")
    with pytest.raises(UserError, match="gcloud storage cp"):
        io.expand(io.place("gs://bucket/a"))


def test_paths_of_this_machine_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert io.place("~/a") == io.expand("~/a") == tmp_path / "a"
    assert str(places.given("~/a")) == "~/a"
    assert str(io.place("a/b://c")) == "a/b:/c"
    assert io.resolved(tmp_path / "a" / "..") == tmp_path.resolve()
    assert not places.is_remote(tmp_path)


def test_the_missing_package_is_named_with_its_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "gcsfs" else found(name),
    )
    with pytest.raises(UserError, match=r"anchor_jax\[gcs\]"):
        io.place("gs://bucket/a")


def test_a_missing_bucket_and_no_access_differ_in_their_messages(store):
    with pytest.raises(UserError, match="the bucket nobodys does not exist"):
        places.make_folder(io.place("gs://nobodys/run"))

    store.forbids = True
    with pytest.raises(UserError, match="cannot be reached .*Forbidden.*gcloud auth"):
        places.exists(io.place(f"{ROOT}/a"))


def test_files_are_written_whole_or_not_at_all(store):
    path = io.place(f"{ROOT}/runs/a.json")

    io.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="stop"), io.replacing(path) as part:
        part.write_text("half")
        raise ValueError("stop")

    assert io.read_json(path) == {"a": 1}
    assert store.objects.keys() == {"runs/a.json"}
    assert places.is_dir(path.parent) and places.is_file(path)
    assert not places.exists(path.with_name("b.json"))
    with pytest.raises(FileNotFoundError):
        io.read_json(path.with_name("b.json"))


def test_objects_and_folders_are_removed(store):
    for name in ("runs/a", "runs/b/c", "runs/b/d", "runs/ab"):
        store.write(name, b"", {})
    for name in ("a", "b", "none"):
        io.remove(io.place(f"{ROOT}/runs/{name}"))
    assert store.objects.keys() == {"runs/ab"}

    store.forbids = True
    io.remove(io.place(f"{ROOT}/runs/ab"))  # as on a disk, only if possible


def test_what_another_program_made_meanwhile_is_kept(store):
    path = io.place(f"{ROOT}/a.txt")
    with (
        pytest.raises(UserError, match="made by another program"),
        io.replacing(path, keep_new=True) as part,
    ):
        part.write_text("ours")
        store.write("a.txt", b"theirs", {})
    assert store.objects["a.txt"].content == b"theirs"


def test_a_damaged_file_in_a_bucket_is_named(store):
    store.write("a.json", b"{", {})
    with pytest.raises(UserError, match="gs://bucket/a.json is damaged .*; remove it"):
        io.read_json(f"{ROOT}/a.json", remedy="remove it")


def test_a_folder_of_new_files_is_uploaded_at_its_end(store):
    with io.filling(io.place(f"{ROOT}/samples")) as folder:
        (folder / "a.mp4").write_bytes(b"a")
        assert not store.objects
    with pytest.raises(ValueError), io.filling(io.place(f"{ROOT}/samples")) as folder:
        (folder / "b.mp4").write_bytes(b"b")
        raise ValueError

    assert store.objects.keys() == {"samples/a.mp4"}


def test_a_log_in_a_bucket_is_written_at_intervals_and_for_checkpoints(
    store, monkeypatch
):
    folder = io.place(f"{ROOT}/run")
    log = files.Log(folder)
    for step in range(3):
        log.add({"step": step})
    assert not store.objects
    log.flush()
    log.flush()
    assert [line["step"] for line in files.read_log(folder)] == [0, 1, 2]
    written = [path for method, path in store.asked if method == "POST"]
    assert len(written) == 1

    again = files.Log(folder)
    monkeypatch.setattr(files, "EVERY", 0.0)
    again.add({"step": 3})
    assert [line["step"] for line in files.read_log(folder)] == [0, 1, 2, 3]


def test_a_monitors_files_are_whole_when_a_checkpoint_is_saved(store):
    pytest.importorskip("tensorboardX")
    folder = io.place(f"{ROOT}/run")
    monitor = Monitor(folder, 9, 0, 1)
    monitor.note(0, {"loss": 1.0})
    monitor.note(1, {"loss": 2.0})

    monitor.means()

    assert [line["step"] for line in files.read_log(folder)] == [1, 2]
    monitor.note(2, {"loss": 3.0})
    monitor.close()
    # As if step 2 was the last checkpoint.
    again = Monitor(folder, 9, 2, 1)
    again.note(2, {"loss": 4.0})
    again.close()
    assert [line["loss"] for line in files.read_log(folder)] == [1, 2, 4]
    events = [name for name in store.objects if name.startswith(f"run/{EVENTS}/")]
    assert events and all(len(store.objects[name].content) > 100 for name in events)


def test_prompt_files_in_a_bucket_are_read_and_hashed(store, tmp_path):
    text = b"a red ring\na blue ring\n"
    store.write("prompts.txt", text, {})
    (tmp_path / "prompts.txt").write_bytes(text)

    path = io.place(f"{ROOT}/prompts.txt")

    assert [one for _, one in PromptFile(path)] == ["a red ring", "a blue ring"]
    assert digest(path) == digest(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="none.txt: no such file"):
        PromptFile(path.with_name("none.txt"))


def test_datasets_are_built_elsewhere(tmp_path):
    with pytest.raises(UserError, match="--config.data.cache=FOLDER"):
        DataConfig().cache_in(io.place(f"{ROOT}/run"))
    assert DataConfig(cache=str(tmp_path)).cache_in(io.place(f"{ROOT}/run")) == tmp_path
    with pytest.raises(UserError, match="cannot be in a bucket"):
        DataConfig(cache=f"{ROOT}/data").cache_in(tmp_path)


def test_a_run_in_a_bucket_names_its_own_first_weights(store, tmp_path):
    folder = io.place(f"{ROOT}/runs/400")  # as a step is named
    bundles.save(folder / "fresh")
    bundles.save(tmp_path / "fresh")
    lineage.write_run(folder, "./fresh")

    base = lineage.run_base(lineage.run_folder(folder / "7"))

    assert base == f"{ROOT}/runs/400/fresh"
    assert load_bundle(base).digest == load_bundle(str(tmp_path / "fresh")).digest
    lineage.write_run(folder, "./../other")
    with pytest.raises(UserError, match="without empty parts"):
        load_bundle(str(folder))
    with pytest.raises(UserError, match="no such folder"):
        load_bundle(f"{ROOT}/none")


@pytest.mark.slow
def test_incomplete_checkpoints_are_never_chosen_and_are_removed(store):
    prepared = make(REGRESS, mesh=(1, 4, 1, 1))
    folder = io.place(f"{ROOT}/run")
    first = Checkpoints(folder, {}, 2)
    for step in (1, 2):
        first.save(prepared.state.replace(step=jax.numpy.int32(step)), Cursor(step))
    first.close()
    store.write("run/samples/a.png", b"a", {})
    store.write("run/3/generator/d/cut", b"a", {})
    assert checkpoint.steps(folder) == (1, 2)
    del store.objects[f"run/2/{remote.COMPLETE}"]
    assert checkpoint.steps(folder) == (1,)
    assert checkpoint.last_step(folder) == 1 and not checkpoint.is_checkpoint(
        folder / "2"
    )

    again = Checkpoints(folder, {}, 2)
    state, cursor = again.restore(prepared.state, prepared.compiled.places)

    assert (int(state.step), cursor) == (1, Cursor(1))
    both = map(leaves, (state.generator, prepared.state.generator))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)
    names = {name.split("/")[1] for name in store.objects}
    assert names == {"1", "samples"}
    place = again.set_aside(1, "torn")
    assert str(place) == f"{ROOT}/run/torn-1"
    names = {name.split("/")[1] for name in store.objects}
    assert names == {"torn-1", "samples"}


@pytest.mark.slow
def test_two_processes_save_what_one_restores(store):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = str(pathlib.Path(__file__).with_name("two_savers.py"))
    running = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(number), f"{ROOT}/run"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [one.communicate(timeout=200)[0] for one in running]
    assert [one.returncode for one in running] == [0, 0], "\n".join(outputs)
    prepared = make(REGRESS, mesh=(2, 2, 1, 1))

    state, cursor = Checkpoints(io.place(f"{ROOT}/run"), {}, 2).restore(
        prepared.state, prepared.compiled.places
    )

    assert (int(state.step), cursor) == (7, Cursor(3))
    for ours, theirs in zip(
        leaves(state.generator), leaves(prepared.state.generator), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs + 1)


@pytest.mark.slow
def test_loading_one_network_reads_no_other(store):
    prepared = make(REGRESS, mesh=(1, 4, 1, 1))
    folder = io.place(f"{ROOT}/run")
    saved = Checkpoints(folder, {}, 2)
    saved.save(prepared.state.replace(step=jax.numpy.int32(1)), Cursor(1))
    saved.close()
    store.read.clear()

    checkpoint.restore(folder, "generator")

    items = {name.split("/")[2] for name in store.read if "/d/" in name}
    assert items == {"generator"}
    assert "run/1/opt_generator/manifest.ocdbt" in store.objects


PROGRAM = """
import jax, jax.numpy as jnp
from anchor_jax import compile_cache
found = []
jax.monitoring.register_event_listener(
    lambda event, **more: found.append(event.rpartition("/")[2])
)
compile_cache.enable(print)
assert float(jax.jit(lambda x: x * 2 + 1)(jnp.float32(3))) == 7
print(found.count("compile_requests_use_cache"), found.count("cache_hits"))
"""


@pytest.mark.slow
def test_jax_keeps_programs_in_a_bucket_that_it_was_given(store):
    def start():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "JAX_COMPILATION_CACHE_DIR": f"{ROOT}/cache",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return tuple(map(int, done.stdout.split()))

    asked, found = start()
    assert asked and not found
    assert any(name.startswith("cache/jit_") for name in store.objects)
    assert start() == (asked, asked)


OWNER = """
import json, sys
from anchor_jax import ownership
from anchor_jax.errors import UserError
folder, where, ready = json.loads(sys.argv[1])
if where:
    ownership._where = lambda: [where]
ownership.BUCKET_BEAT, ownership.BUCKET_LEASE = 0.3, 3.0
if ready:
    print("ready", flush=True)
    sys.stdin.readline()
try:
    lease = ownership.own(folder, tell=lambda line: None)
except UserError as error:
    print(f"error: {error}", flush=True)
    sys.exit(2)
print("owns", flush=True)
line = sys.stdin.readline().strip()
if line == "check":
    try:
        lease.check()
        print("holds", flush=True)
    except UserError as error:
        print(f"error: {error}", flush=True)
lease.release()
"""


def owner(where="", ready=False):
    arguments = json.dumps([f"{ROOT}/run", where, ready])
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def say(process, line):
    process.stdin.write(line + "\n")
    process.stdin.flush()


@pytest.mark.slow
def test_one_of_three_jobs_that_start_together_owns_a_bucket(store):
    jobs = [owner(ready=True) for _ in range(3)]
    assert [one.stdout.readline() for one in jobs] == ["ready\n"] * 3
    for one in jobs:
        say(one, "go")
    lines = [one.stdout.readline() for one in jobs]

    assert sum(line == "owns\n" for line in lines) == 1, lines
    assert sum("gs://bucket/run is in use by process" in line for line in lines) == 2
    for one in jobs:
        one.communicate("check\n" if one.poll() is None else None, timeout=60)
    assert not store.objects


@pytest.mark.slow
def test_a_killed_owner_of_a_bucket_is_replaced_and_a_late_one_writes_nothing(
    store, monkeypatch
):
    monkeypatch.setattr(ownership, "BUCKET_LEASE", 3.0)
    # What it says of itself can be checked by nobody, as on another host.
    first = owner(where="elsewhere")
    assert first.stdout.readline() == "owns\n"
    with pytest.raises(UserError, match="is in use by"):
        ownership.own(f"{ROOT}/run")  # its heartbeats are seen
    os.kill(first.pid, 19)  # SIGSTOP
    with ownership.own(f"{ROOT}/run") as lease:
        os.kill(first.pid, 18)  # SIGCONT
        say(first, "check")
        assert "gs://bucket/run was taken over by" in first.stdout.readline()
        first.communicate(timeout=60)
        lease.check()
        io.write_text(io.place(f"{ROOT}/run/a.txt"), "ours")
    assert store.objects.keys() == {"run/a.txt"}


def test_two_rivals_that_see_each_other_both_withdraw(store):
    place = io.place(f"{ROOT}/run/.owner")
    claims = [ownership._Claim(place, place.parent, job) for job in ("a", "b")]
    one, other = map(ownership._BucketHold, claims)
    other.file.write_bytes(other.content())

    assert not one.enter([])
    assert one.file.name not in {path.name for path in place.iterdir()}
    other.leave()
    assert one.enter([])
    one.leave()
    assert not store.objects


def test_a_heartbeat_does_not_bring_a_member_back(store):
    place = io.place(f"{ROOT}/run/.owner")
    hold = ownership._BucketHold(ownership._Claim(place, place.parent))
    assert hold.enter([])
    hold.check()
    store.delete(f"run/.owner/{hold.file.name}", {})

    hold.beat()

    assert ownership._members(place) == []
    with pytest.raises(UserError, match="was taken over"):
        hold.check()
    store.forbids = True
    hold.check()  # out of reach is not an answer


def test_a_late_heartbeat_leaves_nothing_behind(store):
    place = io.place(f"{ROOT}/run/.owner")
    hold = ownership._BucketHold(ownership._Claim(place, place.parent))
    assert hold.enter([])

    hold.leave()
    hold.beat()

    assert not store.objects


def test_processes_of_one_job_share_a_bucket(store):
    seats = [ownership.own(f"{ROOT}/run", "job", (seat,)) for seat in ("0", "1")]
    members = [name for name in store.objects if name.endswith(".json")]
    assert len(members) == 2
    with pytest.raises(UserError, match="is in use by"):
        ownership.own(f"{ROOT}/run", "other job")
    for one in seats:
        one.release()
    assert not store.objects


def test_messages_and_stacks_of_a_process_reach_the_bucket(store, tmp_path):
    log, stacks = tmp_path / "messages", tmp_path / "stacks-1.txt"
    log.write_text("lost process 0")
    facts = {"folder": f"{ROOT}/run", "index": 1}
    ends, now = [], [0.0]
    dog = Watchdog(
        WatchdogConfig(),
        stacks,
        lambda *end: ends.append(end),
        lambda: now[0],
        copy=io.place(f"{ROOT}/run/stacks-1.txt"),
    )

    place = io.place(f"{ROOT}/run")
    watch, _ = open_watch(REGRESS, tuple, place, 0, Times(), str, str)
    assert str(watch.watchdog.copy) == f"{ROOT}/run/stacks-0.txt"
    kept = supervisor._Parent(0, log, facts)._keep(True)
    dog.started("kind")
    for now[0] in range(0, 3700, 10):
        dog.check()

    assert str(kept) == f"{ROOT}/run/process-1.log"
    assert store.objects["run/process-1.log"].content == b"lost process 0"
    assert f"are in {ROOT}/run/stacks-1.txt" in ends[0][1]
    assert b"test_messages_and" in store.objects["run/stacks-1.txt"].content

    store.forbids = True
    assert supervisor._Parent(0, log, facts)._keep(True) == log
    assert dog.write_stacks() == stacks
