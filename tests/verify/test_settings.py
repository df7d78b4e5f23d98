"""Cases with other settings than the recorded ones pass, and wrong numbers fail."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from made_up import (
    GOLDEN,
    like,
    nearest,
    table,
    training_config,
    training_weights,
    write,
)
from safetensors.numpy import load_file, save_file

from anchor_jax.verify import run
from anchor_jax.verify.case import load_case
from anchor_jax.verify.networks import dit_params, model_config, run_dit
from anchor_jax.wan.attention import bidirectional

FRAMES = 3
NETWORK = "flow = tanh(0.7 x + a) (0.5 + t/1000) + b sin(t/300) - 0.3 x, float32"


def passes(folder):
    result = run.verify_case(folder)
    assert result.passed, run.report(result)
    return result


def is_off(folder):
    result = run.verify_case(folder)
    assert not result.passed
    return run.report(result)


def shifted(raw, shift):
    moved = shift * raw / 1000 / (1 + (shift - 1) * raw / 1000) * 1000
    return raw if shift <= 1 else moved


def scheduler(folder, *, shift, steps=50, extra=True, last=0.0, trains=False):
    """Makes up the recording of a scheduler, in float64."""
    rng, levels = np.random.default_rng(1), table(shift, steps, extra, last)
    time = np.float32([1000.0, 937.5, 833.3333, 501.3, 20.0, 0.0])
    names, shape = ("x0", "xt", "flow", "noise"), (len(time), 2, 3, 3)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name in names}
    x0, xt, flow, noise = (np.float64(one) for one in inputs.values())
    place = nearest(time, levels)
    sigma, after = like(levels[place], x0), 0.0
    if (place < steps - 1).all():
        after = like(levels[place + 1], x0)
    with np.errstate(divide="ignore", invalid="ignore"):
        back = (xt - x0) / sigma
    outputs = {
        "sigmas": levels,
        "timesteps": 1000 * levels,
        "sigma_used": levels[place],
        "training_target": noise - x0,
        "add_noise": (1 - sigma) * x0 + sigma * noise,
        "x0_from_flow": xt - sigma * flow,
        "flow_from_x0": back,
        "euler_step": xt + (after - sigma) * flow,
    }
    config = {"shift": shift, "num_steps": steps, "extra_one_step": extra}
    config |= {"sigma_min": last}
    if trains:
        bell = np.exp(-2 * ((1000 * levels - steps / 2) / steps) ** 2)
        weights = (bell - bell.min()) * steps / (bell - bell.min()).sum()
        raw = np.arange(0, 1000, 7)
        chosen = [steps, steps * 3 // 4, steps // 2]
        inputs["raw_timestep"] = raw
        outputs |= {
            "training_weights": weights,
            "training_weight_used": weights[place],
            "warped_denoising_step_list": (1000 * levels)[steps - np.array(chosen)],
            "dmd_shifted_timestep": shifted(raw, shift),
            "dmd_shifted_timestep_clamped": np.clip(shifted(raw, shift), 20, 980),
        }
        config["denoising_step_list"] = chosen
    outputs = {name: np.float32(one) for name, one in outputs.items()}
    return write(folder, config, inputs | {"timestep": time}, outputs)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        {"shift": 5.0},
        {"shift": 1.0, "extra": False},
        {"shift": 8.0, "extra": False, "last": 0.003},
        {"shift": 12.0, "last": 0.003},
        {"shift": 3.0, "steps": 1000, "trains": True},
        {"shift": 0.5, "steps": 1000, "trains": True},
    ],
)
def test_schedules_of_any_form_pass(tmp_path, form, trains):
    passes(scheduler(tmp_path / "scheduler" / "made", **{"trains": trains, **form}))


def test_another_form_of_a_schedule_fails(tmp_path):
    folder = scheduler(tmp_path / "scheduler" / "made", shift=5.0)
    config = json.loads((folder / "config.json").read_text())

    for change in ({"extra_one_step": False}, {"shift": 5.01}, {"num_steps": 49}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert "DIFFERS sigmas" in is_off(folder)
    for change in ({"num_train_timesteps": 500}, {"extra_one_step": 1}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert next(iter(change)) in is_off(folder)


def test_timesteps_are_compared_within_the_precision_of_float32(tmp_path):
    folder = tmp_path / "scheduler" / "near"
    shutil.copytree(GOLDEN / "scheduler" / "train_shift5", folder)
    outputs = load_file(folder / "outputs.safetensors")
    names = ("timesteps", "warped_denoising_step_list", "dmd_shifted_timestep")

    for name in (*names, "dmd_shifted_timestep_clamped"):
        times = outputs[name]
        # Three units in the last place of a number near 1000.
        moved = np.where(times > 512, times + np.float32(3 * 6.1035e-5), times)
        save_file(outputs | {name: moved}, folder / "outputs.safetensors")
        passes(folder)
        far = np.where(times > 512, times + np.float32(0.01), times)
        save_file(outputs | {name: far}, folder / "outputs.safetensors")
        assert f"DIFFERS {name}" in is_off(folder)


def dmd(tmp_path, guidance, shift):
    """Makes up the recording of both losses, around the networks' own passes."""
    training_weights(tmp_path)
    config = training_config(guidance_scale=guidance, timestep_shift=shift)
    folder = tmp_path / "dmd" / "made"
    config |= {"mask_first": 1, "denoising_step_list": [1000, 500]}
    rng, shape = np.random.default_rng(2), (2, FRAMES, 16, 4, 6)
    names = ("generated_latent", "dmd_noise", "critic_noise")
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name in names}
    for name in ("cond", "uncond"):
        inputs[name] = rng.standard_normal((2, 9, 48)).astype(np.float32)
    inputs["raw_timestep"] = np.full((2, 1), 640)
    inputs["critic_raw_timestep"] = np.full((2, 1), 3)
    write(folder, config, inputs, {"none": np.zeros(1)})
    outputs = _dmd_outputs(load_case(folder), inputs, guidance, shift)
    outputs = {name: np.float32(one) for name, one in outputs.items()}
    return write(folder, config, inputs, outputs)


