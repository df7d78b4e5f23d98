"""This machine: its hardware, expected speed and memory, and problems."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import time

import jax
import jax.numpy as jnp

import anchor_jax
from anchor_jax import compile_cache, places, trees
from anchor_jax.cache.policies import POLICIES
from anchor_jax.errors import UserError
from anchor_jax.io import expand
from anchor_jax.perf import roofline
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import GRIDS, PRESETS, WAN_2_1
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig
from anchor_jax.weights import checkpoint
from anchor_jax.weights.load import load_bundle

_MODELS = ("1.3B", "14B")
_POLICY = "anchor_forcing"
_GB = 10**9
_REAL_TIME = WAN_2_1.frames_per_second
_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")
_PARTS = {
    "av": ("videos", ("av",)),
    "sentencepiece": ("the tokenizer of the tiny model", ("sentencepiece",)),
    "tokenizers": ("the tokenizer of converted weights", ("tokenizers",)),
    "plan-tpu": ("anchor-jax plan for TPUs", ("libtpu",)),
    "plan-gpu": (
        "anchor-jax plan for GPUs",
        ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    ),
}
_NEEDED = ("av", "sentencepiece", "tokenizers")
_OF_MATMUL = 0.6  # a stream's FLOP/s relative to one large matrix product
_ITEMS = ("generator", "text_encoder", "vae")


def examine(weights: str | None = None, cache: places.Place | None = None) -> dict:
    """Returns the report as plain values; `do` lists suggested fixes.

    Args:
      weights: a folder, `tiny`, or None.
      cache: the folder of compiled programs, or None.
    """
    device = _device()
    known = roofline.find(device["kind"])
    chip = known or _measured(device)
    share = roofline.EFFICIENCY if known else _OF_MATMUL
    report = {
        "versions": _versions(),
        "device": device | {"chip": known.name if known else None},
        "speed": {"flops": chip.flops, "share": share},
        "kernels": _kernels(device["platform"]),
        "compiled": _compiled(cache),
        "parts": {name: _has(name) for name in _PARTS},
        "sizes": _sizes(chip, share, device["memory"]),
    }
    if weights:
        report["weights"] = _weights(weights)
    return report | {"do": _advice(report)}


def _versions() -> dict[str, str]:
    versions = {"anchor_jax": anchor_jax.__version__}
    versions["python"] = platform.python_version()
    return versions | {name: importlib.metadata.version(name) for name in _VERSIONS}


def _device() -> dict:
    """Returns the first device. `memory` is the number of bytes that jax may use."""
    devices = jax.devices()
    first = devices[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": first.platform,
        "kind": first.device_kind if first.platform != "cpu" else platform.machine(),
        "count": len(devices),
        "cores": os.cpu_count(),
        "memory": limit or _host_memory(),
    }


def _host_memory() -> int:
    """Returns this machine's memory in bytes, or 0 if it is unknown."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return 0
    pages, size = (os.sysconf(name) for name in names)
    return pages * size


