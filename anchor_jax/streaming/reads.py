"""What each block of a stream reads under a policy, as text."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from anchor_jax.cache.policies import Flush, Policy, RecachePass
from anchor_jax.cache.tables import aligned
from anchor_jax.cache.types import ReadPlan
from anchor_jax.streaming.clock import Clock, landings


def memory(policy: Policy, frames: int = 60, switch: int = 40) -> list[str]:
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
    return aligned(rows)


def _plans(
    policy: Policy, frames: int, switch: int
) -> Iterator[tuple[str, int, ReadPlan]]:
    """Yields a label, the frame of the last restart, and the plan of every pass."""

    @jax.jit
    def block(index):
        return policy.read(index), policy.write(index)[1]

    @functools.partial(jax.jit, static_argnums=1)
    def again(index, recache):
        plan = policy.read_recache(index, recache)
        return plan, policy.write_recache(index, recache)[1]

    index, clock = policy.init_index(), Clock()
    landed = landings([switch], policy.block)[0]
    while clock.frame < frames:
        label = f"{clock.frame}"
        if clock.is_restart(policy):
            clock = clock.restarted(policy)
            index = policy.init_index().replace(start=np.int32(clock.local))
            plan, index = again(index, RecachePass(clock.local, sink=True))
            yield "restart", clock.origin, plan
        if clock.frame == landed:
            label = f"+{clock.frame}"
            if isinstance(policy.on_switch, Flush):
                _, index = policy.flush(index)
            recache = policy.recache(clock.local)
            if recache:
                plan, index = again(index, recache)
                yield "re-cache", clock.origin, plan
            index = policy.switched(index, switch - clock.origin, False)
        plan, index = block(index)
        yield label, clock.origin, plan
        clock = clock.advanced(policy)


def _cells(policy: Policy, plan: ReadPlan, origin: int) -> tuple[str, ...]:
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
