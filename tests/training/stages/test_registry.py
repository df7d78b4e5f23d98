"""The table of stages: what each one promises to the rest of the package."""

import dataclasses
import subprocess
import sys
import types

import jax
import pytest

from anchor_jax import experiment
from anchor_jax.errors import UserError
from anchor_jax.training import run
from anchor_jax.training.data.kinds import ClipKind, PromptKind
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import CompiledStage, StageKind
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.registry import STAGES


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_a_section_and_describes_itself(name):
    kind, config = STAGES[name], TrainConfig(stage=name)
    model = types.SimpleNamespace(
        latent_channels=16, text_len=8, text_dim=4, dtype="float32"
    )
    grid = types.SimpleNamespace(height=2, width=3)

    shapes = kind.batch_shapes(config, types.SimpleNamespace(model=model, grid=grid))

    sections = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    assert (
        sections[name] is kind.section and type(getattr(config, name)) is sections[name]
    )
    assert kind.numbers and all(field.startswith(f"{name}.") for field in kind.least)
    assert "latent frames" in kind.describe_frames(config)
    assert all(isinstance(one, jax.ShapeDtypeStruct) for one in shapes.values())
    method = kind.method(dataclasses.asdict(config))
    assert method == experiment.trained_method(dataclasses.asdict(config))


DOMAIN = """
from anchor_jax import tiny_world

place = "anchor_jax.training.stages.regression:REGRESSION"
tiny_world.PARTS["stages"] = {"again": place}

from anchor_jax.training.stages import build, regression

assert build.TrainConfig().again == regression.RegressionConfig()
config = build.TrainConfig(
    stage="again", again=regression.RegressionConfig(block=3, blocks=2)
)
kind = build.find_stage(config)
assert kind is regression.REGRESSION
assert kind.describe_frames(config) == "6 latent frames"
"""


def test_a_stage_cannot_have_the_name_of_a_shared_field():
    with pytest.raises(ValueError, match="stage 'data': every training has a field"):
        build.train_config({**STAGES, "data": STAGES["regression"]})
    assert "regression: the section of the stage" in TrainConfig.__doc__


@pytest.mark.slow
def test_a_domain_adds_a_stage_with_its_section():
    done = subprocess.run(
        [sys.executable, "-c", DOMAIN], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_weights_of_an_unknown_stage_name_the_known_ones():
    training = {**dataclasses.asdict(TrainConfig()), "stage": "distilation"}

    with pytest.raises(UserError, match="did you mean 'distillation'"):
        experiment.trained_method(training)


def test_a_steps_time_is_the_mean_over_a_cycle(monkeypatch):
    seconds, now, advanced = {"both": 7.0, "critic": 1.0}, [0.0], []

    class Compiled:
        cycle = 4

        def updates(self, step):
            return "critic" if step % 4 else "both"

        def settle(self, state, cursor):
            return "settled", cursor

        def advance(self, state, cursor, step):
            advanced.append((state, step))
            # The first step of each kind compiles.
            now[0] += seconds[self.updates(step)] + 100 * (len(advanced) <= 2)
            return state, cursor, ()

    prepared = types.SimpleNamespace(compiled=Compiled(), state="started")
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jax, "block_until_ready", lambda x: x)
    training = run.TrainingRun(TrainConfig(), None, prepared, None, print)

    assert training.seconds_per_step() == pytest.approx((7 + 3 * 1) / 4)
    assert {state for state, _ in advanced} == {"settled"}
    assert sorted(step for _, step in advanced) == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", [StageKind, CompiledStage, PromptKind, ClipKind])
def test_a_part_without_its_methods_cannot_be_made(kind):
    class Unfinished(kind):
        pass

    with pytest.raises(TypeError, match="abstract method"):
        Unfinished()
