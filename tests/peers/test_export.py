"""Exports of ours, loaded by diffusers and transformers without a complaint."""

import json
import shutil
import warnings

import diffusers
import peer_models as peers
import pytest
import torch
import transformers

from anchor_jax.porting.export import export

CLASSES = {
    "transformer": diffusers.WanTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "text_encoder": transformers.UMT5EncoderModel,
}
PROMPT = "a red fox sings in the snow"


@pytest.fixture(scope="module")
def back(ported, tmp_path_factory):
    """An export in shards of 30,000 bytes."""
    folder = tmp_path_factory.mktemp("export") / "back"
    assert export(ported, folder, "diffusers", shard_bytes=30_000) == ()
    return folder


def settings(scheduler):
    return {name: value for name, value in scheduler.config.items() if name[0] != "_"}


@pytest.mark.parametrize("part", CLASSES)
def test_each_part_is_loaded_strictly(back, pipeline, part, complaints):
    with warnings.catch_warnings(action="error"):
        model, found = CLASSES[part].from_pretrained(
            back / part, output_loading_info=True
        )

    assert not any(found.values()), found
    assert complaints() == []
    indices = [*(back / part).glob("*.safetensors.index.json")]
    assert len(indices) == (part != "text_encoder")
    expected = getattr(pipeline, part).state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


def test_the_pipeline_is_loaded_whole(back, pipeline, complaints):
    with warnings.catch_warnings(action="error"):
        loaded = diffusers.WanPipeline.from_pretrained(back)

    assert complaints() == []
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert settings(loaded.scheduler) == settings(pipeline.scheduler)
    ids = [pipe.tokenizer(PROMPT).input_ids for pipe in (loaded, pipeline)]
    assert ids[0] == ids[1]
    video = peers.draw(1, 2, 4, 4, 16), 700.0, peers.draw(1, 512, 16, seed=1)
    first = peers.predict(loaded.transformer, *video)
    second = peers.predict(pipeline.transformer, *video)
    peers.assert_close(first, second)


def test_a_source_keeps_its_own_scheduler_and_tokenizer(published, back):
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        first, second = (json.loads((x / name).read_text()) for x in (published, back))
        assert first == second


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def bare(request, pipeline, ported, tmp_path):
    """A checkpoint whose tokenizer is one file, and ids of the prompt."""
    folder = tmp_path / "ported"
    shutil.copytree(ported, folder)
    home = folder / "tokenizer"
    (home / "tokenizer_config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").unlink()
    if request.param == "tokenizer.json":
        return folder, pipeline.tokenizer(PROMPT).input_ids
    words = peers.sentencepiece_model()
    (home / "tokenizer.json").unlink()
    (home / "spiece.model").write_bytes(words.content)
    ids, mask = words.encode([PROMPT])
    return folder, ids[0, : mask.sum()].tolist()


def test_what_a_source_lacks_is_made(bare, pipeline, tmp_path, complaints):
    weights, ids = bare

    export(weights, tmp_path / "back", "diffusers")
    export(weights, tmp_path / "official", "wan")

    loaded = diffusers.WanPipeline.from_pretrained(tmp_path / "back")
    place = tmp_path / "official" / "google" / "umt5-xxl"
    for made in (loaded.tokenizer, transformers.AutoTokenizer.from_pretrained(place)):
        assert made(PROMPT).input_ids == ids
        assert (made.pad_token_id, made.eos_token_id, made.unk_token_id) == (0, 1, 2)
        assert made.model_max_length == peers.TEXT_LEN
        assert len(made) == len(pipeline.tokenizer)
    assert settings(loaded.scheduler) == settings(peers.scheduler())
    assert complaints() == []
