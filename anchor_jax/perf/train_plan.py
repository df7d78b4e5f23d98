"""Estimates the steps of a training on chips, and compiles them for absent machines.

Weights are shapes, and every array has the sharding that it would have on the mesh.
Memory is counted for the first chip of a machine, which also has the text encoder.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from anchor_jax import sharding, trees
from anchor_jax.errors import UserError
from anchor_jax.perf import aot, compiling, links, roofline, targets, work
from anchor_jax.perf.compiling import Compiled, Program, Refused
from anchor_jax.perf.links import Layout
from anchor_jax.perf.targets import Target, Topology
from anchor_jax.perf.work import Setting, Step, Use
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
_GB = 10**9


@dataclasses.dataclass(frozen=True)
class NetworkSizes:
    """Sizes of the networks of a training; the critic has those of the generator."""

    generator: ModelConfig
    teacher: ModelConfig
    vae: VaeConfig
    text: TextConfig


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A training by formula.

    Attributes:
      step: a mean step.
      working: rough bytes of the working memory of its largest program.
      uses: what the step does.
      setting: chips, mesh and batch.
      trained: bytes whose gradients a mean step reduces, by network.
      has_programs: whether the step's collectives are those of compiled programs.
    """

    step: Step
    working: float
    uses: tuple[Use, ...]
    setting: Setting
    trained: Mapping[str, float]
    has_programs: bool = False

    def attention_seconds(self, role: str) -> float:
        """Returns the seconds of self-attention of one run of a role's program."""
        done = sum(use.attention for use in self.uses if use.role == role)
        speed = self.step.peak * self.step.efficiency
        return done * self.setting.batch / speed

    def summary(self) -> dict[str, Any]:
        """Returns the numbers as plain values; operations are those of a step."""
        step, batch = self.step, self.setting.batch
        names = ("flops", "again", "compute", "memory", "links", "seconds", "mfu")
        parts: dict[str, float] = {}
        for use in self.uses:
            done = use.each * (use.flops + use.again) * batch
            key = f"{use.role}: {use.name}"
            parts[key] = parts.get(key, 0.0) + done
        return {
            "efficiency": step.efficiency,
            **{name: getattr(step, name) for name in names},
            "working": self.working,
            "has_programs": self.has_programs,
            "traffic": [dataclasses.asdict(one) for one in step.traffic],
            "parts": parts,
        }


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """The programs of a training on one of the chips of a mesh; sizes in bytes.

    Attributes:
      target: name of the chip.
      mesh: number of devices by axis.
      programs: programs by name, or the compiler's reason for a refusal. Without a
        compiler there are none, and working memory is a formula.
      resident: bytes of arrays that stay in memory between steps, by name.
      gradient: bytes of the largest gradient, which waits for the next program.
      estimate: the training by formula, or None.
      topology: the chips, as `parse_topology` reads them.
      smaller: a smaller setting that fits, if this one does not.
    """

    target: Target
    mesh: Mapping[str, int]
    programs: Mapping[str, Compiled | Refused]
    resident: Mapping[str, int]
    gradient: int
    estimate: Estimate | None = None
    topology: str = ""
    smaller: str = ""

    @property
    def needed(self) -> int:
        """The peak memory."""
        kept = sum(self.resident.values()) + self.gradient
        if not self.programs:
            return round(kept + (self.estimate.working if self.estimate else 0))
        made = [one for one in self.programs.values() if isinstance(one, Compiled)]
        return kept + max((m.outputs + m.temporaries + m.code for m in made), default=0)

    @property
    def lacks_memory(self) -> bool:
        """Whether the chip has too little memory."""
        refused = (m.reason for m in self.programs.values() if isinstance(m, Refused))
        is_full = any(reason.startswith("does not fit") for reason in refused)
        return is_full or self.needed > self.target.chip.memory

    @property
    def fits(self) -> bool:
        """Whether the chip has enough memory, and no program was refused."""
        refused = [one for one in self.programs.values() if isinstance(one, Refused)]
        return not refused and not self.lacks_memory

    @property
    def is_close(self) -> bool:
        """Whether the error of the formula for working memory decides if it fits."""
        if self.programs or self.estimate is None:
            return False
        error = work.ERROR * self.estimate.working
        return abs(self.target.chip.memory - self.needed) < error

    def problems(self) -> tuple[str, ...]:
        """Returns the problems of the programs and the memory, with remedies."""
        found = []
        for name, made in self.programs.items():
            if isinstance(made, Refused):
                found.append(f"{name}: {made.reason}")
            elif name != aot.ENCODER and not name.endswith("update"):
                found += [f"{name}: {problem}" for problem in made.problems()]
        if self.lacks_memory:
            again = "recompute activations with --remat=nothing_saveable, "
            if self.estimate and self.estimate.setting.remat == "nothing_saveable":
                again = ""
            found.append(
                f"{self.target.chip.name} has too little memory; {again}use more"
                " chips, or a smaller size"
            )
            found += [f"by formula it fits with {self.smaller}"] * bool(self.smaller)
        return tuple(found)

    def runs(self, value: Callable[[Compiled], float]) -> list[tuple[float, Compiled]]:
        """Returns what a mean step runs: programs, and how often.

        For each role that is the program with the largest value, and the update.
        Programs that were not compiled are left out.
        """
        roles = {use.role: use.each for use in self.estimate.uses}
        found = []
        for role, each in roles.items():
            made = {
                name: one
                for name, one in self.programs.items()
                if name.startswith(role) and isinstance(one, Compiled)
            }
            updates = [one for name, one in made.items() if name.endswith("update")]
            others = [one for name, one in made.items() if not name.endswith("update")]
            chosen = [max(others, key=value)] if others else []
            found += [(each, one) for one in (*chosen, *updates)]
        return found

    def with_programs(self) -> "TrainingReport":
        """Returns the report with a mean step that has the programs' collectives."""
        if self.estimate is None or not self.programs:
            return self
        rows = [
            row.repeated(each)
            for each, one in self.runs(compiling.link_seconds)
            for row in one.traffic
        ]
        step = dataclasses.replace(self.estimate.step, traffic=links.merged(rows))
        made = dataclasses.replace(self.estimate, step=step, has_programs=True)
        return dataclasses.replace(self, estimate=made)

    def seconds_compiler(self) -> float | None:
        """Returns the seconds of a mean step by the compiler, or None.

        Its estimates leave kernels out; self-attention counts by formula. Collectives
        overlap with nothing, and passes that may be left out count as run.
        """
        if self.estimate is None:
            return None
        runs = self.runs(lambda one: one.estimate or 0.0)
        refused = [one for one in self.programs.values() if isinstance(one, Refused)]
        if not runs or refused or any(one.estimate is None for _, one in runs):
            return None
        total = sum(
            each * (one.estimate + compiling.link_seconds(one)) for each, one in runs
        )
        roles = {use.role: use.each for use in self.estimate.uses}
        return total + sum(
            each * self.estimate.attention_seconds(role) for role, each in roles.items()
        )

    def summary(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        return {
            "chip": self.target.chip.name,
            "topology": self.topology,
            "memory": self.target.chip.memory,
            "mesh": dict(self.mesh),
            "programs": {k: v.summary() for k, v in self.programs.items()},
            "resident": dict(self.resident),
            "gradient": self.gradient,
            "needed": self.needed,
            "fits": self.fits,
            "is_close": self.is_close,
            "formula": self.estimate and self.estimate.summary(),
            "seconds_compiler": self.seconds_compiler(),
            "problems": list(self.problems()),
        }


def plan(
    topology: Topology,
    config: TrainConfig,
    networks: NetworkSizes,
    progress: Callable[[str], None] = lambda _: None,
    *,
    compiles: bool = True,
    efficiency: float = roofline.EFFICIENCY,
    keep: pathlib.Path | None = None,
) -> TrainingReport:
    """Estimates a training's steps on a topology, and compiles its programs.

    Args:
      topology: the chips of the mesh.
      config: config of the training. Its weights are not read.
      networks: sizes of the networks.
      progress: called with each program's name before it is compiled.
      compiles: whether to compile. If false, everything but the arrays that stay in
        memory is a formula.
      efficiency: share of the chips' peak that products are assumed to reach.
      keep: folder for the texts of the compiled programs, or None.

    Raises:
      UserError: The compiler of the target is not installed, or the config does not fit
        the number of chips.
    """
    target = topology.target
    find = targets.devices_of if compiles else targets.stand_ins
    mesh = build.make_mesh(config, find(topology))
    vae = dataclasses.replace(networks.vae, conv=target.conv)
    networks = dataclasses.replace(networks, vae=vae)
    prepared = on_paper(config, networks, mesh)
    resident, gradient = _resident(prepared)
    encoder, resident[aot.ENCODER] = aot.text_program(
        networks.text, _prompts(config, topology)
    )
    layout = Layout(topology, tuple(device.id for device in mesh.devices.flat))
    made = {}
    if compiles:
        found = programs(prepared, config, networks)
        file = functools.partial(_file, keep, topology, mesh, config.remat)
        made = _compile(found, mesh, layout, progress, file)
        progress(aot.ENCODER)
        (device,) = targets.devices_of(targets.topology(topology.name))
        alone = compiling.on_device(encoder, device)
        made[aot.ENCODER] = compiling.compile_program(alone, keep=file(aot.ENCODER))
    return TrainingReport(
        target,
        dict(mesh.shape),
        made,
        resident,
        gradient,
        estimate(config, prepared, Layout(topology), efficiency),
        topology.label,
    ).with_programs()


def _prompts(config: TrainConfig, topology: Topology) -> int:
    """Returns the prompts of a machine, which its first chip encodes."""
    machine = min(topology.chips, targets.NODE)
    return max(1, config.batch * machine // topology.chips)


def _compile(
    found: Mapping[str, Program],
    mesh: Mesh,
    layout: Layout,
    progress: Callable[[str], None],
    file: Callable[[str], pathlib.Path | None],
) -> dict[str, Compiled | Refused]:
    made = {}
    for part, program in found.items():
        progress(part)
        with jax.set_mesh(mesh):
            made[part] = compiling.compile_program(program, layout, file(part))
    return made


def _file(
    keep: pathlib.Path | None, topology: Topology, mesh: Mesh, remat: str, part: str
) -> pathlib.Path | None:
    """Returns the file for a program's text, or None without a folder."""
    if keep is None:
        return None
    sides = "x".join(map(str, mesh.shape.values()))
    return keep / targets.file_name(topology, f"mesh {sides}", remat, part)


def estimate(
    config: TrainConfig, prepared: Prepared, layout: Layout, efficiency: float
) -> Estimate:
    """Returns a training by formula."""
    state, compiled = prepared.state, prepared.compiled
    setting = Setting(
        layout=layout,
        mesh=dict(compiled.mesh.shape),
        batch=config.batch,
        remat=config.remat,
        microbatches=getattr(config, "microbatches", 1),
        efficiency=efficiency,
    )
    uses = build.find_stage(config).uses(config, prepared)
    trained = {
        "generator": trees.nbytes(state.generator) / compiled.cycle,
        "critic": trees.nbytes(state.fake_score),
    }
    step = work.step(uses, setting, trained)
    working = work.working_bytes(uses, setting)
    return Estimate(step, working, uses, setting, trained)


def find_smaller(
    topology: Topology, config: TrainConfig, networks: NetworkSizes
) -> str:
    """Returns the first smaller setting that fits by formula, or an empty text."""
    for text, report in smaller_settings(topology, config, networks):
        if report.fits:
            return f"{text}: {report.needed / _GB:.1f} GB"
    return ""


def smaller_settings(
    topology: Topology, config: TrainConfig, networks: NetworkSizes
) -> Iterator[tuple[str, TrainingReport]]:
    """Yields plans that need less and less memory, with their flags.

    Each change adds to the last. A change that the chips, the batch or the networks
    cannot have is left out.
    """
    flags: dict[str, str] = {}
    for field, values in _changes(topology, config, networks):
        for value in values:
            smaller = dataclasses.replace(config, **{field: value})
            try:
                report = plan(topology, smaller, networks, compiles=False)
            except UserError:
                continue
            config, flags[field] = smaller, _flag(field, value)
            yield " ".join(flags.values()), report
            break


def _changes(
    topology: Topology, config: TrainConfig, networks: NetworkSizes
) -> Iterator[tuple[str, list[Any]]]:
    """Yields fields of a config, with values of which the first possible one counts.

    Activations are recomputed, weights are split over as many chips as they can be, a
    device takes fewer videos at a time, and the size falls.
    """
    if config.remat != "nothing_saveable":
        yield "remat", ["nothing_saveable"]
    data, fsdp, *others = sharding.infer(config.mesh, targets.stand_ins(topology))
    fewer = [n for n in range(1, data) if data * fsdp % n == 0]
    yield "mesh", [(n, -1, *others) for n in fewer]
    videos = config.batch // (data * fsdp)
    for count in range(config.microbatches + 1, videos + 1):
        if videos % count == 0:
            yield "microbatches", [count]
    family = networks.generator.family
    here = family.parse_size(config.size or family.size)
    areas = {size: one.height * one.width for size, one in family.grids.items()}
    for size in sorted(areas, key=areas.get, reverse=True):
        if areas[size] < here.height * here.width:
            yield "size", [size]


def _flag(field: str, value: Any) -> str:
    """Returns the flag of the command `plan` that gives a field a value."""
    if field == "remat":
        return f"--remat={value}"
    shown = f'"({",".join(map(str, value))})"' if field == "mesh" else value
    return f"--config.{field}={shown}"


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
