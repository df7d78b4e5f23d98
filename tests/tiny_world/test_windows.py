"""Clips and windows with events show what their captions say, where they say it."""

import numpy as np
import pytest

from anchor_jax.tiny_world import clips as world_clips
from anchor_jax.tiny_world import codec as codecs
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world import windows as world_windows
from anchor_jax.tiny_world.windows import BLOCKS, POSITIONS
from anchor_jax.tiny_world.words import train_tokenizer
from anchor_jax.wan.tokenizer import SentencePieceTokenizer


@pytest.fixture(scope="module")
def codec():
    return world_data.fit_codec(0, 16)


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(train_tokenizer(world_clips.captions()), 16)


@pytest.fixture(scope="module")
def clips(codec):
    return world_clips.gather(world_clips.make_clips(codec, 0, 48, frames=6))


@pytest.fixture(scope="module")
def windows(codec):
    return world_windows.sample_windows(codec, seed=0, count=90)


def pixels(codec, latents):
    decoded = codecs.decode(codec, latents[None].astype(np.float32), first=False)
    return np.asarray(decoded)[0]


def is_empty(codec, latents):
    """Whether only a background is seen, of latent frames."""
    return pixels(codec, latents).std(axis=(1, 2)).max() < 0.05


def background(codec, latents):
    video = codecs.to_bytes(pixels(codec, latents)).reshape(-1, 3)
    shown = np.median(video, axis=0)
    far = {
        name: np.abs(shown - value).max() for name, value in scene.BACKGROUNDS.items()
    }
    return min(far, key=far.get)


@pytest.mark.slow
def test_every_word_of_the_world_has_a_token(tokenizer):
    ids, mask = tokenizer.encode(world_clips.captions())

    assert not np.any(ids == 2)
    assert mask.sum(axis=1).max() <= 16
    assert set(" ".join(world_clips.captions()).replace(",", "").split()) >= set(
        events.vocabulary()
    )


@pytest.mark.slow
def test_clips_end_as_their_captions_say(codec, clips):
    hidden = [one.hidden for one in clips.scenes]
    assert any(hidden) and not all(hidden)
    assert any(one.second for one in clips.scenes)
    assert any(not one.named for one in clips.scenes)
    for latents, shown in zip(clips.latents, clips.scenes, strict=True):
        assert is_empty(codec, latents[-2:]) == shown.hidden
        assert background(codec, latents[-2:]) == shown.first.background
        assert not scene.is_held_out(shown.first)


@pytest.mark.slow
def test_some_clips_begin_before_their_event(codec, clips):
    """A hidden scene whose first block still shows its object."""
    seen = [
        not is_empty(codec, latents[:3])
        for latents, shown in zip(clips.latents, clips.scenes, strict=True)
        if shown.hidden
    ]
    assert any(seen) and not all(seen)


@pytest.mark.slow
def test_windows_hold_sink_past_and_present(codec, windows):
    for latents, first, now in zip(
        windows.latents, windows.first, windows.now, strict=True
    ):
        assert background(codec, latents[:3]) == first.first.background
        assert background(codec, latents[-3:]) == now.first.background
        assert is_empty(codec, latents[-3:]) == now.hidden
        assert not is_empty(codec, latents[:3])


def test_what_returns_was_hidden_for_longer_than_the_local_window(codec, windows):
    found = 0
    for row in range(len(windows.layout)):
        now, since = windows.now[row], windows.since[row]
        if now.named or windows.layout[row] != 1 or since < 2:
            continue
        found += 1
        local = windows.latents[row][3 : 3 * since]
        assert is_empty(codec, local)
        # Only the sink can know what returns.
        assert windows.first[row].first.color == now.first.color
    assert found


def test_batches_are_functions_of_their_number(windows, tokenizer):
    draw = world_windows.WindowBatches(windows, tokenizer, 4, seed=0, dropout=0.0)

    for number in range(3):
        one, again = draw(number), draw(number)
        for name in one:
            np.testing.assert_array_equal(one[name], again[name])
        assert tuple(one["position"]) == POSITIONS[number]
    assert np.any(draw(3)["latents"] != draw(0)["latents"])


def test_losses_are_of_blocks_under_the_prompt_in_force(windows, tokenizer):
    draw = world_windows.WindowBatches(windows, tokenizer, 64, seed=0, dropout=0.0)

    for number in range(3):
        batch = draw(number)
        which, weight = batch["which"], batch["weight"]
        assert which.shape == weight.shape == (64, BLOCKS)
        assert not np.any(which[:, 0]) and np.all(weight[:, 0] == 1)
        changed = which[:, 1] == 1
        assert np.all(which[changed, 1:] == 1) and np.all(weight[:, -1] == 1)
        if number == 2:
            assert not np.any(weight[:, 1])
        else:
            assert np.all(weight[~changed] == 1)


def test_left_out_captions_are_empty(clips, windows, tokenizer):
    (empty,), _ = tokenizer.encode([""])
    for draw in (
        world_clips.ClipBatches(clips, tokenizer, 200, 6, 0, dropout=0.25),
        world_windows.WindowBatches(windows, tokenizer, 200, 0, dropout=0.25),
    ):
        share = (draw(0)["ids"] == empty).all(axis=(1, 2)).mean()
        assert 0.15 < share < 0.35
