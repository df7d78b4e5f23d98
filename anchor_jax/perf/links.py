"""Bytes and seconds of collectives on the links of a topology.

A ring moves the least bytes. Each chip sends (n - 1) / n of an array of a group of n
chips, twice for a sum that all chips get. Chips of one node share what comes from other
nodes: each receives its part over the network and sends it on inside the node.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from anchor_jax.perf.hlo import Collective, Groups
from anchor_jax.perf.targets import Topology

_ROUNDS = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of chips of a collective.

    Attributes:
      size: number of chips.
      hosts: number of nodes that they are on.
    """

    size: int
    hosts: int = 1


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one chip sends in a program, by kind of collective and by link.

    Attributes:
      kind: kind of collective.
      count: number of collectives; in a mean step, not a whole number.
      nbytes: bytes of the arrays that are gathered, reduced or sent.
      inside: bytes that a chip sends inside its node or slice.
      between: bytes that a chip sends to other nodes.
      seconds: their time at the published speed of the links, one after another.
    """

    kind: str
    count: float
    nbytes: float
    inside: float
    between: float
    seconds: float

    def repeated(self, times: float) -> "Traffic":
        """Returns what it is if a program runs this often."""
        kind, *values = dataclasses.astuple(self)
        return Traffic(kind, *(times * value for value in values))


def merged(rows: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """Returns sums by kind of collective."""
    by_kind = defaultdict(list)
    for row in rows:
        kind, *values = dataclasses.astuple(row)
        by_kind[kind].append(values)
    return tuple(
        Traffic(kind, *map(sum, zip(*parts, strict=True)))
        for kind, parts in sorted(by_kind.items())
    )


def sent(kind: str, nbytes: float, group: Group) -> tuple[float, float]:
    """Returns the bytes that a chip sends inside its node, and to other nodes.

    Args:
      kind: kind of collective.
      nbytes: bytes of the array, as in `hlo.Collective`.
      group: the chips that take part.
    """
    if kind == "collective-permute":
        return (0.0, nbytes) if group.hosts > 1 else (nbytes, 0.0)
    if group.size < 2:
        return 0.0, 0.0
    rounds = _ROUNDS.get(kind, 1.0)
    total = rounds * nbytes * (group.size - 1) / group.size
    away = rounds * nbytes * (group.hosts - 1) / group.hosts
    if kind != "all-to-all":
        # Only sums and gathers repeat data, which then travels once for a node.
        away /= group.size / group.hosts
    return total - away, away


@dataclasses.dataclass(frozen=True)
class Layout:
    """The chips of a mesh.

    Attributes:
      topology: the chips.
      order: number of the device at each position of the mesh. (): as they come.
    """

    topology: Topology
    order: tuple[int, ...] = ()

    def group(self, groups: Groups) -> Group:
        """Returns the largest of a collective's groups.

        Args:
          groups: positions in the mesh; () is all devices.
        """
        order = self.order or tuple(range(self.topology.chips))

        def describe(positions) -> Group:
            hosts = {self.topology.host(order[position]) for position in positions}
            return Group(len(positions), len(hosts))

        found = map(describe, groups or (range(len(order)),))
        return max(found, key=lambda one: (one.hosts, one.size))

    def seconds(self, kind: str, nbytes: float, group: Group) -> float:
        """Returns the time of a collective at the published speed of the links.

        Links inside a node and between nodes are busy at the same time.
        """
        inside, between = sent(kind, nbytes, group)
        target, share = self.topology.target, self.topology.links_of(group.size)
        near = inside / (target.link * share) if inside else 0.0
        return max(near, between / target.network if between else 0.0)

    def traffic(self, collectives: Iterable[Collective]) -> tuple[Traffic, ...]:
        """Returns what one chip sends in a program, by kind of collective."""
        rows = []
        for one in collectives:
            group = self.group(one.groups)
            inside, between = sent(one.kind, one.nbytes, group)
            time = self.seconds(one.kind, one.nbytes, group)
            row = Traffic(one.kind, 1.0, one.nbytes, inside, between, time)
            rows.append(row.repeated(one.times))
        return merged(rows)
