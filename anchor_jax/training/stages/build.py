"""The config of a training, and its stage with state, weights and data."""

import dataclasses
import pathlib

from jax.sharding import Mesh

from anchor_jax import sharding
from anchor_jax.errors import UserError, suggest
from anchor_jax.training import placement
from anchor_jax.training.data.kinds import Batches, DataConfig
from anchor_jax.training.data.order import Share
from anchor_jax.training.placement import Arrays
from anchor_jax.training.stages.base import InitialNetworks, Prepared, StageKind
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.registry import STAGES
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.training.state import Ema, Optimizer
from anchor_jax.wan.spec import WAN_2_1, ModelConfig
from anchor_jax.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The section `lora`: low-rank updates of generator and critic.

    Attributes:
      rank: of the updates; 0 trains every parameter.
    """

    rank: int = 0


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """The section `samples`: the videos that are made while a training runs.

    Attributes:
      prompts: a script a video, as `anchor-jax sample` takes them: "PROMPT | PROMPT"
        switches; without any, the tiny world's or the first ones of the data.
      num: videos, where no prompts are given.
      frames: latent frames; of a bidirectional teacher at most those of its clips.
      policy: what streams remember; without a value `distillation.policy`, and the
        whole clip for a bidirectional teacher.
      steps: of Euler, for networks that are not distilled.
      grid: the noise levels of these steps, of `flow.GRIDS`.
      guidance: of the same; 1 is none.
    """

    prompts: tuple[str, ...] = ()
    num: int = 4
    frames: int = WAN_2_1.clip_frames
    policy: str | None = None
    steps: int = 20
    grid: str = "even"
    guidance: float = 2.5


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The fields of a training's config, with the paper's values.

    Attributes:
      stage: a name in `stages.registry`: "regression" (teacher, causal
        initialisation) or "distillation".
      weights: where the generator begins: "tiny", "fresh" (a random tiny model), a
        folder of ported weights, or of a training.
      teacher: weights of the real score, for distillation; of the guided network, for
        `regression.guidance`.
      critic: weights with which the fake score begins: the critic of a distillation or
        of a ported checkpoint, or a network; without a value the teacher's.
      rules: "paper", or "release", to continue published weights as trained.
      steps: in all.
      batch: videos of a step, over all devices.
      seed: of weights, noise and sequences.
      mesh: devices along data, fsdp, context, tensor; -1 fills up.
      size: pixels, such as "480x832"; without a value the weights' own.
      dtype: of activations; without a value the weights' own.
      remat: a member of jax.checkpoint_policies, or "none".
      attention: a kernel, or "auto".
      out: folder of checkpoints, logs and samples.
      save_every: steps to a checkpoint.
      keep: last checkpoints that stay.
      keep_best: checkpoints that stay for their `best_of`; 0 is none.
      best_of: a logged number; its mean since the save before, lower is better.
      log_every: steps to a line of numbers.
      sample_every: steps to sample videos, which the last step has too; 0 is never.
    """

    stage: str = "distillation"
    weights: str = "tiny"
    teacher: str | None = None
    critic: str | None = None
    rules: str = "paper"
    steps: int = 700
    batch: int = 64
    seed: int = 0
    mesh: tuple[int, ...] = (1, -1, 1, 1)
    size: str | None = None
    dtype: str | None = None
    remat: str = "none"
    attention: str = "auto"
    lora: LoraConfig = LoraConfig()
    regression: RegressionConfig = RegressionConfig()
    distillation: DistillationConfig = DistillationConfig()
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
    out: str = "runs/train"


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
      config: of the training.
      bundle: where the generator begins.
      batches: number -> batch, as the stage takes it. None: nothing will run.
      teacher: the real score, for distillation; or whose guided flow is regressed.
      critic: where the fake score begins; None: as the teacher.
      on: makes and places arrays; None: on the mesh of the config.

    Raises:
      UserError: Parts of the config do not go together.
    """
    stage = find_stage(config)
    on = on or Arrays(make_mesh(config))
    _check_fits(bundle.model, teacher=teacher, critic=critic)
    return stage.prepare(config, InitialNetworks(bundle, teacher, critic), batches, on)


def open_source(
    config: TrainConfig,
    bundle: Bundle,
    folder: pathlib.Path,
    share: Share | None = None,
    most: int | None = None,
) -> Batches:
    """Returns the batches of a config's stage.

    Args:
      config: of the training.
      bundle: weights with the tokenizer, the text encoder and the codec.
      folder: the training's folder.
      share: the videos of a batch that this process makes. None: all of them.
      most: number of examples to prepare. None: all.

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
    """Raises unless all networks have the generator's latents and prompts."""
    for name, other in others.items():
        for field in ("latent_channels", "text_dim", "text_len"):
            ours = getattr(model, field)
            theirs = getattr(other.model, field) if other else ours
            if theirs != ours:
                raise UserError(
                    f"config.{name}: its {field} is {theirs}, the generator's {ours};"
                    " choose weights with the same codec and text encoder"
                )


def make_mesh(config: TrainConfig, devices=None) -> Mesh:
    """Returns the mesh of a config, of all devices unless they are given.

    Raises:
      UserError: It does not fit the devices or the batch.
    """
    try:
        mesh = sharding.make_mesh(config.mesh, devices)
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
    split = placement.videos_at_once(mesh)
    if config.batch % split:
        raise UserError(
            f"config.batch={config.batch} must be a multiple of data x fsdp ="
            f" {split} devices; choose {-(-config.batch // split) * split}"
        )
    return mesh
