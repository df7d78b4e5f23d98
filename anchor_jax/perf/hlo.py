"""Reads the text of a compiled program: collectives, loops, estimated cycles, arrays.

Only what differs between programs is read. The text of a new compiler may name more;
what is unknown is left out.

Source: the text format of XLA's HLO, `Compiled.as_text()`.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
"""Kinds of collectives, as the compiler names them."""

Groups = tuple[tuple[int, ...], ...]
"""Positions in the mesh of the devices that communicate with one another."""

_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALLS = re.compile(r" fusion\(.*\bcalls=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}"
    r"|(?:true|false)_computation=%?([\w.\-]+))"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BITS = re.compile(r"\d+")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<mesh>[^\]]*)\]"
    r"(?:, device_ids=\((?P<ids>\[[^)]*?\](?:T\([\d,]*\))?|[\d, ]*)\))?"
    r" \{(?P<axes>[^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: a member of `KINDS`.
      nbytes: size on one device: of the gathered array, of the array that is reduced or
        reduced and scattered, or of the array that a device sends.
      groups: the devices that communicate; () is all of them.
      dtype: type of the largest array.
      chain: number that the parts of a collective share, or None if it has no parts.
      times: how often it runs; a loop's collective runs once per iteration.
    """

    kind: str
    nbytes: int
    groups: Groups
    dtype: str
    chain: int | None = None
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does, with the iterations of its loops.

    One branch of a conditional counts, the one with the most work. So passes that may
    be left out count as run.

    Attributes:
      collectives: the collectives.
      cycles: the compiler's estimate of cycles outside custom calls; 0 if it has none.
      calls: number of custom calls by target.
    """

    collectives: tuple[Collective, ...] = ()
    cycles: int = 0
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        names = self.calls.keys() | other.calls.keys()
        calls = {n: self.calls.get(n, 0) + other.calls.get(n, 0) for n in names}
        both = self.collectives + other.collectives
        return Work(both, self.cycles + other.cycles, calls)

    def repeated(self, times: int) -> "Work":
        """Returns the work of a loop with this body."""
        again = (
            dataclasses.replace(one, times=one.times * times)
            for one in self.collectives
        )
        calls = {name: count * times for name, count in self.calls.items()}
        return Work(tuple(again), self.cycles * times, calls)

    @property
    def size(self) -> tuple[int, int]:
        """Cycles, and bytes of collectives: the measure of a branch."""
        return self.cycles, sum(one.nbytes * one.times for one in self.collectives)


def read(text: str) -> Work:
    """Returns what a program does.

    Args:
      text: text of `compiled.as_text()`.
    """
    bodies, entry = _computations(text)

    @functools.cache
    def work(name: str, inside: bool) -> Work:
        return _work_of(name, inside, bodies, work)

    return work(entry, False) if entry else Work()


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Returns the lines of each computation, and the name of the first to run."""
    bodies, entry, lines = {}, None, []
    for line in text.splitlines():
        if start := _START.match(line):
            lines = bodies.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif " = " in line:
            lines.append(line)
    return bodies, entry


def _work_of(name: str, inside: bool, bodies, work) -> Work:
    """Returns the work of one computation; `inside` a fusion no cycles are counted."""
    total, started = Work(), {}
    for line in bodies.get(name, ()):
        operation = _operation(line)
        if collective := _collective(line, operation, name):
            _start(started, collective)
        elif operation == "while":
            total += _loop(line, bodies, work)
        elif operation == "conditional":
            branches = [work(branch, False) for branch in _branch_names(line)]
            total += max(branches, key=lambda one: one.size, default=Work())
        elif operation in ("fusion", "call", "async-start"):
            done = _called(line, operation, inside, work)
            for found in done.collectives:
                _start(started, found)
            total += dataclasses.replace(done, collectives=())
        else:
            total += _plain(line, operation, inside)
    return total + Work(tuple(itertools.chain.from_iterable(started.values())))


def _start(started: dict, found: Collective) -> None:
    """Adds a collective; its parts on a TPU are a chain, and count once."""
    if found.chain is None:
        started.setdefault(None, []).append(found)
    else:
        started.setdefault((found.kind, found.chain), [found])


def _called(line: str, operation: str, inside: bool, work) -> Work:
    """Returns the work of a fusion, a call or an asynchronous operation."""
    fused = inside or operation == "fusion"
    done = sum((work(name, fused) for name in _CALLED.findall(line)), Work())
    return done + Work(cycles=0 if inside else _cycles(line))


def _plain(line: str, operation: str, inside: bool) -> Work:
    calls = {}
    if operation == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', line)
        calls = {target[1]: 1} if target else {}
    return Work(cycles=0 if inside else _cycles(line), calls=calls)


def _cycles(line: str) -> int:
    found = _CYCLES.search(line)
    return int(found[1]) if found else 0


def _operation(line: str) -> str:
    """Returns the name of an instruction's operation."""
    found = _OPERATION.search(line.partition(" = ")[2])
    return found[1] if found else ""


def _branch_names(line: str) -> list[str]:
    names = []
    for listed, one in _BRANCHES.findall(line):
        names += re.findall(r"[\w.\-]+", listed) or [one]
    return names


def _loop(line: str, bodies, work) -> Work:
    """Returns the work of a loop: its body, times its iterations."""
    body = re.search(r"\bbody=%?([\w.\-]+)", line)
    return work(body[1], False).repeated(_trips(line, bodies)) if body else Work()


