"""Converts weights from official names to ours and back; every name is accounted for.

A key table is a tuple of `KeyRule`; `anchor_jax.porting.key_tables` holds the tables.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from anchor_jax import trees
from anchor_jax.errors import UserError
from anchor_jax.porting.torch_file import release
from anchor_jax.weights.checkpoint import Lazy

Weights = Mapping[str, Any]  # arrays, or `Lazy` placeholders
Tree = dict[str, Any]

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
_LINES = 10  # lines of an error message, besides its first and last
_WIDTH = 160  # characters of such a line
STACKED = "layer"
DTYPES = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))


@functools.cache
def _expression(source: str, template: str) -> re.Pattern[str]:
    """Returns the pattern of a template, with its fields' patterns from `source`."""
    patterns = {key: found for key, found in _FIELD.findall(source) if found}
    patterns.setdefault(STACKED, r"0|[1-9]\d*")
    expression, end = "", 0
    for field in _FIELD.finditer(template):
        expression += re.escape(template[end : field.start()])
        expression += f"(?P<{field[1]}>{patterns[field[1]]})"
        end = field.end()
    return re.compile(expression + re.escape(template[end:]))


@dataclasses.dataclass(frozen=True)
class KeyRule:
    r"""One kind of parameter: its official name, ours, and the order of axes.

    Names are templates for both directions. `{name:pattern}` in the source matches the
    pattern, and `{name}` in the target is the matched text. The field `{layer}` is a
    number that the target does not contain: those arrays are stacked along a new
    leading axis.

    `layout` is an einops pattern from official axes to ours (None: unchanged), and
    `sizes` gives the axes that the inverse needs.
    """

    source: str
    target: str
    layout: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def is_stacked(self) -> bool:
        return f"{{{STACKED}}}" in self.source

    def match_source(self, name: str) -> dict[str, str] | None:
        """Returns the fields of an official name, or None if it does not match."""
        return self._match(self.source, name)

    def match_target(self, path: str) -> dict[str, str] | None:
        """Returns the fields of one of our paths, or None if it does not match."""
        return self._match(self.target, path)

    def _match(self, template: str, name: str) -> dict[str, str] | None:
        found = _expression(self.source, template).fullmatch(name)
        return found.groupdict() if found else None

    def lay_out(self, array: np.ndarray) -> np.ndarray:
        """Returns an official array in our order of axes."""
        if self.layout is None:
            return array
        return einops.rearrange(array, self.layout, **dict(self.sizes))

    def lay_back(self, array: np.ndarray) -> np.ndarray:
        """Returns the inverse of `lay_out`."""
        if self.layout is None:
            return array
        ours, official = reversed(self.layout.split("->"))
        return einops.rearrange(array, f"{ours} -> {official}", **dict(self.sizes))


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Returns a template with each field replaced by its text."""
    return _FIELD.sub(lambda field: str(fields[field[1]]), template)


@dataclasses.dataclass
class _Claimed:
    """The arrays of one target by layer (0 if it is not stacked)."""

    rule: KeyRule
    fields: dict[str, str]
    parts: dict[int, tuple[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def name(self, layer: int) -> str:
        return fill(self.rule.source, {**self.fields, STACKED: layer})


class Mismatch(UserError):
    """Weights that do not fit a table and a network; `problems` lists each fault.

    The message has at most 12 lines: problems that differ only in numbers share a line.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(_message(self.problems)))


def _message(problems: Sequence[str]) -> Iterator[str]:
    if len(problems) == 1:
        yield _cut(problems[0], 1000)
        return
    yield (
        f"{len(problems)} problems; check that the weights, their prefix and the"
        " configuration fit together:"
    )
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(_NUMBER.sub("#", problem), []).append(problem)
    for group in list(groups.values())[:_LINES]:
        more = f" (and {len(group) - 1} more like it)" if len(group) > 1 else ""
        yield _cut(group[0], _WIDTH) + more
    rest = sum(map(len, list(groups.values())[_LINES:]))
    if rest:
        yield f"... and {rest} more of other kinds"


