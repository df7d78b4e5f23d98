"""A recipe: everything needed to make a video again and to verify the result."""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import platform
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from jaxtyping import UInt8

import anchor_jax
from anchor_jax import limits, media, places
from anchor_jax.axes import Array
from anchor_jax.cache import catalog
from anchor_jax.cache.policies import Policy
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, shown, some, suggest
from anchor_jax.flow import Levels
from anchor_jax.io import parse_json
from anchor_jax.prompts import MAX_FRAMES, MAX_PROMPT_CHARACTERS, MAX_SEED
from anchor_jax.streaming import room
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, Renoise, UniPC
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.text import check_text
from anchor_jax.wan.kernels import KERNELS
from anchor_jax.wan.spec import FAMILIES, LatentGrid
from anchor_jax.weights.bundle import Bundle

FORMAT_VERSION = 1
MAX_BATCH = 1024
REMEDY = "copy it again, or give a file that anchor-jax sample wrote"
"""Remedy in messages about files that are not recipes."""

_PARTS = {
    kind.__name__: kind
    for kind in (
        *(StreamSetup, *FAMILIES.values(), LatentGrid, Levels),
        *(Renoise, Euler, UniPC, DpmPlusPlus),
        *catalog.PARTS,
        *map(type, KERNELS.values()),
    )
}
_LARGEST_NUMBER = 65536
_LONGEST_LIST = 1024
_DEEPEST = 16
_LONGEST_FILE = 64 * 2**20
_FINGERPRINT_CHARACTERS = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Switch:
    """A prompt with its requested switch frame and the frame where it took effect.

    For a pending switch, `landed` is the first frame at which it may take effect. None
    means the requested frame.
    """

    prompt: str
    requested: int
    cut: bool = False
    landed: int | None = None

    @property
    def earliest(self) -> int:
        """The first latent frame at which it may take effect."""
        return self.requested if self.landed is None else self.landed


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The checked definition of a video.

    Attributes:
      setup: the static setup of the stream.
      seed: random seed of the noise.
      negative_prompt: negative prompt of the guidance.
      batch: number of videos generated together.
      frames: length in latent frames.
      prompts: prompts in the order in which they took effect.
      fingerprint: other factors that determine the bits, such as versions and device.
      blocks: SHA-256 of each block's pixels, or empty.
      weights: name or path of the weights in the config, or None.
      lora: treatment of adapters in the config.
      text_encoder: placement of the text encoder in the config.
      enlarge: factor by which the config enlarges the video file, or None.
    """

    setup: StreamSetup
    seed: int
    negative_prompt: str
    batch: int
    frames: int
    prompts: tuple[Switch, ...]
    fingerprint: Mapping[str, str]
    blocks: tuple[str, ...] = ()
    weights: str | None = None
    lora: str = "separate"
    text_encoder: str = "device"
    enlarge: int | None = None

    def shortened(self, frames: int) -> "Recipe":
        """Returns the recipe of the first `frames` latent frames (whole blocks)."""
        return dataclasses.replace(
            self,
            frames=frames,
            prompts=tuple(one for one in self.prompts if one.landed < frames),
            blocks=self.blocks[: frames // self.setup.policy.block],
        )

    def forked(self, frame: int, prompt: str, frames: int) -> "Recipe":
        """Returns the same video up to a latent frame, then another prompt.

        Args:
          frame: the requested switch frame. The prompt takes effect at the first block
            that starts there or later. Later prompts are dropped.
          prompt: the new prompt.
          frames: length in latent frames (whole blocks).
        """
        block = self.setup.policy.block
        landed = -(-frame // block) * block
        before = tuple(one for one in self.prompts if one.landed < landed)
        prompts = (*before, Switch(prompt, frame if before else 0, landed=landed))
        blocks = self.blocks[: landed // block]
        return dataclasses.replace(self, prompts=prompts, frames=frames, blocks=blocks)


def describe(value: Any) -> Any:
    """Returns a tree of dataclasses as plain values; `kind` holds the class name."""
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"kind": type(value).__name__} | {k: describe(v) for k, v in fields.items()}


def fingerprint(bundle: Bundle) -> dict[str, str]:
    """Returns the factors besides the recipe that determine a video's bits."""
    config, device = jax.config, jax.local_devices()[0]
    return {
        "anchor_jax": f"{anchor_jax.__version__} {_source()}",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "machine": f"{platform.machine()} {_processor()}".strip(),
        "prng": f"{config.jax_default_prng_impl} {config.jax_threefry_partitionable}",
        "matmul_precision": str(config.jax_default_matmul_precision),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "weights": bundle.digest,
    }


