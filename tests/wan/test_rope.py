"""Rotary positions and the sinusoid of timesteps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax.wan import rope


def expected_angles(position, head_dim, rows, columns, theta=10000.0):
    """Angles [frame, row, column, pair], straight from the definition in float64."""
    time, high, wide = rope.axis_pairs(head_dim)
    angles = np.zeros((len(position), rows, columns, head_dim // 2))
    for f, p in enumerate(position):
        for r in range(rows):
            for c in range(columns):
                for i in range(time):
                    angles[f, r, c, i] = p * theta ** (-2 * i / (2 * time))
                for i in range(high):
                    angles[f, r, c, time + i] = r * theta ** (-2 * i / (2 * high))
                for i in range(wide):
                    angles[f, r, c, time + high + i] = c * theta ** (-i / wide)
    return angles


@pytest.mark.parametrize(
    "head_dim, pairs", [(128, (22, 21, 21)), (24, (4, 4, 4)), (12, (2, 2, 2))]
)
def test_pairs_are_split_over_time_height_and_width(head_dim, pairs):
    assert rope.axis_pairs(head_dim) == pairs
    assert sum(pairs) == head_dim // 2


def test_rotation_is_exact_up_to_position_100000():
    position = np.array([0, 1, 20, 51, 1023, 1024, 4095, 65_537, 99_999, 100_000])

    ours = jax.jit(lambda p: rope.rotary(p, (3, 2), 128))(jnp.asarray(position))

    angles = expected_angles(position, 128, 3, 2).reshape(len(position), 6, 64)
    angles = np.repeat(angles, 2, axis=-1)
    sign = np.tile([-1, 1], 64)
    np.testing.assert_allclose(ours.cos, np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.sin, sign * np.sin(angles), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_adjacent_channels_are_rotated_as_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6, 2, 24)).astype(np.float32)
    by = rope.rotary(jnp.asarray([4, 18, 700]), (3, 2), 24, 100.0)

    ours = rope.rotate(jnp.asarray(x).reshape(2, 3, 6, 48), by).reshape(x.shape)

    angles = expected_angles([4, 18, 700], 24, 3, 2, 100.0).reshape(3, 6, 1, 12)
    rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    expected = np.stack([rotated.real, rotated.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rotation_keeps_bfloat16():
    by = rope.rotary(jnp.asarray([7]), (1, 1), 24)

    assert rope.rotate(jnp.ones((1, 1, 1, 48), "bfloat16"), by).dtype == "bfloat16"


def test_only_the_difference_of_positions_matters():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, 1, 24)).astype(np.float32) for _ in range(2))

    def product(at_q, at_k):
        rotation = [
            rope.rotary(jnp.asarray([p]), (1, 1), 24, 100.0) for p in (at_q, at_k)
        ]
        return float(jnp.sum(rope.rotate(q, rotation[0]) * rope.rotate(k, rotation[1])))

    assert product(18, 12) == pytest.approx(product(90_018, 90_012), abs=1e-5)
    assert product(18, 12) != pytest.approx(product(18, 9), abs=1e-2)


def test_sinusoid_has_the_official_check_values():
    ours = rope.timestep_sinusoid(jnp.float32(937.5), 256)

    picked = np.asarray(ours)[[0, 1, 127, 128, 129, 255]]
    expected = [0.2623, 0.5805, 0.9949, 0.9650, -0.8143, 0.1006]
    np.testing.assert_allclose(picked, expected, rtol=0, atol=6e-5)


@pytest.mark.parametrize("timestep", [0.0, 0.3, 20.0, 625.0, 833.3333129882812, 1000.0])
def test_sinusoid_is_that_of_float64(timestep):
    angles = timestep * 10000.0 ** (-np.arange(128) / 128)

    ours = rope.timestep_sinusoid(jnp.float32(timestep), 256)

    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