_NUMBER = re.compile(r"\d+")


def _cut(text: str, width: int) -> str:
    """Returns a line of printable characters, shortened in the middle."""
    text = "".join(one if one.isprintable() else "?" for one in text)
    half = width // 2 - 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """An array of a source that is read only when needed.

    Attributes:
      shape: Shape of the array, with its official order of axes.
      dtype: Type of the array.
      make: Function that returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def convert(
    source: Weights, table: tuple[KeyRule, ...], expected: Tree | None = None
) -> Tree:
    """Returns the arrays as a nested dict under our names, layers stacked.

    Args and Raises are those of `convert_lazily`.
    """
    lazy = convert_lazily(source, table, expected)
    return jax.tree.map(lambda leaf: leaf.load(), lazy)


def convert_lazily(
    source: Weights, table: tuple[KeyRule, ...], expected: Tree | None = None
) -> Tree:
    """Returns leaves of type `Lazy` as a nested dict under our names, layers stacked.

    All checks are made now, from shapes and types only. A leaf is read when it is
    loaded, layer by layer into one array. Pages of a mapped file are then released.

    Args:
      source: Arrays by official name, preferably of a mapped file.
      table: Its rules. Exactly one must claim each name.
      expected: The resulting tree, of objects with a shape; types are not compared. If
        None, only gaps between layers are reported as missing.

    Raises:
      Mismatch: Names are extra, missing or claimed twice, or arrays have a wrong shape
        or type. All are listed.
    """
    problems: list[str] = []
    claimed = _claim(source, table, problems)
    shapes = None
    if expected is not None:
        leaves = trees.flatten(expected)
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        problems += _absent(shapes, claimed, table)
    depth = len({layer for item in claimed.values() for layer in item.parts})
    ported = {}
    for path, item in claimed.items():
        shape = shapes.get(path) if shapes is not None else None
        if shapes is not None and shape is None:
            problems += [
                f"{name}: extra, the network has no {path}"
                for name, _ in item.parts.values()
            ]
            continue
        ported[path] = _assemble(path, item, depth, shape, problems)
    if problems:
        raise Mismatch(problems)
    return trees.unflatten(ported)


def shape_of(source: Weights, table: tuple[KeyRule, ...], path: str) -> tuple[int, ...]:
    """Returns the shape of one layer at one of our paths, in our order of axes.

    Raises:
      Mismatch: Its array is missing or has the wrong axes.
    """
    name = path
    for rule in table:
        if (fields := rule.match_target(path)) is None:
            continue
        name = fill(rule.source, {**fields, STACKED: 0})
        if name in source:
            return _lay_out(name, source[name], rule).shape
    raise Mismatch([f"{name}: missing, expected for {path}"])


def num_layers(source: Weights, table: tuple[KeyRule, ...]) -> int:
    """Returns the number of layers among the names that a table claims."""
    stacked = [rule for rule in table if rule.is_stacked]
    found = (rule.match_source(name) for name in source for rule in stacked)
    return len({fields[STACKED] for fields in found if fields is not None})


def _lay_out(name: str, array: np.ndarray | Deferred, rule: KeyRule) -> np.ndarray:
    """Returns an array in our order of axes, or the shape of an unread array."""
    if isinstance(array, Deferred):
        array = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    try:
        return rule.lay_out(array)
    except einops.EinopsError:
        wanted = f"axes {rule.layout.split('->')[0].strip()!r}"
        problem = f"{name}: shape {array.shape}, expected {wanted}"
        raise Mismatch([problem]) from None


