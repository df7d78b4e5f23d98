import dataclasses

import numpy as np
import pytest

from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world.events import Meaning, Scene
from anchor_jax.tiny_world.scene import Attributes

RED = Attributes("red", "square", "left", "black")
ONE = Scene(RED)
TWO = Scene(RED, ("blue", "ring"))
HIDDEN = Scene(RED, hidden=True)
BACK = Scene(RED, named=False)


def drawn_scripts(held_out, count=40, **kinds):
    rng = np.random.default_rng(0)
    return [events.script(rng, 8, held_out, **kinds) for _ in range(count)]


def test_captions_parse_back():
    rng = np.random.default_rng(0)
    for played in drawn_scripts(None, 80):
        for one in played:
            for text in (events.caption(one), events.caption(one, rng)):
                assert events.parse(text) == events.meaning(one), text
                assert len(scene.words(text)) <= 15
                assert set(scene.words(text)) <= set(events.vocabulary())


def test_each_kind_of_scene_has_five_captions():
    still = dataclasses.replace(RED, motion="still")
    two_still = Scene(still, ("blue", "ring"))
    rng = np.random.default_rng(0)
    for one in (ONE, TWO, HIDDEN, BACK, two_still, Scene(still, named=False)):
        texts = {events.caption(one, rng) for _ in range(60)}
        assert len(texts) == 5 and events.caption(one) in texts


@pytest.mark.parametrize(
    "one, text",
    [
        (ONE, "a red square moves left on a black background"),
        (TWO, "a red square and a blue ring move left on a black background"),
        (HIDDEN, "nothing on a black background"),
        (BACK, "it returns and moves left on a black background"),
    ],
)
def test_canonical_captions(one, text):
    assert events.caption(one) == text


def test_a_single_object_is_captioned_as_ever():
    for one in scene.all_attributes(True):
        assert events.caption(Scene(one)) == scene.caption(one)
        same = [make(np.random.default_rng(3)) for make in _captioners(one)]
        assert same[0] == same[1]
    assert set(scene.vocabulary()) < set(events.vocabulary())


def _captioners(one):
    return (
        lambda rng: events.caption(Scene(one), rng),
        lambda rng: scene.caption(one, rng),
    )


def test_what_a_caption_leaves_open_is_none():
    assert events.parse(events.caption(BACK)) == Meaning("black", "left")
    assert events.parse(events.caption(HIDDEN)) == Meaning("black")
    assert events.meaning(BACK) == events.meaning(
        Scene(dataclasses.replace(RED, color="green", shape="ring"), named=False)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "it returns on a black background",
        "it returns and moves left",
        "it returns and a red square moves left on a black background",
        "nothing moves left on a black background",
        "nothing on a red background",
        "a red square and a red ring move left on a black background",
        "a red square and a ring blue move left on a black background",
        "a red square and a ring move left on a black background",
        "a red square and a blue ring move left",
        "a red square and a purple ring move left on a black background",
    ],
)
def test_captions_outside_the_world(text):
    assert events.parse(text) is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"second": ("red", "ring")}, "first object's colour"),
        ({"second": ("pink", "ring")}, "not in the world"),
        ({"second": ("blue", "ring"), "hidden": True}, "choose one"),
        ({"second": ("blue", "ring"), "named": False}, "choose one"),
        ({"hidden": True, "named": False}, "choose one"),
    ],
)
def test_scenes_that_no_caption_says_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Scene(RED, **fields)


@pytest.mark.parametrize(
    "one, possible",
    [
        (ONE, (*scene.KINDS, "enter", "hide")),
        (TWO, (*scene.KINDS, "leave")),
        (HIDDEN, ("return",)),
        (BACK, (*scene.KINDS, "enter", "hide")),
    ],
)
def test_possible_events(one, possible):
    rng = np.random.default_rng(0)
    assert events.kinds(one) == possible
    for kind in events.EVENTS:
        if kind in possible:
            assert events.event(one, events.follow(rng, one, kind)) == kind
        else:
            with pytest.raises(ValueError, match="cannot follow"):
                events.follow(rng, one, kind)


def test_unknown_events_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="choose one of"):
        events.follow(rng, ONE, "explode")
    with pytest.raises(ValueError, match="kinds"):
        events.script(rng, 3, False, kinds=("explode",))
    with pytest.raises(ValueError, match="num_segments=0"):
        events.script(rng, 0, False)
    with pytest.raises(ValueError, match="none of kinds"):
        events.script(rng, 3, False, kinds=("leave",))


@pytest.mark.parametrize("one", [ONE, TWO, BACK])
@pytest.mark.parametrize("kind", scene.KINDS)
def test_an_attribute_changes_alone_and_is_named(one, kind):
    rng = np.random.default_rng(0)
    for _ in range(20):
        after = events.follow(rng, one, kind)
        assert scene.changed(one.first, after.first) == (kind,)
        assert after.second == one.second and after.named


def test_entering_and_leaving_keep_the_first_object():
    rng = np.random.default_rng(0)
    seconds = set()
    for _ in range(200):
        after = events.follow(rng, ONE, "enter")
        assert after.first == RED and after.second[0] != "red"
        assert events.follow(rng, after, "leave") == ONE
        seconds.add(after.second)
    assert len(seconds) == 9


def test_what_returns_is_what_was_hidden():
    rng = np.random.default_rng(0)
    assert events.follow(rng, ONE, "hide") == HIDDEN
    back = {events.follow(rng, HIDDEN, "return") for _ in range(60)}
    assert {one.first.motion for one in back} == set(scene.MOTIONS)
    for one in back:
        assert dataclasses.replace(one.first, motion="left") == RED and not one.named


