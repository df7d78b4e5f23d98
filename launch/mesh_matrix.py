"""Runs small trainings and a stream on every mesh of 8 devices, and compares.

    python launch/mesh_matrix.py [--out=FILE] [--only=data,fsdp,context,tensor]

The devices are simulated on the CPU. Each row of the printed table is one mesh. Losses,
gradients and latents are compared with those of one device. `arrays` is the largest
ratio of an array's bytes on a device to its size over the product of the mesh axes that
split it; `flops` is the largest ratio of a program's operations on a device to those on
one device over 8. The status is 1 if a number is above its limit. It takes about 70
minutes on two cores.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile

DEVICES = 8
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA. Collectives of simulated devices block one each; with more threads two
# collectives of one device run at once, and XLA mixes them up.
os.environ.setdefault("NPROC", str(DEVICES))
# Without the emitters programs compile in half of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={DEVICES}"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # A busy machine may keep a simulated device waiting.
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
)

import device_results  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from anchor_jax import processes, sharding  # noqa: E402
from anchor_jax.cache.policies import POLICIES  # noqa: E402
from anchor_jax.flow import few_step_levels  # noqa: E402
from anchor_jax.streaming import stream  # noqa: E402
from anchor_jax.streaming.types import PromptChange, StreamSetup  # noqa: E402
from anchor_jax.training.placement import Arrays, of_frozen  # noqa: E402
from anchor_jax.training.stages import build  # noqa: E402
from anchor_jax.training.stages.base import Cursor  # noqa: E402
from anchor_jax.training.stages.build import LoraConfig, TrainConfig  # noqa: E402
from anchor_jax.training.stages.distillation import DistillationConfig  # noqa: E402
from anchor_jax.training.stages.regression import RegressionConfig  # noqa: E402
from anchor_jax.training.state import Ema, Optimizer  # noqa: E402
from anchor_jax.wan import shapes  # noqa: E402
from anchor_jax.wan.spec import LatentGrid, ModelConfig  # noqa: E402
from anchor_jax.wan.text import TextConfig  # noqa: E402
from anchor_jax.wan.vae import VaeCodec, VaeConfig  # noqa: E402
from anchor_jax.weights.bundle import Bundle  # noqa: E402

MODEL = ModelConfig(
    dim=512,
    ffn_dim=2048,
    num_heads=8,
    num_layers=2,
    freq_dim=16,
    text_dim=16,
    text_len=8,
    latent_channels=4,
    dtype="float32",
)
GRID = LatentGrid(4, 64)
VAE = VaeConfig(
    base_dim=8,
    z_dim=4,
    dim_mult=(1, 2),
    temporal_downsample=(True,),
    num_res_blocks=1,
    latent_mean=(0.0,) * 4,
    latent_std=(1.0,) * 4,
    dtype="float32",
)
BATCH, FRAMES = 8, 6
ADAM = Optimizer(learning_rate=1e-3, betas=(0.9, 0.99))
DISTILL = TrainConfig(
    steps=2,
    batch=BATCH,
    distillation=DistillationConfig(
        steps=(1000, 500), frames=FRAMES, length=12, switches=(6,), every=1
    ),
    optimizer=ADAM,
    critic_optimizer=ADAM,
    ema=Ema(0.5, 0),
    remat="nothing_saveable",
)
LORA = dataclasses.replace(DISTILL, lora=LoraConfig(rank=32))
REGRESS = dataclasses.replace(
    DISTILL,
    stage="regression",
    regression=RegressionConfig(forcing="teacher", blocks=2, guidance=2.5),
)
LIMITS = {
    "losses": 1e-5,
    "gradients": 1e-5,
    "latents": 1e-5,
    "arrays": 1.1,
    "flops": 1.15,
}
CASES = {
    "first chunk": (DISTILL, 0),
    "switch, LoRA": (LORA, FRAMES),
    "regression": (REGRESS, 0),
}


def meshes() -> list[tuple[int, ...]]:
    """Returns every mesh of the devices, as (data, fsdp, context, tensor)."""
    sizes = [n for n in range(1, DEVICES + 1) if DEVICES % n == 0]
    found = itertools.product(sizes, repeat=4)
    return [one for one in found if math.prod(one) == DEVICES]


def bundle(seed: int = 0) -> Bundle:
    """Returns a small random model."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel" and leaf.ndim > 1:
            return values / np.sqrt(leaf.shape[-2])
        return 1 + 0.1 * values if name in ("scale", "gamma") else 0.1 * values

    def params(config):
        return jax.tree_util.tree_map_with_path(fill, shapes.of(config))

    generator, codec = params(MODEL), params(VAE)
    return Bundle(
        model=MODEL,
        text=TextConfig(),
        codec=VaeCodec(VAE),
        grid=GRID,
        tokenizer=None,
        encode_prompts=None,
        load_variables=lambda: {"params": generator},
        load_codec=lambda: codec,
        metadata={},
        digest="",
    )


