"""From a config to a stage with its state, weights and data, ready for the loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from anchor_jax import flow, sharding
from anchor_jax.cache import policies
from anchor_jax.cache.policies import POLICIES, Policy
from anchor_jax.errors import UserError, suggest
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.training import placement, rollout
from anchor_jax.training.data.sources import DataConfig
from anchor_jax.training.losses import ReleaseTables, Score, Tables
from anchor_jax.training.placement import Arrays
from anchor_jax.training.schedule import Plan
from anchor_jax.training.stages.distill import Distill
from anchor_jax.training.stages.programs import DistillStage, RegressionStage, Stage
from anchor_jax.training.stages.regress import Regression
from anchor_jax.training.state import Ema, Optimizer, TrainState, init_state
from anchor_jax.wan import lora
from anchor_jax.wan.spec import WAN_2_1, ModelConfig
from anchor_jax.weights.bundle import Bundle

STAGES = ("regression", "distillation")
RULES = ("paper", "release")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The section `lora`: low-rank updates of generator and critic.

    Attributes:
      rank: of the updates; 0 trains every parameter.
    """

    rank: int = 0


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
    """The section `regression`.

    Attributes:
      forcing: "none", one bidirectional clip; "noise", blocks that see earlier ones at
        noise levels of their own; "teacher", blocks that see earlier ones clean.
      endpoints: regress stored endpoints of trajectories, not the flow.
      block: latent frames denoised together.
      blocks: of a clip.
      shift: moves noise levels towards noise.
      window: latent frames that a block sees; all without a value.
      text: train the text encoder along.
      guidance: the target is the guided flow of `teacher`, a network of the same
        forcing: without + guidance (with - without); without a value it is the data's.
      negative_prompt: what guidance leads away from.
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


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The section `distillation`.

    Attributes:
      policy: `anchor-jax policies` lists them.
      steps: the generator's noise levels, of a grid of 1000 before the shift.
      shift: moves noise levels towards noise.
      guidance: real = with + guidance (with - without).
      frames: latent frames that the loss sees; a sequence's first chunk.
      length: latent frames of a sequence; as `frames`: one chunk.
      switches: latent frames, one of which is each sequence's prompt switch.
      every: steps to a generator update.
      negative_prompt: what guidance leads away from.
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
      stage: "regression" (teacher, causal initialisation) or "distillation".
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


@dataclasses.dataclass(eq=False)
class Prepared:
    """A stage ready to run.

    Attributes:
      stage: with its weights on the mesh and its data.
      state: before the first step, on the mesh.
      bundle: the generator's, with text encoder and codec.
      counts: parameters by network, for the plan.
      frames: latent frames that a step sees or makes, in the mean.
    """

    stage: Stage
    state: TrainState
    bundle: Bundle
    counts: Mapping[str, int]
    frames: float


Batches = Callable[[int], Mapping[str, np.ndarray]]


def prepare(
    config: TrainConfig,
    bundle: Bundle,
    batches: Batches,
    teacher: Bundle | None = None,
    critic: Bundle | None = None,
    on: Arrays | None = None,
) -> Prepared:
    """Returns a stage with its first state.

    Args:
      config: of the training.
      bundle: where the generator begins.
      batches: number -> batch, as the stage takes it.
      teacher: the real score, for distillation; or whose guided flow is regressed.
      critic: where the fake score begins; None: as the teacher.
      on: makes and places arrays; None: on the mesh of the config.

    Raises:
      UserError: Parts of the config do not go together.
    """
    on = on or Arrays(make_mesh(config))
    _check_fits(bundle.model, teacher=teacher, critic=critic)
    if config.stage == "regression":
        return _prepare_regression(config, bundle, batches, teacher, on)
    if config.stage == "distillation":
        if teacher is None:
            raise UserError("config.teacher is missing; distillation needs a teacher")
        return _prepare_distillation(
            config, bundle, batches, teacher, critic or teacher, on
        )
    known = suggest(config.stage, STAGES, "stages")
    raise UserError(f"config.stage={config.stage!r}{known}")


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


def _prepare_regression(
    config, bundle: Bundle, batches, teacher: Bundle | None, on: Arrays
) -> Prepared:
    section = config.regression
    teacher = _guided_teacher(section, teacher)
    blocks = (section.block,) * section.blocks if section.forcing != "none" else ()
    with _naming("config.regression"):
        stage = Regression(
            model=_model(config, bundle.model),
            blocks=blocks,
            forcing=section.forcing,
            endpoints=section.endpoints,
            shift=section.shift,
            window=section.window,
            text=bundle.text if section.text else None,
            teacher=_model(config, teacher.model) if teacher else None,
            guidance=section.guidance if teacher else 1.0,
            kernel=on.kernel(config.attention, bundle.model),
        )
    trained, frozen = _split(config, bundle.variables, 0, on)
    if section.text:
        trained = {**trained, "text": bundle.encode_prompts.params}
    tx = config.optimizer.transform(config.steps)

    def begin(trained):
        return init_state(config.seed, trained, tx, has_ema=_ema(config) is not None)

    state = on.make(begin, trained)
    weights = {"generator": frozen}
    counts = {"generator": _count(bundle.variables), "trained": _count(trained)}
    if teacher is not None:
        weights["teacher"] = dict(teacher.variables)
        counts["teacher"] = _count(teacher.variables)
    placed, state = _place(config, state, weights, on)
    prepared = RegressionStage(stage=stage, tx=tx, batches=batches, **placed)
    frames = config.batch * section.block * section.blocks
    return Prepared(prepared, state, bundle, counts, frames)


def _guided_teacher(section: RegressionConfig, teacher: Bundle | None):
    """Returns whose guided flow is regressed, None without guidance."""
    if section.guidance is None:
        return None
    if teacher is None:
        raise UserError(
            "config.teacher is missing; regression.guidance takes the guided flow of a"
            " teacher, which may be the network that config.weights names"
        )
    return teacher


def _prepare_distillation(
    config, bundle: Bundle, batches, teacher: Bundle, critic: Bundle, on: Arrays
) -> Prepared:
    section = config.distillation
    stage = make_distill(config, bundle, teacher, critic, on)
    trained, frozen = _split(config, bundle.variables, 0, on)
    fake, fake_frozen = _split(config, critic.variables, 1, on)
    updates = -(-config.steps // section.every)
    tx = config.optimizer.transform(updates)
    critic_tx = config.critic_optimizer.transform(config.steps)

    def begin(trained, fake):
        return init_state(
            config.seed,
            trained,
            tx,
            has_ema=_ema(config) is not None,
            fake_score=fake,
            fake_score_tx=critic_tx,
            rollout=rollout.begin(stage.setup, config.batch, section.frames),
        )

    state = on.make(begin, trained, fake)
    weights = {
        "generator": frozen,
        "fake_score": fake_frozen,
        "real_score": dict(teacher.variables),
        "codec": bundle.codec_params,
    }
    placed, state = _place(config, state, weights, on)
    prepared = DistillStage(
        stage=stage,
        tx=tx,
        critic_tx=critic_tx,
        batches=batches,
        seed=config.seed,
        every=section.every,
        **placed,
    )
    counts = {
        "generator": _count(bundle.variables),
        "trained": _count(trained),
        "critic": _count(critic.variables),
        "teacher": _count(teacher.variables),
    }
    rollouts = 1 + 1 / section.every
    frames = config.batch * rollouts * _mean_chunk(stage.plan)
    return Prepared(prepared, state, bundle, counts, frames)


def _place(config, state: TrainState, frozen, on: Arrays):
    """Returns what every stage has, and its state; both on the mesh."""
    mesh = on.mesh
    places = placement.of_state(state, mesh)
    placed = {
        "frozen": on.put(frozen, placement.of_frozen(frozen, mesh)),
        "mesh": mesh,
        "places": places,
        "ema": _ema(config),
    }
    return placed, on.put(state, places)


def _ema(config) -> Ema | None:
    return config.ema if config.ema.decay else None


def _mean_chunk(plan: Plan) -> float:
    """Returns how many latent frames a chunk makes, in the mean of a sequence."""
    made = [piece.new for piece in plan.pieces(None)]
    return sum(made) / len(made)


def make_distill(config, bundle, teacher, critic, on: Arrays) -> Distill:
    """Returns what is static about a distillation.

    Raises:
      UserError: A field of `distillation` is wrong.
    """
    section = config.distillation
    is_release = config.rules == "release"
    tables = ReleaseTables(shift=section.shift) if is_release else Tables()
    with _naming("config.distillation"):
        policy = _policy(config)
        _check_length(policy, section)
        setup = StreamSetup(
            model=_model(config, bundle.model),
            grid=bundle.grid,
            policy=policy,
            levels=flow.few_step_levels(section.steps, section.shift, table=is_release),
            kernel=on.kernel(config.attention, bundle.model),
            floor=float(flow.sigma_table(section.shift)[-1]) if is_release else 0.0,
        )
        return Distill(
            setup=setup,
            critic=Score(_model(config, critic.model), tables, setup.kernel),
            teacher=Score(_model(config, teacher.model), tables, setup.kernel),
            codec=bundle.codec,
            plan=Plan(
                frames=section.frames,
                block=setup.policy.block,
                length=section.length,
                switches=section.switches,
            ),
            guidance=section.guidance,
            shift=section.shift,
            batch=config.batch,
        )


def _check_length(policy: Policy, section: DistillationConfig) -> None:
    """Raises unless a sequence can be made without an end or a restart in it."""
    most = policy.limit if policy.restart is None else policy.restart.every
    if most is not None and section.length > most:
        raise ValueError(
            f"frames={section.frames}, length={section.length}: the policy ends or"
            f" restarts after {most} latent frames; choose at most as many for both, or"
            " another policy, such as longlive"
        )


def _policy(config) -> Policy:
    name = config.distillation.policy
    if name not in POLICIES:
        known = suggest(name, POLICIES, "policies")
        raise UserError(f"config.distillation.policy={name!r}{known}")
    if config.rules not in RULES:
        known = suggest(config.rules, RULES, "rules")
        raise UserError(f"config.rules={config.rules!r}{known}")
    policy = POLICIES[name]
    return policies.as_trained(policy) if config.rules == "release" else policy


def _model(config, model: ModelConfig) -> ModelConfig:
    """Returns a network's sizes for training: masters in float32."""
    return dataclasses.replace(model, remat=config.remat, param_dtype="float32")


def _split(config, variables, number: int, on: Arrays):
    """Returns the collections that are trained and those that are not."""
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
            " that, or export the weights merged"
        )
    return {"lora": given}, {"params": variables["params"]}


@contextlib.contextmanager
def _naming(section: str) -> Iterator[None]:
    """Turns what a dataclass refuses into a message that names the section."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{section}: {error}") from error


def _count(tree) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(dict(tree)))
