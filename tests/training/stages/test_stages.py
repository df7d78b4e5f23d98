"""Configs of stages: what they report, and what is refused."""

import dataclasses

import bundles
import jax
import pytest
from stage_runs import DISTILL, GUIDED, REGRESS, clips, embeddings, on_one_device

from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.training import run as run_command
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.run import read_config
from anchor_jax.training.schedule import SequencePlan
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import LoraConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.wan import lora


@pytest.mark.slow
def test_unknown_words_and_cut_prompts_are_reported(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    monkeypatch.setattr(build, "open_source", lambda *given: embeddings)
    weights, printed = tmp_path / "weights", []
    bundles.save(weights)
    lines = f"{bundles.RED} xyzzy\n{bundles.BLUE}\n{bundles.BLUE} {bundles.RED}\n"
    (tmp_path / "a.txt").write_text(lines)
    config = dataclasses.replace(
        DISTILL,
        **dict.fromkeys(("weights", "teacher"), str(weights)),
        data=DataConfig("prompts", str(tmp_path / "a.txt")),
        out=str(tmp_path / "run"),
        sample_every=0,
    )

    run_command.open_training(config, printed.append).checkpoints.close()

    assert "warning: words that the model does not know: xyzzy" in printed
    (cut,) = [line for line in printed if "a.txt, line 3" in line]
    assert "6 of 9 tokens are read" in cut


@pytest.mark.parametrize(("every", "is_told"), [(2, True), (1, False)])
def test_chunks_that_the_generator_never_learns_from_are_reported(
    every, is_told, tmp_path, monkeypatch
):
    on_one_device(monkeypatch)
    monkeypatch.setattr(build, "open_source", lambda *given: embeddings)
    weights, printed = tmp_path / "weights", []
    bundles.save(weights)
    section = dataclasses.replace(DISTILL.distillation, every=every)
    config = dataclasses.replace(
        DISTILL,
        **dict.fromkeys(("weights", "teacher"), str(weights)),
        distillation=section,
        out=str(tmp_path / "run"),
        sample_every=0,
    )
    run_command.open_training(config, printed.append).checkpoints.close()

    if not is_told:
        assert not printed
        return
    (line,) = printed
    chunks = "only on the chunks that start at frames 0, never on those that start at"
    assert f"{chunks} 6, 9" in line
    assert "distillation.every + 1 = 3" in line


@pytest.mark.parametrize("name", ["train_dmd", "train_streaming"])
@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_shipped_configs_learn_from_every_chunk(name, scale):
    section = read_config(load_config(f"{name}:{scale}")).distillation
    plan = SequencePlan(section.frames, 3, section.length, section.switches)
    assert len(plan.visited(section.every)) == len(plan.chunks(None))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stage": "distil"}, "config.stage='distil'"),
        ({"rules": "papers"}, "config.rules='papers'"),
        ({"batch": 3, "mesh": (2, 2, 1, 1)}, "config.batch=3"),
        (
            {"batch": 8, "mesh": (2, 2, 1, 1), "microbatches": 3},
            "config.microbatches=3 does not divide the 2 videos .* from 1, 2, or a",
        ),
        ({"mesh": (3, 1, 1, 1)}, "config.mesh"),
        (
            {"distillation": DistillationConfig("self_forcing", length=39)},
            "frames=21, length=39: the policy ends or restarts after 21 latent",
        ),
        (
            {"distillation": DistillationConfig("causvid", length=39)},
            "frames=21, length=39: the policy ends or restarts after 21 latent",
        ),
        (
            {"stage": "regression", "regression": RegressionConfig(window=12)},
            "config.regression: window=12",
        ),
        (
            {
                "stage": "regression",
                "regression": RegressionConfig("noise", True, guidance=2.5),
            },
            "config.regression: guidance needs a flow target",
        ),
        (
            {
                "stage": "regression",
                "regression": RegressionConfig(text=True, guidance=2.5),
            },
            "config.regression: guidance needs a flow target",
        ),
    ],
)
def test_incompatible_configs_are_refused(wrong, named):
    config = dataclasses.replace(DISTILL, **wrong)
    with pytest.raises(UserError, match=named):
        build.prepare(config, bundles.load(), embeddings, bundles.load())


def test_the_rank_of_updates_is_that_of_the_weights():
    bundle = bundles.load()
    updates = lora.init(bundle.variables["params"], 3, jax.random.key(0))
    variables = {**bundle.variables, "lora": updates}
    bundle = dataclasses.replace(bundle, load_variables=lambda: variables)
    config = dataclasses.replace(REGRESS, lora=LoraConfig(rank=2))

    with pytest.raises(UserError, match="config.lora.rank=2: .* updates of rank 3"):
        build.prepare(config, bundle, clips)


@pytest.mark.parametrize("field", ["latent_channels", "text_dim", "text_len"])
@pytest.mark.parametrize("name", ["teacher", "critic"])
def test_networks_of_other_prompts_or_latents_are_refused(name, field):
    bundle = bundles.load()
    model = dataclasses.replace(bundle.model, **{field: 5})
    given = {"teacher": bundle, name: dataclasses.replace(bundle, model=model)}
    config = dataclasses.replace(DISTILL, mesh=(4, 1, 1, 1))

    with pytest.raises(UserError, match=f"config.{name}: its {field} is 5"):
        build.prepare(config, bundle, embeddings, **given)


@pytest.mark.slow
@pytest.mark.parametrize("config", [DISTILL, GUIDED], ids=["distill", "guided"])
def test_stages_with_a_teacher_need_it(config):
    config = dataclasses.replace(config, mesh=(4, 1, 1, 1))
    with pytest.raises(UserError, match="config.teacher is missing"):
        build.prepare(config, bundles.load(), embeddings)
