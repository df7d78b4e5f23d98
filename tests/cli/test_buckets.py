"""Trainings in a bucket, through a small server of its protocol."""

import bundles
import chex
import fake_gcs
import pytest
import running

from anchor_jax import io
from anchor_jax.cli.main import main
from anchor_jax.training import files
from anchor_jax.weights import checkpoint
from anchor_jax.weights.load import load_bundle

OUT = f"gs://{fake_gcs.BUCKET}/runs/teacher"


@pytest.fixture(scope="module")
def server():
    with fake_gcs.serving() as (store, address):
        yield store, address


@pytest.fixture
def store(server):
    server[0].objects.clear()
    return server[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def training(weights, out, cache, *more):
    return [
        "train",
        "--config=train_teacher",
        f"--config.weights={weights}",
        f"--config.out={out}",
        f"--config.data.cache={cache}",
        "--config.steps=4",
        "--config.save_every=2",
        "--config.batch=4",
        "--config.regression.blocks=1",
        "--config.data.size=8",
        "--config.log_every=1",
        "--config.sample_every=4",
        "--config.samples.num=1",
        "--config.samples.steps=1",
        "--config.optimizer.decay=0",
        *more,
    ]


def train(*arguments):
    return main(training(*arguments))


def put(store, folder, name):
    """Copies the files of a folder into the bucket."""
    for path in folder.iterdir():
        store.write(f"{name}/{path.name}", path.read_bytes(), {})


def below(store, name):
    start = f"{name}/"
    return {key[len(start) :] for key in store.objects if key.startswith(start)}


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_and_is_sampled(store, cache, tmp_path, capsys):
    bundles.save(tmp_path / "weights")
    put(store, tmp_path / "weights", "weights")
    weights = f"gs://{fake_gcs.BUCKET}/weights"

    assert train(weights, OUT, cache, "--config.steps=2") == 0
    assert train(weights, OUT, cache) == 0
    assert train(tmp_path / "weights", tmp_path / "run", cache) == 0

    found = below(store, "runs/teacher")
    assert {"config.json", "run.json", "inputs.json", "4/commit_success.txt"} <= found
    assert {"samples/step-000004.mp4", "samples/step-000004.png"} <= found
    assert any(name.startswith("events/events.out") for name in found)
    assert not any(name.startswith(".owner") for name in found)
    steps = [line["step"] for line in files.read_log(io.place(OUT))]
    assert steps == [1, 2, 3, 4]
    # The same numbers as on a disk, over a resumption.
    there, here = load_bundle(OUT), load_bundle(str(tmp_path / "run"))
    chex.assert_trees_all_equal(there.variables, here.variables)
    assert checkpoint.steps(OUT) == (2, 4)
    capsys.readouterr()

    made = tmp_path / "videos"
    arguments = ["sample", "--config=interactive", f"--config.weights={OUT}/4"]
    assert main([*arguments, "--config.prompt=a red ring[1s]", f"--out={made}"]) == 0
    assert any(path.suffix == ".mp4" for path in made.rglob("*"))


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_and_resume(store, cache, tmp_path):
    bundles.save(tmp_path / "weights")
    for steps in (2, 4):
        more = (f"--config.steps={steps}", "--config.sample_every=0")
        line = training(tmp_path / "weights", OUT, cache, *more)
        port = running.free_port()
        started = [running.by_flags(line, port, number) for number in range(2)]
        statuses, outputs = running.ends(started)
        assert statuses == [0, 0], "\n".join(outputs)
        assert ("Resuming at step 2" in outputs[0]) is (steps == 4)

    assert checkpoint.steps(OUT) == (2, 4)
    assert [line["step"] for line in files.read_log(io.place(OUT))] == [1, 2, 3, 4]
    left = [one for one in below(store, "runs/teacher") if one.startswith(".")]
    assert left == []
    assert load_bundle(OUT).digest != load_bundle(str(tmp_path / "weights")).digest
