"""Trajectories of a teacher, and the regression that reads them."""

import os
import signal

import bundles
import jax.numpy as jnp
import numpy as np
import pytest
import shares

from anchor_jax import flow, processes
from anchor_jax.cli.main import main
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.shares import Unfinished
from anchor_jax.training import ode, run
from anchor_jax.training.data import sources
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.data.trajectories import Trajectories
from anchor_jax.training.ode import TrajectoryConfig
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.training.stages.regression_step import RegressionSpec

CONFIG = TrajectoryConfig(
    count=5, batch=2, frames=6, steps=8, guidance=2.0, data=DataConfig("world_prompts")
)


@pytest.fixture(scope="module")
def model():
    return bundles.load()


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    assert ode.write(_in(folder), model, 0, 1) == (5, 0)
    return folder


def _in(folder, **changes):
    return TrajectoryConfig(**{**vars(CONFIG), "out": str(folder), **changes})


def states(folder):
    stored = Trajectories(folder)
    return {number: stored.by_number(number) for number in stored.numbers}


@pytest.mark.parametrize(
    "name",
    [
        *("train_teacher", "train_teacher:21", "train_causal", "train_causal:guided"),
        *("train_ode", "train_ode:tiny", "train_dmd", "train_dmd:tiny"),
        *("train_streaming", "train_streaming:tiny", "train_finetune"),
    ],
)
def test_shipped_trainings_are_read(name):
    read = run.read_config(load_config(name))

    assert read.out.startswith("runs/")
    assert read.stage in build.STAGES


@pytest.mark.parametrize(("name", "guidance"), [("", 2.5), (":paper", 6.0)])
def test_shipped_trajectories_are_of_the_papers_levels(name, guidance):
    read = ode.read_config(load_config(f"trajectories{name}"))
    levels = flow.even_levels(read.steps, read.shift)

    stored = levels.timestep[:: read.steps // ode.STORED]
    np.testing.assert_allclose(stored, [1000, 937.5, 833.333, 625], rtol=1e-6)
    assert read.guidance == guidance


@pytest.mark.slow
def test_states_are_those_of_the_guided_flow(model, written):
    """Euler's steps written out, two to a quarter."""
    example = states(written)[3]
    setup = ode.make_setup(CONFIG, model)
    embedding = model.encode_prompts([example["prompt"], ""])
    stage = RegressionSpec(model=model.model)
    x = jnp.asarray(example["states"][0], jnp.float32)[None]
    sigma = [*setup.levels.sigma, 0.0]
    for number, (now, after) in enumerate(zip(sigma, sigma[1:], strict=False)):
        if number % 2 == 0:
            want = example["states"][number // 2]
            np.testing.assert_allclose(x[0], want, atol=2e-2)
        batch = {"embedding": embedding[:, None]}
        both = jnp.concatenate([x, x])
        levels = jnp.full((2, 6), now)
        c, u = stage.predict(model.variables, batch, both, levels)
        x = x + (after - now) * (u + 2.0 * (c - u))[None]
    np.testing.assert_allclose(x[0], example["states"][-1], atol=2e-2)


@pytest.mark.slow
def test_processes_share_the_work_and_change_no_bit(model, written, tmp_path):
    assert ode.write(_in(tmp_path), model, 1, 2) == (2, 0)
    assert ode.write(_in(tmp_path), model, 0, 2) == (3, 0)

    alone, shared = states(written), states(tmp_path)
    assert sorted(shared) == [0, 1, 2, 3, 4]
    for number, example in alone.items():
        assert shared[number]["prompt"] == example["prompt"]
        np.testing.assert_array_equal(shared[number]["states"], example["states"])


def test_what_is_there_is_not_made_again_and_other_inputs_are_refused(model, written):
    assert ode.write(_in(written), model, 0, 1) == (0, 0)
    with pytest.raises(UserError, match="other trajectories|trajectories of"):
        ode.write(_in(written, guidance=3.0), model, 0, 1)


def test_a_stopped_process_keeps_what_it_finished(
    model, written, tmp_path, monkeypatch
):
    made = ode.trajectories

    def stop(bundle, setup, texts, numbers, *others):
        if 4 in numbers:
            raise KeyboardInterrupt
        return made(bundle, setup, texts, numbers, *others)

    monkeypatch.setattr(ode, "trajectories", stop)
    with pytest.raises(KeyboardInterrupt):
        ode.write(_in(tmp_path), model, 0, 1)
    assert sorted(states(tmp_path)) == [0, 1, 2, 3]

    monkeypatch.undo()
    assert ode.write(_in(tmp_path), model, 0, 1) == (1, 0)
    np.testing.assert_array_equal(
        states(tmp_path)[4]["states"], states(written)[4]["states"]
    )


def test_a_process_that_must_stop_ends_after_the_current_clips(
    model, written, tmp_path, monkeypatch
):
    made = ode.trajectories

    def ask(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return made(*arguments)

    monkeypatch.setattr(ode, "trajectories", ask)

    assert ode.write(_in(tmp_path), model, 0, 1) == (2, 3)
    assert sorted(states(tmp_path)) == [0, 1]


def test_a_stopped_command_has_the_status_of_an_interrupt(
    tmp_path, monkeypatch, capsys
):
    bundles.save(tmp_path / "weights")
    monkeypatch.setattr(ode, "write", lambda *given: (1, 2))
    command = ["trajectories", f"--config.weights={tmp_path / 'weights'}"]

    assert main(command) == 130
    assert "Stopped; 2 are missing" in capsys.readouterr().err


def regression(folder, **changes):
    section = RegressionConfig(forcing="noise", endpoints=True, block=3, blocks=2)
    data = DataConfig("trajectories", path=str(folder))
    fields = {"stage": "regression", "batch": 3, "regression": section, "data": data}
    return TrainConfig(**{**fields, **changes})


def test_batches_hold_each_block_at_a_stored_level(model, written, tmp_path):
    draw = build.open_source(regression(written), model, tmp_path)
    batch, again = draw(4), draw(4)

    sigma = [1, 0.9375, 5 / 6, 0.625, 0]
    assert batch["sigma"].shape == (3, 2)
    for row in range(3):
        (example,) = [
            one["states"]
            for one in states(written).values()
            if _is(one["states"][-1], batch["target"][row])
        ]
        for block in range(2):
            away = np.abs(np.subtract(sigma, batch["sigma"][row, block]))
            part = slice(3 * block, 3 * block + 3)
            assert away.min() < 1e-6
            assert _is(example[away.argmin(), part], batch["noisy"][row, part])
    for name, value in batch.items():
        np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(draw(5)["noisy"], batch["noisy"])


def test_a_lost_process_of_a_job_leaves_its_share_missing(model, tmp_path, monkeypatch):
    for name, value in (("is_joined", True), ("count", 2), ("key", "key")):
        monkeypatch.setattr(processes, name, lambda value=value: value)
    monkeypatch.setattr(processes, "part", lambda seconds: None)
    monkeypatch.setattr("anchor_jax.shares.check_shared", lambda *given: None)
    monkeypatch.setattr(processes, "index", lambda: 1)

    with pytest.raises(Unfinished, match="3 of 5 trajectories are missing, because of"):
        ode.write(_in(tmp_path), model, 1, 2)
    assert sorted(states(tmp_path)) == [1, 3]

    monkeypatch.setattr(processes, "index", lambda: 0)
    assert ode.write(_in(tmp_path), model, 0, 2) == (3, 0)
    assert sorted(states(tmp_path)) == [0, 1, 2, 3, 4]


def test_processes_share_a_batch(model, written, tmp_path):
    config = regression(written, batch=4)

    shares.assert_shared(
        lambda share: build.open_source(config, model, tmp_path, share)(4)
    )


def _is(a, b):
    return np.array_equal(np.asarray(a, np.float32), b)


@pytest.mark.slow
def test_the_loss_leaves_clean_blocks_out(model, written, tmp_path):
    batch = build.open_source(regression(written), model, tmp_path)(4)
    stage = RegressionSpec(
        model=model.model, blocks=(3, 3), forcing="noise", endpoints=True
    )
    sigma = np.repeat(batch["sigma"], 3, axis=1)
    predicted = stage.predict(model.variables, batch, batch["noisy"], sigma)
    x0 = flow.x0_from_flow(predicted, batch["noisy"], sigma)
    error = np.square(x0 - batch["target"]).mean(axis=(2, 3, 4))

    loss = stage.loss(model.variables, batch, None)

    np.testing.assert_allclose(loss, error[sigma > 0].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig("trajectories")}, "data.path is missing"),
        ({"data": DataConfig("prompts")}, "kinds for stage regression"),
        ({"data": DataConfig("world_clips")}, "endpoints are those of"),
        ({"regression": RegressionConfig("noise", True, 3, 7)}, "expected \\(21, "),
    ],
)
def test_what_does_not_go_together_is_named(model, written, tmp_path, changes, message):
    given = {"data": DataConfig("trajectories", path=str(written))} | changes
    with pytest.raises(UserError, match=message):
        build.open_source(regression(written, **given), model, tmp_path)


