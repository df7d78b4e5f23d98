import numpy as np
import pytest

from anchor_jax.tiny_world import scene
from anchor_jax.tiny_world.scene import Attributes

RED = Attributes("red", "square", "right", "black")


def test_splits_are_disjoint_and_complete():
    held, seen = scene.all_attributes(True), scene.all_attributes(False)
    assert len(set(held) | set(seen)) == 240
    assert not set(held) & set(seen)
    assert len({(one.color, one.shape, one.motion) for one in held}) == 12


def test_every_word_is_seen_in_training():
    rng = np.random.default_rng(0)
    used = set()
    for one in scene.all_attributes(False):
        for _ in range(8):
            used.update(scene.words(scene.caption(one, rng)))
    assert used == set(scene.vocabulary())


@pytest.mark.parametrize("held_out", [False, True])
def test_sample_stays_in_its_split(held_out):
    rng = np.random.default_rng(0)
    drawn = [scene.sample_attributes(rng, held_out) for _ in range(100)]
    assert all(scene.is_held_out(one) == held_out for one in drawn)


def test_captions_parse_back():
    rng = np.random.default_rng(0)
    for one in scene.all_attributes(False) + scene.all_attributes(True):
        assert scene.parse_caption(scene.caption(one)) == one
        assert scene.parse_caption(scene.caption(one, rng)) == one
    assert scene.caption(RED) == "a red square moves right on a black background"


@pytest.mark.parametrize(
    "text",
    [
        "a red square moves left",
        "a red blue square moves left on a black background",
        "a purple square moves left on a black background",
        "",
    ],
)
def test_captions_outside_the_world(text):
    assert scene.parse_caption(text) is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose one of"):
        Attributes("pink", "square", "left", "black")


def test_frame_counts():
    assert [scene.latent_to_pixel_frames(n) for n in (1, 5, 11)] == [1, 17, 41]
    lengths = scene.segment_pixel_frames((3, 6, 2))
    assert lengths == (9, 24, 8)
    assert sum(lengths) == scene.latent_to_pixel_frames(11)
    with pytest.raises(ValueError, match="latent_lengths"):
        scene.segment_pixel_frames((3, 0))


@pytest.mark.parametrize("shape", scene.SHAPES)
@pytest.mark.parametrize("motion", scene.MOTIONS)
def test_motion_is_four_pixels_a_frame_on_a_torus(shape, motion):
    one = Attributes("green", shape, motion, "gray")
    video = scene.render([(one, 41)], (60.3, 2.7), 13.0)
    x, y = (4 * part for part in scene.MOTIONS[motion])
    for number in (1, 7, 40):
        moved = np.roll(video[0], (number * y, number * x), axis=(0, 1))
        np.testing.assert_array_equal(video[number], moved)


def test_the_object_is_always_whole():
    one = Attributes("red", "ring", "up", "black")
    areas = (scene.render([(one, 33)], (63.9, 0.1), 12.0)[..., 0] > 117).sum((1, 2))
    assert np.ptp(areas) == 0


def test_shapes_differ_and_the_ring_has_a_hole():
    center = np.array([[32.0, 32.0]])
    masks = [scene.coverage(name, center, 13.0)[0] > 0.5 for name in scene.SHAPES]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert (mask & other).sum() < 0.65 * (mask | other).sum()
    assert [bool(mask[32, 32]) for mask in masks] == [True, True, False]


def test_edges_are_soft():
    values = np.unique(scene.coverage("square", np.array([[32.3, 32.6]]), 12.5))
    assert values[0] == 0 and values[-1] == 1 and len(values) > 2


def test_segments_continue_the_track():
    turned = Attributes("blue", "ring", "down", "white")
    segments = [(RED, 9), (turned, 8)]
    steps = scene.wrap(np.diff(scene.centers(segments, (50.0, 10.0)), axis=0))
    np.testing.assert_allclose(steps[:8], np.tile([4, 0], (8, 1)))
    np.testing.assert_allclose(steps[8:], np.tile([0, 4], (8, 1)))
    video = scene.render(segments, (50.0, 10.0), 12.0)
    np.testing.assert_array_equal(video[:9], scene.render(segments[:1], (50, 10), 12))
    assert tuple(video[8, 40, 32]) == scene.BACKGROUNDS["black"]
    assert tuple(video[9, 40, 32]) == scene.BACKGROUNDS["white"]


@pytest.mark.parametrize("kind", scene.KINDS)
def test_switch_changes_exactly_one(kind):
    rng = np.random.default_rng(0)
    for _ in range(20):
        before = scene.sample_attributes(rng, False)
        after = scene.switch_attributes(rng, before, kind, held_out=False)
        assert scene.changed(before, after) == (kind,)
        assert not scene.is_held_out(after)


def test_switch_of_any_kind_changes_several():
    rng = np.random.default_rng(0)
    drawn = [scene.switch_attributes(rng, RED, "any") for _ in range(20)]
    assert all(len(scene.changed(RED, one)) >= 2 for one in drawn)


def test_switch_refuses_what_does_not_exist():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="choose one of"):
        scene.switch_attributes(rng, RED, "size")
    held = scene.all_attributes(True)[0]
    with pytest.raises(ValueError, match="held_out=None"):
        scene.switch_attributes(rng, held, "color", held_out=True)


def test_draws_follow_the_generator():
    tracks = [
        scene.sample_track(np.random.default_rng(seed), [(RED, 5)])
        for seed in (3, 3, 4)
    ]
    assert tracks[0] == tracks[1] != tracks[2]
    assert tracks[0].render().shape == (5, 64, 64, 3)
