"""The config of a training, and its stage with state, weights and data."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

from jax.sharding import Mesh

from anchor_jax import sharding
from anchor_jax.errors import UserError, suggest
from anchor_jax.training import placement
from anchor_jax.training.data.kinds import Batches, DataConfig
from anchor_jax.training.data.order import Share
from anchor_jax.training.placement import Arrays
from anchor_jax.training.stages.base import InitialNetworks, Prepared, StageKind
from anchor_jax.training.stages.registry import STAGES
from anchor_jax.training.state import Ema, Optimizer
from anchor_jax.training.watch.preflight import PreflightConfig
from anchor_jax.training.watch.profiles import ProfileConfig
from anchor_jax.wan.spec import WAN_2_1, ModelConfig
from anchor_jax.watchdog import WatchdogConfig
from anchor_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The section `lora`: low-rank updates of generator and critic.

    Attributes:
      rank: rank of the updates. At 0 every parameter is trained.
    """

    rank: int = 0


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """The section `samples`: the videos that are made while a training runs.

    Attributes:
      prompts: one script per video, in the form of `anchor-jax sample`: "PROMPT |
        PROMPT" has a switch. Empty takes prompts of the tiny world or the first ones of
        the data.
      num: number of videos if `prompts` is empty.
      frames: latent frames per video. A bidirectional teacher makes at most one clip.
      policy: cache policy of the streams. None takes `distillation.policy`, or the
        whole clip for a bidirectional teacher.
      steps: number of Euler steps, for networks that are not distilled.
      grid: noise levels of these steps, a name in `flow.GRIDS`.
      guidance: guidance scale for the same networks; 1 turns guidance off.
    """

    prompts: tuple[str, ...] = ()
    num: int = 4
    frames: int = WAN_2_1.clip_frames
    policy: str | None = None
    steps: int = 20
    grid: str = "even"
    guidance: float = 2.5


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """The fields that the config of every training has, with the paper's values.

    Attributes:
      stage: a name in `stages.registry`: "regression" (teacher, causal
        initialisation) or "distillation".
      weights: initial weights of the generator: "tiny", "fresh" (a random tiny model),
        a folder of ported weights, or the folder of a training.
      teacher: weights of the real score for distillation, or of the guided network for
        `regression.guidance`.
      critic: initial weights of the fake score: the critic of a distillation or of a
        ported checkpoint, or a network. None takes the teacher's.
      rules: "paper" or "release". "release" continues published weights under the rules
        of their training.
      steps: total number of steps.
      batch: videos per step, over all devices.
      seed: seed of weights, noise and sequences.
      mesh: devices along data, fsdp, context, tensor. One may be -1, which is
        inferred from the number of devices. If data and fsdp are, fsdp gets the devices
        of one machine, or up to 16 TPUs.
      microbatches: number of parts of the batch whose gradients are computed one after
        another and added, for less memory.
      prefetch: number of batches that are made ahead of their step; 0 makes each when
        its step starts.
      size: height and width in pixels, such as "480x832". None takes the size of the
        weights.
      dtype: type of activations. None takes the type that the weights name.
      remat: a member of jax.checkpoint_policies, or "none".
      attention: a kernel, or "auto".
      out: folder for checkpoints, logs and samples.
      watchdog: when a training that makes no progress is ended.
      preflight: checks before the first step.
      profile: profiles of a running training, on request.
      save_every: steps between checkpoints.
      keep: number of newest checkpoints to retain.
      keep_best: number of checkpoints to retain for the lowest `best_of`; 0 retains
        none.
      best_of: name of a logged metric. Checkpoints are compared by its mean since the
        previous checkpoint; lower is better.
      log_every: steps between lines of metrics.
      sample_every: steps between sample videos; the last step makes them too. 0 makes
        none.
    """

    stage: str = "distillation"
    weights: str = "tiny"
    teacher: str | None = None
    critic: str | None = None
    rules: str = "paper"
    steps: int = 700
    batch: int = 64
    seed: int = 0
    mesh: tuple[int, ...] = (-1, -1, 1, 1)
    microbatches: int = 1
    prefetch: int = 1
    size: str | None = None
    dtype: str | None = None
    remat: str = "none"
    attention: str = "auto"
    lora: LoraConfig = LoraConfig()
    optimizer: Optimizer = Optimizer()
    critic_optimizer: Optimizer = Optimizer(learning_rate=4e-7)
    ema: Ema = Ema()
    data: DataConfig = DataConfig()
    samples: SamplesConfig = SamplesConfig()
    save_every: int = 100
    keep: int = 2
    keep_best: int = 0
    best_of: str = "loss"
    log_every: int = 10
    sample_every: int = 250
    watchdog: WatchdogConfig = WatchdogConfig()
    preflight: PreflightConfig = PreflightConfig()
    profile: ProfileConfig = ProfileConfig()
    out: str = "runs/train"