def test_prompts_come_from_two_files(model, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(f"{bundles.RED}\n{bundles.BLUE}\n")
    second.write_text(f"{bundles.GREEN}\n{bundles.RED}\n")
    data = DataConfig("prompts", path=str(first), switch_path=str(second))
    config = TrainConfig(batch=2, data=data)

    batch = build.open_source(config, model, tmp_path / "run")(0)

    pairs = {(bundles.RED, bundles.GREEN), (bundles.BLUE, bundles.RED)}
    found = set()
    for pair in pairs:
        one, two = np.asarray(model.encode_prompts(list(pair)))
        for row in range(2):
            if np.allclose(batch["prompt"][row], one, atol=1e-6):
                np.testing.assert_allclose(batch["switch"][row], two, atol=1e-6)
                found.add(pair)
    assert found == pairs
    texts = sources.open_texts(data, tmp_path / "run")
    assert {texts(2), texts(3)} == pairs


@pytest.mark.slow
def test_the_commands_run(tmp_path, capsys):
    bundles.save(tmp_path / "weights")
    out = tmp_path / "stored"
    command = ["trajectories", f"--config.weights={tmp_path / 'weights'}"]
    command += [f"--config.out={out}", "--config.count=2", "--config.batch=2"]
    assert main([*command, "--config.frames=6", "--config.steps=4"]) == 0
    assert main([*command, "--config.steps=6"]) == 2

    train = ["train", "--config=train_ode", f"--config.weights={tmp_path / 'weights'}"]
    train += [f"--config.data.path={out}", f"--config.out={tmp_path / 'run'}"]
    train += ["--config.steps=2", "--config.batch=4", "--config.regression.blocks=2"]
    assert main([*train, "--config.sample_every=0"]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "2").is_dir()
