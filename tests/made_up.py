"""Cases that tests make up: recorded ones with other settings, computed in numpy."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent / "golden"


def write(folder, config, inputs, outputs, trace=None):
    """Writes a case; its kind is the name of the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in (("inputs", inputs), ("outputs", outputs)):
        tensors = {key: np.array(one, order="C") for key, one in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    if trace is not None:
        (folder / "trace.json").write_text(json.dumps(trace))
    return folder


def training_weights(folder):
    """Writes weights of generator, scores and codec; scores are moved generators."""
    generator = load_file(GOLDEN / "training_weights.safetensors")
    rng = np.random.default_rng(0)
    found = dict(generator)
    for score in ("fake_score", "real_score"):
        for name, value in generator.items():
            moved = value * rng.uniform(0.9, 1.1, value.shape)
            found[name.replace("generator", score, 1)] = moved.astype(np.float32)
    codec = load_file(GOLDEN / "vae" / "weights.safetensors")
    found |= {f"vae.{name}": value for name, value in codec.items()}
    save_file(found, folder / "weights.safetensors")


def training_config(**changes):
    """Returns the settings of a made-up training on these weights."""
    stored = json.loads((GOLDEN / "ode_regression/block3/config.json").read_text())
    codec = json.loads((GOLDEN / "vae/dim6_9f/config.json").read_text())["model"]
    return {
        "model": stored["model"],
        "teacher": stored["model"],
        "vae": codec,
        "latent_hw": [4, 6],
        "num_frame_per_block": 3,
        "local_attn_size": 6,
        "sink_size": 3,
        "timestep_shift": 5.0,
        "denoising_step_list": [1000, 500],
        "weights_file": "../../weights.safetensors",
        **changes,
    }


def table(shift, steps=1000, extra=True, last=0.0):
    """Returns noise levels as the official scheduler has them, in float64."""
    grid = np.linspace(1, last, steps + extra)[:steps]
    return shift * grid / (1 + (shift - 1) * grid)


def nearest(times, levels):
    """Returns the index of the entry nearest to each timestep."""
    return np.abs(1000 * levels - np.reshape(times, (-1, 1))).argmin(axis=1)


def like(levels, array):
    """Returns one number per video, to be multiplied with the videos."""
    return levels.reshape(-1, *[1] * (array.ndim - 1))
