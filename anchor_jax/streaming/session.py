"""A session: one stream on the host, with prompts as input and frames as output.

It is the only object with mutable state. The functions that run on the device are pure.
"""

import collections
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from anchor_jax import interrupts
from anchor_jax.axes import Array
from anchor_jax.cache.policies import RecachePass
from anchor_jax.cache.types import ReadPlan
from anchor_jax.errors import UserError
from anchor_jax.prompts import Script
from anchor_jax.streaming import room, stream
from anchor_jax.streaming.clock import Clock, check_restart, landings
from anchor_jax.streaming.decode import decode, decode_next, renew
from anchor_jax.streaming.recipe import (
    FORMAT_VERSION,
    MAX_FRAMES,
    Recipe,
    Switch,
    check_prompt,
    describe,
    fingerprint,
)
from anchor_jax.streaming.snapshot import (
    Moment,
    Moments,
    describe_switches,
    read_moment,
    tail_blocks,
    write_moment,
)
from anchor_jax.streaming.types import PromptChange, StreamSetup, StreamState
from anchor_jax.text import check_text
from anchor_jax.wan.attention import ContextKV
from anchor_jax.weights.bundle import Bundle

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Frames:
    """The pixel frames of one block, which the device may still be computing.

    Attributes:
      pixels: on the device.
      start: the block's first latent frame.
      segment: zero-based index of the block's segment.
      plan: the block's read plan, with frames counted from the last restart.
    """

    pixels: UInt8[Array, "batch frame height width 3"]
    start: int
    segment: int
    plan: ReadPlan

    def fetch(self) -> UInt8[Array, "batch frame height width 3"]:
        """Waits for the pixels and returns them on the host."""
        return np.asarray(self.pixels)


