"""Sample videos of a training: what they show, of which weights, and at what cost."""

import contextlib
import dataclasses
import json
import pathlib

import av
import bundles
import jax
import numpy as np
import pytest

from anchor_jax import processes
from anchor_jax.errors import Stopped, UserError
from anchor_jax.streaming import stream
from anchor_jax.streaming.loop import Euler, Renoise
from anchor_jax.training import samples
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.data.trajectories import TrajectoryWriter
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.stages.build import SamplesConfig, TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.training.state import Ema

DISTILL = TrainConfig(
    steps=3,
    batch=4,
    distillation=DistillationConfig(
        policy="longlive", steps=(1000, 500), frames=6, length=12, switches=(6,)
    ),
    ema=Ema(0.5, 0),
    samples=SamplesConfig(num=3, frames=6, steps=2),
)
REGRESS = dataclasses.replace(
    DISTILL,
    stage="regression",
    regression=RegressionConfig(block=3, blocks=1),
)


def prepare(config):
    return build.prepare(config, bundles.load(), clips, bundles.load())


def clips(number):
    rng = np.random.default_rng(number)
    grid, model = bundles.load().grid, bundles.load().model
    shape = (4, 3, grid.height, grid.width, model.latent_channels)
    prompt = bundles.load().encode_prompts([bundles.RED] * 4)
    return {
        "latents": rng.standard_normal(shape).astype(np.float32),
        "embedding": np.asarray(prompt)[:, None],
    }


def read(path):
    with av.open(path) as video:
        return np.stack(
            [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        )


@pytest.mark.slow
def test_videos_are_of_the_mean_and_compiled_once(tmp_path):
    prepared = prepare(DISTILL)
    sampler = samples.make_sampler(DISTILL, prepared, tmp_path)
    state, shown = prepared.state, []
    sampler.show = lambda image, step: shown.append((image, step))

    sampler(state, 250)
    programs = stream.make_block._cache_size()
    moved = jax.tree.map(lambda x: 1.5 * x, state.generator)
    moved = jax.device_put(moved, prepared.compiled.places.generator)
    sampler(state.replace(generator=moved), 500)
    sampler(state.replace(ema=moved), 750)

    assert stream.make_block._cache_size() == programs
    names = {place.name for place in (tmp_path / "samples").iterdir()}
    steps = ("000250", "000500", "000750")
    assert names == {f"step-{x}.{kind}" for x in steps for kind in ("mp4", "png")}
    video = read(tmp_path / "samples" / "step-000250.mp4")
    size = 8 * bundles.load().grid.height
    assert video.shape == (21, 2 * size, 2 * size, 3)
    (first, _), (second, _), (third, step) = shown
    np.testing.assert_array_equal(first, second)
    assert np.any(first != third) and step == 750


def test_kernels_know_the_mesh(tmp_path, monkeypatch):
    prepared, seen = prepare(DISTILL), []

    def play(*arguments):
        seen.append(jax.sharding.get_abstract_mesh())
        return np.zeros((1, 16, 16, 3), np.uint8)

    monkeypatch.setattr(samples.Sampler, "_play", play)
    samples.make_sampler(DISTILL, prepared, tmp_path)(prepared.state, 1)

    assert seen == [prepared.compiled.mesh.abstract_mesh] * 3


@pytest.mark.parametrize("number", [0, 1])
def test_all_processes_meet_after_the_first_stops_within_its_videos(
    tmp_path, monkeypatch, number
):
    sampler, calls = samples.make_sampler(DISTILL, prepare(DISTILL), tmp_path), []

    def play(*arguments):
        calls.append("play")
        raise Stopped("interrupted")

    def gather(self, arrays):
        calls.append("gather")
        return arrays

    monkeypatch.setattr(samples.Sampler, "_play", play)
    monkeypatch.setattr(samples.Sampler, "_on_one_device", gather)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: number)
    monkeypatch.setattr(processes, "barrier", lambda *more: calls.append("meet"))
    with pytest.raises(Stopped) if number == 0 else contextlib.nullcontext():
        sampler(prepare(DISTILL).state, 3)

    assert calls == ["gather", *["play"] * (number == 0), "meet"]


def test_videos_switch_where_training_does():
    videos = samples.make_sampler(DISTILL, prepare(DISTILL), pathlib.Path("x")).videos

    scripts = [video.script for video in videos]
    assert [one.switch_frames for one in scripts] == [(3,)] * 3
    assert len({one.prompts for one in scripts}) == 3
    assert videos[0].setup == prepare(DISTILL).compiled.spec.setup


