"""From a config to a bundle, scripts, and the static setup of each stream."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from anchor_jax import flow, prompts
from anchor_jax.bundle import Bundle
from anchor_jax.cache import policies
from anchor_jax.cache.policies import (
    POLICIES,
    Flush,
    Junction,
    Keep,
    Policy,
    Recache,
    ReleaseJunction,
)
from anchor_jax.cache.positions import Absolute, Bounded, Ranked, Relative
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, suggest
from anchor_jax.prompts import MAX_SEED, Script, Timing
from anchor_jax.streaming.loop import Euler, Renoise, UniPC
from anchor_jax.streaming.types import StreamSetup

TEACHER = "wan_teacher"
RULES = ("paper", "release")
SOLVERS = {"renoise": Renoise(), "euler": Euler(), "unipc": UniPC()}
SWITCHES = {
    "keep": Keep(),
    "flush": Flush(),
    "recache": Recache(),
    "recache_sink": Recache(rewrite_sink=True),
}
# Each from the policy's window and its scene cut's position, if it has one.
ROPES: dict[str, Callable[[int, int | None], Any]] = {
    "absolute": lambda window, cut: Absolute(),
    "relative": lambda window, cut: Relative(range=window, cut=cut),
    "tri_region": lambda window, cut: Relative(range=21, cut=cut),
    "bounded": lambda window, cut: Bounded(range=21, cut=cut),
    "ranked": lambda window, cut: Ranked(range=window, cut=cut),
}

_ENDS_AT_WINDOW = ("relative", "ranked")
_SIZES = ("window", "sink", "block")
_OVERRIDES = (*_SIZES, "rope", "on_switch")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The section `sampler` of a config; `configs/tiny.py` explains the fields."""

    solver: str
    steps: tuple[int, ...]
    num_steps: int
    shift: float
    guidance: float
    negative_prompt: str
    negative_prompt_file: str | None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The fields of a config; `configs/tiny.py` explains them."""

    weights: str
    policy: str
    rules: str
    rope: str | None
    on_switch: str | None
    window: int | None
    sink: int | None
    block: int | None
    prompt: str
    prompt_file: str | None
    frames: int | None
    seed: int
    sampler: SamplerConfig
    out: str | None


def read_config(config) -> SampleConfig:
    """Returns the config with every field of the type that it must have.

    Raises:
      UserError: A field is missing, unknown or of another type, or the seed is out of
        range.
    """
    read = from_config(SampleConfig, config, "config")
    if not 0 <= read.seed <= MAX_SEED:
        raise UserError(
            f"config.seed={read.seed}: expected a whole number from 0 to {MAX_SEED}"
        )
    return read


def make_policy(config, script: Script) -> Policy:
    """Returns the policy for a script: the named one with the config's overrides.

    Args:
      config: `policy`, `rules`, and `window`, `sink`, `block`, `rope`, `on_switch`,
        each None for the policy's own.
      script: its length makes the teacher; one prompt alone has a policy of its own
        under the release's rules.

    Raises:
      UserError: A name is unknown, or the parts do not go together.
    """
    if config.rules not in RULES:
        known = suggest(str(config.rules), RULES, "rules")
        raise UserError(f"rules={config.rules!r}{known}")
    if config.policy == TEACHER:
        return _teacher(config, script)
    policy = _override(_named(config), config)
    if config.rules == "release" and len(script.segments) == 1:
        return policies.single_prompt(policy)
    return policy


def load_scripts(config) -> tuple[Script, ...]:
    """Returns the scripts of the config's `prompt_file`, or of its `prompt`.

    Raises:
      UserError: A line is wrong; every one at fault is named.
    """
    block = 1 if config.policy == TEACHER else _override(_named(config), config).block
    timing = Timing(block=block, frames=config.frames)
    if config.prompt_file:
        return prompts.load_scripts(timing, path=config.prompt_file)
    return prompts.load_scripts(timing, inline=config.prompt)


def make_setup(config, bundle: Bundle, script: Script) -> StreamSetup:
    """Returns what is static about the stream of a script.

    Raises:
      UserError: The policy or a field of `sampler` is wrong.
    """
    sampler = config.sampler
    guidance = sampler.guidance
    if not 0 <= guidance < float("inf"):
        raise UserError(f"sampler.guidance={guidance}: expected 0 or more; 1 is none")
    return StreamSetup(
        model=bundle.model,
        grid=bundle.grid,
        policy=make_policy(config, script),
        levels=_levels(sampler),
        solver=SOLVERS[sampler.solver],
        guidance=float(guidance),
    )


def negative_prompt(config) -> str:
    """Returns what guidance leads away from: a file's text, or the config's.

    Raises:
      UserError: The file cannot be read.
    """
    sampler = config.sampler
    if not sampler.negative_prompt_file:
        return sampler.negative_prompt
    path = pathlib.Path(sampler.negative_prompt_file)
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"sampler.negative_prompt_file: {path} cannot be read: {error.strerror}"
        ) from error


def _named(config) -> Policy:
    name = config.policy
    if name not in POLICIES:
        known = [*POLICIES, TEACHER]
        raise UserError(f"unknown policy {name!r}{suggest(name, known, 'policies')}")
    policy = POLICIES[name]
    return _released(policy) if config.rules == "release" else policy


def _released(policy: Policy) -> Policy:
    """Returns the policy as the published code of its method has it."""
    junction, positions = policy.junction, policy.positions
    if type(junction) is Junction:
        junction = ReleaseJunction(junction.frames)
    if type(positions) is Relative and positions.cut is not None:
        positions = Ranked(positions.range, cut=positions.cut)
    return dataclasses.replace(policy, junction=junction, positions=positions)


def _override(policy: Policy, config) -> Policy:
    """Returns the policy with the parts that the config names instead of its own."""
    given = {name: getattr(config, name) for name in _SIZES}
    fields = {name: value for name, value in given.items() if value is not None}
    if config.on_switch is not None:
        fields["on_switch"] = _choice("on_switch", config.on_switch, SWITCHES)
    positions = _positions(policy, config, fields.get("window", policy.window))
    try:
        return dataclasses.replace(policy, **fields, positions=positions)
    except ValueError as error:
        raise UserError(f"{config.policy} with {_given(config)}: {error}") from error


def _positions(policy: Policy, config, window: int):
    """Returns the RoPE rule; one whose range is the window's size moves with it."""
    own = policy.positions
    if config.rope is None:
        if getattr(own, "range", None) == policy.window:
            return dataclasses.replace(own, range=window)
        return own
    make = _choice("rope", config.rope, ROPES)
    if policy.junction and config.rope in _ENDS_AT_WINDOW:
        raise UserError(
            f"{config.policy} with rope={config.rope}: its range is the window's"
            f" {window} positions, which leaves none for the junction; choose"
            " rope=tri_region or rope=bounded, or a policy without a junction, such as"
            " longlive"
        )
    return make(window, own.cut)


