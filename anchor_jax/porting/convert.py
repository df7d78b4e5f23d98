"""Weights from official names to ours and back, with every name accounted for.

A table is a tuple of rules; `anchor_jax.porting.rules` holds the tables.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import einops
import numpy as np
from flax import traverse_util

Weights = Mapping[str, np.ndarray]
Tree = dict[str, Any]

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
STACKED = "layer"


@functools.cache
def _expression(source: str, template: str) -> re.Pattern[str]:
    """Returns what a template matches, its fields' patterns taken from `source`."""
    patterns = {key: found for key, found in _FIELD.findall(source) if found}
    patterns.setdefault(STACKED, r"0|[1-9]\d*")
    expression, end = "", 0
    for field in _FIELD.finditer(template):
        expression += re.escape(template[end : field.start()])
        expression += f"(?P<{field[1]}>{patterns[field[1]]})"
        end = field.end()
    return re.compile(expression + re.escape(template[end:]))


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""One kind of parameter: its official name, ours, and the order of axes.

    Names are templates that hold for both directions. `{name:pattern}` in the source
    stands for what the pattern matches, and `{name}` in the target for the same text.
    The field `{layer}` is a number that the target does not name: those arrays are
    stacked along a new leading axis.

    `layout` is an einops pattern from official axes to ours (None: as they are), and
    `sizes` gives those axes that the inverse could not otherwise tell apart.
    """

    source: str
    target: str
    layout: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def is_stacked(self) -> bool:
        return f"{{{STACKED}}}" in self.source

    def match_source(self, name: str) -> dict[str, str] | None:
        """Returns the fields of an official name, None if this is not its rule."""
        return self._match(self.source, name)

    def match_target(self, path: str) -> dict[str, str] | None:
        """Returns the fields of one of our paths, None if this is not its rule."""
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
    """The arrays that one target is made of, by layer (0 where it is not stacked)."""

    rule: Rule
    fields: dict[str, str]
    parts: dict[int, tuple[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def name(self, layer: int) -> str:
        return fill(self.rule.source, {**self.fields, STACKED: layer})


def convert(
    source: Weights, rules: tuple[Rule, ...], expected: Tree | None = None
) -> Tree:
    """Returns the arrays as a nested dict under our names, layers stacked.

    Args:
      source: Official names to arrays.
      rules: A table; every name must be claimed by exactly one rule.
      expected: The tree to arrive at, of anything with a shape; types are not
        compared. Without it only gaps between layers are found missing.

    Raises:
      ValueError: Names are extra, missing, claimed twice or of a wrong shape; all of
        them are listed.
    """
    problems: list[str] = []
    claimed = _claim(source, rules, problems)
    shapes = None
    if expected is not None:
        leaves = traverse_util.flatten_dict(expected, sep="/")
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        problems += _absent(shapes, claimed, rules)
    depth = 1 + max((max(item.parts) for item in claimed.values()), default=0)
    ported = {}
    for path, item in claimed.items():
        shape = shapes.get(path) if shapes is not None else None
        if shapes is not None and shape is None:
            problems += [
                f"{name}: extra, {path} is not expected"
                for name, _ in item.parts.values()
            ]
            continue
        ported[path] = _assemble(path, item, depth, shape, problems)
    if problems:
        raise ValueError(
            f"{len(problems)} parameters cannot be ported one to one; check that the"
            " checkpoint, its prefix and the configuration belong together:\n"
            + "\n".join(problems)
        )
    return traverse_util.unflatten_dict(ported, sep="/")


def _claim(
    source: Weights, rules: tuple[Rule, ...], problems: list[str]
) -> dict[str, _Claimed]:
    """Returns the arrays by target path; adds to `problems` names not claimed once."""
    claimed: dict[str, _Claimed] = {}
    for name, array in source.items():
        matches = [(rule, rule.match_source(name)) for rule in rules]
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
    rules: tuple[Rule, ...],
) -> Iterator[str]:
    """Yields a line for each expected path that no array was found for."""
    for path in shapes.keys() - claimed.keys():
        names = [
            fill(rule.source, {STACKED: "*", **fields})
            for rule in rules
            if (fields := rule.match_target(path)) is not None
        ]
        yield f"{', '.join(names) or '(no rule)'}: missing, expected for {path}"


def _assemble(
    path: str,
    item: _Claimed,
    depth: int,
    shape: tuple[int, ...] | None,
    problems: list[str],
) -> np.ndarray | None:
    """Returns the array of a target, or None with a line in `problems`."""
    each = shape
    if item.rule.is_stacked and shape is not None:
        depth, each = (shape or (0,))[0], shape[1:]
    layers = range(depth if item.rule.is_stacked else 1)
    before = len(problems)
    for layer in layers:
        if layer not in item.parts:
            problems.append(f"{item.name(layer)}: missing, expected for {path}")
    parts = []
    for layer, (name, array) in sorted(item.parts.items()):
        if layer not in layers:
            problems.append(f"{name}: extra, {path} has {len(layers)} layers")
            continue
        try:
            part = item.rule.lay_out(array)
        except einops.EinopsError:
            wanted = f"axes {item.rule.layout.split('->')[0].strip()!r}"
            problems.append(f"{name}: shape {array.shape}, expected {wanted}")
            continue
        each = part.shape if each is None else each
        if part.shape != each:
            problems.append(
                f"{name}: shape {array.shape} gives {part.shape} for {path},"
                f" expected {each}"
            )
        parts.append(part)
    if len(problems) > before:
        return None
    return np.stack(parts) if item.rule.is_stacked else np.ascontiguousarray(parts[0])


def export(params: Tree, rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    """Returns the parameters under their official names: the inverse of `convert`.

    Raises:
      ValueError: A path is claimed by no rule or by several; all are listed.
    """
    official, problems = {}, []
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        found = [(rule, rule.match_target(path)) for rule in rules]
        found = [(rule, fields) for rule, fields in found if fields is not None]
        if len(found) != 1:
            problems.append(f"{path}: claimed by {len(found)} rules")
            continue
        rule, fields = found[0]
        parts = np.asarray(leaf) if rule.is_stacked else [np.asarray(leaf)]
        for layer, part in enumerate(parts):
            name = fill(rule.source, {**fields, STACKED: layer})
            official[name] = np.ascontiguousarray(rule.lay_back(part))
    if problems:
        raise ValueError(
            "each parameter must be claimed by exactly one rule; is this the table of"
            " this network?\n" + "\n".join(problems)
        )
    return official


def plain_names(source: Weights, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the arrays whose name starts with a prefix, named without it.

    Fragments that sharded training leaves in names are removed. Source: algorithm.md,
    section 6.5.
    """
    plain = {name.replace("_fsdp_wrapped_module.", ""): name for name in source}
    return {
        name.removeprefix(prefix): source[original]
        for name, original in plain.items()
        if name.startswith(prefix)
    }


