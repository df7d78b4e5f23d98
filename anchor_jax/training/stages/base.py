"""The interface of a training stage, as the loop, planner, samples and command use it.

A stage's module has three parts side by side: its config section, its compiled steps
(`CompiledStage`), and its kind (`StageKind`), which `stages.registry` names.
"""

import abc
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anchor_jax.cache.policies import Policy
from anchor_jax.errors import UserError
from anchor_jax.perf.work import Use
from anchor_jax.sampling.methods import SAVED, Method
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.training import placement
from anchor_jax.training.data.kinds import Batches
from anchor_jax.training.data.order import Share
from anchor_jax.training.placement import Arrays
from anchor_jax.training.state import Ema, TrainState
from anchor_jax.wan import lora
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.weights.bundle import Bundle

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Cursor:
    """The position in the data and in the sequences: the integers of the next step.

    Attributes:
      number: number of batches, or of sequences, taken so far.
      start: first latent frame of the sequence's next chunk. At 0 a new sequence
        starts.
    """

    number: int = 0
    start: int = 0


@dataclasses.dataclass(eq=False, kw_only=True)
class CompiledStage(abc.ABC):
    """The compiled steps of a stage, with their frozen weights and their data.

    Attributes:
      spec: the static settings of the stage.
      frozen: weights without a gradient, on the mesh, by network.
      mesh: the mesh.
      places: shardings of the state.
      tx: optimizer of the generator.
      ema: settings of the running mean, or None.
      batches: function from a number to a batch of numpy arrays.
    """

    spec: Any
    frozen: Any
    mesh: Mesh
    places: TrainState
    tx: Any
    ema: Ema | None
    batches: Batches | None

    @property
    @abc.abstractmethod
    def cycle(self) -> int:
        """Number of steps after which the pattern of updates repeats."""

    @abc.abstractmethod
    def advance(self, state: TrainState, cursor: Cursor, step: int):
        """Returns state, cursor and metrics, one step later. The state is donated."""

    @abc.abstractmethod
    def programs(self, state: TrainState, batch) -> dict[str, tuple[Callable, tuple]]:
        """Returns a step's jitted functions and their arguments, by name."""

    @abc.abstractmethod
    def updates(self, step: int) -> str:
        """Returns which networks a step updates, as text."""

    @abc.abstractmethod
    def settle(self, state: TrainState, cursor: Cursor) -> tuple[TrainState, Cursor]:
        """Returns a state and a cursor from which steps take their typical time."""


@dataclasses.dataclass(frozen=True, eq=False)
class InitialNetworks:
    """The initial networks of a training.

    Attributes:
      generator: the trained network, with its text encoder and codec.
      teacher: a frozen network, or None.
      critic: the initial fake score. None takes the teacher's weights.
    """

    generator: Bundle
    teacher: Bundle | None = None
    critic: Bundle | None = None


@dataclasses.dataclass(eq=False)
class Prepared:
    """A stage that is ready to run.

    Attributes:
      compiled: the compiled steps, with weights on the mesh and with data.
      state: the state before the first step, on the mesh.
      bundle: the generator's bundle, with text encoder and codec.
      counts: number of parameters by network.
      frames: mean number of latent frames that a step reads or makes.
    """

    compiled: CompiledStage
    state: TrainState
    bundle: Bundle
    counts: Mapping[str, int]
    frames: float


