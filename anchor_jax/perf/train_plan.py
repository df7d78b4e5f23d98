"""Compiles the steps of a training for absent machines.

Weights are shapes, and every array has the sharding that it would have on the mesh.
Memory is counted for the first chip of a machine, which also has the text encoder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from anchor_jax import trees
from anchor_jax.perf import aot
from anchor_jax.perf.aot import Compiled, Program, Refused, Target
from anchor_jax.training import placement
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Prepared
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.wan import shapes
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeCodec, VaeConfig
from anchor_jax.weights.bundle import Bundle

BLOCK = 3
"""Latent frames of a block. Smaller arrays are not counted as score matrices."""
_MACHINE = 8  # chips of a process, the first of which encodes its prompts


@dataclasses.dataclass(frozen=True)
class NetworkSizes:
    """Sizes of the networks of a training; the critic has those of the generator."""

    generator: ModelConfig
    teacher: ModelConfig
    vae: VaeConfig
    text: TextConfig


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """The programs of a training on one of the chips of a mesh; sizes in bytes.

    Attributes:
      target: name of the chip.
      mesh: number of devices by axis.
      programs: programs by name, or the compiler's reason for a refusal.
      resident: bytes of arrays that stay in memory between steps, by name.
      gradient: bytes of the largest gradient, which waits for the next program.
    """

    target: Target
    mesh: Mapping[str, int]
    programs: Mapping[str, Compiled | Refused]
    resident: Mapping[str, int]
    gradient: int

    @property
    def needed(self) -> int:
        """The peak memory."""
        kept = sum(self.resident.values()) + self.gradient
        made = [one for one in self.programs.values() if isinstance(one, Compiled)]
        return kept + max((m.outputs + m.temporaries + m.code for m in made), default=0)

    def problems(self) -> tuple[str, ...]:
        """Returns the problems of the programs and the memory, with remedies."""
        found = []
        for name, made in self.programs.items():
            if isinstance(made, Refused):
                found.append(f"{name}: {made.reason}")
            elif name != aot.ENCODER and not name.endswith("update"):
                found += [f"{name}: {problem}" for problem in made.problems()]
        chip = self.target.chip
        refused = (m.reason for m in self.programs.values() if isinstance(m, Refused))
        is_full = any(reason.startswith("does not fit") for reason in refused)
        if is_full or self.needed > chip.memory:
            found.append(
                f"{chip.name} has too little memory; recompute activations with"
                " --remat=nothing_saveable, use more --chips, or a smaller size"
            )
        return tuple(found)

    def summary(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        return {
            "chip": self.target.chip.name,
            "memory": self.target.chip.memory,
            "mesh": dict(self.mesh),
            "programs": {k: v.summary() for k, v in self.programs.items()},
            "resident": dict(self.resident),
            "gradient": self.gradient,
            "needed": self.needed,
            "problems": list(self.problems()),
        }


def plan(
    name: str,
    chips: int,
    config: TrainConfig,
    networks: NetworkSizes,
    progress: Callable[[str], None] = lambda _: None,
) -> TrainingReport:
    """Compiles a training's programs for a target.

    Args:
      name: name of the target.
      chips: number of chips in the mesh, a power of two.
      config: config of the training. Its weights are not read.
      networks: sizes of the networks.
      progress: called with each program's name before it is compiled.

    Raises:
      UserError: The target is unknown, its compiler is not installed, or the config
        does not fit the number of chips.
    """
    target = aot.find_target(name)
    mesh = build.make_mesh(config, aot.devices_of(target, chips))
    vae = dataclasses.replace(networks.vae, conv=target.conv)
    networks = dataclasses.replace(networks, vae=vae)
    prepared = on_paper(config, networks, mesh)
    made = {}
    for part, program in programs(prepared, config, networks).items():
        progress(part)
        with jax.set_mesh(mesh):
            made[part] = aot.compile_program(program)
    resident, gradient = _resident(prepared)
    progress(aot.ENCODER)
    prompts = max(1, config.batch * min(chips, _MACHINE) // chips)
    encoder, resident[aot.ENCODER] = aot.text_program(networks.text, prompts)
    (device,) = aot.devices_of(target, 1)
    made[aot.ENCODER] = aot.compile_program(aot.on_device(encoder, device))
    return TrainingReport(target, dict(mesh.shape), made, resident, gradient)


def _resident(prepared: Prepared) -> tuple[dict[str, int], int]:
    """Returns the bytes of long-lived arrays by name, and of the largest gradient."""
    state = prepared.state
    trained = {"generator": state.generator, "critic": state.fake_score}
    held = {
        **trained,
        "optimizers": (state.opt_generator, state.opt_fake_score, state.ema),
        "frozen weights": prepared.compiled.frozen,
        "rollout": state.rollout,
    }
    sizes = {name: trees.shard_nbytes(tree) for name, tree in held.items()}
    return sizes, max(sizes[name] for name in trained)


def on_paper(config: TrainConfig, networks: NetworkSizes, mesh: Mesh) -> Prepared:
    """Returns a stage whose weights and state are shapes.

    Raises:
      UserError: The text encoder would be trained too.
    """
    build.find_stage(config).check_plan(config)
    family = networks.generator.family
    grid = family.parse_size(config.size or family.size)
    vae = VaeCodec(networks.vae)
    generator = _bundle(networks.generator, vae, grid)
    teacher = _bundle(networks.teacher, vae, grid)
    on = placement.Shapes(mesh)
    return build.prepare(config, generator, None, teacher, generator, on)


def _bundle(model: ModelConfig, vae: VaeCodec, grid) -> Bundle:
    """Returns a bundle of shapes in the stored types, without a tokenizer."""
    return Bundle(
        model=model,
        text=TextConfig(),
        codec=vae,
        grid=grid,
        tokenizer=None,
        encode_prompts=None,
        load_variables=lambda: {"params": shapes.of(model)},
        load_codec=lambda: shapes.of(vae.config),
        metadata={},
        digest="",
    )


def programs(
    prepared: Prepared, config: TrainConfig, networks: NetworkSizes
) -> dict[str, Program]:
    """Returns a step's programs by name."""
    stage, bundle = prepared.compiled, prepared.bundle
    batch = build.find_stage(config).batch_shapes(config, bundle)
    batch = placement.Shapes(stage.mesh).put(
        batch, placement.of_batch(batch, stage.mesh)
    )
    rows, columns = bundle.grid.tokens(bundle.model.patch)
    features = {
        # The VAE attends to the pixels of one latent frame.
        bundle.grid.height * bundle.grid.width,
        *aot.features_of(networks.generator, config.lora.rank),
        *aot.features_of(networks.teacher),
    }
    return {
        name: Program(
            function,
            args,
            {},
            reads=frozenset(),
            tokens=BLOCK * rows * columns,
            features=frozenset(features),
        )
        for name, (function, args) in stage.programs(prepared.state, batch).items()
    }
