"""Turns a config into a bundle, scripts, and the static setup of each stream."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from anchor_jax import flow, prompts
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
from anchor_jax.config import from_config, with_field
from anchor_jax.errors import UserError, naming, shown, suggest
from anchor_jax.io import expand
from anchor_jax.prompt_files import PromptFile
from anchor_jax.prompts import (
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    Script,
    Scripts,
    Timing,
)
from anchor_jax.streaming import room
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, Renoise, UniPC
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.text import check_text
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import WAN_2_1, Family
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.load import load_bundle

TEACHER = "wan_teacher"
RULES = ("paper", "release")
SOLVERS = {
    "renoise": Renoise(),
    "euler": Euler(),
    "unipc": UniPC(),
    "dpmpp": DpmPlusPlus(),
}
EVEN = "even"
# Default noise levels for a solver other than that of the weights' method.
_USUAL_GRIDS = dict.fromkeys(SOLVERS, EVEN) | {"dpmpp": "wan_dpmpp"}
SWITCHES = {
    "keep": Keep(),
    "flush": Flush(),
    "recache": Recache(),
    "recache_sink": Recache(rewrite_sink=True),
}
# Functions of the policy's window and of its scene cut position, if it has one.
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


# The negative prompt that the authors of Wan2.1 publish.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

_NOT_READ = (AttributeError, LookupError, RecursionError, TypeError)


@dataclasses.dataclass(frozen=True)
class Method:
    """Default sampling settings for the weights of a training method.

    Attributes:
      policy: name of the cache policy.
      rules: "release" for published weights, which follow their own code.
      solver: name in `SOLVERS`.
      steps: timesteps of the solver renoise.
      warp: whether `steps` index the shifted grid or are timesteps themselves.
      num_steps: number of steps of the other solvers.
      grid: name in `flow.GRIDS` of the noise levels of the other solvers.
      shift: shift of the noise levels towards noise.
      guidance: guidance scale; 1 turns guidance off.
      negative_prompt: negative prompt of the guidance.
      note: a line that is printed when such weights are sampled.
    """

    policy: str
    rules: str = "release"
    solver: str = "renoise"
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    warp: bool = True
    num_steps: int = 50
    grid: str = EVEN
    shift: float = 5.0
    guidance: float = 1.0
    negative_prompt: str = ""
    note: str = ""


METHODS = {
    "anchor_forcing": Method("anchor_forcing"),
    "longlive": Method("longlive"),
    "self_forcing": Method("self_forcing"),
    # The published list is [1000, 757, 522, 0]. Its entries are already shifted. Its 0
    # is the clean pass, with which every block ends here anyway.
    "causvid": Method("causvid", steps=(1000, 757, 522), warp=False, shift=8.0),
    "memflow": Method(
        "longlive",
        note="memflow's memory bank is not supported; longlive's policy is used",
    ),
    # The defaults of Wan2.1's own program, for text to video.
    "wan": Method(
        TEACHER,
        solver="unipc",
        num_steps=50,
        grid="wan_unipc",
        shift=5.0,
        guidance=5.0,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        note="for the 1.3B model at 480x832 the authors of Wan2.1 recommend"
        " sampler.guidance=6 and a sampler.shift from 8 to 12",
    ),
}
# For bundles without a method, such as `tiny`.
SAVED = Method("anchor_forcing", rules="paper")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The section `sampler`; `configs/interactive.py` explains the fields.

    None takes the default of the weights' method.
    """

    solver: str | None
    steps: tuple[int, ...] | None
    warp: bool | None
    num_steps: int | None
    grid: str | None
    shift: float | None
    guidance: float | None
    negative_prompt: str | None
    negative_prompt_file: str | None


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The fields of a config; `configs/interactive.py` explains them."""

    weights: str
    size: str | None
    dtype: str | None
    attention: str
    text_encoder: str
    lora: str
    policy: str | None
    rules: str | None
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
    """Returns the config as a dataclass, with the type of every field checked.

    Older configs have no `sampler.grid`; it then is "even".

    Raises:
      UserError: A field is missing, unknown or of another type, or the seed is out of
        range.
    """
    whole = with_field(config, "sampler", "grid", EVEN)
    read = from_config(SampleConfig, whole, "config")
    if not 0 <= read.seed <= MAX_SEED:
        raise UserError(
            f"config.seed={read.seed}: must be an integer from 0 to {MAX_SEED}"
        )
    return read


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


parse_size = WAN_2_1.parse_size
"""Returns the latent size of `HEIGHTxWIDTH` in pixels, for Wan2.1."""


def resolve(config: SampleConfig, metadata: Mapping[str, Any]) -> SampleConfig:
    """Returns the config with its open fields filled by the weights' method.

    Args:
      config: the config; only fields that are None are filled.
      metadata: the bundle's metadata. It holds the config of a training, or the method
        that the weights were ported as, or neither.

    Raises:
      UserError: The method is unknown, and a field is open.
    """
    rest = (config.policy, config.rules, *dataclasses.astuple(config.sampler)[:-1])
    if None not in rest:
        return config
    method = _method(metadata)
    return dataclasses.replace(
        config,
        policy=method.policy if config.policy is None else config.policy,
        rules=method.rules if config.rules is None else config.rules,
        sampler=_filled(config.sampler, method),
    )


def told_choices(
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
    lines = [f"rules: {config.rules}, policy: {config.policy} ({why})"]
    if config.sampler.solver != "renoise" and given.sampler != config.sampler:
        lines.append(_shown(config.sampler))
    if trained:
        # If the training's config cannot be read, no setting was taken from it.
        with contextlib.suppress(UserError):
            lines += _departures(config, _method(metadata))
    elif given.policy is None and _method(metadata).note:
        lines.append(f"note: {_method(metadata).note}")
    return tuple(lines)


def _shown(sampler: SamplerConfig) -> str:
    """Returns a log line on a sampler with many steps."""
    return (
        f"solver: {sampler.solver}, {sampler.num_steps} steps, noise levels"
        f" {sampler.grid}, shift {sampler.shift:g}, guidance {sampler.guidance:g}"
    )


def _departures(config: SampleConfig, method: Method) -> list[str]:
    """Returns a warning if weights are sampled differently from their training."""
    names = ("solver", "steps", "shift") if method.solver == "renoise" else ("solver",)
    asked = {name: getattr(config, name) for name in ("policy", "rules")}
    asked |= {name: getattr(config.sampler, name) for name in names}
    differing = [
        f"{name} {getattr(method, name)}, not {value}"
        for name, value in asked.items()
        if value != getattr(method, name)
    ]
    if not differing:
        return []
    return [
        f"warning: the weights were trained for {'; '.join(differing)};"
        " configs/interactive.py uses the settings of their training"
    ]


def trained_method(training: Mapping[str, Any], base: Method = SAVED) -> Method:
    """Returns the sampling settings of trained weights: those of their stage.

    Args:
      training: the training's config, as plain values.
      base: the settings of the initial weights. If these are bidirectional, the trained
        weights are too.
    """
    section, regression = training["distillation"], training["regression"]
    samples, rules = training["samples"], training["rules"]
    distills = training["stage"] == "distillation"
    is_causal = distills or regression["forcing"] != "none"
    policy = section["policy"] if is_causal else TEACHER
    # Older trainings have no grid; they were sampled at even noise levels.
    grid = samples["grid"] if "grid" in samples else None
    if policy == base.policy == TEACHER:
        return base if grid else dataclasses.replace(base, grid=EVEN)
    if distills or regression["endpoints"]:
        shift = (section if distills else regression)["shift"]
        return Method(policy, rules, steps=tuple(section["steps"]), shift=shift)
    return Method(
        policy,
        rules,
        solver="euler",
        num_steps=samples["steps"],
        grid=grid or EVEN,
        shift=regression["shift"],
        guidance=samples["guidance"],
        negative_prompt=section["negative_prompt"],
    )


def _method(metadata: Mapping[str, Any]) -> Method:
    training = metadata.get("training")
    if training is not None:
        begun = _method({**metadata, "training": None})
        try:
            method = trained_method(training, begun)
            fields = dataclasses.fields(Method)
            values = {field.name: getattr(method, field.name) for field in fields}
            return from_config(Method, values, "training")
        except (*_NOT_READ, UserError) as error:
            raise UserError(
                "the config of the weights' training cannot be read"
                f" ({_said(error)}); set policy, rules and every field of sampler"
            ) from error
    name = metadata.get("method")
    if name is None:
        return SAVED
    if not isinstance(name, str) or name not in METHODS:
        known = suggest(str(name), METHODS, "methods")
        raise UserError(
            f"the weights were ported as {shown(name)}{known}; set policy, rules and"
            " every field of sampler, or port them again"
        )
    return METHODS[name]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else repr(error)


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

    The family says how many latent frames a second of a script has.

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


def negative_prompt(config) -> str:
    """Returns the negative prompt, from its file or from the config.

    Raises:
      UserError: The file cannot be read, or its text is invalid or too long.
    """
    sampler = config.sampler
    where, text = "config.sampler.negative_prompt", sampler.negative_prompt
    if sampler.negative_prompt_file:
        where = "config.sampler.negative_prompt_file"
        with naming(where):
            file = PromptFile(expand(sampler.negative_prompt_file), comments=False)
            if file.kind != "text":
                raise UserError(
                    f"{file.path} is JSON or a table; give a plain text file"
                )
            text = " ".join(" ".join(line for _, line in file).split())
    check_text(text, where)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{where} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are"
            " allowed; shorten it"
        )
    return text


def _named(config) -> Policy:
    name = config.policy
    if name not in POLICIES:
        known = [*POLICIES, TEACHER]
        found = suggest(name, known, "policies")
        raise UserError(f"unknown policy {shown(name)}{found}")
    policy = POLICIES[name]
    return _released(policy) if config.rules == "release" else policy


def _released(policy: Policy) -> Policy:
    """Returns the variant of the policy in the published code of its method."""
    junction, positions = policy.junction, policy.positions
    if type(junction) is Junction:
        junction = ReleaseJunction(junction.frames)
    if type(positions) is Relative and positions.cut is not None:
        positions = Ranked(positions.range, cut=positions.cut)
    return dataclasses.replace(policy, junction=junction, positions=positions)


def _override(policy: Policy, config) -> Policy:
    """Returns the policy with the config's overrides."""
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
    """Returns the RoPE rule; a range equal to the window changes with the window."""
    own = policy.positions
    if config.rope is None:
        if getattr(own, "range", None) == policy.window:
            return dataclasses.replace(own, range=window)
        return own
    make = _choice("rope", config.rope, ROPES)
    if policy.junction and config.rope in _ENDS_AT_WINDOW:
        raise UserError(
            f"{config.policy} with rope={config.rope}: the range of {window} positions"
            " (the window) leaves none for the junction; choose rope=tri_region or"
            " rope=bounded, or a policy without a junction, such as longlive"
        )
    return make(window, own.cut)


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