def train_config(stages: Mapping[str, StageKind]) -> type[SharedConfig]:
    """Returns the class of a training's config.

    Raises:
      ValueError: A stage has the name of a field that every training has.
    """
    taken = {field.name for field in dataclasses.fields(SharedConfig)} & set(stages)
    if taken:
        raise ValueError(
            f"stage {min(taken)!r}: every training has a field of this name; choose"
            " another name for the stage"
        )
    sections = "\n".join(
        f"  {name}: the section of the stage, a `{kind.section.__name__}`."
        for name, kind in stages.items()
    )
    return dataclasses.make_dataclass(
        "TrainConfig",
        [(name, kind.section, kind.section()) for name, kind in stages.items()],
        bases=(SharedConfig,),
        frozen=True,
        namespace={
            "__doc__": "The config of a training: the fields of `SharedConfig`, and a"
            f" section for each stage.\n\nAttributes:\n{sections}\n",
            "__module__": __name__,
        },
    )


TrainConfig = train_config(STAGES)


def prepare(
    config: TrainConfig,
    bundle: Bundle,
    batches: Batches | None,
    teacher: Bundle | None = None,
    critic: Bundle | None = None,
    on: Arrays | None = None,
) -> Prepared:
    """Returns a stage with its first state.

    Args:
      config: config of the training.
      bundle: initial weights of the generator.
      batches: function from a number to the stage's batch. None if no step will run.
      teacher: the real score for distillation, or the network whose guided flow is
        regressed.
      critic: initial weights of the fake score. None takes the teacher's.
      on: object that makes and places arrays. None uses the mesh of the config.

    Raises:
      UserError: Parts of the config are incompatible.
    """
    stage = find_stage(config)
    on = on or Arrays(make_mesh(config))
    _check_fits(bundle.model, teacher=teacher, critic=critic)
    _check_mesh(on.mesh, bundle, teacher, critic)
    with _naming_mesh():
        return stage.prepare(
            config, InitialNetworks(bundle, teacher, critic), batches, on
        )


def open_source(
    config: TrainConfig,
    bundle: Bundle,
    folder: pathlib.Path,
    share: Share | None = None,
    most: int | None = None,
) -> Batches:
    """Returns the batches of a config's stage.

    Args:
      config: config of the training.
      bundle: weights with the tokenizer, the text encoder and the codec.
      folder: the training's folder.
      share: the rows of each batch that this process makes. None makes all of them.
      most: largest number of examples to prepare. None prepares all.

    Raises:
      UserError: The data do not suit the stage, or a file is wrong.
    """
    share = share or Share.whole(config.batch)
    return find_stage(config).open_source(config, bundle, folder, share, most)


def find_stage(config: TrainConfig) -> StageKind:
    """Returns the kind of a config's stage.

    Raises:
      UserError: The name is unknown.
    """
    if config.stage not in STAGES:
        known = suggest(config.stage, STAGES, "stages")
        raise UserError(f"config.stage={config.stage!r}{known}")
    return STAGES[config.stage]


def _check_fits(model: ModelConfig, **others: Bundle | None) -> None:
    """Raises UserError unless all networks take the generator's latents and prompts."""
    for name, other in others.items():
        for field in ("latent_channels", "text_dim", "text_len"):
            ours = getattr(model, field)
            theirs = getattr(other.model, field) if other else ours
            if theirs != ours:
                raise UserError(
                    f"config.{name}: its {field} is {theirs}, the generator's {ours};"
                    " choose weights with the same codec and text encoder"
                )


def _check_mesh(mesh: Mesh, bundle: Bundle, *others: Bundle | None) -> None:
    """Raises UserError unless devices can share all heads and tokens."""
    model = bundle.model
    rows, columns = bundle.grid.tokens(model.patch, model.family.strides)
    heads = {one.model.num_heads for one in (bundle, *others) if one is not None}
    with _naming_mesh():
        sharding.check_heads(mesh.shape, heads, rows * columns, model.text_len)


@contextlib.contextmanager
def _naming_mesh() -> Iterator[None]:
    """Turns the refusal of a mesh into a UserError that names the field."""
    try:
        yield
    except sharding.Unsplittable as error:
        raise UserError(f"config.mesh: {error}") from error


def make_mesh(config: TrainConfig, devices=None) -> Mesh:
    """Returns the mesh of a config, over all devices by default.

    Raises:
      UserError: The mesh does not fit the devices or the batch.
    """
    try:
        mesh = sharding.make_mesh(config.mesh, devices)
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
    split, parts = placement.videos_at_once(mesh), config.microbatches
    if config.batch % split:
        fit = {config.batch // split * split, -(-config.batch // split) * split} - {0}
        raise UserError(
            f"config.batch={config.batch} must be a multiple of data x fsdp = {split};"
            f" choose {' or '.join(map(str, sorted(fit)))}, or another config.mesh"
        )
    each = config.batch // split
    if each % parts:
        fit = [n for n in range(1, each + 1) if each % n == 0]
        raise UserError(
            f"config.microbatches={parts} does not divide the {each} videos that each"
            f" device has of config.batch={config.batch}; choose it from"
            f" {', '.join(map(str, fit))}, or a batch that is a multiple of"
            f" {split * parts}"
        )
    return mesh
