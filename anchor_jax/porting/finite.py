"""Checks that weights are finite while they are written."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from anchor_jax import trees
from anchor_jax.errors import UserError
from anchor_jax.finite import count
from anchor_jax.porting.convert import STACKED, KeyRule, fill
from anchor_jax.weights.checkpoint import Lazy


@dataclasses.dataclass
class Watch:
    """Counts values that are not finite as leaves are read.

    Attributes:
      keeps: Whether weights that are not finite are written anyway.
      found: Their number, by item and collection of the network.
    """

    keeps: bool = False
    found: dict[str, int] = dataclasses.field(default_factory=dict)
    refusal: UserError | None = None

    def over(
        self, item: str, tree: Any, tables: Mapping[str, tuple[KeyRule, ...]]
    ) -> Any:
        """Returns a tree of `Lazy` whose values are checked when they are loaded.

        Args:
          item: Name of the network's item.
          tree: Leaves of the network.
          tables: The table by collection ("params", "lora", or "" for the tree itself).
        """
        flat = trees.flatten(tree)
        for path, leaf in flat.items():
            first, _, rest = path.partition("/")
            part, inner = (first, rest) if first in tables else ("", path)
            load = functools.partial(
                self._load, leaf, f"{item} {part}".strip(), inner, tables[part]
            )
            flat[path] = dataclasses.replace(leaf, load=load)
        return trees.unflatten(flat)

    def _load(self, leaf: Lazy, network: str, path: str, table) -> np.ndarray:
        array = leaf.load()
        if wrong := count(array):
            self.found[network] = self.found.get(network, 0) + wrong
            if not self.keeps:
                name = _official(array, path, table)
                self.refusal = UserError(
                    f"{network}: {name} has values that are not finite (NaN or"
                    f" infinite), {wrong:,} of {array.size:,} in its kind of layer; the"
                    " training may have diverged: use an earlier checkpoint, or"
                    " download the file again;"
                    " --allow_nonfinite ports it anyway"
                )
                raise self.refusal
        return array


def _official(array: np.ndarray, path: str, table: tuple[KeyRule, ...]) -> str:
    """Returns the official name of a leaf's first part that is not finite."""
    for rule in table:
        if (fields := rule.match_target(path)) is not None:
            layer = 0
            if rule.is_stacked:
                layer = next(at for at, part in enumerate(array) if count(part))
            return fill(rule.source, {**fields, STACKED: layer})
    return path