def _teacher(config, script: Script) -> Policy:
    """Returns the policy of a model that denoises the whole clip at once."""
    if _given(config):
        raise UserError(
            f"{TEACHER} denoises a whole clip at once and remembers nothing, so"
            f" {_given(config)} cannot apply; leave it out or choose another policy"
        )
    if len(script.segments) > 1:
        raise UserError(
            f"{TEACHER} denoises a whole clip at once, so its prompt cannot switch; got"
            f" {len(script.segments)} prompts; give one, such as 'a red square[6f]'"
        )
    return Policy(
        block=script.frames,
        sink=0,
        window=script.frames,
        positions=Absolute(),
        on_switch=Keep(),
        limit=script.frames,
    )


def _given(config) -> str:
    """Returns the overrides that the config makes, as text."""
    given = [(name, getattr(config, name)) for name in _OVERRIDES]
    return ", ".join(f"{name}={value}" for name, value in given if value is not None)


def _choice(field: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"{field}={name!r}{suggest(str(name), table, 'choices')}")
    return table[name]


def _levels(sampler) -> flow.Levels:
    """Returns the noise levels of the sampler's section."""
    _choice("sampler.solver", sampler.solver, SOLVERS)
    if not 0 < sampler.shift < float("inf"):
        raise UserError(f"sampler.shift={sampler.shift}: expected more than 0")
    if sampler.solver != "renoise":
        if sampler.num_steps < 1:
            raise UserError(
                f"sampler.num_steps={sampler.num_steps}: expected 1 or more"
            )
        return flow.even_levels(sampler.num_steps, sampler.shift)
    steps = tuple(sampler.steps)
    whole = all(type(step) is int for step in steps)
    falls = whole and all(a > b for a, b in zip(steps, steps[1:], strict=False))
    if not steps or not falls or steps[0] > flow.TRAIN_STEPS or steps[-1] < 1:
        raise UserError(
            f"sampler.steps={steps}: expected whole numbers that fall, from at most"
            f" {flow.TRAIN_STEPS} to at least 1, such as (1000, 750, 500, 250)"
        )
    return flow.few_step_levels(steps, sampler.shift)