def _score(case, prefix, noisy, time, prompt):
    """Returns the clean latents that a score tells, by the table of shift 8."""
    config = model_config(case)
    rows = np.zeros((len(prompt), config.text_len, config.text_dim), np.float32)
    rows[:, : prompt.shape[1]] = prompt
    flow, _ = run_dit(
        {"params": dit_params(case, config, prefix)},
        jnp.asarray(np.moveaxis(noisy, 2, -1), jnp.float32),
        jnp.asarray(np.repeat(time[:, None], FRAMES, axis=1), jnp.float32),
        jnp.asarray(rows),
        jnp.arange(FRAMES),
        bidirectional(FRAMES),
        config=config,
    )
    eight = table(8.0)
    sigma = like(eight[nearest(time, eight)], noisy)
    return noisy - sigma * np.moveaxis(np.float64(flow), -1, 2), sigma


def _noised(latents, noise, raw, shift):
    """Returns a role's noisy latents, their noise level, and timesteps."""
    time, levels = np.clip(shifted(np.float64(raw), shift), 20, 980), table(shift)
    sigma = like(levels[nearest(time, levels)], latents)
    return (1 - sigma) * latents + sigma * noise, sigma, time


def _dmd_outputs(case, inputs, guidance, shift):
    x, mask = np.float64(inputs["generated_latent"]), np.arange(FRAMES) >= 1
    noisy, _, time = _noised(
        x, inputs["dmd_noise"], inputs["raw_timestep"][:, 0], shift
    )
    fake, _ = _score(case, "fake_score.", noisy, time, inputs["cond"])
    real, _ = _score(case, "real_score.", noisy, time, inputs["cond"])
    free, _ = _score(case, "real_score.", noisy, time, inputs["uncond"])
    guided = real + guidance * (real - free)
    scale = np.abs(x - guided).mean(axis=(1, 2, 3, 4))
    direction = (fake - guided) / like(scale, x)
    share = mask.reshape(1, -1, 1, 1, 1) / (mask.sum() * x[:, 0].size)
    found = {
        "noisy_latent": noisy,
        "fake_x0": fake,
        "real_x0_cond": real,
        "real_x0_uncond": free,
        "real_x0_cfg": guided,
        "kl_grad_unnormalized": fake - guided,
        "normalizer": scale,
        "kl_grad": direction,
        "timestep": np.repeat(time[:, None], FRAMES, axis=1),
        "dmd_loss": 0.5 * (share * direction**2).sum(),
        "dmd_loss_grad_wrt_latent": share * direction,
        "generator_scheduler.sigmas": table(shift),
        "score_scheduler.sigmas": table(8.0),
    }
    noise, raw = inputs["critic_noise"], inputs["critic_raw_timestep"][:, 0]
    noisy, sigma, time = _noised(x, noise, raw, shift)
    clean, eight = _score(case, "fake_score.", noisy, time, inputs["cond"])
    flow = (noisy - clean) / sigma
    return found | {
        "critic.noisy_latent": noisy,
        "critic.fake_x0": clean,
        "critic.fake_flow": (noisy - clean) / eight,
        "critic.flow_from_x0_with_generator_scheduler": flow,
        "critic.timestep": np.repeat(time[:, None], FRAMES, axis=1),
        "critic_loss": np.square(flow - (noise - x)).mean(),
    }


