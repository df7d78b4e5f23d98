"""Where batches come from; stored trajectories are in test_ode."""

import dataclasses
import hashlib
import itertools
import json

import bundles
import numpy as np
import pytest
import shares
import tensorflow_datasets as tfds

from anchor_jax.errors import UserError
from anchor_jax.tiny_world import clips as world_clips
from anchor_jax.tiny_world import windows as world_windows
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "blocks"), [("world_clips", 2), ("world_windows", 5)])
def test_prompts_are_embedded_unless_the_text_encoder_is_trained(
    kind, blocks, tmp_path
):
    model = bundles.load()

    def draw(text: bool):
        section = RegressionConfig(blocks=blocks, text=text)
        data = DataConfig(kind, size=6)
        config = TrainConfig("regression", batch=2, regression=section, data=data)
        return build.open_source(config, model, tmp_path)(3)

    given, embedded = draw(True), draw(False)

    ids, mask = given.pop("ids"), given.pop("mask")
    embedding = embedded.pop("embedding")
    assert embedding.shape[:2] == ids.shape[:2]
    for prompt in range(ids.shape[1]):
        expected = model.encode_prompts.encode_ids(ids[:, prompt], mask[:, prompt])
        np.testing.assert_allclose(embedding[:, prompt], expected, atol=1e-6)
    assert given.keys() == embedded.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(embedded[name], value)


def test_guidance_uses_the_negative_prompt(tmp_path):
    model = bundles.load()
    section = RegressionConfig(blocks=2, guidance=2.5, negative_prompt=bundles.BLUE)
    data = DataConfig("world_clips", size=6)
    config = TrainConfig("regression", batch=4, regression=section, data=data)

    draw = build.open_source(config, model, tmp_path)

    expected = np.asarray(model.encode_prompts([bundles.BLUE] * 4))
    for number in (0, 3):
        np.testing.assert_array_equal(draw(number)["negative"], expected)
    shares.assert_shared(
        lambda share: build.open_source(config, model, tmp_path, share)(4)
    )


@pytest.mark.parametrize(
    "stage, kind, blocks",
    [
        ("regression", "world_clips", 2),
        ("regression", "world_windows", 5),
        ("distillation", "world_prompts", 5),
    ],
)
def test_processes_share_a_batch(stage, kind, blocks, tmp_path):
    model = bundles.load()
    section = RegressionConfig(blocks=blocks, text=True)
    data = DataConfig(kind, size=6)
    config = TrainConfig(stage, batch=4, regression=section, data=data)

    shares.assert_shared(
        lambda share: build.open_source(config, model, tmp_path, share)(4)
    )


@pytest.mark.parametrize(
    ("kind", "blocks", "module", "make"),
    [
        ("world_clips", 2, world_clips, "make_clips"),
        ("world_windows", 5, world_windows, "make_windows"),
    ],
)
def test_a_world_is_made_once(kind, blocks, module, make, tmp_path, monkeypatch):
    model = bundles.load()
    section = RegressionConfig(blocks=blocks, text=True)

    def draw(seed):
        data = DataConfig(kind, size=9, seed=seed)
        config = TrainConfig("regression", batch=4, regression=section, data=data)
        return build.open_source(config, model, tmp_path)(5)

    first, other = draw(0), draw(1)
    monkeypatch.setattr(module, make, lambda *given: pytest.fail("made again"))
    again = draw(0)

    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    assert (other["latents"] != first["latents"]).any()
    assert len(list((tmp_path / "data").glob("clips-*"))) == 2


@pytest.mark.parametrize(
    ("kind", "frames", "total", "scenes"),
    [
        ("world_clips", 6, 649.83, "e641eb3972929874"),
        ("world_windows", 15, 2006.46, "36a72154a018568e"),
    ],
)
def test_a_seed_makes_the_same_world_in_every_version(
    kind, frames, total, scenes, tmp_path
):
    """What another version makes of a seed needs another `world_data.VERSION`."""
    model = bundles.load()
    section = RegressionConfig(blocks=frames // 3, text=True)
    data = DataConfig(kind, size=6 if kind == "world_clips" else 9)
    config = TrainConfig("regression", batch=4, regression=section, data=data)
    build.open_source(config, model, tmp_path)
    (folder,) = (tmp_path / "data").glob("clips-*")
    (place,) = (folder / "clips").iterdir()
    kept = list(tfds.builder_from_directory(str(place)).as_data_source("train"))

    columns = zip(*(one["captions"] for one in kept), strict=True)
    text = b"\n".join(itertools.chain.from_iterable(columns))
    latents = np.stack([one["latents"] for one in kept]).astype(np.float64)
    assert hashlib.sha256(text).hexdigest()[:16] == scenes
    np.testing.assert_allclose(np.abs(latents).sum(), total, atol=0.01)


def test_switches_need_prompts_that_change(tmp_path):
    lines = [{"prompt": text, "switch": text} for text in ("a", "b")]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    section = DistillationConfig(length=42, switches=(21,))
    config = TrainConfig(
        batch=2, distillation=section, data=DataConfig("prompts", str(path))
    )

    with pytest.raises(UserError, match="every prompt equals its switch prompt"):
        build.open_source(config, bundles.load(), tmp_path)
    without = dataclasses.replace(config, distillation=DistillationConfig())
    assert build.open_source(without, bundles.load(), tmp_path)(0)["prompt"].any()
