"""Flow-matching maths: tables, levels, identities."""

import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax import flow


@pytest.mark.parametrize(
    "shift, entry, timestep",
    [
        (5.0, 0, 1000.0),
        (5.0, 1, 999.7998),
        (5.0, 250, 937.5),
        (5.0, 500, 833.33331),
        (5.0, 750, 625.0),
        (5.0, 998, 9.920635),
        (5.0, 999, 4.98008),
        (8.0, 250, 960.0),
        (8.0, 500, 888.8889),
        (8.0, 750, 727.2727),
        (8.0, 999, 7.94439),
    ],
)
def test_table_has_the_official_values(shift, entry, timestep):
    table = flow.sigma_table(shift)

    assert table.shape == (1000,) and table.dtype == np.float32
    assert 1000 * table[entry] == pytest.approx(timestep, rel=1e-6)


@pytest.mark.parametrize(
    "timestep, shift, sigma",
    [
        (0.0, 5.0, 0.00498008),
        (20.0, 5.0, 0.0196850),
        (20.0, 8.0, 0.0235064),
        (1000.0, 5.0, 1.0),
        (937.5, 5.0, 0.9375),
    ],
)
def test_lookup_takes_the_nearest_entry(timestep, shift, sigma):
    ours = flow.lookup_sigma(jnp.asarray([[timestep]]), shift)

    assert ours.shape == (1, 1)
    assert float(ours[0, 0]) == pytest.approx(sigma, rel=1e-5)


def test_lookup_takes_the_first_of_two_equally_near():
    times = flow.sigma_table(5.0) * np.float32(1000)
    for entry in (3, 400, 998):
        between = (times[entry] + times[entry + 1]) / 2
        nearest = int(np.abs(times - between).argmin())
        found = float(flow.lookup_sigma(jnp.float32(between), 5.0))
        assert found == flow.sigma_table(5.0)[nearest]


def test_few_steps_are_warped_onto_the_shifted_grid():
    levels = flow.few_step_levels((1000, 750, 500, 250), 5.0)

    assert levels.timestep == (1000.0, 937.5, 833.3333129882812, 625.0)
    assert levels.sigma == pytest.approx([1, 0.9375, 5 / 6, 0.625], rel=1e-6)
    assert len(levels) == 4
    assert flow.few_step_levels((1000, 0), 5.0).timestep == (1000.0, 0.0)


def test_unwarped_steps_are_timesteps_and_the_table_gives_their_sigma():
    plain = flow.few_step_levels((1000, 757, 522), 8.0, warp=False)
    table = flow.few_step_levels((1000, 757, 522), 8.0, warp=False, table=True)

    assert plain.timestep == table.timestep == (1000.0, 757.0, 522.0)
    assert plain.sigma == pytest.approx([1.0, 0.757, 0.522], rel=1e-6)
    assert table.sigma != plain.sigma
    assert set(table.sigma) <= set(flow.sigma_table(8.0).tolist())


def test_even_levels_meet_the_few_steps_at_48():
    levels = flow.even_levels(48, 5.0)

    picked = [levels.timestep[i] for i in (0, 12, 24, 36)]
    assert len(levels) == 48
    assert picked == pytest.approx([1000, 937.5, 833.3333, 625], rel=1e-6)
    assert np.all(np.diff(levels.sigma) < 0) and levels.sigma[-1] > 0


@pytest.mark.parametrize(
    "grid, steps, shift, times, sigmas, last",
    [
        ("wan_unipc", 50, 5.0, [999, 995, 991], [0.99979985, 0.99573237], 92),
        ("wan_unipc", 20, 3.0, [999, 982, 963], [0.99966645, 0.9824195], 136),
        ("wan_dpmpp", 50, 5.0, [1000, 995, 991], [1.0, 0.99593496], 92),
        ("diffusers_unipc", 50, 3.0, [999, 993, 986], [0.999999, 0.9932501], 60),
        ("diffusers_euler", 30, 3.0, [1000, 988.27136], [1.0, 0.98827136], 8.928572),
        ("even", 50, 5.0, [1000, 995.93496], [1.0, 0.99593496], 92.592593),
    ],
)
def test_grids_have_the_values_of_their_makers(grid, steps, shift, times, sigmas, last):
    levels = flow.GRIDS[grid](steps, shift)

    assert len(levels) == steps
    assert levels.timestep[: len(times)] == pytest.approx(times, rel=1e-7)
    assert levels.sigma[: len(sigmas)] == pytest.approx(sigmas, rel=1e-7)
    assert levels.timestep[-1] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("grid", ["wan_unipc", "wan_dpmpp", "diffusers_unipc"])
