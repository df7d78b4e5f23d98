"""A stage's steps compiled for a mesh, and the order in which they run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from anchor_jax.training import placement
from anchor_jax.training.schedule import Piece
from anchor_jax.training.stages import distill, regress
from anchor_jax.training.stages.distill import Distill, Shape
from anchor_jax.training.stages.regress import Regression
from anchor_jax.training.state import Ema, TrainState

Watch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where the data and the sequences stand: the integers of the next step.

    Attributes:
      number: batches, or sequences, that were taken.
      start: first latent frame of the sequence's next chunk; 0: a new one begins.
    """

    number: int = 0
    start: int = 0


class Stage(Protocol):
    """A stage of training as the loop sees it."""

    frozen: Any
    mesh: Mesh
    places: TrainState

    def advance(self, state: TrainState, cursor: Cursor, step: int):
        """Returns state, cursor and what to watch, one step later."""

    def programs(self, state: TrainState, batch) -> dict[str, tuple[Callable, tuple]]:
        """Returns a step's jitted functions and their arguments, by name."""


@dataclasses.dataclass(eq=False)
class RegressionStage:
    """Regression: a batch a step.

    Attributes:
      stage: static.
      frozen: on the mesh.
      mesh: of all.
      places: the state's shardings.
      tx: the optimizer.
      ema: static.
      batches: number -> batch of numpy arrays.
    """

    stage: Regression
    frozen: Any
    mesh: Mesh
    places: TrainState
    tx: Any
    ema: Ema | None
    batches: Callable[[int], Mapping[str, Any]]

    @functools.cached_property
    def _step(self):
        everywhere = placement.everywhere(self.mesh)
        step = functools.partial(
            regress.regression_step, stage=self.stage, tx=self.tx, ema=self.ema
        )
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.places, everywhere),
        )

    def advance(self, state: TrainState, cursor: Cursor, step: int):
        """Returns state, cursor and what to watch, one step later."""
        del step
        batch = placement.put_batch(self.batches(cursor.number), self.mesh)
        with jax.set_mesh(self.mesh):
            state, watch = self._step(state, self.frozen, batch)
        return state, Cursor(cursor.number + 1), watch

    def programs(self, state: TrainState, batch) -> dict[str, tuple[Callable, tuple]]:
        """Returns a step's jitted functions and their arguments, by name."""
        return {"step": (self._step, (state, self.frozen, batch))}


@dataclasses.dataclass(eq=False)
class DistillStage:
    """Distillation: a critic update a step, a generator update every few.

    Attributes:
      stage: static.
      frozen: on the mesh.
      mesh: of all.
      places: the state's shardings.
      tx: the generator's optimizer.
      critic_tx: the critic's.
      ema: static.
      batches: number of a sequence -> its embeddings `prompt`, `switch`, `negative`.
      seed: of the sequences' switches.
      every: steps to a generator update.
    """

    stage: Distill
    frozen: Any
    mesh: Mesh
    places: TrainState
    tx: Any
    critic_tx: Any
    ema: Ema | None
    batches: Callable[[int], Mapping[str, Any]]
    seed: int = 0
    every: int = 5
    _gradients: dict[tuple[str, Shape], Callable] = dataclasses.field(
        default_factory=dict, init=False
    )

    def advance(self, state: TrainState, cursor: Cursor, step: int):
        """Returns state, cursor and what to watch, one step later.

        Both gradients are of the parameters before the step (training/README.md,
        "Steps").
        """
        watch, gradient = {}, None
        with jax.set_mesh(self.mesh):
            if step % self.every == 0:
                piece, batch, after = self._take(cursor)
                run = self._gradient("generator", distill.shape_of(self.stage, piece))
                state, gradient, watch = run(state, self.frozen, batch)
                # A sequence of one chunk: the critic sees the same prompts.
                cursor = cursor if self._is_short else after
            piece, batch, cursor = self._take(cursor)
            run = self._gradient("critic", distill.shape_of(self.stage, piece))
            state, by_critic, more = run(state, self.frozen, batch)
            watch |= more
            if gradient is not None:
                loss = watch["generator_loss"]
                state, more = self._update_generator(state, gradient, loss)
                watch |= more
            loss = watch["critic_loss"]
            state, more = self._update_critic(state, by_critic, loss)
        return state, cursor, watch | more

    def programs(self, state: TrainState, batch) -> dict[str, tuple[Callable, tuple]]:
        """Returns the jitted functions of steps and their arguments, by name.

        A gradient has a program for each shape of a chunk; here is one of each kind.
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

    def _kinds(self) -> dict[str, Shape]:
        """Returns the shape of the last chunk of each kind, a late switch's."""
        plan, kinds = self.stage.plan, {}
        for piece in plan.pieces(max(plan.switches, default=None)):
            shape = distill.shape_of(self.stage, piece)
            kind = "switch" if shape.turn else "later chunk"
            kinds["first chunk" if shape.is_first else kind] = shape
        return kinds

    @property
    def _is_short(self) -> bool:
        plan = self.stage.plan
        return plan.piece(plan.frames, None) is None

    def _take(self, cursor: Cursor) -> tuple[Piece, Any, Cursor]:
        """Returns a chunk, its sequence's batch on the mesh, and the next cursor."""
        plan = self.stage.plan
        switch = plan.switch(self.seed, cursor.number)
        piece = plan.piece(cursor.start, switch)
        after = Cursor(cursor.number, piece.end)
        if plan.piece(piece.end, switch) is None:
            after = Cursor(cursor.number + 1)
        return piece, self._batch(cursor.number, switch or 0), after

    @functools.cached_property
    def _batch(self):
        """The batch of a sequence, made once for all of its chunks."""
        batches, mesh = self.batches, self.mesh

        @functools.lru_cache(maxsize=1)
        def make(number: int, requested: int):
            batch = placement.put_batch(batches(number), mesh)
            return {**batch, "requested": jax.numpy.int32(requested)}

        return make

    def _gradient(self, role: str, shape: Shape) -> Callable:
        """Returns a compiled gradient, one for each shape of a chunk."""
        if (role, shape) not in self._gradients:
            self._gradients[role, shape] = self._make_gradient(role, shape)
        return self._gradients[role, shape]

    def _make_gradient(self, role: str, shape: Shape) -> Callable:
        functions = {
            "generator": (distill.generator_gradient, self.places.generator),
            "critic": (distill.critic_gradient, self.places.fake_score),
        }
        function, gradient = functions[role]
        everywhere = placement.everywhere(self.mesh)
        return jax.jit(
            functools.partial(function, stage=self.stage, shape=shape),
            donate_argnums=0,
            # A sequence's first chunk reads no rollout, and takes the old one's room.
            keep_unused=True,
            out_shardings=(self.places, gradient, everywhere),
        )

    @functools.cached_property
    def _update_generator(self):
        update = functools.partial(distill.update_generator, tx=self.tx, ema=self.ema)
        return self._updating(update)

    @functools.cached_property
    def _update_critic(self):
        return self._updating(
            functools.partial(distill.update_critic, tx=self.critic_tx)
        )

    def _updating(self, update):
        everywhere = placement.everywhere(self.mesh)
        return jax.jit(
            update,
            donate_argnums=0,
            out_shardings=(self.places, everywhere),
        )
