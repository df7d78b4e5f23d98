"""Parts that packages add to the core, found by role and name, and loaded on demand.

A domain is a package that adds parts: data, a codec, metrics. Its `__init__` has
`PARTS`, role -> name -> "module:attribute", and imports nothing heavy. No module of the
core imports a domain; `DOMAINS` below is the only place that names one.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

DOMAINS = ("anchor_jax.tiny_world",)

Part = TypeVar("Part")


def load(place: str) -> Any:
    """Returns the object named "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Mapping[str, Part]):
    """The parts of one role, by name. Names are known before a part is imported."""

    def __init__(self, role: str, own: Mapping[str, str] | None = None):
        """Adds the core's own parts to those of the domains.

        Args:
          role: key of `PARTS` in the domains.
          own: name -> "module:attribute" of parts of the core.
        """
        self.role, self._own = role, dict(own or {})

    def _places(self) -> dict[str, str]:
        places = dict(self._own)
        for domain in DOMAINS:
            added = importlib.import_module(domain).PARTS.get(self.role, {})
            twice = sorted(places.keys() & added)
            if twice:
                raise ValueError(
                    f"{domain}: {self.role} {', '.join(twice)} exist already; choose"
                    " other names"
                )
            places |= added
        return places

    def __getitem__(self, name: str) -> Part:
        return load(self._places()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places())

    def __contains__(self, name: object) -> bool:
        return name in self._places()

    def __len__(self) -> int:
        return len(self._places())