class StageKind(abc.ABC):
    """A stage as the rest of the package sees it; stateless.

    `config` is a `TrainConfig` of this stage, in which the stage reads its own section.

    Attributes:
      section: dataclass of the stage's section of the config, which has the stage's
        name. Every field has a default.
      numbers: names of a step's metrics. `best_of` must be one of them.
      least: smallest value of config fields, by dotted name.
      has_critic: whether the stage also trains a fake score.
    """

    section: type
    numbers: tuple[str, ...] = ()
    least: Mapping[str, int] = {}
    has_critic = False

    @abc.abstractmethod
    def open_source(
        self,
        config,
        bundle: Bundle,
        folder: pathlib.Path,
        share: Share,
        most: int | None = None,
    ) -> Batches:
        """Returns the stage's batches.

        Args:
          config: config of the training.
          bundle: weights with the tokenizer, the text encoder and the codec.
          folder: folder of the training.
          share: the rows of each batch that this process makes.
          most: largest number of examples to prepare. None prepares all.

        Raises:
          UserError: The data do not suit the stage, or a file is wrong.
        """

    @abc.abstractmethod
    def prepare(
        self, config, networks: InitialNetworks, batches: Batches | None, on: Arrays
    ) -> Prepared:
        """Returns the stage with its first state.

        Args:
          config: config of the training.
          networks: the initial networks.
          batches: function from a number to a batch. None if no step will run.
          on: object that makes and places arrays.

        Raises:
          UserError: Parts of the config are incompatible.
        """

    def texts(self, config) -> Iterator[tuple[str, str]]:
        """Yields (field name, text) of each text in the config that is encoded."""
        yield from ()

    @abc.abstractmethod
    def describe_frames(self, config) -> str:
        """Returns the number of latent frames of a video, as text."""

    def warnings(self, prepared: Prepared) -> list[str]:
        """Returns warnings about the configured stage."""
        del prepared
        return []

    def check_plan(self, config) -> None:
        """Raises UserError if `batch_shapes` cannot describe the stage's batches."""
        del config

    @abc.abstractmethod
    def batch_shapes(self, config, bundle: Bundle) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch whose prompts are encoded, by name."""

    def bench_cycle(self, config) -> int:
        """Returns the steps after which updates repeat, if `flops` can count them.

        Raises:
          UserError: The operations of such a stage are not counted.
        """
        raise UserError(
            f"config.stage={config.stage!r}: bench measures distillations whose"
            " sequences are one chunk, such as configs/train_dmd.py:tiny"
        )

    def flops(self, compiled: CompiledStage, metrics) -> float:
        """Returns the operations of a step, from its metrics.

        Raises:
          UserError: They are not counted.
        """
        del metrics
        raise UserError(
            f"the operations of {type(compiled).__name__} are not counted; bench"
            " measures distillations, such as configs/train_dmd.py:tiny"
        )

    @abc.abstractmethod
    def uses(self, config, prepared: Prepared) -> tuple[Use, ...]:
        """Returns the uses of networks in a mean step, as `plan` counts them."""

    @abc.abstractmethod
    def method(self, training: Mapping[str, Any], base: Method = SAVED) -> Method:
        """Returns the sampling settings of weights that the stage trained.

        Args:
          training: the training's config as plain values. An older version may have
            written it.
          base: the settings of the initial weights. If these are bidirectional, the
            trained weights are too.
        """

    @abc.abstractmethod
    def sample_setup(
        self, prepared: Prepared, method: Method, policy: Policy
    ) -> StreamSetup:
        """Returns the static setup of sample videos."""

    @abc.abstractmethod
    def sample_frames(self, config) -> int:
        """Returns the number of latent frames of a clip that is denoised as a whole."""

    def sample_switches(self, config) -> bool:
        """Returns whether sample videos switch prompts by default."""
        del config
        return False

    @abc.abstractmethod
    def sample_negative(self, config) -> str:
        """Returns the negative prompt of sample videos."""


def section_of(config) -> Any:
    """Returns the section of a config's stage."""
    return getattr(config, config.stage)


def training_sizes(config, model: ModelConfig) -> ModelConfig:
    """Returns a network's sizes for training, with parameters in float32."""
    return dataclasses.replace(model, remat=config.remat, param_dtype="float32")


def used_ema(config) -> Ema | None:
    """Returns the running mean that a training keeps, or None."""
    return config.ema if config.ema.decay else None


def split_collections(config, variables, number: int, on: Arrays):
    """Returns the trained collections and the frozen ones.

    Args:
      config: config of the training.
      variables: the network's collections.
      number: number of the network. It selects the random numbers of the initial
        updates.
      on: object that makes arrays.

    Raises:
      UserError: The weights already have low-rank updates of another rank.
    """
    rank = config.lora.rank
    if not rank:
        return {"params": variables["params"]}, {}
    given = variables.get("lora")
    if given is None:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        begin = functools.partial(lora.init, rank=rank, rng=key)
        given = on.make(begin, variables["params"])
    if lora.ranks(given) != {rank}:
        has = ", ".join(map(str, sorted(lora.ranks(given))))
        raise UserError(
            f"config.lora.rank={rank}: the weights have updates of rank {has}; choose"
            " that rank, or export the weights merged"
        )
    return {"lora": given}, {"params": variables["params"]}


def place(config, state: TrainState, frozen, on: Arrays):
    """Returns the fields that every `CompiledStage` has, and the placed state."""
    mesh = on.mesh
    places = placement.of_state(state, mesh)
    placed = {
        "frozen": on.put(frozen, placement.of_frozen(frozen, mesh)),
        "mesh": mesh,
        "places": places,
        "ema": used_ema(config),
    }
    return placed, on.put(state, places)


@contextlib.contextmanager
def naming_section(section: str) -> Iterator[None]:
    """Turns the ValueError of a dataclass into a UserError that names the section."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{section}: {error}") from error


def count(tree) -> int:
    """Returns the number of values in a tree of arrays."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(dict(tree)))