@pytest.mark.slow
def test_distillation_at_another_guidance_passes_and_a_third_fails(tmp_path):
    folder = dmd(tmp_path, guidance=5.5, shift=3.0)
    passes(folder)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"guidance_scale": 3.0}))
    report = is_off(folder)
    assert "DIFFERS real_x0_cfg" in report and "DIFFERS dmd_loss" in report
    assert "DIFFERS fake_x0" not in report
    config["fake_guidance_scale"] = 1.0
    (folder / "config.json").write_text(json.dumps(config))
    assert "fake_guidance_scale can only be 0" in is_off(folder)


def euler(folder, *, steps, shift, by_x=0.4):
    """Makes up a run of diffusers' Euler, in float64."""
    rng = np.random.default_rng(3)
    names, shape = ("latents", "a", "b"), (2, 4, 2, 2, 2)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name in names}
    x, a, b = (np.float64(one) for one in inputs.values())
    ends = shift * np.array([1, 1e-3]) / (1 + (shift - 1) * np.array([1, 1e-3]))
    grid = np.linspace(*ends, steps)
    sigma = np.append(shift * grid / (1 + (shift - 1) * grid), 0)
    flows, states = [], []
    for level, after in zip(sigma[:-1], sigma[1:], strict=True):
        time = 1000 * level
        flow = np.tanh(by_x * x + a) * (0.5 + time / 1000)
        flow += b * np.sin(time / 300) - 0.3 * x
        x = x + (after - level) * flow
        flows.append(flow)
        states.append(x)
    outputs = {"sigmas": sigma, "timesteps": 1000 * sigma[:-1]}
    outputs |= {"flow": np.stack(flows), "latents": np.stack(states)}
    outputs = {name: np.float32(one) for name, one in outputs.items()}
    config = {"solver": "diffusers_euler", "num_steps": steps, "shift": shift}
    config["network"] = NETWORK.replace("0.7", str(by_x))
    return write(folder, config, inputs, outputs)


@pytest.mark.parametrize(("steps", "shift"), [(20, 8.0), (7, 1.0)])
def test_runs_of_other_steps_shifts_and_networks_pass(tmp_path, steps, shift):
    folder = euler(tmp_path / "solver" / "made", steps=steps, shift=shift)
    passes(folder)

    config = json.loads((folder / "config.json").read_text())
    for change, name in (
        ({"shift": shift + 0.01}, "sigmas"),
        ({"solver": "wan_unipc"}, "latents"),
        ({"network": NETWORK}, "flow"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert f"DIFFERS {name}" in is_off(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "wan_unipcs"}, "did you mean 'wan_unipc'"),
        ({"solver": ["wan_unipc"]}, "unknown"),
        ({"num_steps": 10**9}, "num_steps"),
        ({"shift": 0}, "shift"),
        ({"network": "__import__('os')"}, "with numbers for N"),
        ({"network": NETWORK.replace("t/300", "t/0")}, "divides by 0"),
    ],
)
def test_invalid_runs_are_reported(tmp_path, change, message):
    folder = tmp_path / "solver" / "made"
    shutil.copytree(GOLDEN / "solver" / "wan_unipc_20_shift3", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))

    assert message in is_off(folder)
