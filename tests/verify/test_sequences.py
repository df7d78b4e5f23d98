"""A long sequence whose keys are stored rotated at their absolute frames.

The recording is made up around our own latents: the official buffer is laid out, and
its keys are rotated, in numpy.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from made_up import training_config, training_weights, write
from safetensors.numpy import load_file, save_file

from anchor_jax.verify import run, sequences
from anchor_jax.verify.case import Checks, load_case

FRAMES, BLOCK, WINDOW, SWITCH, ROWS = 12, 3, 9, 9, 15


def rotated(keys, frame):
    """Returns keys [batch, 2 x 3 tokens, head, 16] rotated as those of a frame."""
    pairs = keys.astype(np.float64).reshape(*keys.shape[:-1], 8, 2)
    row, column = np.divmod(np.arange(6), 3)
    angle = np.concatenate(
        [
            np.outer(place, 10000.0 ** (-np.arange(count) / count))
            for place, count in ((np.full(6, frame), 4), (row, 2), (column, 2))
        ],
        axis=1,
    )
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
    return np.stack([rotated.real, rotated.imag], -1).reshape(keys.shape)


def buffer(cache, layer, which, end):
    """Returns the official buffer, [batch, row x token, head, 16].

    Row f holds frame f, as nothing has been moved yet; rows that no later block reads
    hold anything.
    """
    held, frames = np.asarray(getattr(cache.slots, which)[layer]), cache.index.frame
    held = held.reshape(*held.shape[:-1], -1, 16)
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((held.shape[0], ROWS, *held.shape[2:]))
    rows[:, end:] = 0
    for slot, frame in enumerate(np.asarray(frames)):
        # The sink stays where it is when its keys are set to 0.
        place = slot if slot < BLOCK else frame
        if place >= 0:
            keys = held[:, slot]
            rows[:, place] = rotated(keys, place) if which == "k" else keys
    return rows.reshape(len(rows), -1, *held.shape[3:])


class Recorder(Checks):
    """Keeps what it is asked to compare, instead."""

    def __init__(self):
        super().__init__({})

    def compare(self, name, ours, theirs=None, **limits):
        self.outputs[name] = np.float32(ours)

    def equal(self, name, ours, theirs=None):
        pass


def call(kind, first, prompt, frames, size=BLOCK, time=0.0):
    return {
        "kind": kind,
        "start_frame": first,
        "num_frames": size,
        "timestep": time,
        "prompt": prompt,
        "kv_frames_attended": frames,
        "rope_frames_start_calls_in_order": [[size, first], [size, first]],
    }


def draws(rng):
    """Returns the random numbers of a chunk that leaves at the second level."""
    clip = (1, FRAMES, 16, 4, 6)
    noise = rng.standard_normal((2 * FRAMES // BLOCK, BLOCK, *clip[2:]))
    found = [("randn", rng.standard_normal(clip)), ("randint", np.array([1]))]
    found += [("randn_like", one) for one in noise]
    found += [("randint", np.array([[700]]))]
    found += [("randn_like", rng.standard_normal(clip))]
    types = {"randint": np.int64}
    return {
        f"draw.{number:04d}.{kind}": value.astype(types.get(kind, np.float32))
        for number, (kind, value) in enumerate(found)
    }


def chunk(draws):
    return {
        "index": 0,
        "role": "critic",
        "draws": [0, draws],
        "chunk_start_frame": 0,
        "new_frames": FRAMES,
        "gradient_mask_per_frame": [1] * FRAMES,
        "loss_prompt": "switch",
        "generator_calls": [
            call("denoise", 0, "cond", 3),
            call("context", 0, "cond", 3),
            call("denoise", 3, "cond", 6),
            call("denoise", 6, "cond", 9),
            # Runs all past frames; the sink's keys are not stored again.
            call("recache", 0, "switch", 9, size=9),
            call("denoise", 9, "switch", 9),
            call("context", 9, "switch", 9),
        ],
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    place = tmp_path_factory.mktemp("set")
    training_weights(place)
    config = training_config(
        num_training_frames=FRAMES,
        max_length=FRAMES,
        switch_frame_index=SWITCH,
        rope_enhance=False,
        use_prompt_cache=False,
        local_attn_size=WINDOW,
    )
    rng = np.random.default_rng(4)
    inputs = draws(rng)
    trace = {"chunks": [chunk(len(inputs))], "can_generate_more_after": False}
    for name, rows in (("cond", 9), ("switch", 5), ("uncond", 7)):
        inputs[name] = rng.standard_normal((1, rows, 48)).astype(np.float32)
    folder = place / "streaming_training" / "absolute"
    write(folder, config, inputs, {"none": np.zeros(1)}, trace)
    recorder = Recorder()
    precision = jax.default_matmul_precision("highest")
    with pytest.MonkeyPatch.context() as patch, precision:
        patch.setattr(sequences._Sequence, "_compare_cache", _record_cache)
        sequences.verify_streaming_training(load_case(folder), recorder)
    return write(folder, config, inputs, recorder.outputs, trace)


def _record_cache(self, name):
    end = int(self.state.cache.index.start)
    for layer in range(self.networks.setup.model.num_layers):
        for which in "kv":
            rows = buffer(self.state.cache, layer, which, end)
            self.checks.outputs[f"{name}.cache.layer{layer}.{which}"] = np.float32(rows)
            self.checks.outputs[f"{name}.junction.layer{layer}.{which}"] = np.zeros(1)


@pytest.mark.slow
def test_a_sequence_with_absolute_positions_passes(recorded):
    result = run.verify_case(recorded)

    assert result.passed, run.report(result)
    names = [row.name for row in result.rows]
    assert "chunk0.cache.layer1.k" in names and "trace.chunk0.call4.query" in names
    assert len(result.left_out[sequences.NO_JUNCTION]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["k", "v"])
def test_a_key_or_value_that_differs_fails(recorded, tmp_path, name):
    folder = tmp_path / "set" / "streaming_training" / "absolute"
    shutil.copytree(recorded.parents[1], folder.parents[1])
    path, part = folder / "outputs.safetensors", f"chunk0.cache.layer0.{name}"
    outputs = load_file(path)

    outputs[part][0, 10 * 6] += 0.01  # The second frame of the newest block.
    save_file(outputs, path)
    result = run.verify_case(folder)

    assert [row.name for row in result.rows if not row.is_equal] == [part]


@pytest.mark.slow
def test_a_position_that_differs_fails(recorded):
    trace = json.loads((recorded / "trace.json").read_text())
    changed = json.loads(json.dumps(trace))
    calls = changed["chunks"][0]["generator_calls"]
    calls[5]["rope_frames_start_calls_in_order"][1] = [3, 6]
    (recorded / "trace.json").write_text(json.dumps(changed))

    result = run.verify_case(recorded)

    (recorded / "trace.json").write_text(json.dumps(trace))
    wrong = [row.name for row in result.rows if not row.is_equal]
    assert wrong == ["trace.chunk0.call5.key_new"]
