"""Metrics by name: what they measure, and how their numbers are collected."""

import divided
import numpy as np
import pytest

from anchor_jax.errors import UserError
from anchor_jax.evaluation import registry
from anchor_jax.evaluation.registry import METRICS, Collector
from anchor_jax.tiny_world import scene


def test_flickering_is_the_mean_difference_of_neighbouring_frames():
    still = np.full((3, 4, 6, 3), 200, np.uint8)
    blinking = np.zeros((3, 4, 6, 3), np.uint8)
    blinking[1] = 255
    half = np.zeros((3, 4, 6, 3), np.uint8)
    half[1:, :2] = 51  # One of two steps changes half of the values by 51.

    rows = METRICS["temporal_flickering"](np.stack([still, blinking, half]), [""] * 3)

    values = [row["temporal_flickering"] for row in rows]
    np.testing.assert_allclose(values, [1, 0, (255 - 51 / 4) / 255])


def test_one_frame_has_no_neighbour():
    with pytest.raises(UserError, match="must be at least 2"):
        METRICS["temporal_flickering"](np.zeros((1, 1, 4, 4, 3), np.uint8), [""])


def test_a_rendered_clip_matches_its_caption_and_a_script_has_no_numbers():
    rng = np.random.default_rng(3)
    wanted = scene.sample_attributes(rng, held_out=False)
    video = scene.sample_track(rng, [(wanted, 21)]).render()
    text = scene.caption(wanted)

    first, second = METRICS["world_match"](
        np.stack([video] * 2), [text, f"{text} | {text}"]
    )

    assert set(first.values()) == {1.0} and {"color", "motion"} <= first.keys()
    assert second == {}


def test_numbers_are_collected_over_batches():
    collector = Collector(["temporal_flickering"])
    for value in (0, 255):
        video = np.zeros((2, 2, 4, 4, 3), np.uint8)
        video[:, 1] = value
        collector(video, ["", ""])

    summary = collector.summary()

    cell = {"mean": 0.5, "n": 4}
    assert summary == {"temporal_flickering": {"temporal_flickering": cell}}
    assert registry.table(summary) == "temporal_flickering: 0.5000 (n=4)"


def test_an_unknown_metric_is_refused():
    with pytest.raises(UserError, match="did you mean 'temporal_flickering'"):
        Collector(["temporal_flicker"])


def test_processes_collect_the_numbers_of_all_in_order():
    def video(value):
        pixels = np.zeros((1, 2, 4, 4, 3), np.uint8)
        pixels[:, 1] = value
        return pixels

    def collect(division):
        collector = Collector(["temporal_flickering"])
        for batch in range(5):
            if division.has(batch):
                collector(video(10 * batch), [""])
        collector.join(division)
        return collector

    (alone,) = divided.run(collect, 1)
    for shared in divided.run(collect, 3):
        assert shared.rows == alone.rows and shared.summary() == alone.summary()


def test_a_trial_that_every_process_runs_whole_is_counted_once():
    def collect(division):
        collector = Collector(["temporal_flickering"])
        collector(np.zeros((2, 2, 4, 4, 3), np.uint8), ["", ""])
        collector.join(division)
        return collector.summary()

    for summary in divided.run(collect, 2):
        assert summary["temporal_flickering"]["temporal_flickering"]["n"] == 2