def _measured(device: dict):
    """Returns a chip with the measured speed of a matrix product; it takes a second."""
    size = 1024 if device["platform"] == "cpu" else 4096
    dtype = jnp.float32 if device["platform"] == "cpu" else jnp.bfloat16
    multiply = jax.jit(lambda x: x @ x)
    x = jnp.ones((size, size), dtype)
    multiply(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + 0.7
    while time.perf_counter() < end:
        began = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return roofline.Chip(
        name=device["kind"],
        kinds=(),
        vendor="other",
        flops=2.0 * size**3 / best,
        memory=device["memory"],
        bandwidth=float("inf"),
    )


def _kernels(place: str) -> dict[str, str]:
    """Returns the name of the attention kernel for each model."""
    names = {kernel: name for name, kernel in kernels.KERNELS.items()}
    chosen = {}
    for name in (*_MODELS, "tiny"):
        model = PRESETS[name]
        kernel = kernels.choose(place, model.dtype, model.head_dim)
        chosen[name] = names.get(kernel, type(kernel).__name__)
    return chosen


def _compiled(folder: places.Place | None) -> dict:
    """Returns the folder of cached programs and its size in bytes; 0 in a bucket."""
    if folder is None or places.is_remote(folder) or not folder.is_dir():
        return {"folder": folder and str(folder), "bytes": 0}
    files = (path for path in folder.rglob("*") if path.is_file())
    return {"folder": str(folder), "bytes": sum(path.stat().st_size for path in files)}


def _has(part: str) -> bool:
    """Returns whether one of a part's modules is installed."""
    return any(importlib.util.find_spec(module) for module in _PARTS[part][1])


def _sizes(chip, share: float, memory: int) -> list[dict]:
    """Returns the expected memory and speed for each model and size."""
    rows = []
    for name in _MODELS:
        for size, grid in GRIDS.items():
            stream = roofline.make_stream(
                PRESETS[name],
                grid,
                POLICIES[_POLICY],
                text=TextConfig(),
                codec=VaeConfig(),
            )
            parts = roofline.resident_bytes(stream)
            parts["working"] = roofline.working_bytes(stream)
            encoder, whole = parts["text encoder"], sum(parts.values())
            freed = max(whole - encoder, encoder)
            rows.append(
                {
                    "model": name,
                    "size": size,
                    "parts": parts,
                    "needed": whole,
                    "needed_encoder_freed": freed,
                    "fits": _fit(whole, freed, memory),
                    "frames_per_second": roofline.frames_per_second(
                        stream, chip, share
                    ),
                    "switch_seconds": roofline.switch_seconds(stream, chip, share),
                }
            )
    return rows


def _fit(whole: float, freed: float, memory: int) -> str:
    """Returns whether a stream fits: `yes`, `freed` (text encoder freed) or `no`."""
    if whole <= memory:
        return "yes"
    return "freed" if freed <= memory else "no"


def _weights(weights: str) -> dict:
    """Returns the contents of a folder of weights, or its problem."""
    try:
        return _items(weights)
    except UserError as error:
        return {"folder": weights, "problem": str(error)}


def _items(weights: str) -> dict:
    folder = expand(weights)
    if weights == "tiny" or not checkpoint.is_checkpoint(folder):
        generator = load_bundle(weights).variables
        return {"folder": weights, "items": {"generator": trees.nbytes(generator)}}
    held = [item for item in checkpoint.items(folder) if item != "meta"]
    items = {item: trees.nbytes(checkpoint.shapes(folder, item)) for item in held}
    missing = [item for item in _ITEMS if item not in items]
    found = {"folder": weights, "items": items}
    if missing:
        found["problem"] = (
            f"{weights} has no {', '.join(missing)}; convert all parts together into a"
            " new folder: anchor-jax port --help"
        )
    return found


def _advice(report: dict) -> list[str]:
    """Returns a remedy for each problem."""
    device, weights = report["device"], report.get("weights", {})
    found = [*_about_device(device), *_about_sizes(report)]
    for module in _NEEDED:
        if not report["parts"][module]:
            use = _PARTS[module][0]
            found.append(f"pip install {module}: it is required for {use}")
    if report["compiled"]["folder"] is None:
        found.append(
            f"set {compile_cache.CACHE_VARIABLE} to a folder of your own: without it"
            " every run compiles again"
        )
    if "problem" in weights:
        found.append(weights["problem"])
    return found


def _about_device(device: dict) -> list[str]:
    if device["platform"] == "cpu":
        if shutil.which("nvidia-smi"):
            return ["pip install 'anchor_jax[gpu]': jax ignores this machine's GPU"]
        if pathlib.Path("/dev/accel0").exists():
            return ["pip install 'anchor_jax[tpu]': jax ignores this machine's TPU"]
        return [
            "use a GPU or TPU for the Wan models; on a CPU use only the tiny"
            " model: anchor-jax sample --config=configs/tiny.py"
        ]
    if device["platform"] == "gpu" and device["chip"]:
        whole = roofline.find(device["kind"]).memory
        if device["memory"] < 0.85 * whole:
            return [
                "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: jax may use only"
                f" {device['memory'] / _GB:.0f} of {whole / _GB:.0f} GB"
            ]
    return []


def _about_sizes(report: dict) -> list[str]:
    if report["device"]["platform"] == "cpu":
        return []
    fits = {row["fits"] for row in report["sizes"] if row["model"] == _MODELS[0]}
    found = []
    if "freed" in fits:
        found.append(
            "use text_encoder=free where the table says so: the text encoder and the"
            " generator do not fit together"
        )
    if "yes" not in fits and "freed" not in fits:
        found.append("use a device with more memory: no Wan model fits on this one")
    fast = [row for row in report["sizes"] if row["frames_per_second"] >= _REAL_TIME]
    if not fast:
        found.append(
            f"expect less than real time ({_REAL_TIME} frames/s) at every size"
        )
    return found


def lines(report: dict) -> list[str]:
    """Returns the report as lines of text."""
    device, compiled = report["device"], report["compiled"]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    kernels = ", ".join(f"{v} for {k}" for k, v in report["kernels"].items())
    parts = ", ".join(
        name if there else f"{name} missing ({_PARTS[name][0]})"
        for name, there in report["parts"].items()
    )
    speed = report["speed"]
    source = "data sheet" if device["chip"] else "measured with a matrix product"
    shown = [
        f"versions   {versions}",
        f"device     {device['count']} x {device['kind']} ({device['platform']},"
        f" {device['cores']} host cores), {device['memory'] / _GB:.1f} GB for jax",
        f"speed      {speed['flops'] / 1e12:.3g} Tflop/s ({source})",
        f"attention  kernels: {kernels}",
        f"compiled   {compiled['folder'] or 'not cached'},"
        f" {compiled['bytes'] / 1e6:.1f} MB",
        f"parts      {parts}",
    ]
    if "items" in report.get("weights", {}):
        held = report["weights"]["items"].items()
        items = ", ".join(f"{name} {n / _GB:.2f} GB" for name, n in held)
        shown.append(f"weights    {report['weights']['folder']}: {items}")
    shown += ["", *_table(report)]
    shown += ["", *(f"do: {what}" for what in report["do"] or ["nothing; no problems"])]
    return shown


def _number(value: float) -> str:
    """Formats a number with three digits, without an exponent, in eight columns."""
    return f"{value:8.0f}" if value >= 100 else f"{value:8.3g}"


_FITS = {"yes": "yes", "freed": "text_encoder=free", "no": "no"}


def _table(report: dict) -> list[str]:
    share = report["speed"]["share"]
    shown = [
        f"Expected with policy {_POLICY} in bfloat16, at {share:.0%} of the speed"
        " above; memory in GB, from formulas:",
        "model  size     weights  cache   text    VAE  working  frames/s  switch s"
        "  fits",
    ]
    for row in report["sizes"]:
        parts = row["parts"]
        vae = parts["decoder"] + parts["decoder state"]
        values = (parts["generator"], parts["cache"], parts["text encoder"], vae)
        weights, cache, text, vae = (value / _GB for value in values)
        shown.append(
            f"{row['model']:<5}  {row['size']:<7}  {weights:7.1f}  {cache:5.1f}"
            f"  {text:5.1f}  {vae:5.1f}  {parts['working'] / _GB:7.1f}"
            f"  {_number(row['frames_per_second'])}  {_number(row['switch_seconds'])}"
            f"  {_FITS[row['fits']]}"
        )
    return shown