@functools.cache
def _source() -> str:
    """Returns a digest of the package's sources; one version has many commits."""
    package = pathlib.Path(anchor_jax.__file__).parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


@functools.cache
def _processor() -> str:
    """Returns the processor's name if the system reports it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return platform.processor()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return " ".join(next(names, "").split())


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Returns one line for each entry in which two fingerprints differ."""
    return tuple(
        f"{name}: {shown(then.get(name, 'unknown'))} then,"
        f" {shown(now.get(name, 'unknown'))} now"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    )


def digest(pixels: UInt8[Array, "frame height width 3"]) -> str:
    """Returns the SHA-256 of a block's pixels in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


def load_recipe(path: str | os.PathLike) -> Recipe:
    """Returns the recipe in an untrusted JSON file.

    Raises:
      UserError: The file cannot be read, or a field is wrong.
    """
    path = places.local(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the .json beside a video"
        ) from error
    if len(content) > _LONGEST_FILE:
        raise UserError(
            f"{path} has more than {_LONGEST_FILE} bytes, so it is not a recipe; give"
            " the .json beside a video"
        )
    return parse_recipe(parse_json(content, str(path), REMEDY), str(path))


def parse_recipe(given: Mapping[str, Any], where: str) -> Recipe:
    """Returns a checked recipe from untrusted plain values.

    Args:
      given: values as `Session.recipe` returns them, and optionally `blocks` and
        `config`. Other fields are ignored.
      where: the name of the source in messages.

    Raises:
      UserError: A field is missing or wrong.
    """
    if isinstance(given.get("recipes"), Mapping):
        files = ", ".join(some([shown(one) for one in given["recipes"].values()]))
        raise UserError(
            f"{where} describes a comparison of several videos; give the recipe of one"
            f" of them: {files}"
        )
    version = given.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise UserError(
            f"{where}: format_version={shown(version)}, expected {FORMAT_VERSION};"
            " use the version of anchor_jax that wrote it, or make the video again"
        )
    names = {field.name for field in dataclasses.fields(Recipe)}
    known = {name: given[name] for name in names & given.keys()}
    config = given.get("config")
    config = config if isinstance(config, Mapping) else {}
    for name in ("weights", "lora", "text_encoder", "enlarge"):
        known.pop(name, None)
        if name in config:
            known[name] = config[name]
    for field in dataclasses.fields(Recipe):
        if field.default is not dataclasses.MISSING:
            known.setdefault(field.name, field.default)
    for name in ("prompts", "blocks"):
        _check_list(f"{where}: {name}", known.get(name, ()))
    known["setup"] = _setup(known.get("setup"), f"{where}: setup")
    known["prompts"] = parse_switches(known.get("prompts", ()), f"{where}: prompts")
    recipe = from_config(Recipe, known, f"{where}: recipe")
    _check_numbers(recipe, where)
    _check_prompts(recipe, where)
    _check_fingerprint(recipe, where)
    room.check(recipe.setup, recipe.batch, where)
    return recipe


def _setup(given: Any, where: str) -> StreamSetup:
    """Returns a setup from plain values, after checking that its parts fit."""
    setup = rebuild(given, where)
    if not isinstance(setup, StreamSetup):
        raise UserError(f"{where}: got {shown(given)}, expected a StreamSetup")
    limits.check_sizes(f"{where}.model", setup.model)
    limits.check_sizes(f"{where}.grid", setup.grid)
    try:
        setup.grid.tokens(setup.model.patch)
        tables = setup.solver.coefficients(setup.levels)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its parts do not fit together: {error}") from error
    if not all(np.isfinite(table).all() for table in tables.values()):
        raise UserError(
            f"{where}.levels: {setup.solver} has coefficients that are not"
            " finite at these noise levels"
        )
    for name, most in (("guidance", math.inf), ("floor", 1)):
        value = getattr(setup, name)
        if not 0 <= value <= most or value == math.inf:
            raise UserError(
                f"{where}.{name}={value}: must be finite and from 0 to {most}"
            )
    reason = setup.kernel and setup.kernel.refuses(
        setup.model.dtype, setup.model.head_dim
    )
    if reason:
        raise UserError(f"{where}.kernel: {reason}")
    return setup


def parse_switches(given: Any, where: str) -> tuple[Switch, ...]:
    """Returns prompts with their frames, each checked on its own.

    Raises:
      UserError: An entry is not a valid `Switch`.
    """
    _check_list(where, given)
    read = []
    for number, one in enumerate(given):
        name = f"{where}[{number}]"
        if not isinstance(one, Mapping):
            raise UserError(f"{name}: got {shown(one)}, expected an object")
        switch = from_config(Switch, one, name)
        check_prompt(switch.prompt, f"{name}.prompt")
        for field in ("requested", "landed"):
            frame = getattr(switch, field)
            if frame is not None:
                _check_range(f"{name}.{field}", frame, 0, MAX_FRAMES)
        read.append(switch)
    return tuple(read)


def check_prompt(prompt: str, where: str) -> None:
    """Raises UserError unless a value is a valid prompt."""
    if not isinstance(prompt, str):
        raise UserError(
            f"{where} is {shown(prompt)}, expected text; write what to show"
        )
    if not prompt.strip() or len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{where}: got {len(prompt)} characters, expected from 1 to"
            f" {MAX_PROMPT_CHARACTERS}, not only blanks; write what to show"
        )
    check_text(prompt, where)


def rebuild(value: Any, where: str, depth: int = 0) -> Any:
    """Returns the inverse of `describe`; only classes in a fixed table are made.

    Raises:
      UserError: A class is unknown, or a field does not fit.
    """
    if depth > _DEEPEST:
        raise UserError(f"{where[:80]}: nested more than {_DEEPEST} deep")
    if isinstance(value, list):
        _check_list(where, value, _LONGEST_LIST)
        return tuple(
            rebuild(one, f"{where}[{i}]", depth + 1) for i, one in enumerate(value)
        )
    if isinstance(value, Mapping):
        return _rebuild_part(value, where, depth + 1)
    is_number = isinstance(value, int | float)
    if is_number and not abs(value) <= _LARGEST_NUMBER:
        raise UserError(f"{where}={shown(value)}: expected at most {_LARGEST_NUMBER}")
    return value


def _rebuild_part(value: Mapping[str, Any], where: str, depth: int) -> Any:
    name = value.get("kind")
    if not isinstance(name, str) or name not in _PARTS:
        known = suggest(name if isinstance(name, str) else "", _PARTS, "kinds")
        raise UserError(f"{where}.kind={shown(name)} is unknown{known}")
    kind = _PARTS[name]
    given = {
        k: rebuild(v, f"{where}.{k}", depth) for k, v in value.items() if k != "kind"
    }
    _check_choices(kind, given, where)
    part = from_config(kind, given, where)
    if isinstance(part, Policy):
        _check_policy(part, where)
    if isinstance(part, Levels):
        _check_levels(part, where)
    if kind in map(type, KERNELS.values()):
        for field, size in dataclasses.asdict(part).items():
            _check_range(f"{where}.{field}", int(size), type(size) is int, 2**20)
    return part


def _check_choices(kind: type, given: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless fields of a union type have one of its classes."""
    hints = typing.get_type_hints(kind) | {"kernel": Any}
    if kind is StreamSetup:
        hints["kernel"] = typing.Union[(*map(type, KERNELS.values()), types.NoneType)]
    for name in hints.keys() & given.keys():
        choices = typing.get_args(hints[name])
        if typing.get_origin(hints[name]) not in (typing.Union, types.UnionType):
            continue
        if not isinstance(given[name], choices):
            names = " or ".join(choice.__name__ for choice in choices)
            raise UserError(
                f"{where}.{name}: got {type(given[name]).__name__}, expected {names}"
            )


