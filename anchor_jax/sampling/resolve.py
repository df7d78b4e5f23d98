"""Turns a config and the weights' metadata into the static setup of each stream."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from anchor_jax import flow, prompts
from anchor_jax.cache import policies
from anchor_jax.cache.catalog import CATALOG, POLICIES, ROPES, SWITCHES, TEACHER
from anchor_jax.cache.policies import Policy
from anchor_jax.errors import UserError, shown, suggest
from anchor_jax.prompts import Script, Scripts, Timing
from anchor_jax.sampling.config import EVEN, SampleConfig, SamplerConfig
from anchor_jax.sampling.methods import Method, method_of
from anchor_jax.streaming import room
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, Renoise, UniPC
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import WAN_2_1, Family
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.load import load_bundle

RULES = ("paper", "release")
SOLVERS = {
    "renoise": Renoise(),
    "euler": Euler(),
    "unipc": UniPC(),
    "dpmpp": DpmPlusPlus(),
}
# Default noise levels for a solver other than that of the weights' method.
_USUAL_GRIDS = dict.fromkeys(SOLVERS, EVEN) | {"dpmpp": "wan_dpmpp"}
_SIZES = ("window", "sink", "block")
_OVERRIDES = (*_SIZES, "rope", "on_switch")


def load_weights(config: SampleConfig) -> Bundle:
    """Returns the bundle of a config's weights, size, type and devices.

    Raises:
      UserError: The weights or one of these fields is wrong.
    """
    return load_bundle(
        config.weights,
        grid=config.size,
        dtype=config.dtype,
        text_encoder=config.text_encoder,
        lora=config.lora,
    )


def resolve(config: SampleConfig, metadata: Mapping[str, Any]) -> SampleConfig:
    """Returns the config with every field that is None set by the weights' method.

    Args:
      config: the config; only fields that are None are filled.
      metadata: the bundle's metadata. It holds the config of a training, or the method
        that the weights were ported as, or neither.

    Raises:
      UserError: The method is unknown, and a field is None.
    """
    rest = (config.policy, config.rules, *dataclasses.astuple(config.sampler)[:-1])
    if None not in rest:
        return config
    method = method_of(metadata)
    return dataclasses.replace(
        config,
        policy=method.policy if config.policy is None else config.policy,
        rules=method.rules if config.rules is None else config.rules,
        sampler=_filled(config.sampler, method),
    )


def describe_choices(
    given: SampleConfig, config: SampleConfig, metadata: Mapping[str, Any]
) -> tuple[str, ...]:
    """Returns log lines for settings inferred from the weights.

    Args:
      given: the config as it was read.
      config: the resolved config.
      metadata: the bundle's metadata.
    """
    name, trained = metadata.get("method"), metadata.get("training") is not None
    why = f"weights were ported as {name}" if name else "weights were not ported"
    if trained:
        why = "as the weights were trained"
    if None not in (given.policy, given.rules):
        why = "as the config says" if trained else f"as the config says; {why}"
    elif trained and given.policy is not None:
        why = "policy as the config says"
    changed = f" with {_given(config)}" if _given(config) else ""
    lines = [f"rules: {config.rules}, policy: {config.policy}{changed} ({why})"]
    if config.sampler.solver != "renoise" and given.sampler != config.sampler:
        lines.append(_shown(config.sampler))
    if trained:
        # If the training's config cannot be read, no setting was taken from it.
        with contextlib.suppress(UserError):
            lines += _departures(config, method_of(metadata))
    elif given.policy is None and method_of(metadata).note:
        lines.append(f"note: {method_of(metadata).note}")
    return tuple(lines)


def describe_size_change(bundle: Bundle) -> tuple[str, ...]:
    """Returns a warning if videos are not of the size of the weights' training."""
    trained, training = bundle.trained_grid, bundle.metadata.get("training")
    if trained is None:
        return ()
    family = bundle.model.family
    # If the training's config cannot be read, the size of its first weights counts.
    with contextlib.suppress(UserError, AttributeError, TypeError):
        trained = family.parse_size(training["size"])
    if trained == bundle.grid:
        return ()
    size = family.describe_size(trained)
    return (
        f"size={family.describe_size(bundle.grid)}: the weights were trained at {size};"
        f" other sizes give broken shapes; leave the size out, or set {size}",
    )


