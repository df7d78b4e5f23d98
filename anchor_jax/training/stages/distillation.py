"""The stage `distillation`: distribution matching, on rollouts of the generator."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax import trees
from anchor_jax.cache.policies import Policy
from anchor_jax.errors import UserError
from anchor_jax.perf.work import Use
from anchor_jax.sampling.methods import SAVED, Method
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.training import placement, rollout
from anchor_jax.training.data import sources
from anchor_jax.training.data.kinds import PROMPTS, Batches
from anchor_jax.training.data.order import Share
from anchor_jax.training.placement import Arrays
from anchor_jax.training.schedule import ChunkSpan
from anchor_jax.training.stages import base, distillation_step
from anchor_jax.training.stages.base import Cursor, InitialNetworks, Prepared, StageKind
from anchor_jax.training.stages.distillation_flops import mean_uses, step_flops
from anchor_jax.training.stages.distillation_spec import make_spec, mean_chunk
from anchor_jax.training.stages.distillation_step import ChunkShape, DistillationSpec
from anchor_jax.training.state import TrainState, init_state
from anchor_jax.wan.spec import WAN_2_1
from anchor_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The section `distillation`.

    Attributes:
      policy: name of a cache policy; `anchor-jax policies` lists them.
      steps: the generator's timesteps from 0 to 1000, before the shift.
      shift: shift of the noise levels towards noise.
      guidance: real = with + guidance (with - without).
      frames: latent frames that the loss sees, and the length of a sequence's first
        chunk.
      length: latent frames per sequence. If equal to `frames`, a sequence is one chunk.
      switches: latent frames. The prompt switch of each sequence is at one of them.
      every: steps per generator update.
      negative_prompt: negative prompt of the guidance.
    """

    policy: str = "anchor_forcing"
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    guidance: float = 3.0
    frames: int = WAN_2_1.clip_frames
    length: int = WAN_2_1.clip_frames
    switches: tuple[int, ...] = ()
    every: int = 5
    negative_prompt: str = ""


