"""The loop over noise levels: against plain Python, and against known solutions."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anchor_jax
from anchor_jax.flow import GRIDS, Levels, even_levels, few_step_levels
from anchor_jax.streaming.loop import (
    DpmPlusPlus,
    Euler,
    Renoise,
    UniPC,
    approach,
    guide,
)

SHAPE = (2, 3, 4, 4, 2)
FEW = few_step_levels((1000, 750, 500, 250), 5.0)
MEAN, SPREAD = 0.7, 0.5


def normal(*seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def flow(noisy, timestep):
    """A flow that depends on everything it is given."""
    return 0.3 * noisy + jnp.sin(timestep / 300) * jnp.roll(noisy, 1, axis=1) + 0.1


def denoise(noisy, timestep, carry):
    return flow(noisy, timestep), carry


@functools.partial(jax.jit, static_argnames=("denoise", "levels", "solver"))
def sample(noise, fresh=None, carry=None, *, denoise, levels, solver):
    return approach(denoise, noise, levels, solver, fresh, carry)


def test_renoise_equals_a_plain_loop():
    noise, fresh = normal(0), normal(1, shape=(3, *SHAPE))

    latents, passes, _ = sample(
        noise, fresh, denoise=denoise, levels=FEW, solver=Renoise()
    )

    noisy = noise
    for level, (timestep, sigma) in enumerate(
        zip(FEW.timestep, FEW.sigma, strict=True)
    ):
        predicted = flow(noisy, timestep)
        x0 = noisy - sigma * predicted
        np.testing.assert_allclose(passes.noisy[level], noisy, rtol=0, atol=1e-5)
        np.testing.assert_allclose(passes.flow[level], predicted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(passes.x0[level], x0, rtol=0, atol=1e-5)
        if level < 3:
            then = FEW.sigma[level + 1]
            noisy = (1 - then) * x0 + then * fresh[level]
    np.testing.assert_allclose(latents, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("levels", [FEW, even_levels(7, 3.0)], ids=["few", "even"])
def test_euler_equals_a_plain_loop(levels):
    noise = normal(0)

    latents, passes, _ = sample(noise, denoise=denoise, levels=levels, solver=Euler())

    noisy, then = noise, (*levels.sigma[1:], 0.0)
    for level, timestep in enumerate(levels.timestep):
        np.testing.assert_allclose(passes.noisy[level], noisy, rtol=0, atol=1e-5)
        step = then[level] - levels.sigma[level]
        noisy = noisy + step * flow(noisy, timestep)
    np.testing.assert_allclose(latents, noisy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", [Renoise(), Euler(), UniPC(), DpmPlusPlus()])
def test_one_step_gives_the_predicted_x0(solver):
    noise = normal(0)
    levels = Levels((600.0,), (0.6,))

    latents, passes, _ = sample(noise, denoise=denoise, levels=levels, solver=solver)

    np.testing.assert_allclose(latents, passes.x0[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        latents, noise - 0.6 * flow(noise, 600.0), rtol=0, atol=1e-5
    )


def test_carry_travels_from_pass_to_pass():
    def counting(noisy, timestep, carry):
        return noisy + carry, carry + 1

    latents, passes, carry = sample(
        normal(0), carry=jnp.float32(0), denoise=counting, levels=FEW, solver=Renoise()
    )

    assert float(carry) == 4
    offset = (passes.flow - passes.noisy)[:, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(offset, [0, 1, 2, 3], atol=1e-5)


def test_fresh_noise_matters_to_renoise_only():
    noise, fresh = normal(0), normal(1, shape=(3, *SHAPE))

    follow = [(solver, False) for solver in (Euler(), UniPC(), DpmPlusPlus())]
    for solver, moves in ((Renoise(), True), *follow):
        arguments = {"denoise": denoise, "levels": FEW, "solver": solver}
        one = sample(noise, fresh, **arguments)[0]
        other = sample(noise, 2 * fresh, **arguments)[0]
        assert bool(np.abs(one - other).max() > 1e-3) == moves


def gaussian(noisy, timestep, carry):
    """The exact flow where data are normal with mean 0.7 and deviation 0.5."""
    sigma = timestep / 1000
    signal = (1 - sigma) * SPREAD**2 / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
    x0 = MEAN + signal * (noisy - (1 - sigma) * MEAN)
    return (noisy - x0) / sigma, carry


def error(solver, steps, first):
    """Distance to the exact end of the path that starts at noise level `first`."""
    z = normal(0)
    deviation = np.sqrt((1 - first) ** 2 * SPREAD**2 + first**2)
    noisy = (1 - first) * MEAN + deviation * z
    sigma = tuple(np.linspace(first, 0, steps + 1)[:-1].tolist())
    levels = Levels(tuple(1000 * s for s in sigma), sigma)
    latents = sample(noisy, denoise=gaussian, levels=levels, solver=solver)[0]
    return float(np.abs(latents - (MEAN + SPREAD * z)).max())


def orders(solver):
    errors = [error(solver, steps, 0.9) for steps in (20, 40, 80)]
    return np.log2(np.divide(errors[:-1], errors[1:])), errors


def test_euler_falls_with_the_first_power_of_the_step():
    order, _ = orders(Euler())

    assert np.all(order > 0.9) and np.all(order < 1.1)


def test_unipc_falls_with_the_second_power_of_the_step_and_beats_euler():
    order, errors = orders(UniPC())

    assert np.all(order > 1.75) and np.all(order < 2.4)
    assert errors[0] < orders(Euler())[1][0] / 8
    assert errors[2] < orders(Euler())[1][2] / 25


def test_dpmpp_falls_faster_than_the_step_and_beats_euler():
    order, errors = orders(DpmPlusPlus())

    # Its first and last steps are of first order.
    assert order[0] > 1.2 and 1.5 < order[1] < 2.4
    assert errors[0] < orders(Euler())[1][0] / 4


@pytest.mark.parametrize("grid", GRIDS)
def test_dpmpp_equals_its_formula(grid):
    noise, levels = normal(0), GRIDS[grid](6, 5.0)

    latents, passes, _ = sample(
        noise, denoise=denoise, levels=levels, solver=DpmPlusPlus()
    )

    sigma = [*levels.sigma, 0.0]
    with np.errstate(divide="ignore"):
        ratio = np.log1p(-np.array(sigma)) - np.log(sigma)
    x, before = noise, None
    for i, timestep in enumerate(levels.timestep):
        np.testing.assert_allclose(passes.noisy[i], x, rtol=0, atol=1e-5)
        x0 = x - sigma[i] * flow(x, timestep)
        h, slope = ratio[i + 1] - ratio[i], 0.0
        if i and i + 1 < len(levels):
            slope = (x0 - before) * h / (ratio[i] - ratio[i - 1]) / 2
        x = sigma[i + 1] / sigma[i] * x
        x = x - (1 - sigma[i + 1]) * np.expm1(-h) * (x0 + slope)
        before = x0
    np.testing.assert_allclose(latents, x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_unipc_beats_euler_from_pure_noise(shift):
    z = normal(0)
    levels = even_levels(48, shift)

    far = {
        solver: np.abs(
            sample(z, denoise=gaussian, levels=levels, solver=solver)[0]
            - (MEAN + SPREAD * z)
        ).max()
        for solver in (Euler(), UniPC())
    }

    assert far[UniPC()] < far[Euler()] / 4


def test_solvers_keep_a_constant_prediction():
    target = normal(3)

    def towards(noisy, timestep, carry):
        return (noisy - target) / (timestep / 1000), carry

    for solver in (Renoise(), Euler(), UniPC(), DpmPlusPlus()):
        latents = sample(
            normal(0), denoise=towards, levels=even_levels(6, 5.0), solver=solver
        )[0]
        np.testing.assert_allclose(latents, target, rtol=0, atol=2e-5)


def test_guidance_mixes_prompt_and_negative_prompt():
    with_prompt, without = normal(0), normal(1)
    both = jnp.concatenate([with_prompt, without])

    np.testing.assert_allclose(guide(both, 1.0), with_prompt, atol=1e-6)
    np.testing.assert_allclose(guide(both, 0.0), without, atol=1e-6)
    np.testing.assert_allclose(
        guide(both, 3.0), 3 * with_prompt - 2 * without, atol=1e-5
    )
    same = jnp.concatenate([without, without])
    np.testing.assert_allclose(guide(same, 7.5), without, atol=1e-5)


def loops(tree):
    """Loops, and functions handed to `scan`, `fori_loop` or `while_loop`."""
    handed = set()
    for node in ast.walk(tree):
        name = getattr(getattr(node, "func", None), "attr", None)
        if name in ("scan", "fori_loop", "while_loop"):
            handed |= {arg.id for arg in node.args if isinstance(arg, ast.Name)}
    kinds = ast.For | ast.While | ast.comprehension
    for node in ast.walk(tree):
        named = isinstance(node, ast.FunctionDef) and node.name in handed
        if isinstance(node, kinds) or named:
            yield node


def calls(node):
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            function = inner.func
            yield getattr(function, "attr", getattr(function, "id", None))


@pytest.mark.slow
def test_no_other_module_loops_over_noise_levels():
    package = pathlib.Path(anchor_jax.__file__).parent
    denoises = {"add_noise", "x0_from_flow"}
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for loop in loops(ast.parse(path.read_text(encoding="utf-8")))
        if denoises & set(calls(loop))
    }

    assert found == {"streaming/loop.py"}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", [UniPC(), DpmPlusPlus()])
@pytest.mark.parametrize("steps", [1, 2, 250, 900])
def test_coefficients_are_finite_for_any_number_of_steps(steps, solver, grid):
    levels = GRIDS[grid](steps, 5.0)

    assert np.isfinite(solver.coefficients(levels)["row"]).all()
