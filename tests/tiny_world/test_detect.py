import dataclasses
import functools

import numpy as np
import pytest

from anchor_jax.tiny_world import codec, detect, scene, score

ONE = scene.Attributes("blue", "triangle", "left", "white")


@functools.cache
def fitted() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    videos = [
        scene.sample_track(rng, [(scene.sample_attributes(rng, False), 17)]).render()
        for _ in range(100)
    ]
    pixels = codec.with_first_repeated(codec.to_unit(np.stack(videos)))
    return codec.fit_codec(codec.pixel_blocks(pixels), 16)


def roundtrip(frames: np.ndarray) -> np.ndarray:
    latents = codec.encode(fitted(), codec.to_unit(frames)[None])
    return codec.to_bytes(codec.decode(fitted(), latents, first=True)[0])


def clip(attributes: scene.Attributes = ONE, frames: int = 17) -> np.ndarray:
    return scene.render([(attributes, frames)], (50.2, 20.7), 12.6)


@functools.cache
def coded_clips() -> tuple[list[np.ndarray], list[scene.Attributes]]:
    rng = np.random.default_rng(1)
    attributes = [scene.sample_attributes(rng, True) for _ in range(60)]
    videos = [
        roundtrip(scene.sample_track(rng, [(one, 17)]).render()) for one in attributes
    ]
    return videos, attributes


@pytest.mark.slow
@pytest.mark.parametrize("frames", [17, 41])
def test_rendered_clips_are_measured_right(frames):
    rng = np.random.default_rng(2)
    rates = score.ceiling(rng, lambda one: one, 20, frames, held_out=True)
    assert all(one.rate == 1 for one in rates.values()), rates


@pytest.mark.slow
def test_ceiling_through_the_codec():
    rates = score.score(*coded_clips())
    for name in (*scene.KINDS, "shape_iou", "steady", "all"):
        assert rates[name].rate >= 0.98, (name, rates[name])


@pytest.mark.slow
def test_longer_ceiling_through_the_codec():
    rates = score.ceiling(np.random.default_rng(3), roundtrip, 20, 41, held_out=False)
    assert all(rates[kind].rate == 1 for kind in scene.KINDS), rates


@pytest.mark.slow
def test_mismatched_captions_score_at_chance():
    videos, _ = coded_clips()
    rates = score.mismatch_control(np.random.default_rng(4), videos, draws=20)
    for kind, chance in zip(scene.KINDS, (1 / 4, 1 / 3, 1 / 5, 1 / 4), strict=True):
        assert abs(rates[kind].rate - chance) < 0.05
    assert rates["all"].rate < 0.02


@pytest.mark.parametrize("kind", scene.KINDS)
def test_a_wrong_attribute_fails_alone(kind):
    other = scene.switch_attributes(np.random.default_rng(0), ONE, kind)
    found = detect.matches(detect.measure(clip()), other)
    assert [name for name in scene.KINDS if not found[name]] == [kind]
    assert not found["all"]


def test_measured_numbers():
    measured = detect.measure(clip())
    np.testing.assert_allclose(measured.displacement, (-16, 0), atol=0.05)
    assert measured.visible == 1 and measured.iou > 0.9
    assert measured.radius in (12, 13)
    assert measured.border_jumps == measured.inner_jumps == measured.seams == 0


@pytest.mark.parametrize("phase", [0, 1, 4, 7])
def test_jumps_are_found_at_the_borders_of_the_phase(phase):
    frames = clip(dataclasses.replace(ONE, motion="still"), 16)
    latent = (phase + np.arange(16) + 3) // 4
    shaken = np.where((latent % 2)[:, None, None, None], np.roll(frames, 12, 2), frames)
    measured = detect.measure(shaken, phase)
    assert measured.border_jumps == 1 and measured.inner_jumps == 0
    assert measured.motion == detect.UNCLEAR
    wrong = detect.measure(shaken, phase + 1)
    assert wrong.border_jumps == 0 and wrong.inner_jumps > 0


def test_a_late_latent_is_a_seam():
    frames = clip()
    shifted = frames.copy()
    shifted[9:13] = np.roll(frames[9:13], 8, axis=2)
    measured = detect.measure(shifted)
    assert measured.seams == 0.5
    assert measured.motion == "left"


def test_motion_inside_latents_alone_has_no_direction():
    start = clip(frames=4)
    frames = np.concatenate([start[:1], start, start, start, start])
    assert detect.measure(frames).motion not in ("left", "right", "up", "down")


def test_an_empty_clip_shows_nothing():
    frames = np.full((17, 64, 64, 3), scene.BACKGROUNDS["gray"], np.uint8)
    measured = detect.measure(frames)
    assert measured.background == "gray" and measured.visible == 0
    assert measured.color == measured.shape == measured.motion == detect.UNCLEAR
    found = detect.matches(measured, dataclasses.replace(ONE, background="gray"))
    assert [name for name, right in found.items() if right] == ["background"]


def test_noise_shows_nothing():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    measured = detect.measure(frames)
    assert measured.background == measured.shape == detect.UNCLEAR


def test_a_colour_that_changes_is_unclear():
    green = dataclasses.replace(ONE, color="green")
    frames = scene.render([(ONE, 9), (green, 8)], (50.2, 20.7), 12.6)
    assert detect.measure(frames).color == detect.UNCLEAR


def test_a_second_object_lowers_the_iou():
    frames = clip()
    red = clip(scene.Attributes("red", "triangle", "left", "white"))
    moved = np.roll(red, 30, axis=1)
    two = np.where((moved == 245).all(-1, keepdims=True), frames, moved)
    assert detect.measure(two).iou < detect.GOOD_IOU < detect.measure(frames).iou


def test_tracking_crosses_the_torus_border():
    mask = scene.coverage("triangle", np.array([[63.5, 0.5], [1.5, 62.0]]), 13) > 0.5
    moved = scene.wrap(np.diff(detect.track(mask), axis=0))[0]
    np.testing.assert_allclose(moved, (2, -2.5), atol=0.6)


def test_wrong_pixels_are_refused():
    with pytest.raises(ValueError, match="to_bytes"):
        detect.measure(np.zeros((5, 64, 64, 3), np.float32))


def test_wilson_interval():
    low, high = score.wilson_interval(40, 48)
    np.testing.assert_allclose((low, high), (0.7042, 0.9130), atol=1e-3)
    assert score.wilson_interval(20, 20)[1] == 1
    assert score.wilson_interval(0, 20)[0] == 0
    with pytest.raises(ValueError, match="n must be above 0"):
        score.wilson_interval(0, 0)
    with pytest.raises(ValueError, match="one each"):
        score.score([clip()], [])