def test_timesteps_are_cut_and_sigmas_are_not(grid):
    levels = flow.GRIDS[grid](40, 8.0)

    cut = np.subtract(np.multiply(levels.sigma, 1000), levels.timestep)
    assert all(time.is_integer() for time in levels.timestep)
    assert np.all(cut > -1e-4) and np.all(cut < 1) and cut.max() > 0.5


@pytest.mark.parametrize("grid", flow.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("shift", [0.5, 1.0, 12.0])
def test_every_grid_falls_and_ends_above_0(grid, steps, shift):
    levels = flow.GRIDS[grid](steps, shift)

    assert len(levels) == len(levels.sigma) == steps
    assert 0.998 < levels.sigma[0] <= 1 and levels.sigma[-1] > 0
    assert np.all(np.diff(levels.sigma) < 0)


@pytest.mark.parametrize("extra", [True, False])
def test_a_table_may_have_other_steps(extra):
    table = flow.sigma_table(3.0, 50, extra, last=0.0 if extra else 0.01)

    plain = np.linspace(1, 0.0 if extra else 0.01, 50 + extra)[:50]
    np.testing.assert_allclose(table, 3 * plain / (1 + 2 * plain), rtol=1e-6)
    assert int(flow.nearest_entry(jnp.float32(1000), table)) == 0
    assert flow.table_weights(table).sum() == pytest.approx(50, rel=1e-5)


def test_levels_are_hashable_and_equal_by_value():
    assert flow.even_levels(4, 5.0) == flow.even_levels(4, 5.0)
    assert hash(flow.even_levels(4, 5.0)) == hash(flow.even_levels(4, 5.0))


def sample(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((2, 3, 2, 2, 4)), jnp.float32)


@pytest.mark.parametrize(
    "sigma",
    [jnp.float32(0.7), jnp.asarray([0.3, 1.0]), jnp.asarray([[0.1, 0.5, 1.0]] * 2)],
    ids=["one", "per video", "per frame"],
)
def test_flow_and_x0_are_two_forms_of_one_prediction(sigma):
    x0, noise = sample(0), sample(1)
    noisy = flow.add_noise(x0, noise, sigma)

    there = flow.flow_from_x0(x0, noisy, sigma)
    back = flow.x0_from_flow(there, noisy, sigma)

    np.testing.assert_allclose(there, noise - x0, rtol=0, atol=2e-5)
    np.testing.assert_allclose(back, x0, rtol=0, atol=1e-5)


def test_noise_levels_broadcast_from_the_left():
    x0, noise = sample(0), sample(1)
    sigma = jnp.asarray([[0.0, 0.5, 1.0], [1.0, 0.0, 0.25]])

    ours = flow.add_noise(x0, noise, sigma)

    np.testing.assert_array_equal(ours[0, 0], x0[0, 0])
    np.testing.assert_array_equal(ours[0, 2], noise[0, 2])
    np.testing.assert_allclose(
        ours[1, 2], 0.75 * x0[1, 2] + 0.25 * noise[1, 2], atol=1e-6
    )


def test_mixing_happens_in_float32_and_keeps_the_noise_dtype():
    x0, noise = sample(0).astype("bfloat16"), sample(1).astype("bfloat16")

    ours = flow.add_noise(x0, noise, jnp.float32(0.3))

    exact = 0.7 * x0.astype("float32") + 0.3 * noise.astype("float32")
    assert ours.dtype == "bfloat16"
    np.testing.assert_array_equal(ours, exact.astype("bfloat16"))


def test_training_weights_have_the_official_values():
    weights = flow.training_weights(5.0)

    assert weights[0] == pytest.approx(0, abs=1e-6)
    assert weights[500] == pytest.approx(1.02486, rel=1e-4)
    assert weights[999] == pytest.approx(0.031879, rel=1e-4)
    assert int(weights.argmax()) == 833
    assert weights.max() == pytest.approx(2.0764, rel=1e-4)
    assert weights.mean() == pytest.approx(1, rel=1e-5)


def test_dmd_timesteps_are_shifted_and_clipped():
    uniform = jnp.arange(1000, dtype=jnp.float32)

    ours = np.asarray(flow.dmd_timestep(uniform, 5.0))

    assert np.sum(ours == 980) == 92
    assert np.sum(ours == 20) == 5
    assert ours[500] == pytest.approx(833.3333, rel=1e-5)