@dataclasses.dataclass(eq=False, kw_only=True)
class CompiledDistillation(base.CompiledStage):
    """Every step updates the critic, every few steps also the generator.

    A batch holds a sequence's embeddings `prompt`, `switch` and `negative`.

    Attributes:
      critic_tx: optimizer of the critic.
      seed: seed of the sequences' switch frames.
      every: steps per generator update.
    """

    spec: DistillationSpec
    critic_tx: Any
    seed: int = 0
    every: int = 5
    _gradients: dict[tuple[str, ChunkShape], Callable] = dataclasses.field(
        default_factory=dict, init=False
    )

    @property
    def cycle(self) -> int:
        """Steps per generator update."""
        return self.every

    def advance(self, state: TrainState, cursor: Cursor, step: int):
        """Returns state, cursor and metrics, one step later.

        Both gradients use the parameters before the step (training/README.md, "Steps").
        """
        metrics, gradient = {}, None
        with jax.set_mesh(self.mesh):
            if step % self.every == 0:
                span, batch, after = self._take(cursor)
                run = self._gradient(
                    "generator", distillation_step.shape_of(self.spec, span)
                )
                state, gradient, metrics = run(state, self.frozen, batch)
                # In a sequence of one chunk the critic sees the same prompts.
                cursor = cursor if self._is_short else after
            span, batch, cursor = self._take(cursor)
            run = self._gradient("critic", distillation_step.shape_of(self.spec, span))
            state, by_critic, more = run(state, self.frozen, batch)
            metrics |= more
            if gradient is not None:
                loss = metrics["generator_loss"]
                state, more = self._update_generator(state, gradient, loss)
                metrics |= more
            loss = metrics["critic_loss"]
            state, more = self._update_critic(state, by_critic, loss)
        return state, cursor, metrics | more

    def updates(self, step: int) -> str:
        """Returns which networks a step updates, as text."""
        return "critic" if step % self.every else "generator and critic"

    def settle(self, state: TrainState, cursor: Cursor) -> tuple[TrainState, Cursor]:
        """Returns the state after one chunk, as most chunks are not the first."""
        state, cursor, _ = self.advance(state, cursor, 1)
        return state, cursor

    def programs(self, state: TrainState, batch) -> dict[str, tuple[Callable, tuple]]:
        """Returns the jitted functions of steps and their arguments, by name.

        Each chunk shape has its own gradient program; one of each kind is returned.
        """
        found, args = {}, (state, self.frozen, batch)
        for name, shape in self._kinds().items():
            for role in ("generator", "critic"):
                found[f"{role}, {name}"] = self._gradient(role, shape), args
        loss = jax.ShapeDtypeStruct((), "float32")
        args = state, state.generator, loss
        found["generator update"] = self._update_generator, args
        args = state, state.fake_score, loss
        found["critic update"] = self._update_critic, args
        return found

    def _kinds(self) -> dict[str, ChunkShape]:
        """Returns the shape of the last chunk of each kind, for a late switch."""
        plan, kinds = self.spec.plan, {}
        for span in plan.chunks(max(plan.switches, default=None)):
            shape = distillation_step.shape_of(self.spec, span)
            kind = "switch" if shape.switch else "later chunk"
            kinds["first chunk" if shape.is_first else kind] = shape
        return kinds

    @property
    def _is_short(self) -> bool:
        plan = self.spec.plan
        return plan.chunk(plan.frames, None) is None

    def _take(self, cursor: Cursor) -> tuple[ChunkSpan, Any, Cursor]:
        """Returns a chunk, its sequence's batch on the mesh, and the next cursor."""
        plan = self.spec.plan
        switch = plan.switch(self.seed, cursor.number)
        span = plan.chunk(cursor.start, switch)
        after = Cursor(cursor.number, span.end)
        if plan.chunk(span.end, switch) is None:
            after = Cursor(cursor.number + 1)
        return span, self._batch(cursor.number, switch or 0), after

    @functools.cached_property
    def _batch(self):
        """Returns the batch of a sequence, made once for all of its chunks."""
        batches, mesh = self.batches, self.mesh

        @functools.lru_cache(maxsize=1)
        def make(number: int, requested: int):
            batch = placement.put_batch(batches(number), mesh)
            return {**batch, "requested": jax.numpy.int32(requested)}

        return make

    def _gradient(self, role: str, shape: ChunkShape) -> Callable:
        """Returns a compiled gradient, one for each shape of a chunk."""
        if (role, shape) not in self._gradients:
            self._gradients[role, shape] = self._make_gradient(role, shape)
        return self._gradients[role, shape]

    def _make_gradient(self, role: str, shape: ChunkShape) -> Callable:
        functions = {
            "generator": (distillation_step.generator_gradient, self.places.generator),
            "critic": (distillation_step.critic_gradient, self.places.fake_score),
        }
        function, gradient = functions[role]
        everywhere = placement.everywhere(self.mesh)
        return jax.jit(
            functools.partial(function, spec=self.spec, shape=shape),
            donate_argnums=0,
            # A first chunk reads no rollout; the old rollout is donated for its memory.
            keep_unused=True,
            out_shardings=(self.places, gradient, everywhere),
        )

    @functools.cached_property
    def _update_generator(self):
        update = functools.partial(
            distillation_step.update_generator, tx=self.tx, ema=self.ema
        )
        return self._updating(update)

    @functools.cached_property
    def _update_critic(self):
        return self._updating(
            functools.partial(distillation_step.update_critic, tx=self.critic_tx)
        )

    def _updating(self, update):
        everywhere = placement.everywhere(self.mesh)
        return jax.jit(
            update,
            donate_argnums=0,
            out_shardings=(self.places, everywhere),
        )


