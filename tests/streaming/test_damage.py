import json
import struct

import bundles
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny

from anchor_jax import flow
from anchor_jax.errors import UserError
from anchor_jax.streaming.session import Session

HEADER = "anchor_jax_moment"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a snapshot, and the next block of its session."""
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    setup = tiny.setup(levels=flow.few_step_levels((900,), 5.0))
    session = Session(bundles.load(), setup, bundles.RED, seed=1)
    session.step()
    session.save(path)
    return path.read_bytes(), session.step().fetch()


def restore(folder, content):
    path = folder / "m.safetensors"
    path.write_bytes(content)
    return Session.restore(path, bundles.load())


def parts(content):
    """Returns the metadata and the tensors of a snapshot."""
    (length,) = struct.unpack("<Q", content[:8])
    stored = json.loads(content[8 : 8 + length])["__metadata__"]
    return stored, safetensors.numpy.load(content)


@pytest.mark.slow
def test_a_flipped_bit_is_refused_wherever_it_is(saved, tmp_path):
    content = saved[0]
    (length,) = struct.unpack("<Q", content[:8])
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, 8 + length, 40)]
    places += [*rng.integers(8 + length, len(content), 40), len(content) - 1]

    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << rng.integers(8)
        with pytest.raises(UserError, match=r"m\.safetensors"):
            restore(tmp_path, bytes(broken))


def test_a_changed_tensor_is_named_as_damage(saved, tmp_path):
    broken = bytearray(saved[0])
    broken[-5] ^= 4

    with pytest.raises(UserError, match="damaged: its checksum"):
        restore(tmp_path, bytes(broken))


def test_a_snapshot_of_an_earlier_version_has_no_checksum(saved, tmp_path):
    stored, tensors = parts(saved[0])
    old = safetensors.numpy.save(tensors, {HEADER: stored[HEADER]})

    session = restore(tmp_path, old)

    np.testing.assert_array_equal(session.step().fetch(), saved[1])


def test_an_unknown_entry_of_the_header_is_refused(saved, tmp_path):
    stored, tensors = parts(saved[0])
    stored["sha257"] = stored.pop("sha256")

    with pytest.raises(UserError, match="unknown entry 'sha257'"):
        restore(tmp_path, safetensors.numpy.save(tensors, stored))


@pytest.mark.parametrize(
    ("name", "value"), [("cursor", -1), ("cursor", 10**6), ("filled", 99)]
)
def test_places_outside_of_the_cache_are_refused(saved, tmp_path, name, value):
    stored, tensors = parts(saved[0])
    tensors[f"[0].cache.index.{name}"] = np.array(value, np.int32)

    with pytest.raises(UserError, match=f"{name}={value}"):
        content = safetensors.numpy.save(tensors, {HEADER: stored[HEADER]})
        restore(tmp_path, content)