def batches(number: int) -> dict[str, np.ndarray]:
    """Returns the batch of a number, for all stages."""
    rng = np.random.default_rng(number + 1)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    text = (BATCH, MODEL.text_len, MODEL.text_dim)
    batch = {name: draw(*text) for name in ("prompt", "switch", "negative")}
    video = (BATCH, FRAMES, GRID.height, GRID.width, MODEL.latent_channels)
    return batch | {"embedding": batch["prompt"][:, None], "latents": draw(*video)}


def wanted(stage: str):
    """Returns the batches of a stage, without the arrays that it does not read."""
    names = ("latents", "embedding", "negative")
    names = names if stage == "regression" else ("prompt", "switch", "negative")
    return lambda number: {name: batches(number)[name] for name in names}


def train_once(config: TrainConfig, start: int, mesh) -> dict:
    """Returns the losses and gradients of a step, and sizes of arrays and programs."""
    # Three networks, since the difference of equal scores is only rounding.
    networks = [bundle(seed) for seed in range(3)]
    prepared = build.prepare(
        config, networks[0], wanted(config.stage), *networks[1:], on=Arrays(mesh)
    )
    stage, state = prepared.compiled, prepared.state
    arrays = worst_array(stage, state)
    if start:
        state = in_a_sequence(state, stage.spec.setup.policy)
    batch = wanted(config.stage)(0)
    if config.stage != "regression":
        batch["requested"] = np.int32(0)
    flops = {
        name: operations(function, args, mesh)
        for name, (function, args) in stage.programs(state, batch).items()
        if "update" not in name
    }
    state, _, metrics = stage.advance(state, Cursor(0, start), 0)
    means = [
        optax.tree.get(one, "mu")
        for one in (state.opt_generator, state.opt_fake_score)
        if one is not None
    ]
    return {
        "losses": {name: float(value) for name, value in metrics.items()},
        "gradients": jax.tree.map(np.asarray, means),
        "arrays": arrays,
        "flops": flops,
    }