class DistillationKind(StageKind):
    """Trains a generator and a critic alternately."""

    section = DistillationConfig
    numbers = (
        *("critic_loss", "generator_loss", "score_gap"),
        *("critic_gradient_norm", "generator_gradient_norm"),
    )
    least = {"distillation.every": 1}
    has_critic = True

    def open_source(
        self,
        config,
        bundle: Bundle,
        folder: pathlib.Path,
        share: Share,
        most: int | None = None,
    ) -> Batches:
        """Returns batches of prompts and their switch prompts."""
        del most
        sources.check_kind(config.data, PROMPTS, config.stage)
        texts = sources.open_texts(config.data, folder)
        if base.section_of(config).switches:
            sources.check_switching(texts)
        negative = base.section_of(config).negative_prompt
        return sources.open_prompts(texts, bundle, share, negative)

    def prepare(
        self, config, networks: InitialNetworks, batches: Batches | None, on: Arrays
    ) -> Prepared:
        """Returns the stage with its first state."""
        bundle, teacher = networks.generator, networks.teacher
        if teacher is None:
            raise UserError("config.teacher is missing; distillation needs a teacher")
        critic = networks.critic or teacher
        section = base.section_of(config)
        spec = make_spec(config, bundle, teacher, critic, on)
        trained, frozen = base.split_collections(config, bundle.variables, 0, on)
        fake, fake_frozen = base.split_collections(config, critic.variables, 1, on)
        tx = config.optimizer.transform(-(-config.steps // section.every))
        critic_tx = config.critic_optimizer.transform(config.steps)

        def begin(trained, fake):
            return init_state(
                config.seed,
                trained,
                tx,
                has_ema=base.used_ema(config) is not None,
                fake_score=fake,
                fake_score_tx=critic_tx,
                rollout=rollout.begin(spec.setup, config.batch, section.frames),
            )

        state = on.make(begin, trained, fake)
        weights = {
            "generator": frozen,
            "fake_score": fake_frozen,
            "real_score": dict(teacher.variables),
            "codec": bundle.codec_params,
        }
        placed, state = base.place(config, state, weights, on)
        compiled = CompiledDistillation(
            spec=spec,
            tx=tx,
            critic_tx=critic_tx,
            batches=batches,
            seed=config.seed,
            every=section.every,
            **placed,
        )
        counts = {
            "generator": base.count(bundle.variables),
            "trained": base.count(trained),
            "critic": base.count(critic.variables),
            "teacher": base.count(teacher.variables),
        }
        rollouts = 1 + 1 / section.every
        frames = config.batch * rollouts * mean_chunk(spec.plan)
        return Prepared(compiled, state, bundle, counts, frames)

    def texts(self, config) -> Iterator[tuple[str, str]]:
        """Yields the negative prompt of the teacher's guidance."""
        text = base.section_of(config).negative_prompt
        yield f"config.{config.stage}.negative_prompt", text

    def describe_frames(self, config) -> str:
        """Returns the length of the loss's clip and of a sequence."""
        section = base.section_of(config)
        sequence = f"sequences of {section.length}"
        return f"{section.frames} latent frames per update of {sequence}"

    def warnings(self, prepared: Prepared) -> list[str]:
        """Returns a warning if some chunks never update the generator."""
        compiled = prepared.compiled
        plan, every = compiled.spec.plan, compiled.every
        visited = plan.visited(every)
        others = [one.start for one in plan.chunks(None) if one.start not in visited]
        if not others:
            return []
        return [
            "warning: the generator is updated only on the chunks that start at frames"
            f" {', '.join(map(str, visited))}, never on those that start at"
            f" {', '.join(map(str, others))}; choose a distillation.length whose number"
            " of chunks has no common divisor with distillation.every + 1 ="
            f" {every + 1}"
        ]

    def batch_shapes(self, config, bundle: Bundle) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of prompts."""
        model, shape = bundle.model, jax.ShapeDtypeStruct
        prompt = shape((config.batch, model.text_len, model.text_dim), model.dtype)
        prompts = dict.fromkeys(("prompt", "switch", "negative"), prompt)
        return {**prompts, "requested": shape((), jnp.int32)}

    def bench_cycle(self, config) -> int:
        """Returns the steps per generator update, if sequences are one chunk."""
        section = base.section_of(config)
        is_short = section.length == section.frames
        return section.every if is_short else super().bench_cycle(config)

    def flops(self, compiled: CompiledDistillation, metrics) -> float:
        """Returns the operations of a step."""
        return step_flops(compiled.spec, metrics)

    def uses(self, config, prepared: Prepared) -> tuple[Use, ...]:
        """Returns what a mean step does."""
        del config
        stage, gradient = prepared.compiled, trees.nbytes(prepared.state.generator)
        return mean_uses(stage.spec, stage.every, gradient)

    def method(self, training: Mapping[str, Any], base: Method = SAVED) -> Method:
        """Returns the settings of a few-step generator."""
        del base
        section = training[training["stage"]]
        return Method(
            section["policy"],
            training["rules"],
            steps=tuple(section["steps"]),
            shift=section["shift"],
        )

    def sample_setup(
        self, prepared: Prepared, method: Method, policy: Policy
    ) -> StreamSetup:
        """Returns the setup of the rollouts, without noise in the clean pass.

        Only training adds that noise (training/README.md, "D11").
        """
        del method
        setup = prepared.compiled.spec.setup
        return dataclasses.replace(setup, policy=policy, floor=0.0)

    def sample_frames(self, config) -> int:
        """Returns the length of the loss's clip."""
        return base.section_of(config).frames

    def sample_switches(self, config) -> bool:
        """Returns whether sequences switch prompts."""
        return bool(base.section_of(config).switches)

    def sample_negative(self, config) -> str:
        """Returns the negative prompt of the training."""
        return base.section_of(config).negative_prompt


DISTILLATION = DistillationKind()
