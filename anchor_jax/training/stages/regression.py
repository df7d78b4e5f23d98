"""The stage `regression`: bidirectional teacher, causal initialisation, endpoints."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax.cache.catalog import TEACHER
from anchor_jax.cache.policies import Policy
from anchor_jax.errors import UserError
from anchor_jax.perf.work import Use
from anchor_jax.sampling.config import EVEN
from anchor_jax.sampling.methods import SAVED, Method
from anchor_jax.sampling.resolve import SOLVERS, noise_levels
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.training import placement
from anchor_jax.training.data import sources
from anchor_jax.training.data.kinds import CLIPS, Batches, ClipRequest
from anchor_jax.training.data.order import Share
from anchor_jax.training.placement import Arrays
from anchor_jax.training.stages import base
from anchor_jax.training.stages.base import Cursor, InitialNetworks, Prepared, StageKind
from anchor_jax.training.stages.regression_flops import clip_uses
from anchor_jax.training.stages.regression_step import RegressionSpec, regression_step
from anchor_jax.training.state import TrainState, init_state
from anchor_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    """The section `regression`.

    Attributes:
      forcing: "none" is one bidirectional clip. With "noise" each block has its own
        noise level and sees the noisy earlier blocks. With "teacher" it sees the clean
        earlier blocks.
      endpoints: whether to regress stored endpoints of trajectories instead of the
        flow.
      block: latent frames denoised together.
      blocks: number of blocks per clip.
      shift: shift of the noise levels towards noise.
      window: latent frames that a block sees. None shows all.
      text: whether the text encoder is trained too.
      guidance: scale of the guided flow of `teacher`, a network of the same forcing:
        without + guidance (with - without). None takes the flow of the data as the
        target.
      negative_prompt: negative prompt of the guidance.
    """

    forcing: str = "none"
    endpoints: bool = False
    block: int = 3
    blocks: int = 7
    shift: float = 5.0
    window: int | None = None
    text: bool = False
    guidance: float | None = None
    negative_prompt: str = ""

    @property
    def frames(self) -> int:
        """Number of latent frames per clip."""
        return self.block * self.blocks


@dataclasses.dataclass(eq=False, kw_only=True)
class CompiledRegression(base.CompiledStage):
    """The compiled steps of a regression; each takes one batch."""

    spec: RegressionSpec
    cycle = 1

    @functools.cached_property
    def _step(self):
        everywhere = placement.everywhere(self.mesh)
        step = functools.partial(
            regression_step, spec=self.spec, tx=self.tx, ema=self.ema
        )
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.places, everywhere),
        )

    def advance(self, state: TrainState, cursor: Cursor, step: int):
        """Returns state, cursor and metrics, one step later."""
        del step
        batch = placement.put_batch(self.batches(cursor.number), self.mesh)
        with jax.set_mesh(self.mesh):
            state, metrics = self._step(state, self.frozen, batch)
        return state, Cursor(cursor.number + 1), metrics

    def programs(self, state: TrainState, batch) -> dict[str, tuple[Callable, tuple]]:
        """Returns a step's jitted functions and their arguments, by name."""
        return {"step": (self._step, (state, self.frozen, batch))}

    def updates(self, step: int) -> str:
        """Returns which networks a step updates, as text."""
        del step
        return "generator"

    def settle(self, state: TrainState, cursor: Cursor) -> tuple[TrainState, Cursor]:
        """Returns the arguments unchanged: all steps take the same time."""
        return state, cursor