def test_no_single_event_between_unlike_scenes():
    with pytest.raises(ValueError, match="no event"):
        events.event(TWO, HIDDEN)
    with pytest.raises(ValueError, match="no event"):
        events.event(ONE, ONE)


@pytest.mark.parametrize("held_out", [False, True])
def test_scripts_stay_in_their_split(held_out):
    for played in drawn_scripts(held_out):
        assert all(scene.is_held_out(one.first) == held_out for one in played)


def test_scripts_have_every_event_and_what_hides_returns():
    seen = set()
    for played in drawn_scripts(None):
        assert len(played) == 8 and not played[-1].hidden
        pairs = zip(played[:-1], played[1:], strict=True)
        kinds = [events.event(*pair) for pair in pairs]
        assert all(
            kinds[number + 1] == "return"
            for number, kind in enumerate(kinds)
            if kind == "hide"
        )
        seen.update(kinds)
    assert seen == set(events.EVENTS)


def test_scripts_of_chosen_events():
    for played in drawn_scripts(False, 10, kinds=("background", "hide")):
        pairs = zip(played[:-1], played[1:], strict=True)
        assert {events.event(*pair) for pair in pairs} <= {
            "background",
            "hide",
            "return",
        }


@pytest.mark.parametrize("kind", events.EVENTS)
@pytest.mark.parametrize("held_out", [False, True])
def test_shortest_scripts_end_in_their_event_and_split(kind, held_out):
    rng = np.random.default_rng(0)
    for _ in range(10):
        played = events.shortest_script(rng, kind, held_out)
        assert events.event(*played[-2:]) == kind
        assert scene.is_held_out(played[-1].first) == held_out
        assert len(played) == (3 if kind in ("leave", "return") else 2)


def test_redrawn_scripts_have_the_same_events():
    rng = np.random.default_rng(0)
    for played in drawn_scripts(None, 20):
        other = events.redraw(rng, played)
        assert other != played
        for number in range(7):
            pair = slice(number, number + 2)
            assert events.event(*other[pair]) == events.event(*played[pair])
    with pytest.raises(ValueError, match="start with one named object"):
        events.redraw(rng, [TWO, ONE])


@pytest.mark.parametrize("motion", scene.MOTIONS)
def test_one_object_is_rendered_as_ever(motion):
    one = dataclasses.replace(RED, motion=motion)
    other = Attributes("yellow", "ring", "up", "gray")
    video = events.render([(Scene(one), 9), (Scene(other, named=False), 8)], (16, 48))
    expected = scene.render([(one, 9), (other, 8)], (16, 48), scene.RADIUS)
    np.testing.assert_array_equal(video, expected)


def test_positions_are_continuous_through_all_events():
    segments = [(one, 12) for one in (ONE, TWO, ONE, HIDDEN, BACK)]
    first, _ = events.centers(segments, (0.0, 16.0))
    np.testing.assert_allclose(scene.wrap(np.diff(first, axis=0)), [[-4, 0]] * 59)
    video = events.render(segments, (0.0, 16.0))
    # Sixteen steps of four pixels lead once around the torus: 52 is 4 again.
    np.testing.assert_array_equal(video[11], np.roll(video[7], -16, axis=1))
    np.testing.assert_array_equal(video[48 + 4], video[4])
    assert (video[36:48] == scene.BACKGROUNDS["black"]).all()


@pytest.mark.parametrize("motion", scene.MOTIONS)
@pytest.mark.parametrize("shape", scene.SHAPES)
def test_two_objects_never_touch(motion, shape):
    xy = events.centers([(_pair(motion, shape), 17)], (0.0, 16.0))
    for other in scene.SHAPES:
        both = scene.coverage(shape, xy[0], scene.RADIUS) > 0
        both &= scene.coverage(other, xy[1], scene.RADIUS) > 0
        assert not both.any()


def _pair(motion, shape):
    return Scene(Attributes("red", shape, motion, "black"), ("blue", "ring"))


@pytest.mark.parametrize(
    "motion, offset",
    [
        ("left", (0, -32)),
        ("right", (0, -32)),
        ("up", (-32, 0)),
        ("down", (-32, 0)),
        ("still", (-32, 0)),
    ],
)
def test_the_second_object_is_across_the_motion(motion, offset):
    first, second = events.centers([(_pair(motion, "ring"), 9)], (48.0, 16.0))
    np.testing.assert_allclose(scene.wrap(second - first), [offset] * 9)
    video = events.render([(_pair(motion, "ring"), 9)], (48.0, 16.0))
    x, y = second[4].astype(int)
    # The blue ring has its hole at the centre, and its band beside it.
    assert tuple(video[4, y, x]) == scene.BACKGROUNDS["black"]
    assert tuple(video[4, y, (x + 10) % 64]) == scene.COLORS["blue"]


def test_the_second_object_does_not_leap_when_the_motion_turns():
    turned = dataclasses.replace(TWO, first=dataclasses.replace(RED, motion="up"))
    entered = [(TWO, 9), (turned, 8), (Scene(turned.first), 8), (turned, 8)]
    first, second = events.centers(entered, (16.0, 16.0))
    steps = scene.wrap(np.diff(second, axis=0))
    np.testing.assert_allclose(steps[:8], [[-4, 0]] * 8)
    np.testing.assert_allclose(steps[8:16], [[0, -4]] * 8)
    # It entered again, across the motion at that time.
    np.testing.assert_allclose(scene.wrap(second - first)[25:], [[-32, 0]] * 8)
