"""`anchor-jax policies`: lists cache policies, or shows what each block reads."""

import functools
from collections.abc import Iterator, Sequence

from anchor_jax.errors import UserError, suggest

SUMMARY = "List the cache policies, or show what each block reads under one of them."
ARGUMENTS = "[NAME]"
USAGE = """
anchor-jax policies
anchor-jax policies anchor_forcing
anchor-jax sample --config=configs/tiny.py:longlive
anchor-jax sample --config=configs/tiny.py:longlive --config.rope=bounded

# A policy decides which earlier latent frames a block reads (sink: the first frames;
# local window: the newest frames; junction: the block after a prompt switch), at which
# temporal RoPE positions, and what a prompt switch does to the cache.
# With NAME it prints one line per block over 60 latent frames with a switch at 40, as
# FRAMES@POSITIONS. +40 marks the first block under the new prompt.
"""

ABOUT = {
    "anchor_forcing": "the paper's method: positions 0-20, switch kept as junction",
    "anchor_forcing_release": "the released code's variant, for the released weights",
    "longlive": "LongLive 1.0: positions grow without bound",
    "longlive_relative": "LongLive with positions 0-11",
    "self_forcing": "Self-Forcing: reads all frames, limited to 21 latent frames",
    "self_forcing_rolling": "Self-Forcing with a rolling window",
    "causvid": "CausVid: clips of 21 latent frames, chained by their last 3",
    "infinity_rope": "Infinity-RoPE: positions 0-5, flush at a switch, scene cuts",
    "infinity_rope_release": "Infinity-RoPE with the official code's key positions",
    "bounded_rope": "table 6: sink positions directly before the local window",
    "tri_region_no_junction": "ablation: anchor_forcing without the junction",
    "no_recache": "ablation: anchor_forcing without the re-cache",
    "no_global_sink": "ablation: anchor_forcing whose re-cache replaces the sink",
    "wan_teacher": "not streaming: the whole clip at once, bidirectional, one prompt",
}
_TEACHER = "wan_teacher"
_FRAMES = 60
_SWITCH = 40


def define_flags() -> None:
    """Defines no flags."""


def main(argv: Sequence[str]) -> None:
    """Prints the table of policies, or the reads of one policy.

    Raises:
      UserError: The policy is unknown, or several are named.
    """
    from anchor_jax.cache.policies import POLICIES

    if len(argv) > 2:
        raise UserError(f"got {len(argv) - 1} names; give at most one policy")
    if len(argv) == 1:
        print("\n".join(table()))
        return
    name = argv[1]
    if name == _TEACHER:
        print(f"{name}: {ABOUT[name]}")
        print(
            "It has no blocks: every frame reads all others, at positions 0, 1, 2, ..."
        )
        return
    if name not in POLICIES:
        known = [*POLICIES, _TEACHER]
        raise UserError(f"unknown policy {name!r}{suggest(name, known, 'policies')}")
    print(f"{name}: {ABOUT[name]}")
    print("\n".join(memory(POLICIES[name])))


def table() -> list[str]:
    """Returns the lines of the table of policies."""
    from anchor_jax.cache.policies import POLICIES

    rows = [("policy", "regions", "RoPE", "at a switch", "")]
    for name, policy in POLICIES.items():
        cells = (_regions(policy), _rope(policy), _on_switch(policy))
        rows.append((name, *cells, ABOUT[name]))
    rows.append((_TEACHER, "all", "absolute", "refused", ABOUT[_TEACHER]))
    lines = _aligned(rows)
    return [
        *lines,
        "",
        "Numbers are latent frames; the local window includes the block of 3.",
        "anchor-jax policies NAME shows what each block reads, at which positions.",
    ]


def memory(policy, frames: int = _FRAMES, switch: int = _SWITCH) -> list[str]:
    """Returns one line per block: what it reads, as FRAMES@POSITIONS.

    Args:
      policy: the policy.
      frames: latent frames to show; fewer if the policy has a lower limit.
      switch: the requested switch frame.
    """
    rows = [("block", "itself", "sink", "local", "junction")]
    frames = min(frames, policy.limit or frames)
    for label, origin, plan in _plans(policy, frames, switch):
        rows.append((label, *_cells(policy, plan, origin)))
    return _aligned(rows)


def _plans(policy, frames: int, switch: int) -> Iterator[tuple[str, int, object]]:
    """Yields a label, the frame of the last restart, and the plan of every pass."""
    import jax
    import numpy as np

    from anchor_jax.cache.policies import Flush, Rerun
    from anchor_jax.streaming.clock import Clock, landings

    @jax.jit
    def block(index):
        return policy.read(index), policy.write(index)[1]

    @functools.partial(jax.jit, static_argnums=1)
    def rerun(index, size):
        return policy.read_rerun(index, size), policy.write_rerun(index, size)[1]

    index, clock = policy.init_index(), Clock()
    landed = landings([switch], policy.block)[0]
    while clock.frame < frames:
        label = f"{clock.frame}"
        if clock.is_restart(policy):
            clock = clock.restarted(policy)
            index = policy.init_index().replace(start=np.int32(clock.local))
            plan, index = rerun(index, Rerun(clock.local, sink=True))
            yield "restart", clock.origin, plan
        if clock.frame == landed:
            label = f"+{clock.frame}"
            if isinstance(policy.on_switch, Flush):
                _, index = policy.flush(index)
            again = policy.rerun(clock.local)
            if again:
                plan, index = rerun(index, again)
                yield "re-cache", clock.origin, plan
            index = policy.switched(index, switch - clock.origin, False)
        plan, index = block(index)
        yield label, clock.origin, plan
        clock = clock.advanced(policy)


def _cells(policy, plan, origin: int) -> tuple[str, ...]:
    """Returns what a pass reads of itself, the sink, local window and junction."""
    seen = int(plan.frames)
    frames = [int(frame) + origin for frame in plan.frame[:seen]]
    pairs = list(zip(frames, map(int, plan.position[:seen]), strict=True))
    own, end = len(plan.query), seen - int(plan.junction) * policy.junction_frames
    sink = min(own + policy.sink, end)
    parts = (pairs[:own], pairs[own:sink], sorted(pairs[sink:end]))
    last = "prior" if plan.prior else _runs(pairs[end:])
    return (*map(_runs, parts), last)


def _runs(pairs: Sequence[tuple[int, int]]) -> str:
    """Formats (frame, position) pairs as runs in which both increase by one."""
    runs: list[list[tuple[int, int]]] = []
    for frame, position in pairs:
        if runs and runs[-1][-1] == (frame - 1, position - 1):
            runs[-1].append((frame, position))
        else:
            runs.append([(frame, position)])
    return " ".join(
        f"{_span(run[0][0], run[-1][0])}@{_span(run[0][1], run[-1][1])}" for run in runs
    )


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _regions(policy) -> str:
    sink = f"sink {policy.sink} + " if policy.sink else ""
    junction = f" + junction {policy.junction_frames}" if policy.junction else ""
    return f"{sink}local {policy.span}{junction}"


def _rope(policy) -> str:
    rule = policy.positions
    kind = type(rule).__name__.lower()
    limit = getattr(rule, "range", None)
    return kind if limit is None else f"{kind} 0-{limit - 1}"


def _on_switch(policy) -> str:
    """Returns what a prompt switch does to the cache."""
    from anchor_jax.cache.policies import Flush, Recache

    action = policy.on_switch
    if isinstance(action, Flush):
        return f"flush to sink + {action.last}"
    if isinstance(action, Recache):
        return "re-cache, sink too" if action.rewrite_sink else "re-cache"
    return "keep"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