class RegressionKind(StageKind):
    """Trains one network with one loss."""

    section = RegressionConfig
    numbers = ("loss", "gradient_norm")
    least = {"regression.block": 1, "regression.blocks": 1}

    def open_source(
        self,
        config,
        bundle: Bundle,
        folder: pathlib.Path,
        share: Share,
        most: int | None = None,
    ) -> Batches:
        """Returns batches of clips, with `negative` if there is guidance."""
        section = base.section_of(config)
        sources.check_kind(config.data, CLIPS, config.stage)
        _check_endpoints(config)
        request = ClipRequest(
            config.data, bundle, share, section.frames, section.block, folder, most
        )
        negative = section.negative_prompt if section.guidance is not None else None
        return sources.open_clips(request, section.text, negative)

    def prepare(
        self, config, networks: InitialNetworks, batches: Batches | None, on: Arrays
    ) -> Prepared:
        """Returns the stage with its first state."""
        bundle = networks.generator
        teacher = _guided_teacher(config, networks.teacher)
        spec = _spec(config, bundle, teacher, on)
        trained, frozen = base.split_collections(config, bundle.variables, 0, on)
        if base.section_of(config).text:
            trained = {**trained, "text": bundle.encode_prompts.params}
        tx = config.optimizer.transform(config.steps)
        has_ema = base.used_ema(config) is not None

        def begin(trained):
            return init_state(config.seed, trained, tx, has_ema=has_ema)

        state = on.make(begin, trained)
        weights = {"generator": frozen}
        counts = {
            "generator": base.count(bundle.variables),
            "trained": base.count(trained),
        }
        if teacher is not None:
            weights["teacher"] = dict(teacher.variables)
            counts["teacher"] = base.count(teacher.variables)
        placed, state = base.place(config, state, weights, on)
        compiled = CompiledRegression(spec=spec, tx=tx, batches=batches, **placed)
        frames = config.batch * base.section_of(config).frames
        return Prepared(compiled, state, bundle, counts, frames)

    def texts(self, config) -> Iterator[tuple[str, str]]:
        """Yields the negative prompt of guidance."""
        if base.section_of(config).guidance is not None:
            text = base.section_of(config).negative_prompt
            yield f"config.{config.stage}.negative_prompt", text

    def describe_frames(self, config) -> str:
        """Returns the length of a clip."""
        return f"{base.section_of(config).frames} latent frames"

    def check_plan(self, config) -> None:
        """Raises UserError if the text encoder is trained too."""
        if base.section_of(config).text:
            raise UserError(
                f"config.{config.stage}.text=True: a plan takes prompts that are"
                f" encoded; add --config.{config.stage}.text=False"
            )

    def batch_shapes(self, config, bundle: Bundle) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of clips with one prompt."""
        model, grid, section = bundle.model, bundle.grid, base.section_of(config)
        shape, size = jax.ShapeDtypeStruct, config.batch
        prompt = (model.text_len, model.text_dim)
        batch = {"embedding": shape((size, 1, *prompt), model.dtype)}
        if section.guidance is not None:
            batch["negative"] = shape((size, *prompt), model.dtype)
        video = (size, section.frames, grid.height, grid.width, model.latent_channels)
        clip = shape(video, jnp.float32)
        if not section.endpoints:
            return {**batch, "latents": clip}
        levels = shape((size, section.blocks), jnp.float32)
        return {**batch, "noisy": clip, "target": clip, "sigma": levels}

    def method(self, training: Mapping[str, Any], base: Method = SAVED) -> Method:
        """Returns the settings of a teacher, a causal flow, or a few-step generator."""
        section, shared = training[training["stage"]], training["distillation"]
        samples, rules = training["samples"], training["rules"]
        policy = shared["policy"] if section["forcing"] != "none" else TEACHER
        # Configs of older trainings lack `grid`; their noise levels were even.
        grid = samples["grid"] if "grid" in samples else None
        if policy == base.policy == TEACHER:
            return base if grid else dataclasses.replace(base, grid=EVEN)
        if section["endpoints"]:
            steps, shift = tuple(shared["steps"]), section["shift"]
            return Method(policy, rules, steps=steps, shift=shift)
        return Method(
            policy,
            rules,
            solver="euler",
            num_steps=samples["steps"],
            grid=grid or EVEN,
            shift=section["shift"],
            guidance=samples["guidance"],
            negative_prompt=shared["negative_prompt"],
        )

    def sample_setup(
        self, prepared: Prepared, method: Method, policy: Policy
    ) -> StreamSetup:
        """Returns the setup of streams of the network with the method's solver."""
        spec = prepared.compiled.spec
        return StreamSetup(
            model=spec.model,
            grid=prepared.bundle.grid,
            policy=policy,
            levels=noise_levels(method),
            solver=SOLVERS[method.solver],
            guidance=float(method.guidance),
            kernel=spec.kernel,
        )

    def uses(self, config, prepared: Prepared) -> tuple[Use, ...]:
        """Returns what a step does."""
        frames = base.section_of(config).frames
        return clip_uses(prepared.compiled.spec, prepared.bundle.grid, frames)

    def sample_frames(self, config) -> int:
        """Returns the length of the clips."""
        return base.section_of(config).frames

    def sample_negative(self, config) -> str:
        """Returns the negative prompt with which the trained weights are sampled."""
        return config.distillation.negative_prompt


REGRESSION = RegressionKind()


def _spec(config, bundle: Bundle, teacher: Bundle | None, on: Arrays) -> RegressionSpec:
    """Returns the static settings of a regression."""
    section = base.section_of(config)
    blocks = (section.block,) * section.blocks if section.forcing != "none" else ()
    with base.naming_section(f"config.{config.stage}"):
        return RegressionSpec(
            model=base.training_sizes(config, bundle.model),
            blocks=blocks,
            forcing=section.forcing,
            endpoints=section.endpoints,
            shift=section.shift,
            window=section.window,
            text=bundle.text if section.text else None,
            teacher=base.training_sizes(config, teacher.model) if teacher else None,
            guidance=section.guidance if teacher else 1.0,
            kernel=on.kernel(config.attention, bundle.model),
            microbatches=config.microbatches,
        )


def _guided_teacher(config, teacher: Bundle | None) -> Bundle | None:
    """Returns the network whose guided flow is regressed, or None without guidance."""
    if base.section_of(config).guidance is None:
        return None
    if teacher is None:
        raise UserError(
            "config.teacher is missing; regression.guidance takes the guided flow of a"
            " teacher, which may be the network that config.weights names"
        )
    return teacher


def _check_endpoints(config) -> None:
    """Raises UserError unless stored states and endpoint regression go together."""
    section, has_states = base.section_of(config), CLIPS[config.data.kind].has_states
    if has_states != section.endpoints or has_states and section.forcing != "noise":
        raise UserError(
            f"config.data.kind={config.data.kind!r} with regression.endpoints="
            f"{section.endpoints} and forcing={section.forcing!r}: endpoints are those"
            " of data.kind='trajectories', regressed with forcing='noise'"
        )