def _shown(sampler: SamplerConfig) -> str:
    """Returns a log line about a sampler with many steps."""
    return (
        f"solver: {sampler.solver}, {sampler.num_steps} steps, noise levels"
        f" {sampler.grid}, shift {sampler.shift:g}, guidance {sampler.guidance:g}"
    )


def _departures(config: SampleConfig, method: Method) -> list[str]:
    """Returns a warning if weights are sampled differently from their training."""
    names = ("solver", "steps", "shift") if method.solver == "renoise" else ("solver",)
    chosen = {name: getattr(config, name) for name in ("policy", "rules")}
    chosen |= {name: getattr(config.sampler, name) for name in names}
    differing = [
        f"{name} {getattr(method, name)}, not {value}"
        for name, value in chosen.items()
        if value != getattr(method, name)
    ]
    if _given(config):
        differing.append(f"{method.policy} unchanged, not with {_given(config)}")
    if not differing:
        return []
    return [
        f"warning: the weights were trained for {'; '.join(differing)};"
        " configs/interactive.py uses the settings of their training"
    ]


def _filled(sampler: SamplerConfig, method: Method) -> SamplerConfig:
    """Returns the sampler with the method's value for every field that is None."""
    values = dataclasses.asdict(sampler)
    fill = {name: getattr(method, name, None) for name in values}
    if sampler.solver not in (None, method.solver):
        fill["grid"] = _USUAL_GRIDS.get(sampler.solver, EVEN)
    return SamplerConfig(
        **{name: fill[name] if old is None else old for name, old in values.items()}
    )


def make_policy(config, script: Script) -> Policy:
    """Returns the policy for a script: the named policy with the config's overrides.

    Args:
      config: `policy`, `rules`, and the overrides `window`, `sink`, `block`, `rope`,
        `on_switch`. None keeps the policy's own value.
      script: the script. Its length sets the size of the teacher's clip. Under the
        release's rules, a script with one prompt has a special policy.

    Raises:
      UserError: A name is unknown, or the parts are incompatible.
    """
    if config.rules not in RULES:
        known = suggest(str(config.rules), RULES, "rules")
        raise UserError(f"rules={shown(config.rules)}{known}")
    if config.policy == TEACHER:
        return _teacher(config, script)
    policy = _override(_named(config), config)
    if config.rules == "release" and len(script.segments) == 1:
        return policies.single_prompt(policy)
    return policy


def load_scripts(config) -> tuple[Script, ...]:
    """Returns only the scripts of `read_scripts`."""
    return read_scripts(config).all


def read_scripts(config, family: Family = WAN_2_1) -> Scripts:
    """Returns the scripts of the config's `prompt_file`, or of its `prompt`.

    The model family gives the number of latent frames per second.

    Raises:
      UserError: A line is wrong. The message names every wrong line.
    """
    block = 1 if config.policy == TEACHER else _override(_named(config), config).block
    rate = family.latent_frames_per_second
    timing = Timing(block=block, frames=config.frames, rate=rate)
    if config.prompt_file:
        return prompts.read_scripts(timing, path=config.prompt_file)
    return prompts.read_scripts(timing, inline=config.prompt)


def setup_key(config, script: Script) -> tuple[int, int]:
    """Returns a key of a script's setup: equal keys have equal setups."""
    frames = script.frames if config.policy == TEACHER else 0
    return frames, min(2, len(script.segments))


def make_setup(config, bundle: Bundle, script: Script) -> StreamSetup:
    """Returns the static setup of a script's stream.

    Raises:
      UserError: The policy, the kernel or a field of `sampler` is wrong, or the
        stream does not fit into memory.
    """
    sampler = config.sampler
    guidance = sampler.guidance
    if not 0 <= guidance < float("inf"):
        raise UserError(
            f"sampler.guidance={guidance}: must be at least 0 and finite; 1 turns"
            " guidance off"
        )
    setup = StreamSetup(
        model=bundle.model,
        grid=bundle.grid,
        policy=make_policy(config, script),
        levels=noise_levels(sampler),
        solver=SOLVERS[sampler.solver],
        guidance=float(guidance),
        kernel=kernels.named(
            config.attention, bundle.model.dtype, bundle.model.head_dim
        ),
    )
    room.check(setup)
    return setup