def _claim(
    source: Weights, table: tuple[KeyRule, ...], problems: list[str]
) -> dict[str, _Claimed]:
    """Returns arrays by target path; adds names not claimed once to `problems`."""
    claimed: dict[str, _Claimed] = {}
    for name, array in source.items():
        matches = [(rule, rule.match_source(name)) for rule in table]
        matches = [(rule, fields) for rule, fields in matches if fields is not None]
        if len(matches) != 1:
            found = [rule.source for rule, _ in matches]
            problems.append(
                f"{name}: claimed by {len(found)} rules {found}, expected exactly one"
                if found
                else f"{name}: extra, no rule claims it"
            )
            continue
        rule, fields = matches[0]
        layer = int(fields.pop(STACKED, 0))
        path = fill(rule.target, fields)
        item = claimed.setdefault(path, _Claimed(rule, fields))
        if layer in item.parts:
            problems.append(
                f"{name}: its place {path} is taken by {item.parts[layer][0]}"
            )
        item.parts.setdefault(layer, (name, array))
    return claimed


def _absent(
    shapes: Mapping[str, tuple[int, ...]],
    claimed: Mapping[str, _Claimed],
    table: tuple[KeyRule, ...],
) -> Iterator[str]:
    """Yields a line for each expected path without an array."""
    for path in shapes.keys() - claimed.keys():
        names = [
            fill(rule.source, {STACKED: "*", **fields})
            for rule in table
            if (fields := rule.match_target(path)) is not None
        ]
        yield f"{', '.join(names) or '(no rule)'}: missing, expected for {path}"


def _assemble(
    path: str,
    item: _Claimed,
    depth: int,
    shape: tuple[int, ...] | None,
    problems: list[str],
) -> Lazy | None:
    """Returns the leaf of a target, or None with a line in `problems`."""
    each = shape
    if item.rule.is_stacked and shape is not None:
        depth, each = (shape or (0,))[0], shape[1:]
    layers = range(depth if item.rule.is_stacked else 1)
    before = len(problems)
    for layer in layers:
        if layer not in item.parts:
            problems.append(f"{item.name(layer)}: missing, expected for {path}")
    dtype = item.parts[min(item.parts)][1].dtype
    for layer, (name, array) in sorted(item.parts.items()):
        if layer not in layers:
            problems.append(f"{name}: extra, {path} has {len(layers)} layers")
            continue
        problems += _check_dtype(name, array.dtype, dtype)
        try:
            part = _lay_out(name, array, item.rule)
        except Mismatch as mismatch:
            problems += mismatch.problems
            continue
        each = part.shape if each is None else each
        if part.shape != each:
            problems.append(
                f"{name}: shape {array.shape} gives {part.shape} for {path},"
                f" expected {each}"
            )
    if len(problems) > before:
        return None
    parts = [array for _, (_, array) in sorted(item.parts.items())]
    whole = (len(parts), *each) if item.rule.is_stacked else each
    return Lazy(whole, dtype, functools.partial(_read, item.rule, parts, whole))


def _check_dtype(name: str, dtype: np.dtype, other: np.dtype) -> Iterator[str]:
    """Yields a line unless the type is one of weights and equal in all layers."""
    if dtype not in DTYPES:
        names = ", ".join(known.name for known in DTYPES)
        yield f"{name}: type {dtype.name}, must be one of {names}"
    elif dtype != other:
        yield f"{name}: type {dtype.name}, but {other.name} in other layers"


