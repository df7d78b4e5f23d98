"""A cache policy: which frames are kept, at which positions, what a switch does.

A policy is composed of frozen parts, and makes plans from integers only.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Int

from anchor_jax.axes import Array, Flag, Number
from anchor_jax.cache.actions import (
    Flush,
    Keep,
    Recache,
    RecachePass,
    Restart,
    SwitchAction,
)
from anchor_jax.cache.junctions import (
    Junction,
    PeriodicJunction,
    ReleaseJunction,
    TrainedJunction,
)
from anchor_jax.cache.positions import Absolute, Relative, RopeRule
from anchor_jax.cache.types import (
    EMPTY,
    NEVER,
    CacheIndex,
    ReadPlan,
    WritePlan,
    empty_index,
)

_COUNTS = ("frames", "every", "range", "overlap")


@dataclasses.dataclass(frozen=True)
class Policy:
    """One method: regions, RoPE rule and switch action.

    Attributes:
      block: latent frames denoised together.
      sink: number of first frames, which are never evicted.
      window: frames visible at once, with the sink and the block, without the junction.
      junction: the region of the block after a switch, or None.
      positions: the RoPE rule.
      on_switch: what happens when the prompt changes.
      restart: chained restarts, or None.
      limit: latent frames after which the stream must end, or None.
    """

    block: int = 3
    sink: int = 3
    window: int = 12
    junction: Junction | None = None
    positions: RopeRule = Relative()
    on_switch: SwitchAction = Recache()
    restart: Restart | None = None
    limit: int | None = None

    def __post_init__(self):
        for check in (
            self._check_parts,
            self._check_regions,
            self._check_positions,
            self._check_rest,
        ):
            problem = check()
            if problem:
                raise ValueError(f"policy: {problem}")

    @property
    def span(self) -> int:
        """Frames of the local window, the block included."""
        return self.window - self.sink

    @property
    def local(self) -> int:
        """Past frames that the local ring holds."""
        return self.span - self.block

    @property
    def junction_frames(self) -> int:
        return self.junction.frames if self.junction else 0

    @property
    def slots(self) -> int:
        return self.sink + self.local + self.junction_frames

    @property
    def remembers(self) -> bool:
        """Whether later blocks see earlier ones at all."""
        return self.slots > 0

    @property
    def keeps_prior(self) -> bool:
        return bool(self.junction and self.junction.keeps_prior)

    @property
    def captures_from_chunk(self) -> bool:
        """Whether training captures a chunk's first block instead of the switch's."""
        return bool(self.junction and self.junction.from_chunk)

    @property
    def zeroes_sink(self) -> bool:
        return self.on_switch.zero_sink

    @property
    def junction_start(self) -> int:
        """First RoPE position of the junction. Default: range - window - junction."""
        given = self.positions.junction_start
        if given is not None:
            return given
        return self.positions.range - self.window - self.junction_frames

    def init_index(self) -> CacheIndex:
        first = self.junction.first_switch if self.junction else NEVER
        return empty_index(self.slots, first)

    def recache(self, start: int) -> RecachePass | None:
        """Returns the re-cache of a switch before block `start`, or None.

        Up to the window's size it covers all frames, with the sink. Later it covers
        only the local window, because frames of the protected sink would write nothing.

        Source: cache/README.md, "Re-cache", "D10", "D15".
        """
        if not isinstance(self.on_switch, Recache) or start == 0:
            return None
        if start <= self.window:
            return RecachePass(start, sink=True)
        if self.on_switch.rewrite_sink:
            return RecachePass(self.window, sink=True)
        return RecachePass(self.span, sink=False)

    def rerun(self, start: int) -> RecachePass | None:
        """Returns `recache(start)`; the older name, kept for one release."""
        warnings.warn(
            "Policy.rerun is now called Policy.recache", FutureWarning, stacklevel=2
        )
        return self.recache(start)

    def read(self, index: CacheIndex) -> ReadPlan:
        """Returns the read plan of the next block."""
        seen, prior = self._junction(index, index.start)
        past = jnp.where(index.start > 0, self.sink + index.filled, 0)
        return self._plan(index, index.start, self.block, past, seen, prior)

    def read_recache(self, index: CacheIndex, recache: RecachePass) -> ReadPlan:
        """Returns the read plan of a re-cache: its own frames, sink and junction."""
        start = index.start - recache.frames
        seen, prior = jnp.array(False), jnp.array(False)
        if self.junction:
            whole = jnp.minimum(index.start, self.window)
            tested = self.junction.recache_start(index, whole, self.block)
            seen, prior = self._junction(index, tested)
        index = index.replace(filled=jnp.int32(0), cut=jnp.array(False))
        past = jnp.int32(0 if recache.sink else self.sink)
        plan = self._plan(index, start, recache.frames, past, seen, prior, recache)
        if not recache.sink:
            return plan
        first = plan.frame[: self.sink]
        sink = self.positions.sink(index, first, start, recache.frames)
        return plan.replace(
            own=plan.own.at[: self.sink].set(sink),
            position=plan.position.at[: self.sink].set(sink),
        )

    def _junction(self, index: CacheIndex, start):
        if not self.junction:
            return jnp.array(False), jnp.array(False)
        active = self.junction.active(index, start, self.span)
        prior = ~active & self.junction.prior(index)
        return active | prior, prior

    def _plan(
        self,
        index,
        start,
        frames: int,
        past,
        seen,
        prior,
        recache: RecachePass | None = None,
    ) -> ReadPlan:
        sink, ring, _ = self._split(index.frame)
        rule = self.positions
        query = rule.query(start, frames)
        own = rule.own(index, start, frames, self.sink)
        if rule.cut is not None:
            moved = min(3, frames)
            cut = rule.cut + jnp.arange(moved, dtype=jnp.int32)
            query = query.at[-moved:].set(jnp.where(index.cut, cut, query[-moved:]))
            own = own.at[-moved:].set(jnp.where(index.cut, cut, own[-moved:]))
        parts = [
            rule.sink(index, sink, start, frames),
            rule.local(index, ring, start, frames, self.sink),
        ]
        if self.junction:
            first = self.junction_start
            parts.append(first + jnp.arange(self.junction.frames, dtype=jnp.int32))
        by_slot = jnp.concatenate(parts).astype(jnp.int32)
        own_frame = start + jnp.arange(frames, dtype=jnp.int32)
        return ReadPlan(
            start=start,
            query=query,
            own=own,
            past=by_slot,
            frames=(frames + past + seen * self.junction_frames).astype(jnp.int32),
            frame=self._in_order(own_frame, index.frame, frames + past, recache),
            position=self._in_order(own, by_slot, frames + past, recache),
            junction=seen,
            prior=prior,
        )

    def _in_order(self, own, by_slot, filled, recache: RecachePass | None):
        """Returns a value for every key in reading order, from values by slot."""
        sink, ring, junction = self._split(by_slot)
        read = [own, sink, ring]
        if recache:
            read = [own] if recache.sink else [own, sink]
        read.append(jnp.full_like(junction, EMPTY))
        # The junction directly follows the filled local slots.
        return jax.lax.dynamic_update_slice(jnp.concatenate(read), junction, (filled,))

    def _split(self, by_slot):
        ring = self.sink + self.local
        return by_slot[: self.sink], by_slot[self.sink : ring], by_slot[ring:]

    def write(self, index: CacheIndex) -> tuple[WritePlan, CacheIndex]:
        """Returns the write plan of the next block, and the index after it."""
        capture = jnp.array(False)
        if self.junction:
            capture = self.junction.captures(index, self.block)
        plan, done = self._place(
            index, index.start, self.block, index.start == 0, capture
        )
        no = jnp.array(False)
        return plan, done.replace(start=index.start + self.block, capture=no, cut=no)

    def write_recache(
        self, index: CacheIndex, recache: RecachePass
    ) -> tuple[WritePlan, CacheIndex]:
        """Returns the write plan of a re-cache, and the index after it."""
        fresh = index.replace(filled=jnp.int32(0), cursor=jnp.int32(0))
        start, no = index.start - recache.frames, jnp.array(False)
        return self._place(fresh, start, recache.frames, jnp.array(recache.sink), no)

    def _place(self, index, start, frames: int, has_sink, capture):
        offset = jnp.arange(frames, dtype=jnp.int32)
        nowhere = self.slots
        sinks = jnp.where(has_sink, self.sink, 0)
        total = frames - sinks
        order = offset - sinks
        # The ring holds `local` frames: older frames would share a slot with newer
        # frames, and a scatter keeps either of two values for one slot.
        newest = (order >= 0) & (total - order <= self.local)
        ring = self.sink + (index.cursor + order) % max(1, self.local)
        slot = jnp.where(newest, ring, nowhere)
        slot = jnp.where(offset < sinks, offset, slot)
        kept = capture & (offset < self.junction_frames)
        copy = jnp.where(kept, self.sink + self.local + offset, nowhere)
        frame = index.frame.at[slot].set(start + offset, mode="drop")
        frame = frame.at[copy].set(start + offset, mode="drop")
        done = index.replace(
            frame=frame,
            filled=jnp.minimum(index.filled + total, self.local).astype(jnp.int32),
            cursor=((index.cursor + total) % max(1, self.local)).astype(jnp.int32),
        )
        return WritePlan(slot=slot, junction=copy), done

    def flush(self, index: CacheIndex) -> tuple[Int[Array, " slot"], CacheIndex]:
        """Returns the source slot of each slot after a flush, and the index after it.

        The newest frames move to the front of the ring, so that visible slots stay a
        prefix.
        """
        last = min(self.on_switch.last, self.local)
        kept = jnp.minimum(index.filled, last)
        source = jnp.arange(self.slots, dtype=jnp.int32)
        order = jnp.arange(last, dtype=jnp.int32)
        newest = (index.cursor - kept + order) % max(1, self.local)
        source = source.at[self.sink : self.sink + last].set(self.sink + newest)
        slot = jnp.arange(self.slots) - self.sink
        forgotten = (slot >= kept) & (slot < self.local)
        done = index.replace(
            frame=jnp.where(forgotten, EMPTY, index.frame[source]),
            filled=kept,
            cursor=(kept % max(1, self.local)).astype(jnp.int32),
        )
        return source, done

    def switched(self, index: CacheIndex, requested: Number, cut: Flag) -> CacheIndex:
        """Returns the index after a switch; a re-cache comes before."""
        if not self.junction:
            return index.replace(switches=index.switches + 1, cut=cut)
        frame = self.junction.takes_effect(requested, index.start)
        return index.replace(
            switch_frame=jnp.asarray(frame, jnp.int32),
            switches=index.switches + 1,
            capture=jnp.array(True),
            cut=cut,
        )

    def _check_parts(self) -> str | None:
        counts = {"limit": self.limit}
        for name in ("junction", "positions", "restart"):
            part = getattr(self, name)
            for field in _COUNTS:
                counts[f"{name}.{field}"] = getattr(part, field, None)
        for name, count in counts.items():
            if count is not None and count < 1:
                return f"{name}={count} must be at least 1"
        for name in ("junction_start", "cut"):
            place = getattr(self.positions, name)
            if place is not None and place < 0:
                return f"positions.{name}={place} must be at least 0"
        return None

    def _check_regions(self) -> str | None:
        if self.block < 1:
            return f"block={self.block} must be at least 1"
        if self.sink < 0 or self.sink > self.block:
            return (
                f"sink={self.sink} must lie between 0 and block={self.block}: the first"
                " blocks of a longer sink would attend to frames that do not exist yet"
            )
        if self.local < 0:
            return (
                f"window={self.window} must hold sink={self.sink} and"
                f" block={self.block}; choose at least {self.sink + self.block}"
            )
        if self.junction_frames > self.block:
            return (
                f"junction of {self.junction_frames} frames must fit into the block of"
                f" {self.block} that it is a copy of"
            )
        return None

    def _check_positions(self) -> str | None:
        return self.positions.refuses(self)

    def _check_rest(self) -> str | None:
        if isinstance(self.on_switch, Flush) and self.on_switch.last < 0:
            return f"flush must keep at least 0 frames, got {self.on_switch.last}"
        if self.restart and self.restart.overlap >= self.restart.every:
            return (
                f"restart overlap={self.restart.overlap} must be shorter than"
                f" every={self.restart.every}"
            )
        return None


def whole_clip(frames: int) -> Policy:
    """Returns the policy for a model that denoises a whole clip at once."""
    return Policy(
        block=frames,
        sink=0,
        window=frames,
        positions=Absolute(),
        on_switch=Keep(),
        limit=frames,
    )


def as_released(policy: Policy) -> Policy:
    """Returns the policy as the published sampling code implements it.

    Source: cache/README.md, "Rules".
    """
    junction = policy.junction and policy.junction.released()
    positions = policy.positions.released()
    return dataclasses.replace(policy, junction=junction, positions=positions)


def single_prompt(policy: Policy) -> Policy:
    """Returns the policy for a stream without switches, under the release's rules."""
    if type(policy.junction) is ReleaseJunction:
        junction = PeriodicJunction(policy.junction.frames)
        return dataclasses.replace(policy, junction=junction)
    return policy


def as_trained(policy: Policy) -> Policy:
    """Returns the policy as the release's training implements it.

    Source: cache/README.md, "Rules".
    """
    junction, on_switch = policy.junction, policy.on_switch
    if isinstance(junction, Junction):
        junction = TrainedJunction(junction.frames)
    if isinstance(on_switch, Recache):
        on_switch = Recache(rewrite_sink=on_switch.rewrite_sink, zero_sink=True)
    return dataclasses.replace(policy, junction=junction, on_switch=on_switch)
