"""What people watch: TensorBoard's event files, and how numbers become lines."""

import json
import struct

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from anchor_jax.training.monitor import EVENTS, Monitor


def events(folder):
    """Returns the events in a training's folder, in the order of their writing."""
    found = []
    for path in sorted((folder / EVENTS).iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            # A length and its checksum, the event and its checksum.
            found.append(Event.FromString(content[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def values(folder):
    return {
        (event.step, value.tag): value
        for event in events(folder)
        for value in event.summary.value
    }


def test_numbers_and_samples_are_events(tmp_path):
    monitor = Monitor(tmp_path, 4, 0, 2, frames_per_step=6)
    for step in range(2):
        norms = {"generator_gradient_norm": 3.0, "critic_gradient_norm": 2.0 + step}
        monitor.note(step, {"critic_loss": float(step), **norms})
    monitor.show(np.full((4, 5, 3), 200, np.uint8), 2)
    monitor.close()

    found = values(tmp_path)
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["critic_loss"] == 0.5 and line["generator_critic_ratio"] == 3 / 2.5
    numbers = {name: value for name, value in line.items() if name != "step"}
    assert {"seconds_per_step", "latent_frames_per_second", "memory_gb"} <= {*numbers}
    for name, value in numbers.items():
        np.testing.assert_allclose(found[2, name].simple_value, value, rtol=1e-6)
    image = found[2, "samples"].image
    assert (image.height, image.width, image.colorspace) == (4, 5, 3)


def test_points_of_steps_that_are_run_again_are_hidden(tmp_path):
    Monitor(tmp_path, 9, 5, 1).close()

    (start,) = (one for one in events(tmp_path) if one.HasField("session_log"))
    assert (start.step, start.session_log.status) == (6, start.session_log.START)


def test_a_critic_that_stands_still_has_no_ratio(tmp_path):
    monitor = Monitor(tmp_path, 4, 0, 1)
    monitor.note(0, {"generator_gradient_norm": 3.0, "critic_gradient_norm": 0.0})
    monitor.close()

    assert "generator_critic_ratio" not in (tmp_path / "log.jsonl").read_text()


def test_other_processes_write_nothing(tmp_path):
    monitor = Monitor(tmp_path, 4, 0, 1, quiet=True)
    monitor.note(0, {"loss": 3.0})
    monitor.close()

    assert not list(tmp_path.iterdir())