def _trips(line: str, bodies) -> int:
    """Returns a loop's iterations: the compiler's count, or its condition's limit."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    names = [condition[1]] if condition else []
    lines = [one for name in names for one in bodies.get(name, ())]
    inner = [called for one in lines for called in _CALLED.findall(one)]
    lines += [one for name in inner for one in bodies.get(name, ())]
    limit = re.compile(r"= [su]32\[\](?:\{[^}]*\})? constant\((\d+)\)")
    limits = [int(found[1]) for one in lines if (found := limit.search(one))]
    return max(limits, default=1)


def _collective(line: str, operation: str, within: str) -> Collective | None:
    """Returns the collective of an instruction, or None for another operation.

    Args:
      line: the instruction.
      operation: name of its operation.
      within: name of its computation.
    """
    kind, is_start = operation.removesuffix("-start"), operation.endswith("-start")
    if kind == "ragged-all-to-all":
        kind = "all-to-all"
    if kind not in KINDS:
        return None
    result = line.partition(" = ")[2].partition(f" {operation}(")[0]
    groups = read_groups(line)
    nbytes = _moved(kind, array_bytes(result), is_start, _size(groups))
    if kind == "all-reduce" and within.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # how a TPU's program has it
    chain = re.search(r'chain_id="(\d+)"', line)
    number = int(chain[1]) if chain else None
    return Collective(kind, nbytes, groups, _largest_type(result), number)


def _moved(kind: str, result: int, is_start: bool, size: int) -> int:
    """Returns the bytes of a collective, from those of its result.

    The result of a started gather or permutation holds the operand too.
    """
    if kind == "reduce-scatter":
        return result * max(size, 1)
    if is_start and kind == "all-gather":
        return round(result * size / (size + 1)) if size else result
    if is_start and kind == "collective-permute":
        return result // 2
    return result


def _size(groups: Groups) -> int:
    return max(map(len, groups), default=0)


def array_bytes(shape: str) -> int:
    """Returns the bytes of the arrays in a shape, such as `(bf16[8,64], f32[])`."""
    return sum(_array_bytes(*found) for found in _SHAPE.findall(shape))


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = _BITS.search(dtype)
    bits = int(bits[0]) if bits else 8  # pred; tokens have no size
    count = math.prod(int(size) for size in sizes.split(",") if size)
    return 0 if dtype == "token" else count * bits // 8


def _largest_type(shape: str) -> str:
    found = _SHAPE.findall(shape)
    return max(found, key=lambda one: _array_bytes(*one))[0] if found else ""


def read_groups(line: str) -> Groups:
    """Returns the groups of a collective; a permutation's are pairs, from and to."""
    if found := _MESH.search(line):
        return _mesh_groups(found["mesh"], found["ids"], found["axes"])
    if found := _IOTA.search(line):
        shape, _, rest = found[1].partition("<=")
        return _as_groups(_iota(rest).reshape(_numbers(shape)))
    if found := _LISTED.search(line):
        return tuple(
            tuple(_numbers(one)) for one in re.findall(r"\{([\d, ]*)\}", found[1])
        )
    return ()


def _mesh_groups(mesh: str, ids: str | None, axes: str) -> Groups:
    """Returns the groups along some axes of a mesh, in the newest notation."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    shape = tuple(sizes.values())
    order = _iota(ids) if ids else np.arange(math.prod(shape))
    order = order.reshape(shape)
    # A part of an axis is written as 'name':(size before it)its size.
    along, apart = [], []
    for name, size in sizes.items():
        part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", axes)
        before, here = (1, size) if part and not part[1] else (size, 1)
        if part and part[1]:
            before, here = int(part[1]), int(part[2])
        apart += [(before, False), (here, True), (size // before // here, False)]
    order = order.reshape([n for n, _ in apart])
    along = [i for i, (_, is_group) in enumerate(apart) if is_group]
    others = [i for i in range(len(apart)) if i not in along]
    size = math.prod(apart[i][0] for i in along)
    return _as_groups(order.transpose(*others, *along).reshape(-1, size))


def _iota(text: str) -> np.ndarray:
    """Returns the numbers of `[2,8]T(1,0)`, or of a list."""
    if not text.startswith("["):
        return np.array(list(_numbers(text)))
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_numbers(shape))).reshape(tuple(_numbers(shape)))
    return numbers.transpose(tuple(_numbers(order))) if order else numbers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _as_groups(rows: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in rows)


def held_arrays(text: str) -> Iterator[str]:
    """Yields the result of each instruction outside fusions: arrays in memory."""
    inner, fused = set(_CALLS.findall(text)), False
    for line in text.splitlines():
        if start := _START.match(line):
            fused = start[2] in inner
        elif not fused:
            made = line.partition(" = ")[2]
            yield made[: made.find("(", 1)]


def score_shapes(
    text: str, tokens: int, features: Iterable[int] = ()
) -> tuple[str, ...]:
    """Returns the shapes of score matrices in the memory of a compiled program.

    Arrays inside a fusion are not in memory.

    Args:
      text: text of `compiled.as_text()`.
      tokens: least number of tokens per side of a score matrix.
      features: dimensions that are not token axes.
    """
    features, held = set(features), {}
    for made in held_arrays(text):
        for shape in _SHAPE.finditer(made):
            long = [n for n in _numbers(shape[2]) if n >= tokens and n not in features]
            if len(long) > 1:
                held[shape[0]] = None
    return tuple(held)