def test_each_stage_has_the_sampler_of_its_network():
    def setup(**fields):
        regression = RegressionConfig(block=3, blocks=2, **fields)
        config = dataclasses.replace(REGRESS, regression=regression)
        (video, *_) = samples.make_sampler(
            config, prepare(config), pathlib.Path("x")
        ).videos
        return video.setup

    teacher = setup()
    causal = setup(forcing="teacher")
    regressed = setup(forcing="noise", endpoints=True)

    assert (teacher.solver, teacher.guidance, teacher.policy.block) == (Euler(), 2.5, 6)
    assert (causal.solver, causal.guidance, causal.policy.block) == (Euler(), 2.5, 3)
    assert len(causal.levels) == 2
    assert causal.policy.window == 12
    assert (regressed.solver, regressed.guidance) == (Renoise(), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["longlive", "anchor_forcing"])
def test_the_release_is_sampled_as_it_streams_not_as_it_trains(policy, tmp_path):
    section = dataclasses.replace(DISTILL.distillation, policy=policy)
    config = dataclasses.replace(DISTILL, rules="release", distillation=section)
    prepared = prepare(config)
    sampler = samples.make_sampler(config, prepared, tmp_path)

    sampler(prepared.state, 250)

    assert prepared.compiled.spec.setup.floor > 0
    (setup,) = {video.setup for video in sampler.videos}
    assert not setup.floor and not setup.policy.zeroes_sink
    assert setup.policy.keeps_prior == (policy == "anchor_forcing")
    assert (tmp_path / "samples" / "step-000250.mp4").exists()


@pytest.mark.slow
def test_sampling_changes_nothing_of_a_training(tmp_path):
    def run(folder, every):
        prepared = prepare(REGRESS)
        sampler = samples.make_sampler(REGRESS, prepared, folder)
        checkpoints = Checkpoints(folder, {}, 1)
        monitor = Monitor(folder, 3, 0, 1, quiet=True)
        loop = Loop(3, save_every=3, log_every=1, sample_every=every)
        state = train(
            prepared.compiled,
            prepared.state,
            Cursor(),
            loop,
            checkpoints,
            monitor,
            sampler,
        )
        monitor.close()
        checkpoints.close()
        return [np.asarray(x) for x in jax.tree.leaves(state)]

    without, sampled = run(tmp_path / "a", 0), run(tmp_path / "b", 2)

    for ours, theirs in zip(sampled, without, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not (tmp_path / "a" / "samples").exists()
    made = sorted(place.name for place in (tmp_path / "b" / "samples").glob("*.mp4"))
    assert made == ["step-000002.mp4", "step-000003.mp4"]


def shown(data, **fields):
    config = dataclasses.replace(
        DISTILL, data=data, samples=dataclasses.replace(DISTILL.samples, **fields)
    )
    sampler = samples.make_sampler(config, prepare(config), pathlib.Path("x"))
    return sampler and [video.script.prompts for video in sampler.videos]


@pytest.mark.slow
def test_prompts_are_those_of_the_config_or_the_first_of_the_data(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "b.txt").write_text("1\n2\n3\n4\n")
    rows = [{"prompt": "one", "switch": "1"}, {"prompts": ["two", "2", "x"]}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "c.jsonl").write_text(lines + "\nno JSON\n")
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl"))

    assert shown(DataConfig(), prompts=("a | b", "c")) == [("a", "b"), ("c",)]
    pairs = [("one", "1"), ("two", "2"), ("three", "3")]
    assert shown(DataConfig("prompts", a, b)) == pairs
    assert shown(DataConfig("prompts", a))[0] == ("one", "two")
    assert shown(DataConfig("prompts", c)) == pairs[:2]
    writer = TrajectoryWriter(tmp_path / "ode", 0, 1, (5, 3, 8, 8, 4))
    writer.add(0, np.zeros((5, 3, 8, 8, 4)), "stored")
    writer.flush()
    assert shown(DataConfig("trajectories", str(tmp_path / "ode"))) == [
        ("stored", "stored")
    ]
    assert shown(DataConfig("trajectories", str(tmp_path / "none"))) is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num": 0}, "config.samples.num=0"),
        ({"num": 1000}, "at most 64 videos"),
        ({"guidance": -1.0}, "config.samples.guidance=-1.0"),
        ({"grid": "evn"}, "config.samples.grid='evn'; did you mean 'even'"),
        ({"prompts": (" ",)}, "config.samples.prompts"),
        ({"prompts": ("a[3f",)}, "config.samples.prompts, 'a"),
        ({"policy": "longliv"}, "did you mean 'longlive'"),
        ({"policy": "self_forcing", "frames": 24}, "limited to 21"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_training(wrong, named):
    with pytest.raises(UserError, match=named):
        shown(DataConfig(), **wrong)


def test_a_grid_has_black_places_where_there_is_no_video():
    videos = [np.full((2, 4, 6, 3), value, np.uint8) for value in (1, 2, 3)]

    grid = samples.side_by_side(videos)

    assert grid.shape == (2, 8, 12, 3)
    assert [grid[0, y, x, 0] for y in (0, 4) for x in (0, 6)] == [1, 2, 3, 0]