def _named(config) -> Policy:
    name = config.policy
    if name not in POLICIES:
        raise UserError(
            f"unknown policy {shown(name)}{suggest(name, CATALOG, 'policies')}"
        )
    policy = POLICIES[name]
    return policies.as_released(policy) if config.rules == "release" else policy


def _override(policy: Policy, config) -> Policy:
    """Returns the policy with the config's overrides."""
    given = {name: getattr(config, name) for name in _SIZES}
    fields = {name: value for name, value in given.items() if value is not None}
    if config.on_switch is not None:
        fields["on_switch"] = _choice("on_switch", config.on_switch, SWITCHES).action
    positions = _positions(policy, config, fields.get("window", policy.window))
    try:
        return dataclasses.replace(policy, **fields, positions=positions)
    except ValueError as error:
        raise UserError(f"{config.policy} with {_given(config)}: {error}") from error


def _positions(policy: Policy, config, window: int):
    """Returns the RoPE rule; a range equal to the window changes with the window."""
    own = policy.positions
    if config.rope is None:
        if own.range == policy.window:
            return dataclasses.replace(own, range=window)
        return own
    rope = _choice("rope", config.rope, ROPES)
    if policy.junction and rope.ends_at_window:
        others = [
            f"rope={name}"
            for name, other in ROPES.items()
            if not other.ends_at_window
            and other.make(window, own.cut).refuses(policy) is None
        ]
        raise UserError(
            f"{config.policy} with rope={config.rope}: the range of {window} positions"
            f" (the window) leaves none for the junction; choose {' or '.join(others)},"
            " or a policy without a junction, such as longlive"
        )
    return rope.make(window, own.cut)


def _teacher(config, script: Script) -> Policy:
    """Returns the policy of a model that denoises the whole clip at once."""
    if _given(config):
        raise UserError(
            f"{TEACHER} denoises a whole clip at once and has no cache, so"
            f" {_given(config)} does not apply; leave it out or choose another policy"
        )
    if len(script.segments) > 1:
        raise UserError(
            f"{TEACHER} denoises a whole clip at once and cannot switch prompts, but"
            f" got {len(script.segments)} prompts; give one, such as 'a red square[6f]'"
        )
    return policies.whole_clip(script.frames)


def _given(config) -> str:
    """Returns the config's overrides of the policy, as text."""
    given = [(name, getattr(config, name)) for name in _OVERRIDES]
    return ", ".join(f"{name}={value}" for name, value in given if value is not None)


def _choice(field: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        known = suggest(str(name), table, "choices")
        raise UserError(f"{field}={shown(name)}{known}")
    return table[name]


def noise_levels(sampler) -> flow.Levels:
    """Returns the noise levels of a section `sampler`, or of a method.

    Raises:
      UserError: A field is wrong.
    """
    _choice("sampler.solver", sampler.solver, SOLVERS)
    if not 0 < sampler.shift < float("inf"):
        raise UserError(
            f"sampler.shift={sampler.shift}: must be more than 0 and finite"
        )
    if sampler.solver == "renoise" and sampler.grid not in (None, EVEN):
        raise UserError(
            f"sampler.grid={shown(sampler.grid)}: the solver renoise takes its noise"
            " levels from sampler.steps; leave the grid out, or choose another"
            " sampler.solver"
        )
    if sampler.solver != "renoise":
        if not 1 <= sampler.num_steps <= flow.TRAIN_STEPS:
            raise UserError(
                f"sampler.num_steps={sampler.num_steps}: must be an integer from 1 to"
                f" {flow.TRAIN_STEPS}"
            )
        _choice("sampler.grid", sampler.grid, flow.GRIDS)
        return flow.GRIDS[sampler.grid](sampler.num_steps, sampler.shift)
    steps = tuple(sampler.steps)
    whole = all(type(step) is int for step in steps)
    falls = whole and all(a > b for a, b in zip(steps, steps[1:], strict=False))
    if not steps or not falls or steps[0] > flow.TRAIN_STEPS or steps[-1] < 1:
        raise UserError(
            f"sampler.steps={shown(steps)}: must be decreasing integers of at"
            f" most {flow.TRAIN_STEPS} and at least 1, such as (1000, 750, 500, 250)"
        )
    return flow.few_step_levels(steps, sampler.shift, sampler.warp)
