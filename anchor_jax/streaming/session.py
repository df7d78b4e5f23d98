"""A session: one stream on the host, prompts in and frames out.

The only object with a state that changes; what runs on the device are pure functions.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import interrupts
from anchor_jax.cache.policies import Rerun
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
from anchor_jax.streaming.types import StreamSetup, StreamState
from anchor_jax.text import check_text
from anchor_jax.wan.attention import ContextKV
from anchor_jax.weights.bundle import Bundle


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def advance(variables, state: StreamState, rng, frame, *, setup: StreamSetup):
    """Returns the stream one block later, the block's latents, and what it saw.

    One program for noise, denoising and commit, in which nothing is kept that only
    tests look at. `state` is donated.

    Args:
      variables: the generator's collections.
      state: of `stream.start` or of the previous call.
      rng: the video's key.
      frame: latent frame of the video at which the block starts; the noise is a
        function of it and the key.
      setup: static.
    """
    noise = stream.draw_noise(rng, frame, state.recent, setup=setup)
    state, block = stream.step(variables, state, noise, setup=setup)
    return state, block.latents, block.plan


@dataclasses.dataclass(frozen=True)
class Frames:
    """The pixel frames of one block, perhaps still being computed.

    Attributes:
      pixels: uint8 [batch, frame, height, width, 3], on the device.
      start: the block's first latent frame.
      segment: how many prompts the video has had, less one.
      plan: what the block saw, since the last restart.
    """

    pixels: jax.Array
    start: int
    segment: int
    plan: ReadPlan

    def fetch(self) -> np.ndarray:
        """Returns the pixels on the host, once they are there."""
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
        """Makes a session that has not begun; nothing is held on the device yet.

        Args:
          bundle: weights and tokenizer.
          setup: policy, levels and solver.
          prompt: the first prompt.
          seed: of the noise.
          negative_prompt: what guidance leads away from; used if `setup.guidance` is
            not 1.
          batch: how many videos are made side by side, each with noise of its own.
          moments: where to keep what `rewind` and `fork` start from; without it they
            start from the first block.

        Raises:
          UserError: The policy's restart does not fit its blocks, the stream does not
            fit into memory, or the prompt is no text of a usable length.
          ValueError: The moments hold another video.
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
        """Returns a session that has not begun and will make the video of a recipe."""
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
        """Returns the session that `save` wrote; it goes on with the same latents.

        Bit for bit where its fingerprint is that of `recipe()` here.

        Raises:
          UserError: The file is no whole snapshot made with these weights.
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
        """The prompt in force."""
        return self.segments[-1].prompt

    def switch(
        self, prompt: str, requested: int | None = None, cut: bool = False
    ) -> None:
        """Asks for a new prompt, from the first block that starts at or after a frame.

        One switch takes effect per block; later ones wait for the next. Before the
        first block the prompt is replaced.

        Args:
          prompt: what to show.
          requested: latent frame; the next block's start unless given.
          cut: whether that block is a scene cut, for policies that have one.

        Raises:
          UserError: The prompt is no text of a usable length, or the frame none that
            a video can have.
        """
        check_prompt(prompt, "prompt")
        requested = self.frame if requested is None else requested
        if not 0 <= requested <= MAX_FRAMES:
            raise UserError(
                f"requested={requested}: expected a latent frame from 0 to {MAX_FRAMES}"
            )
        if self._state is None and requested <= 0:
            self.segments = [Switch(prompt, requested=0, landed=0)]
            return
        asked = [*self.pending, Switch(prompt, requested, cut)]
        self.pending = collections.deque(sorted(asked, key=lambda one: one.earliest))
        self._context(prompt)

    def step(self) -> Frames:
        """Starts the computation of the next block and returns its frames' handle.

        Does not wait for the device.

        Raises:
          UserError: The policy cannot go on.
        """
        self.check(self.frame + self.setup.policy.block)
        return self._advance()

    def play(self, script: Script) -> Iterator[tuple[np.ndarray, int]]:
        """Returns an iterator over the blocks of a script, from a fresh session on.

        It yields frames, uint8 [frame, height, width, 3], and the segment's index.
        All prompts are prepared before the first block, and a block is being computed
        while the one before it is in the hands of the caller.

        Raises:
          UserError: The script is longer than the policy can go.
          ValueError: The session has begun, or makes several videos.
        """
        self.check(script.frames)
        if self._state is not None or self.batch != 1:
            raise ValueError(
                f"play needs a fresh session of one video, got latent frame"
                f" {self.frame} and a batch of {self.batch}; make a new Session"
            )
        self._ask(script)
        return self.blocks(script.frames)

    def blocks(self, frames: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the blocks up to a latent frame, as `play` does, of a first video.

        Raises:
          UserError: The policy cannot go so far.
        """
        self.check(frames)
        waiting = self.step() if self.frame < frames else None
        while waiting:
            interrupts.check()
            shown = waiting
            waiting = self.step() if self.frame < frames else None
            yield shown.fetch()[0], shown.segment

    def pin(self) -> int:
        """Keeps this moment, and returns its latent frame, for `rewind` and `fork`.

        Waits for the device.

        Raises:
          UserError: It does not fit the budget of `moments`, or there are none.
        """
        if self.moments is None:
            raise UserError(
                "pin: this session keeps no moments; make it with"
                " moments=Moments(budget), in bytes"
            )
        if self._state is not None:
            self.moments.add(self._moment(), pin=True)
        return self.frame

    def rewind(self, frame: int) -> None:
        """Goes back to a latent frame; what is then made again is the same.

        Starts from the newest moment kept, and makes the blocks since anew. Switches
        that took effect later are pending again; `pending.clear()` drops them.

        Args:
          frame: at which a block starts, not after the next one.

        Raises:
          UserError: No block starts there.
        """
        self._check_past(frame)
        if frame < self.frame:
            self._follow(self._history(), frame)

    def fork(self, frame: int, prompt: str, cut: bool = False) -> "Session":
        """Returns a session that shares this one's past and goes on otherwise.

        This session stays as it is. Both use the same store of moments.

        Args:
          frame: at which a block starts, not after the next one.
          prompt: from that block on.
          cut: whether that block is a scene cut, for policies that have one.

        Raises:
          UserError: No block starts there.
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
        """Goes to a moment of this video; what is pending stays."""
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
        """Writes this moment to a file, from which `restore` goes on.

        Raises:
          UserError: Nothing has been made yet, or the file cannot be written.
        """
        if self._state is None:
            raise UserError(
                "save: the session has made no block, so there is nothing to keep; make"
                " one first, or keep the recipe"
            )
        write_moment(path, self._moment(), self.recipe())

    def warm_up(self, script: Script | None = None) -> None:
        """Compiles all that a script will need, or any stream if there is none.

        Runs every program once on a stream that is thrown away.

        Raises:
          UserError: The script is longer than the policy can go.
        """
        if script:
            self.check(script.frames)
        trial = Session(
            self.bundle,
            self.setup,
            script.prompts[0] if script else self.prompt,
            self.seed,
            self.negative_prompt,
            self.batch,
        )
        trial.rehearse(self.reruns(script))

    def rehearse(self, reruns: Sequence[Rerun | None]) -> None:
        """Runs every program once; what the session then holds is of no use.

        Args:
          reruns: the re-caches to run, None for a switch without one.
        """
        last = self._advance()
        while self.frame != self.setup.policy.limit:
            last = self._advance()
            if len(self._tail) == self._tail.maxlen:
                break
        for rerun in reruns:
            self._switch(self.segments[0], rerun)
            last = self._advance()
        if self.setup.policy.restart:
            self._restart()
            last = self._advance()
        last.pixels.block_until_ready()

    def check(self, frames: int) -> None:
        """Raises unless the policy can make this many latent frames.

        Raises:
          UserError: It cannot.
        """
        limit = self.setup.policy.limit
        if limit is not None and frames > limit:
            raise UserError(
                f"got {frames} latent frames, but this policy ends after {limit}:"
                " it forgets nothing and has seen no more positions; ask for"
                f" frames={limit}, or choose a policy without an end, such as"
                " anchor_forcing, longlive or self_forcing_rolling"
            )

    def reruns(self, script: Script | None) -> tuple[Rerun | None, ...]:
        """Returns the re-caches of a script's switches, or of any; None for without."""
        policy = self.setup.policy
        starts = range(policy.block, policy.window + 2 * policy.block, policy.block)
        if script and not policy.restart:
            starts = landings(script.switch_frames, policy.block)
        elif script and not script.switch_frames:
            starts = ()
        return tuple(dict.fromkeys(policy.rerun(start) for start in starts))

    def recipe(self) -> dict[str, Any]:
        """Returns all that is needed to make the same video again, as plain values."""
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
        """Returns the handle of the next block, after what is due before it."""
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
            self._switch(due, policy.rerun(self._clock.local))
        clock = self._clock
        self._state, latents, plan = advance(
            self.bundle.variables,
            self._state,
            self._key,
            np.int32(clock.frame),
            setup=self.setup,
        )
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

    def _switch(self, due: Switch, rerun: Rerun | None) -> None:
        requested = max(0, due.requested - self._clock.origin)
        self._state, _ = stream.switch(
            self.bundle.variables,
            self._state,
            self._context(due.prompt),
            np.int32(requested),
            np.bool_(due.cut),
            setup=self.setup,
            rerun=rerun,
        )

    def _restart(self) -> None:
        """Begins the stream anew from its last blocks, under the prompt in force."""
        bundle, setup = self.bundle, self.setup
        decoders, blocks = zip(*self._tail, strict=True)
        whole, blocks = renew(
            bundle.codec_params, decoders[0], blocks, codec=bundle.codec
        )
        fresh = stream.start(self._context(self.prompt), setup=setup)
        self._state = stream.resume(bundle.variables, fresh, whole, setup=setup)
        # The viewer has these frames; only the decoder's state is wanted.
        self._decoder = None
        for block in blocks:
            self._decode(block)
        self._clock = self._clock.restarted(setup.policy)

    def _decode(self, latents: jax.Array) -> jax.Array:
        self._tail.append((self._decoder, latents))
        bundle = self.bundle
        # A restart goes back to an earlier state; nothing else does.
        step = decode if self._tail.maxlen else decode_next
        pixels, self._decoder = step(
            bundle.codec_params, self._decoder, latents, codec=bundle.codec
        )
        return pixels

    def _context(self, prompt: str) -> ContextKV:
        """Returns a prompt's keys and values, made once while they are needed."""
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
                f"frame={frame}: expected a block's first latent frame, a multiple of"
                f" {block} from 0 to {self.frame}; choose"
                f" {min(max(0, frame // block * block), self.frame)}"
            )

    def _history(self) -> tuple[Switch, ...]:
        """Returns all prompts with the frames at which they take effect."""
        asked = [max(one.earliest, self.frame) for one in self.pending]
        landed = landings(asked, self.setup.policy.block)
        coming = map(
            lambda one, frame: dataclasses.replace(one, landed=frame),
            self.pending,
            landed,
        )
        return (*self.segments, *coming)

    def _moment(self) -> Moment:
        """Returns this moment; its arrays are those that the next block donates."""
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
        """Goes to a latent frame of a history; its later switches are pending."""
        moment = self.moments and self.moments.newest(frame, history)
        # Gone before others come, so that two streams are never on the device.
        self._state = self._decoder = None
        self._tail.clear()
        self._clock, self.segments = Clock(), [history[0]]
        if moment:
            self.go_to(moment)
        self.pending = collections.deque(history[len(self.segments) :])
        while self.frame < frame:
            self._advance()
