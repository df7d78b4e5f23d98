"""Tables of the catalog, as text and as Markdown."""

import re
from collections.abc import Iterable, Sequence

from anchor_jax.cache.catalog import CATALOG, ROPES, SWITCHES, Entry
from anchor_jax.cache.policy import Policy
from anchor_jax.errors import UserError, suggest

_MARKED = re.compile(
    r"(?P<mark><!-- anchor-jax policies: (?P<columns>[^\n]*) -->)\n(\|[^\n]*\n)*"
)

_COLUMNS = {
    "policy": lambda name, entry: name,
    "remembers": lambda name, entry: _regions(entry.policy),
    "RoPE": lambda name, entry: _rope(entry.policy),
    "at a switch": lambda name, entry: _on_switch(entry.policy),
    "what it is": lambda name, entry: entry.about,
    "source": lambda name, entry: entry.source,
}


def text() -> list[str]:
    """Returns the lines of `anchor-jax policies`."""
    columns = ("policy", "remembers", "RoPE", "at a switch", "what it is")
    ropes = [(name, rope.about) for name, rope in ROPES.items()]
    switches = [(name, switch.about) for name, switch in SWITCHES.items()]
    return [
        *aligned([columns, *_rows(columns, CATALOG.items())]),
        "",
        "Numbers are latent frames; the local window includes the block of 3.",
        "anchor-jax policies NAME shows what each block reads, at which positions.",
        "",
        "RoPE rules, for --config.rope:",
        *aligned(ropes),
        "",
        "Switch actions, for --config.on_switch:",
        *aligned(switches),
    ]


def markdown(columns: Sequence[str]) -> list[str]:
    """Returns the lines of a Markdown table of the methods that have a source."""
    published = [(name, entry) for name, entry in CATALOG.items() if entry.source]
    rows = [(f"`{name}`", *cells) for name, *cells in _rows(columns, published)]
    return [
        _line(columns),
        f"|{'---|' * len(columns)}",
        *map(_line, rows),
    ]


def updated(page: str) -> str:
    """Returns a page of Markdown with its tables of policies generated again.

    A table follows a comment that names its columns:
    `<!-- anchor-jax policies: policy, what it is -->`.

    Raises:
      UserError: A column is unknown.
    """

    def replaced(found: re.Match) -> str:
        columns = [name.strip() for name in found["columns"].split(",")]
        for name in columns:
            if name not in _COLUMNS:
                raise UserError(
                    f"unknown column {name!r}{suggest(name, _COLUMNS, 'columns')}"
                )
        return "\n".join([found["mark"], *markdown(columns), ""])

    return _MARKED.sub(replaced, page)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line for each row, with cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _rows(columns: Sequence[str], entries: Iterable[tuple[str, Entry]]):
    return [
        tuple(_COLUMNS[column](name, entry) for column in columns)
        for name, entry in entries
    ]


def _regions(policy: Policy | None) -> str:
    if policy is None:
        return "all"
    sink = f"sink {policy.sink} + " if policy.sink else ""
    junction = f" + junction {policy.junction_frames}" if policy.junction else ""
    return f"{sink}local {policy.span}{junction}"


def _rope(policy: Policy | None) -> str:
    if policy is None:
        return "absolute"
    rule = policy.positions
    name = _rope_name(policy)
    return name if rule.range is None else f"{name} 0-{rule.range - 1}"


def _rope_name(policy: Policy) -> str:
    """Returns the name of a policy's RoPE rule for `--config.rope`.

    Returns the name of the class if no name selects the rule.
    """
    rule = policy.positions
    for name, rope in ROPES.items():
        if rope.make(policy.window, rule.cut) == rule:
            return name
    return type(rule).__name__.lower()


def _on_switch(policy: Policy | None) -> str:
    return "refused" if policy is None else policy.on_switch.label
