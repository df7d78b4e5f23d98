"""The static settings of a distillation, from its config."""

from anchor_jax import flow
from anchor_jax.cache import policies
from anchor_jax.cache.policies import POLICIES, Policy
from anchor_jax.errors import UserError, suggest
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.training.losses import ReleaseTables, Score, Tables
from anchor_jax.training.placement import Arrays
from anchor_jax.training.schedule import SequencePlan
from anchor_jax.training.stages import base
from anchor_jax.training.stages.distillation_step import DistillationSpec
from anchor_jax.weights.bundle import Bundle

RULES = ("paper", "release")


def make_spec(
    config, bundle: Bundle, teacher: Bundle, critic: Bundle, on: Arrays
) -> DistillationSpec:
    """Returns the static settings of a distillation.

    Raises:
      UserError: A field of `distillation` is wrong.
    """
    section = base.section_of(config)
    is_release = config.rules == "release"
    tables = ReleaseTables(shift=section.shift) if is_release else Tables()
    with base.naming_section(f"config.{config.stage}"):
        policy = _policy(config)
        _check_length(policy, section)
        setup = StreamSetup(
            model=base.training_sizes(config, bundle.model),
            grid=bundle.grid,
            policy=policy,
            levels=flow.few_step_levels(section.steps, section.shift, table=is_release),
            kernel=on.kernel(config.attention, bundle.model),
            floor=float(flow.sigma_table(section.shift)[-1]) if is_release else 0.0,
        )
        fake, real = (
            Score(base.training_sizes(config, one.model), tables, setup.kernel)
            for one in (critic, teacher)
        )
        return DistillationSpec(
            setup=setup,
            critic=fake,
            teacher=real,
            codec=bundle.codec,
            plan=SequencePlan(
                frames=section.frames,
                block=setup.policy.block,
                length=section.length,
                switches=section.switches,
            ),
            guidance=section.guidance,
            shift=section.shift,
            batch=config.batch,
            microbatches=config.microbatches,
        )


def mean_chunk(plan: SequencePlan) -> float:
    """Returns the mean number of latent frames per chunk of a sequence."""
    made = [span.new for span in plan.chunks(None)]
    return sum(made) / len(made)


def _check_length(policy: Policy, section) -> None:
    """Raises UserError if the policy would end or restart within a sequence."""
    most = policy.limit if policy.restart is None else policy.restart.every
    if most is not None and section.length > most:
        raise ValueError(
            f"frames={section.frames}, length={section.length}: the policy ends or"
            f" restarts after {most} latent frames; choose at most as many for both, or"
            " another policy, such as longlive"
        )


def _policy(config) -> Policy:
    name = base.section_of(config).policy
    if name not in POLICIES:
        known = suggest(name, POLICIES, "policies")
        raise UserError(f"config.{config.stage}.policy={name!r}{known}")
    if config.rules not in RULES:
        known = suggest(config.rules, RULES, "rules")
        raise UserError(f"config.rules={config.rules!r}{known}")
    policy = POLICIES[name]
    return policies.as_trained(policy) if config.rules == "release" else policy