def in_a_sequence(state, policy):
    """Returns a state whose sequences have `FRAMES` frames of random numbers."""
    rng = np.random.default_rng(4)

    def fill(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jax.device_put(
            rng.standard_normal(x.shape).astype(np.float32), x.sharding
        )

    past = jax.tree.map(fill, state.rollout)
    index = past.cache.index
    for _ in range(FRAMES // policy.block):
        _, index = policy.write(index)
    index = jax.tree.map(
        lambda x, y: jax.device_put(np.array(x), y.sharding),
        index,
        state.rollout.cache.index,
    )
    return state.replace(rollout=past.replace(cache=past.cache.replace(index=index)))


def worst_array(stage, state) -> float:
    """Returns the largest ratio of an array's part to its share, from 64 KiB."""
    places = (stage.places, of_frozen(stage.frozen, stage.mesh))
    ratios = [1.0]
    for leaf, place in zip(
        *map(jax.tree.leaves, ((state, stage.frozen), places)), strict=True
    ):
        if leaf.nbytes >= sharding.SMALL:
            axes = jax.tree.leaves(tuple(place.spec))
            share = leaf.size / math.prod(stage.mesh.shape[axis] for axis in axes)
            ratios.append(leaf.addressable_shards[0].data.size / share)
    return max(ratios)


def operations(function, args, mesh) -> float:
    """Returns the operations of a program on one device, loops counted once."""
    with jax.set_mesh(mesh):
        compiled = function.lower(*args).compile()
    return compiled.cost_analysis()["flops"]


def sample(mesh) -> np.ndarray:
    """Returns latents of a stream with a prompt switch."""
    setup = StreamSetup(
        MODEL, GRID, POLICIES["anchor_forcing"], few_step_levels((1000, 500), 5.0)
    )
    params = bundle().variables["params"]
    places = sharding.shardings(params, sharding.GENERATOR, mesh)
    variables = {"params": jax.device_put(params, places)}
    with jax.set_mesh(mesh):
        contexts = [
            stream.project(variables, batches(n)["prompt"], setup=setup)
            for n in range(2)
        ]
        state = stream.start(contexts[0], setup=setup)
        changes = {6: PromptChange(contexts[1])}
        made = stream.run(
            variables,
            state,
            jax.random.key(0),
            range(0, 9, setup.policy.block),
            changes,
            setup=setup,
        )
        return np.concatenate([np.asarray(latents) for _, latents, _ in made], axis=1)


def distance(ours, theirs) -> float:
    """Returns the largest difference relative to the largest value of each array."""
    return float(
        np.max(
            [
                np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-12)
                for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)
            ]
        )
    )


def one_device():
    """Returns the mesh of the first device."""
    return sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])


def compare(shape: tuple[int, ...], expected: dict) -> dict:
    """Returns the largest numbers of a mesh, by their names in `LIMITS`."""
    mesh, cases = sharding.make_mesh(shape), []
    for name, (config, start) in CASES.items():
        ours, whole = train_once(config, start, mesh), expected[name]
        cases.append(
            {
                "losses": distance(ours["losses"], whole["losses"]),
                "gradients": distance(ours["gradients"], whole["gradients"]),
                "arrays": ours["arrays"],
                "flops": max(
                    DEVICES * count / whole["flops"][program]
                    for program, count in ours["flops"].items()
                ),
            }
        )
    found = {key: float(np.max([case[key] for case in cases])) for key in cases[0]}
    latents = distance(sample(mesh), expected["latents"])
    return {"mesh": list(shape), **found, "latents": latents}


def line(row: dict) -> str:
    """Returns a row of the table."""
    _, shown = device_results.meshes({"meshes": [row]})
    return f"| {' | '.join(shown)} |"


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the command, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="JSON file for the numbers; meshes that it has are not run again",
    )
    parser.add_argument("--only", help="one mesh, such as 2,2,1,2")
    given = parser.parse_args()
    rows = finished(given.out)
    known = {tuple(row["mesh"]) for row in rows}
    chosen = meshes()
    if given.only:
        chosen = [tuple(map(int, given.only.split(",")))]
    # Each program is compiled twice: once to count its operations, once to run.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_disable_most_optimizations", True)
    processes.keep_order()
    mesh = one_device()
    expected = {name: train_once(*case, mesh) for name, case in CASES.items()}
    expected["latents"] = sample(mesh)
    titles = device_results.MESH_TITLES
    say(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for shape in chosen:
        if shape in known:
            continue
        rows.append(compare(shape, expected))
        jax.clear_caches()  # Programs of other meshes are not used again.
        say(line(rows[-1]))
        if given.out:
            rows.sort(key=lambda row: row["mesh"])
            given.out.write_text(json.dumps({"meshes": rows}, indent=1))
    # Numbers that are not finite are above every limit, too.
    above = [
        (row["mesh"], name)
        for row in rows
        for name, limit in LIMITS.items()
        if not row[name] <= limit
    ]
    say(f"{len(rows)} meshes, {len(above)} numbers above their limits: {above}")
    return int(bool(above))


def finished(out: pathlib.Path | None) -> list[dict]:
    """Returns the meshes that a file has from an earlier start."""
    if out is None or not out.exists():
        return []
    return json.loads(out.read_text(encoding="utf-8"))["meshes"]


if __name__ == "__main__":
    sys.exit(main())
