"""`anchor-jax train`: a run starts and resumes, and its weights are sampled from."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import types

import bundles
import chex
import jax
import numpy as np
import pytest
import tiny

from anchor_jax import ownership
from anchor_jax.cli.main import main
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.io import write_json
from anchor_jax.tiny_world.prompts import WorldPromptKind
from anchor_jax.training import resume, run
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.stages.build import LoraConfig, TrainConfig
from anchor_jax.training.stages.regression import CompiledRegression, RegressionConfig
from anchor_jax.wan import dit
from anchor_jax.weights import checkpoint
from anchor_jax.weights.lineage import write_run
from anchor_jax.weights.load import load_bundle


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    bundles.save(folder)
    return folder


def train(weights, out, *more):
    return main(
        [
            "train",
            "--config=train_teacher",
            f"--config.weights={weights}",
            f"--config.out={out}",
            "--config.steps=4",
            "--config.save_every=2",
            "--config.batch=4",
            "--config.regression.blocks=1",
            "--config.data.size=8",
            "--config.log_every=1",
            "--config.sample_every=4",
            "--config.samples.num=1",
            "--config.samples.steps=1",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    assert train(weights, out) == 0
    return out


@pytest.mark.slow
def test_a_run_leaves_checkpoints_numbers_and_its_config(trained):
    assert checkpoint.last_step(trained) == 4
    assert {"generator", "ema", "opt_generator", "data", "meta"} <= {
        *checkpoint.items(trained)
    }
    lines = (trained / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    names = {"loss", "gradient_norm", "latent_frames_per_second", "memory_gb"}
    names |= {"goodput", "host_memory_gb", "share_compiling", "share_sampling"}
    for line in map(json.loads, lines):
        assert all(np.isfinite(line[name]) for name in names)
        frames = line["latent_frames_per_second"] * line["seconds_per_step"]
        np.testing.assert_allclose(frames, 4 * 3)
        shares = [line[name] for name in line if name.startswith("share_")]
        np.testing.assert_allclose(line["goodput"] + sum(shares), 1)
    made = sorted(place.name for place in (trained / "samples").iterdir())
    assert made == ["step-000004.mp4", "step-000004.png"]
    assert json.loads((trained / "config.json").read_text())["batch"] == 4


@pytest.mark.slow
def test_a_step_of_a_run_is_a_bundle(trained):
    earlier, last = load_bundle(str(trained / "2")), load_bundle(str(trained))

    mean = checkpoint.restore(trained / "2", "ema")["params"]
    chex.assert_trees_all_equal(earlier.variables["params"], mean)
    assert (earlier.metadata["step"], last.metadata["step"]) == (2, 4)
    assert earlier.digest != last.digest
    with pytest.raises(UserError, match="3"):
        load_bundle(str(trained / "3"))


@pytest.mark.slow
def test_a_runs_weights_are_a_bundle(trained, weights):
    loaded, base = load_bundle(str(trained)), load_bundle(str(weights))

    mean = checkpoint.restore(trained, "ema")
    chex.assert_trees_all_equal(loaded.variables["params"], mean["params"])
    assert loaded.digest != base.digest
    assert loaded.metadata["training"]["stage"] == "regression"
    # The text encoder was trained too, the codec was not.
    ours, theirs = (one.encode_prompts(["a red ring"]) for one in (loaded, base))
    assert np.abs(np.asarray(ours) - theirs).max() > 0
    np.testing.assert_array_equal(
        loaded.codec_params["decode"], base.codec_params["decode"]
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"data": [1]}'),
        ("inputs.json", b""),
        ("inputs.json", b"[1, 2]"),
        ("skipped.json", b'["1"]'),
        ("goodput.json", b'{"at": 1}'),
        ("log.jsonl", b"\xff\n"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry_run", "--config.seed=7")])
def test_damaged_files_of_a_run_are_named_and_stay(
    weights, tmp_path, capsys, name, content, more
):
    (tmp_path / name).write_bytes(content)

    assert train(weights, tmp_path, *more) == 2

    assert f"error: {tmp_path / name}" in capsys.readouterr().err
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [(name, content)]


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"format_version": 1, "base": 7}']
)
def test_a_damaged_mark_of_a_run_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)

    with pytest.raises(UserError, match="run.json"):
        load_bundle(str(tmp_path))


@pytest.mark.slow
def test_a_run_of_another_config_is_not_continued(trained, weights, capsys):
    assert train(weights, trained, "--config.seed=7") == 2

    printed = capsys.readouterr().err
    assert "another config: seed (was 0, got 7)" in printed
    assert f"--config.weights={trained}" in printed


STEADY = ("--config.optimizer.decay=0", "--config.sample_every=0")


@pytest.mark.slow
def test_a_run_is_extended_exactly(weights, tmp_path, capsys):
    part, whole = tmp_path / "part", tmp_path / "whole"
    assert train(weights, part, *STEADY, "--config.steps=2") == 0
    capsys.readouterr()

    assert train(weights, part, *STEADY) == 0

    printed = capsys.readouterr().out
    assert "The run is extended: config.steps was 2 and is now 4." in printed
    assert "Resuming at step 2." in printed
    assert train(weights, whole, *STEADY) == 0
    assert checkpoint.last_step(part) == 4
    chex.assert_trees_all_equal(
        *(checkpoint.restore(folder, "generator") for folder in (part, whole))
    )
    assert json.loads((part / "config.json").read_text())["steps"] == 4

    capsys.readouterr()
    # Fewer steps than the run has made.
    assert train(weights, part, *STEADY, "--config.steps=3") == 0
    printed, bar = capsys.readouterr()
    ignored = "config.steps was 4 and is now 3; ignored, because the run is already at"
    assert f"{ignored} step 4" in printed and "shortened" not in printed
    assert "Already finished at step 4; nothing to do." in printed
    assert "step/s" not in bar
    assert json.loads((part / "config.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_a_run_whose_learning_rate_falls_is_not_extended(trained, weights, capsys):
    assert train(weights, trained, "--config.steps=6") == 2

    printed = capsys.readouterr().err
    assert "another config: steps (was 4, got 6)" in printed
    assert "with optimizer.decay=0.4 the learning rate of every run falls" in printed


@pytest.mark.slow
def test_a_change_of_a_finished_run_is_reported_as_ignored(trained, weights, capsys):
    before = (trained / "config.json").read_bytes()

    assert train(weights, trained, "--config.optimizer.learning_rate=0.5") == 0

    printed = capsys.readouterr().out
    assert "and is now 0.5; ignored, because the run is already at" in printed
    assert "Already finished at step 4; nothing to do." in printed
    assert (trained / "config.json").read_bytes() == before


@pytest.mark.slow
def test_allowed_changes_are_reported(trained, weights, capsys):
    more = ("--config.optimizer.learning_rate=0.001", "--config.keep=3")

    assert train(weights, trained, *more, "--dry_run") == 0

    printed = capsys.readouterr().out
    assert "changed since this run started: optimizer.learning_rate was " in printed
    assert "parameters: generator" in printed and "3 latent frames" in printed
    assert re.search(r"peak memory: \S+ GB \(from .*log.jsonl\)", printed)
    seconds = r"a step takes \S+ s \(from .*log.jsonl\); 4 steps: \S+ min"
    assert re.search(seconds, printed)


@pytest.mark.slow
def test_a_dry_run_times_steps_and_leaves_nothing(weights, tmp_path, capsys):
    assert train(weights, tmp_path / "new", "--dry_run") == 0

    printed = capsys.readouterr().out
    assert re.search(r"a step takes \S+ s on this machine; 4 steps: \S+ min", printed)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_last_steps_are_logged_too(weights, tmp_path):
    more = ("--config.log_every=3", "--config.sample_every=0")
    assert train(weights, tmp_path, *more) == 0

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4]


@pytest.mark.slow
def test_a_training_that_is_stopped_has_the_status_of_an_interrupt(
    weights, tmp_path, capsys, monkeypatch
):
    advance = CompiledRegression.advance

    def ask(self, state, cursor, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, state, cursor, step)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledRegression, "advance", ask)
        assert train(weights, tmp_path / "run") == 130
    assert "Stopped at 2/4. Rerun this command to resume." in capsys.readouterr().err
    assert train(weights, tmp_path / "run") == 0
    assert checkpoint.last_step(tmp_path / "run") == 4


@pytest.fixture(scope="module")
def distilled(weights, tmp_path_factory):
    """A self-forcing run whose critic has learned, and its config."""
    folder = tmp_path_factory.mktemp("distilled")
    (folder / "prompts.txt").write_text(f"{bundles.RED}\n{bundles.BLUE}\n")
    # The critic begins as the teacher, which has another layer.
    deeper = dataclasses.replace(tiny.MODEL, num_layers=tiny.MODEL.num_layers + 1)
    generator = dit.init_params(deeper, jax.random.key(3))
    tree = {**bundles.params(), "generator": jax.tree.map(np.asarray, generator)}
    bundles.save(folder / "teacher", tree, model=deeper)
    fields = {
        "weights": weights,
        "teacher": folder / "teacher",
        "out": folder / "run",
        "data.kind": "prompts",
        "data.path": folder / "prompts.txt",
        "distillation.steps": "(1000,500)",
        **dict.fromkeys(("distillation.frames", "distillation.length"), 6),
        "critic_optimizer.learning_rate": 1e-2,
        **dict.fromkeys(("steps", "log_every"), 1),
        "sample_every": 0,
        "batch": jax.device_count(),
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["train", "--config=train_dmd:tiny", *given]) == 0
    return folder / "run", load_config("train_dmd:tiny", given)


@pytest.mark.slow
def test_a_critic_continues_from_the_stage_before(distilled, weights, tmp_path):
    folder, config = distilled
    stored = checkpoint.restore(folder, "fake_score")["params"]
    config.out, config.critic = str(tmp_path / "next"), str(folder)
    training = run.open_training(run.read_config(config), tell=lambda line: None)

    began = training.prepared.state.fake_score["params"]
    chex.assert_trees_all_equal(began, stored)
    teacher = load_bundle(config.teacher).variables["params"]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), began, teacher)
    assert any(jax.tree.leaves(moved))
    # By default, and without a mean, it is the generator.
    mean = checkpoint.restore(folder, "ema")["params"]
    generator = load_bundle(str(folder)).variables["params"]
    chex.assert_trees_all_equal(generator, mean)
    read = load_bundle(str(weights), network="critic").variables["params"]
    given = load_bundle(str(weights)).variables["params"]
    chex.assert_trees_all_equal(read, given)


@pytest.mark.slow
def test_invalid_sizes_of_a_critic_are_refused(distilled, tmp_path):
    shutil.copytree(distilled[0], tmp_path / "run")
    path = tmp_path / "run" / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for wrong in ("big", {"num_layers": 10**6}, {"rope_theta": -1.0}):
        path.write_text(json.dumps({**meta, "critic": wrong}))
        with pytest.raises(UserError, match="run"):
            load_bundle(str(tmp_path / "run"), network="critic")


def test_missing_weights_are_named_by_their_field(weights, capsys):
    given = ["train", "--config=train_dmd:tiny", f"--config.weights={weights}"]

    assert main([*given, "--config.teacher=/nowhere"]) == 2
    assert "error: config.teacher: weights='/nowhere'" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    for name in ("datasets", "prompts", "states", "trajectories", "videos"):
        module = f"anchor_jax.training.data.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delattr(module, raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    (tmp_path / "a.txt").write_text("a\nb\n")
    given = ["train", "--config=train_dmd:tiny", "--config.data.kind=prompts"]
    given += [f"--config.{name}=tiny" for name in ("weights", "teacher")]
    given += [f"--config.data.path={tmp_path / 'a.txt'}", f"--config.out={tmp_path}"]

    assert main(given) == 2
    printed = capsys.readouterr().err
    assert "pip install '.[train]'" in printed
    assert "pip install 'anchor_jax[train]'" in printed


def test_a_start_that_failed_does_not_bind_the_next(weights, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(tmp_path / "none", out) == 2
    assert train(weights, out, "--config.regression.blocks=0") == 2
    assert "holds a run" not in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    assert train(tmp_path / "none", out) == 2
    assert list(out.iterdir()) == []


def test_a_folder_that_another_job_owns_is_left_alone(weights, tmp_path, capsys):
    out = tmp_path / "run"
    with ownership.own(out, job="another"):
        assert train(weights, out) == 2
        assert [path.name for path in out.iterdir()] == [".owner"]

    assert f"{out} is in use by process" in capsys.readouterr().err


def test_a_run_whose_data_changed_is_not_resumed(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    data = DataConfig("prompts", str(prompts))
    config = TrainConfig(out=str(tmp_path), data=data)
    bundle = types.SimpleNamespace(digest="x")
    first = resume.inputs(config, bundle, bundle, None)
    write_json(tmp_path / "inputs.json", first)
    resume.compare_inputs(tmp_path, resume.inputs(config, bundle, bundle, None))

    prompts.write_text("b\na\n")
    with pytest.raises(UserError, match="config.data changed since"):
        resume.compare_inputs(tmp_path, resume.inputs(config, bundle, bundle, None))
    prompts.write_text("a\nb\n")
    other = types.SimpleNamespace(digest="y")
    with pytest.raises(UserError, match="config.weights changed since"):
        resume.compare_inputs(tmp_path, resume.inputs(config, other, bundle, None))
    with pytest.raises(UserError, match="config.teacher changed since"):
        resume.compare_inputs(tmp_path, resume.inputs(config, bundle, other, None))


def test_a_run_whose_world_changed_is_not_resumed(tmp_path, monkeypatch):
    config = TrainConfig(out=str(tmp_path), data=DataConfig("world_prompts"))
    bundle = types.SimpleNamespace(digest="x")
    write_json(tmp_path / "inputs.json", resume.inputs(config, bundle, bundle, None))

    monkeypatch.setattr(WorldPromptKind, "version", WorldPromptKind.version + 1)
    with pytest.raises(UserError, match=r"config.data.kind changed since"):
        resume.compare_inputs(tmp_path, resume.inputs(config, bundle, bundle, None))


def test_whole_weights_are_not_held_beside_those_on_the_mesh(weights, tmp_path):
    config = TrainConfig(
        stage="regression",
        weights=str(weights),
        batch=4,
        regression=RegressionConfig(blocks=1),
        data=DataConfig("world_clips", size=8),
        sample_every=0,
        out=str(tmp_path),
    )

    training = run.open_training(config, tell=print)

    assert "variables" not in vars(training.prepared.bundle)


@pytest.mark.slow
def test_a_run_that_has_ended_tells_where_things_are(trained, weights, capsys):
    assert train(weights, trained) == 0

    printed = capsys.readouterr().out
    for place in (trained / "log.jsonl", trained / "samples"):
        assert str(place) in printed
    assert f"--config=configs/interactive.py --config.weights={trained}" in printed
    assert re.search(r"'--config.prompt=a \w+ .*\[3f\]'", printed)


def test_fields_that_an_older_run_did_not_have_are_its_defaults(tmp_path):
    config = TrainConfig(out=str(tmp_path))
    resume.write_config(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in ("samples", "lora", "keep_best"):
        del stored[name]
    del stored["data"]["dropout"]
    (tmp_path / "config.json").write_text(json.dumps(stored))

    resume.compare_config(config, tmp_path, print)

    other = dataclasses.replace(config, lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"lora.rank \(was 0, got 2\)"):
        resume.compare_config(other, tmp_path, print)


def test_a_training_without_a_checkpoint_has_no_weights(weights, tmp_path):
    write_run(tmp_path, str(weights))

    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_bundle(str(tmp_path))


def test_a_step_that_is_not_kept_is_missed_by_name(weights, tmp_path):
    write_run(tmp_path, str(weights))
    (tmp_path / "500").mkdir()

    with pytest.raises(UserError, match="no checkpoint of step 300, only of 500"):
        load_bundle(str(tmp_path / "300"))


def test_trainings_that_lead_to_themselves_are_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"format_version": 1, "base": "./"}')

    with pytest.raises(UserError, match="leads back to itself"):
        load_bundle(str(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--config.steps=0", "config.steps=0"),
        ("--config.samples.frames=0", "config.samples.frames=0"),
        ("--config.samples.policy=longliv", "did you mean 'longlive'"),
        ("--config.samples.prompts=('a | b',)", "config.samples: wan_teacher"),
        ("--config.data.kind=world_clip", "did you mean 'world_clips'"),
        ("--config.data.dropout=1.0", "config.data.dropout=1.0"),
        ("--config.regression.forcing=teach", "forcing='teach'"),
        ("--config.optimizer.name=adam", "name='adam'"),
        ("--config.weights=/nowhere", "/nowhere"),
    ],
)
def test_bad_configs_are_refused_by_name(weights, tmp_path, capsys, wrong, named):
    assert train(weights, tmp_path / "x", wrong) == 2

    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_a_best_of_what_is_not_logged_is_refused(weights, tmp_path, capsys):
    more = ("--config.keep_best=1", "--config.best_of=critic_loss")

    assert train(weights, tmp_path / "x", *more) == 2

    assert "config.best_of='critic_loss'" in capsys.readouterr().err