def _read(
    rule: KeyRule, parts: Sequence[np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the parts in our order of axes, stacked if the rule is by layer."""
    whole = np.empty(shape, parts[0].dtype)
    places = whole if rule.is_stacked else whole[None]
    for place, part in zip(places, parts, strict=True):
        part = part.make() if isinstance(part, Deferred) else part
        place[...] = rule.lay_out(part)
        release(part)
    return whole


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of an official array in our tree.

    Attributes:
      name: The official name.
      rule: The rule that maps it.
      path: Path in our tree.
      layer: Index along the first axis, or None if layers are not stacked.
    """

    name: str
    rule: KeyRule
    path: str
    layer: int | None

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the official array's shape from the shape of the whole leaf."""
        part = leaf if self.layer is None else leaf[1:]
        return self.rule.lay_back(np.broadcast_to(np.zeros((), np.int8), part)).shape

    def take(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the official array from the whole leaf at `path`."""
        part = leaf if self.layer is None else leaf[self.layer]
        return np.ascontiguousarray(self.rule.lay_back(part))


def places(params: Tree, table: tuple[KeyRule, ...]) -> list[Place]:
    """Returns the places of all official arrays, leaf by leaf.

    Args:
      params: The tree, of objects with a shape.
      table: The table.

    Raises:
      UserError: A path is claimed by no rule or by several; all are listed.
    """
    found, problems = [], []
    for path, leaf in trees.flatten(params).items():
        claims = [(rule, rule.match_target(path)) for rule in table]
        claims = [(rule, fields) for rule, fields in claims if fields is not None]
        if len(claims) != 1:
            problems.append(f"{path}: claimed by {len(claims)} rules")
            continue
        rule, fields = claims[0]
        for layer in range(leaf.shape[0]) if rule.is_stacked else [None]:
            name = fill(rule.source, {**fields, STACKED: layer})
            found.append(Place(name, rule, path, layer))
    if problems:
        raise UserError(
            "exactly one rule must claim each parameter; is this the table of"
            " this network?\n" + "\n".join(problems)
        )
    return found


def export(params: Tree, table: tuple[KeyRule, ...]) -> dict[str, np.ndarray]:
    """Returns the parameters under their official names: the inverse of `convert`.

    Raises:
      UserError: A path is claimed by no rule or by several; all are listed.
    """
    leaves = trees.flatten(params)
    return {
        place.name: place.take(np.asarray(leaves[place.path]))
        for place in places(params, table)
    }


def load_safetensors(path: str | pathlib.Path, prefix: str = "") -> Weights:
    """Returns the arrays whose names start with a prefix, without the prefix.

    bfloat16 arrays have the type of `ml_dtypes`.
    """
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def convert_lora(
    source: Weights,
    table: tuple[KeyRule, ...],
    alpha: float,
    expected: Tree | None = None,
) -> Tree:
    """Returns the adapters under our names, with alpha / rank multiplied into `b`.

    An adapted layer then adds x a b without a factor. Source: LoRA (arXiv:2106.09685),
    section 4.1; wan/README.md, "LoRA".
    """
    lazy = convert_lora_lazily(source, table, alpha, expected)
    return jax.tree.map(lambda leaf: leaf.load(), lazy)


def convert_lora_lazily(
    source: Weights,
    table: tuple[KeyRule, ...],
    alpha: float,
    expected: Tree | None = None,
) -> Tree:
    """Returns the result of `convert_lora` with leaves of type `Lazy`."""
    leaves = traverse_util.flatten_dict(convert_lazily(source, table, expected))
    for path, leaf in leaves.items():
        if path[-1] == "b" and alpha != leaf.shape[-2]:
            load = functools.partial(_scaled, leaf, alpha / leaf.shape[-2])
            leaves[path] = dataclasses.replace(leaf, load=load)
    return traverse_util.unflatten_dict(leaves)


def _scaled(leaf: Lazy, factor: float) -> np.ndarray:
    array = leaf.load()
    return (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)


def export_lora(
    adapters: Tree, table: tuple[KeyRule, ...], alpha: float
) -> dict[str, np.ndarray]:
    """Returns adapters under official names, with alpha / rank divided out of `b`."""
    leaves = traverse_util.flatten_dict(adapters)
    for path, leaf in leaves.items():
        if path[-1] == "b":
            leaf = np.asarray(leaf)
            leaves[path] = leaf * np.asarray(leaf.shape[-2] / alpha, leaf.dtype)
    return export(traverse_util.unflatten_dict(leaves), table)