def load_safetensors(path: str | pathlib.Path, prefix: str = "") -> Weights:
    """Returns the arrays of a file whose names start with a prefix, without it.

    bfloat16 arrays come in the type of `ml_dtypes`.
    """
    import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def convert_lora(
    source: Weights, rules: tuple[Rule, ...], alpha: float, expected: Tree | None = None
) -> Tree:
    """Returns the adapters under our names, with alpha / rank multiplied into `b`.

    So an adapted layer adds x a b, without a factor. Source: LoRA (arXiv:2106.09685),
    section 4.1; algorithm.md, section 6.4.
    """
    return _scale_adapters(convert(source, rules, expected), lambda rank: alpha / rank)


def export_lora(
    adapters: Tree, rules: tuple[Rule, ...], alpha: float
) -> dict[str, np.ndarray]:
    """Returns adapters under official names, with alpha / rank divided out of `b`."""
    unscaled = _scale_adapters(adapters, lambda rank: rank / alpha)
    return export(unscaled, rules)


def _scale_adapters(adapters: Tree, factor: Callable[[int], float]) -> Tree:
    """Returns the adapters with each `b` [layer, rank, out] times factor(rank)."""
    leaves = traverse_util.flatten_dict(adapters)
    for path, leaf in leaves.items():
        if path[-1] == "b":
            leaf = np.asarray(leaf)
            leaves[path] = leaf * np.asarray(factor(leaf.shape[-2]), leaf.dtype)
    return traverse_util.unflatten_dict(leaves)