def _check_policy(policy: Policy, where: str) -> None:
    sizes = {"block": policy.block, "window": policy.window}
    if policy.limit is not None:
        sizes["limit"] = policy.limit
    if policy.restart is not None:
        sizes["restart.every"] = policy.restart.every
    for name, size in sizes.items():
        _check_range(f"{where}.{name}", size, 1, _LARGEST_NUMBER)
    _check_range(f"{where}.sink", policy.sink, 0, policy.window)


def _check_levels(levels: Levels, where: str) -> None:
    numbers = (*levels.timestep, *levels.sigma)
    fit = len(levels.timestep) == len(levels.sigma) > 0
    fit = fit and all(type(one) in (int, float) and one >= 0 for one in numbers)
    # A timestep that is truncated to an integer may be 0; a noise level may not.
    if not fit or 0 in levels.sigma:
        raise UserError(
            f"{where}: timestep and sigma must be equally many numbers, timestep at"
            f" least 0 and sigma more than 0; got {shown(levels.timestep)} and"
            f" {shown(levels.sigma)}"
        )


def _check_numbers(recipe: Recipe, where: str) -> None:
    block = recipe.setup.policy.block
    _check_range(f"{where}: seed", recipe.seed, 0, MAX_SEED)
    _check_range(f"{where}: batch", recipe.batch, 1, MAX_BATCH)
    _check_range(f"{where}: frames", recipe.frames, 1, MAX_FRAMES)
    if recipe.frames % block:
        raise UserError(
            f"{where}: frames={recipe.frames}: must be a multiple of the block size"
            f" {block}"
        )
    if recipe.enlarge is not None:
        media.check_enlarge(f"{where}: config.enlarge", recipe.enlarge)
    if len(recipe.negative_prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{where}: negative_prompt has {len(recipe.negative_prompt)} characters,"
            f" expected at most {MAX_PROMPT_CHARACTERS}"
        )
    whole = all(isinstance(x, str) and _DIGEST.fullmatch(x) for x in recipe.blocks)
    if not whole or len(recipe.blocks) not in (0, recipe.frames // block):
        raise UserError(
            f"{where}: blocks: got {len(recipe.blocks)} entries, expected a SHA-256"
            f" for each of {recipe.frames // block} blocks, or none"
        )


def _check_prompts(recipe: Recipe, where: str) -> None:
    """Raises UserError unless prompts start at 0 and then at later blocks."""
    block, landed = recipe.setup.policy.block, [one.landed for one in recipe.prompts]
    for number, one in enumerate(recipe.prompts):
        name = f"{where}: prompts[{number}].landed"
        if one.landed is None or one.landed % block or one.landed < one.requested:
            raise UserError(
                f"{name}={one.landed}: must be a multiple of the block size {block},"
                f" at least the requested frame {one.requested}"
            )
    falls = [b <= a for a, b in itertools.pairwise(landed)]
    if not landed or landed[0] or any(falls) or landed[-1] >= recipe.frames:
        raise UserError(
            f"{where}: prompts landed at {shown(landed)}, expected increasing frames"
            f" that start at 0 and stay below frames={recipe.frames}"
        )


def _check_fingerprint(recipe: Recipe, where: str) -> None:
    for name, value in recipe.fingerprint.items():
        if not isinstance(value, str) or len(value) > _FINGERPRINT_CHARACTERS:
            raise UserError(
                f"{where}: fingerprint.{name[:60]}: got {shown(value)}, expected text"
            )
    if "weights" not in recipe.fingerprint:
        raise UserError(
            f"{where}: fingerprint.weights is missing, expected the weights' SHA-256"
        )


def _check_range(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UserError(
            f"{name}={shown(value)}: must be an integer from {int(least)} to {most}"
        )


def _check_list(name: str, value: Any, most: int = MAX_FRAMES) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{name}: got {shown(value)}, expected a list")
    if len(value) > most:
        raise UserError(f"{name}: got {len(value)} entries, expected at most {most}")