class Session:
    """One stream of videos that share their prompts."""

    def __init__(
        self,
        bundle: Bundle,
        setup: StreamSetup,
        prompt: str,
        seed: int,
        negative_prompt: str = "",
        batch: int = 1,
        moments: Moments | None = None,
    ):
        """Makes a new session. Nothing is on the device yet.

        Args:
          bundle: weights and tokenizer.
          setup: policy, levels and solver.
          prompt: the first prompt.
          seed: random seed of the noise.
          negative_prompt: negative prompt of the guidance. It is used only if
            `setup.guidance` is not 1.
          batch: number of videos generated together, each with its own noise.
          moments: store of states from which `rewind` and `fork` start. Without it they
            start from the first block.

        Raises:
          UserError: The policy's restart does not fit its blocks, the stream does not
            fit into memory, or the prompt is empty, too long or not text.
          ValueError: The store holds moments of another video.
        """
        check_restart(setup.policy)
        room.check(setup, batch)
        check_prompt(prompt, "prompt")
        check_text(negative_prompt, "negative_prompt")
        self.bundle, self.setup, self.batch = bundle, setup, batch
        self.seed, self.negative_prompt = seed, negative_prompt
        self.segments = [Switch(prompt, requested=0, landed=0)]
        self.pending: collections.deque[Switch] = collections.deque()
        self._key = jax.random.key(seed)
        self._clock = Clock()
        self._contexts: dict[str, ContextKV] = {}
        self._state: StreamState | None = None
        self._decoder = None
        self._tail: collections.deque = collections.deque(maxlen=tail_blocks(setup))
        self.moments = moments
        if moments:
            video = (setup, seed, negative_prompt, batch, bundle.digest)
            moments.bind(video)

    @classmethod
    def from_recipe(
        cls, bundle: Bundle, recipe: Recipe, moments: Moments | None = None
    ) -> "Session":
        """Returns a new session that will make the video of a recipe."""
        first, *rest = recipe.prompts
        made = cls(
            bundle,
            recipe.setup,
            first.prompt,
            recipe.seed,
            recipe.negative_prompt,
            recipe.batch,
            moments,
        )
        made.segments, made.pending = [first], collections.deque(rest)
        return made

    @classmethod
    def restore(
        cls, path: str | os.PathLike, bundle: Bundle, moments: Moments | None = None
    ) -> "Session":
        """Returns the session that `save` wrote; it continues with the same latents.

        The continuation is bit-identical if the stored fingerprint equals that of
        `recipe()` on this machine.

        Raises:
          UserError: The file is not a complete snapshot made with these weights.
        """
        recipe, moment = read_moment(path, bundle)
        made = cls.from_recipe(bundle, recipe, moments)
        made.go_to(moment)
        made.pending = collections.deque(moment.pending)
        return made

    @property
    def frame(self) -> int:
        """Latent frame at which the next block starts."""
        return self._clock.frame

    @property
    def prompt(self) -> str:
        """The current prompt."""
        return self.segments[-1].prompt

    def switch(
        self, prompt: str, requested: int | None = None, cut: bool = False
    ) -> None:
        """Requests a prompt switch at a latent frame.

        The switch takes effect at the first block that starts at or after the frame. At
        most one switch takes effect per block; later ones wait for the next block.
        Before the first block the prompt is replaced.

        Args:
          prompt: the new prompt.
          requested: the switch frame. Default: the start of the next block.
          cut: whether the block is a scene cut, for policies that support it.

        Raises:
          UserError: The prompt is empty, too long or not text, or the frame is out of
            range.
        """
        check_prompt(prompt, "prompt")
        requested = self.frame if requested is None else requested
        if not 0 <= requested <= MAX_FRAMES:
            raise UserError(
                f"requested={requested}: must be a latent frame from 0 to {MAX_FRAMES}"
            )
        if self._state is None and requested <= 0:
            self.segments = [Switch(prompt, requested=0, landed=0)]
            return
        waiting = [*self.pending, Switch(prompt, requested, cut)]
        self.pending = collections.deque(sorted(waiting, key=lambda one: one.earliest))
        self._context(prompt)

    def step(self) -> Frames:
        """Starts the computation of the next block and returns its frames.

        Does not wait for the device.

        Raises:
          UserError: The policy's length limit is reached.
        """
        self.check(self.frame + self.setup.policy.block)
        return self._advance()

    def play(
        self, script: Script
    ) -> Iterator[tuple[UInt8[Array, "frame height width 3"], int]]:
        """Returns an iterator over the blocks of a script, on a fresh session.

        It yields frames and the segment's index. All
        prompts are encoded before the first block. The next block is computed while the
        caller handles the current one.

        Raises:
          UserError: The script is longer than the policy's limit.
          ValueError: The session has already made blocks, or its batch is not 1.
        """
        self.check(script.frames)
        if self._state is not None or self.batch != 1:
            raise ValueError(
                f"play needs a new session with batch=1, but this one is at latent"
                f" frame {self.frame} and has batch={self.batch}; make a new Session"
            )
        self._ask(script)
        return self.blocks(script.frames)

    def blocks(
        self, frames: int
    ) -> Iterator[tuple[UInt8[Array, "frame height width 3"], int]]:
        """Yields the blocks up to a latent frame, like `play`, of the first video.

        Raises:
          UserError: The frame is beyond the policy's limit.
        """
        self.check(frames)
        waiting = self.step() if self.frame < frames else None
        while waiting:
            interrupts.check()
            shown = waiting
            waiting = self.step() if self.frame < frames else None
            yield shown.fetch()[0], shown.segment

    def pin(self) -> int:
        """Stores this moment for `rewind` and `fork`, and returns its latent frame.

        Waits for the device.

        Raises:
          UserError: The moment exceeds the budget, or the session has no store.
        """
        if self.moments is None:
            raise UserError(
                "pin: this session has no store of moments; make it with"
                " moments=Moments(budget), where budget is in bytes"
            )
        if self._state is not None:
            self.moments.add(self._moment(), pin=True)
        return self.frame

    def rewind(self, frame: int) -> None:
        """Goes back to a latent frame; the blocks after it will be identical.

        Starts from the newest stored moment before the frame and recomputes the blocks
        in between. Switches that took effect later become pending again;
        `pending.clear()` drops them.

        Args:
          frame: the first latent frame of a block, at most that of the next block.

        Raises:
          UserError: No block starts at the frame.
        """
        self._check_past(frame)
        if frame < self.frame:
            self._follow(self._history(), frame)

    def fork(self, frame: int, prompt: str, cut: bool = False) -> "Session":
        """Returns a session with the same past and another prompt from a given frame.

        This session does not change. Both sessions share the store of moments.

        Args:
          frame: the first latent frame of a block, at most that of the next block.
          prompt: the prompt of that block and all later ones.
          cut: whether that block is a scene cut, for policies that support it.

        Raises:
          UserError: No block starts at the frame.
        """
        self._check_past(frame)
        other = Session(
            self.bundle,
            self.setup,
            self.segments[0].prompt,
            self.seed,
            self.negative_prompt,
            self.batch,
            self.moments,
        )
        if frame == self.frame and self._state is not None:
            other.go_to(self._moment().on_host())
        else:
            other._follow(self._history(), frame)
        other.pending.clear()
        other.switch(prompt, frame, cut)
        return other

    def go_to(self, moment: Moment) -> None:
        """Goes to a moment of this video; pending switches stay."""
        here = moment.on_device()
        self._clock = Clock(here.frame, here.origin)
        self.segments = list(here.segments)
        self._state, self._decoder = here.state, here.decoder
        if here.state.context is None:
            # A copy: the next block donates it.
            context = jax.tree.map(jnp.array, self._context(self.prompt))
            self._state = here.state.replace(context=context)
        self._tail = collections.deque(here.tail, maxlen=self._tail.maxlen)

    def save(self, path: str | os.PathLike) -> None:
        """Writes this moment to a file, from which `restore` continues.

        Raises:
          UserError: No block has been made yet, or the file cannot be written.
        """
        if self._state is None:
            raise UserError(
                "save: the session has made no block yet, so there is nothing to save;"
                " make a block first, or save the recipe"
            )
        write_moment(path, self._moment(), self.recipe())

    def prepare(self, tell: Callable[[str], None] = _LOG.info) -> None:
        """Compiles all programs of this stream, so that no later block waits for it.

        These are the text encoder, the block, the re-caches of switches at any frame,
        and the decoder. `compile_cache.enable` makes this fast in later processes.

        Args:
          tell: called with a line before and after. Default: it goes to the log.
        """
        tell("compiling (once)")
        began = time.monotonic()
        self.warm_up()
        tell(f"compiled in {time.monotonic() - began:.1f} s")

    def warm_up(self, script: Script | None = None) -> None:
        """Compiles all programs for a script, or for any script if None.

        Runs every program once on a temporary stream.

        Raises:
          UserError: The script is longer than the policy's limit.
        """
        if script:
            self.check(script.frames)
        temporary = Session(
            self.bundle,
            self.setup,
            script.prompts[0] if script else self.prompt,
            self.seed,
            self.negative_prompt,
            self.batch,
        )
        temporary.rehearse(self._switch_starts(script).values())

    def rehearse(self, starts: Iterable[int]) -> None:
        """Runs every program once; the session cannot be used afterwards.

        Args:
          starts: latent frames at which prompt switches are compiled.
        """
        last = self._advance()
        while self.frame != self.setup.policy.limit:
            last = self._advance()
            if len(self._tail) == self._tail.maxlen:
                break
        for start in starts:
            self._switch(self.segments[0], start)
            last = self._advance()
        if self.setup.policy.restart:
            self._restart()
            last = self._advance()
        last.pixels.block_until_ready()

    def check(self, frames: int) -> None:
        """Checks that the policy can make this many latent frames.

        Raises:
          UserError: They exceed the policy's limit.
        """
        limit = self.setup.policy.limit
        if limit is not None and frames > limit:
            raise UserError(
                f"got {frames} latent frames, but this policy is limited to {limit}: it"
                " never drops frames, and was trained on no more positions; set"
                f" frames={limit}, or choose a policy without a limit, such as"
                " anchor_forcing, longlive or self_forcing_rolling"
            )

    def recaches(self, script: Script | None) -> tuple[RecachePass | None, ...]:
        """Returns the re-caches of a script's switches, or of any script's if None."""
        return tuple(self._switch_starts(script))

    def _switch_starts(self, script: Script | None) -> dict[RecachePass | None, int]:
        """Returns a start for each re-cache of a script's switches."""
        policy = self.setup.policy
        starts = range(policy.block, policy.window + 2 * policy.block, policy.block)
        if script and not policy.restart:
            starts = landings(script.switch_frames, policy.block)
        elif script and not script.switch_frames:
            starts = ()
        return {policy.recache(start): start for start in starts}

    def recipe(self) -> dict[str, Any]:
        """Returns the recipe that makes the same video again, as plain values."""
        return {
            "format_version": FORMAT_VERSION,
            "setup": describe(self.setup),
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
            "batch": self.batch,
            "frames": self.frame,
            "prompts": describe_switches(self.segments),
            "fingerprint": fingerprint(self.bundle),
        }

    def _advance(self) -> Frames:
        """Applies a due switch or restart, and returns the next block's frames."""
        interrupts.check()
        policy = self.setup.policy
        if self._state is None:
            self._state = stream.start(self._context(self.prompt), setup=self.setup)
        if self.moments and self.moments.is_due(self.frame, policy.block):
            self.moments.add(self._moment())
        due = self._take_due()
        if self._clock.is_restart(policy):
            self._restart()
        elif due:
            self._switch(due, self._clock.local)
        clock = self._clock
        blocks = stream.run(
            self.bundle.variables,
            self._state,
            self._key,
            (clock.frame,),
            setup=self.setup,
        )
        self._state, latents, plan = next(blocks)
        pixels = self._decode(latents)
        pixels.copy_to_host_async()
        self._clock = clock.advanced(policy)
        return Frames(pixels, clock.frame, len(self.segments) - 1, plan)

    def _take_due(self) -> Switch | None:
        """Returns the switch that takes effect at the next block, or None."""
        if not self.pending or self.pending[0].earliest > self.frame:
            return None
        due = dataclasses.replace(self.pending.popleft(), landed=self.frame)
        self.segments.append(due)
        wanted = {self.prompt, *(switch.prompt for switch in self.pending)}
        self._contexts = {k: v for k, v in self._contexts.items() if k in wanted}
        return due

    def _switch(self, due: Switch, start: int) -> None:
        requested = max(0, due.requested - self._clock.origin)
        change = PromptChange(self._context(due.prompt), requested, due.cut)
        self._state, _ = stream.change_prompt(
            self.bundle.variables,
            self._state,
            change,
            start,
            setup=self.setup,
        )

    def _restart(self) -> None:
        """Restarts the stream from its last blocks, under the current prompt."""
        bundle, setup = self.bundle, self.setup
        decoders, blocks = zip(*self._tail, strict=True)
        whole, blocks = renew(
            bundle.codec_params, decoders[0], blocks, codec=bundle.codec
        )
        fresh = stream.start(self._context(self.prompt), setup=setup)
        self._state = stream.resume(bundle.variables, fresh, whole, setup=setup)
        # These frames were shown already; only the decoder's state is needed.
        self._decoder = None
        for block in blocks:
            self._decode(block)
        self._clock = self._clock.restarted(setup.policy)

    def _decode(self, latents: jax.Array) -> jax.Array:
        self._tail.append((self._decoder, latents))
        bundle = self.bundle
        # Only a restart goes back to an earlier state.
        step = decode if self._tail.maxlen else decode_next
        pixels, self._decoder = step(
            bundle.codec_params, self._decoder, latents, codec=bundle.codec
        )
        return pixels

    def _context(self, prompt: str) -> ContextKV:
        """Returns a prompt's keys and values, cached while they are needed."""
        if prompt not in self._contexts:
            texts = [prompt, self.negative_prompt][: self.setup.copies]
            embedding = self.bundle.encode_prompts(texts)
            if self.batch != 1:
                embedding = jnp.repeat(embedding, self.batch, axis=0)
            self._contexts[prompt] = stream.project(
                self.bundle.variables, embedding, setup=self.setup
            )
        return self._contexts[prompt]

    def _ask(self, script: Script) -> None:
        first, *rest = script.segments
        self.switch(first.prompt)
        self._context(first.prompt)
        for segment in rest:
            self.switch(segment.prompt, segment.start, segment.cut)

    def _check_past(self, frame: int) -> None:
        block = self.setup.policy.block
        if frame % block or not 0 <= frame <= self.frame:
            raise UserError(
                f"frame={frame}: must be the first latent frame of a block, a multiple"
                f" of {block} from 0 to {self.frame}; choose"
                f" {min(max(0, frame // block * block), self.frame)}"
            )

    def _history(self) -> tuple[Switch, ...]:
        """Returns past and pending prompts with the frames where they take effect."""
        earliest = [max(one.earliest, self.frame) for one in self.pending]
        landed = landings(earliest, self.setup.policy.block)
        coming = map(
            lambda one, frame: dataclasses.replace(one, landed=frame),
            self.pending,
            landed,
        )
        return (*self.segments, *coming)

    def _moment(self) -> Moment:
        """Returns this moment; the next block donates its arrays."""
        return Moment(
            self._clock.frame,
            self._clock.origin,
            tuple(self.segments),
            tuple(self.pending),
            self._state,
            self._decoder,
            tuple(self._tail),
        )

    def _follow(self, history: tuple[Switch, ...], frame: int) -> None:
        """Goes to a latent frame of a history; later switches become pending."""
        moment = self.moments and self.moments.newest(frame, history)
        # Freed first, so that two streams are never on the device together.
        self._state = self._decoder = None
        self._tail.clear()
        self._clock, self.segments = Clock(), [history[0]]
        if moment:
            self.go_to(moment)
        self.pending = collections.deque(history[len(self.segments) :])
        while self.frame < frame:
            self._advance()
