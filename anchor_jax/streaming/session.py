"""A session: one stream on the host, prompts in and frames out.

The only object with a state that changes; what runs on the device are pure functions.
"""

import collections
import dataclasses
import functools
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import anchor_jax
from anchor_jax.bundle import Bundle
from anchor_jax.cache.policies import Policy, Rerun
from anchor_jax.cache.types import ReadPlan
from anchor_jax.errors import UserError
from anchor_jax.prompts import Script
from anchor_jax.streaming import stream
from anchor_jax.streaming.decode import decode, renew
from anchor_jax.streaming.types import StreamSetup, StreamState
from anchor_jax.wan.attention import ContextKV


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
class Clock:
    """The next block's first latent frame, of the video and since a restart."""

    frame: int = 0
    origin: int = 0

    @property
    def local(self) -> int:
        return self.frame - self.origin

    def is_restart(self, policy: Policy) -> bool:
        return policy.restart is not None and self.local >= policy.restart.every

    def restarted(self, policy: Policy) -> "Clock":
        return Clock(self.frame, self.frame - policy.restart.overlap)

    def advanced(self, policy: Policy) -> "Clock":
        return Clock(self.frame + policy.block, self.origin)


@dataclasses.dataclass(frozen=True)
class Switch:
    """A prompt, the latent frame it was asked for at, and the one it took effect at."""

    prompt: str
    requested: int
    cut: bool = False
    landed: int | None = None


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


def landings(requested: Sequence[int], block: int) -> tuple[int, ...]:
    """Returns the frames at which switches take effect: at most one a block."""
    landed, free = [], 0
    for frame in requested:
        free = max(free, -(-frame // block) * block)
        landed.append(free)
        free += block
    return tuple(landed)


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

        Raises:
          UserError: The policy's restart does not fit its blocks.
        """
        _check_restart(setup.policy)
        self.bundle, self.setup, self.batch = bundle, setup, batch
        self.seed, self.negative_prompt = seed, negative_prompt
        self.segments = [Switch(prompt, requested=0, landed=0)]
        self.pending: collections.deque[Switch] = collections.deque()
        self._key = jax.random.key(seed)
        self._clock = Clock()
        self._contexts: dict[str, ContextKV] = {}
        self._state: StreamState | None = None
        self._decoder = None
        restart = setup.policy.restart
        kept = restart.overlap // setup.policy.block if restart else 0
        self._tail: collections.deque = collections.deque(maxlen=kept)

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
        """
        requested = self.frame if requested is None else requested
        if self._state is None and requested <= 0:
            self.segments = [Switch(prompt, requested=0, landed=0)]
            return
        asked = [*self.pending, Switch(prompt, requested, cut)]
        self.pending = collections.deque(sorted(asked, key=lambda one: one.requested))
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
        return self._blocks(script.frames)

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
            "setup": describe(self.setup),
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
            "batch": self.batch,
            "frames": self.frame,
            "prompts": [dataclasses.asdict(segment) for segment in self.segments],
            "fingerprint": fingerprint(self.bundle),
        }

    def _advance(self) -> Frames:
        """Returns the handle of the next block, after what is due before it."""
        policy = self.setup.policy
        if self._state is None:
            self._state = stream.start(self._context(self.prompt), setup=self.setup)
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
        if not self.pending or self.pending[0].requested > self.frame:
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
        pixels, self._decoder = decode(
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

    def _blocks(self, frames: int) -> Iterator[tuple[np.ndarray, int]]:
        waiting = self.step()
        while waiting:
            shown = waiting
            waiting = self.step() if self.frame < frames else None
            yield shown.fetch()[0], shown.segment


def describe(value: Any) -> Any:
    """Returns a tree of dataclasses as plain values; `kind` names each one's class."""
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"kind": type(value).__name__} | {k: describe(v) for k, v in fields.items()}


def fingerprint(bundle: Bundle) -> dict[str, str]:
    """Returns what the bits of a video depend on besides its recipe."""
    return {
        "anchor_jax": anchor_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "weights": bundle.digest,
    }


def _check_restart(policy: Policy) -> None:
    restart = policy.restart
    if restart is None:
        return
    overlap, block = restart.overlap, policy.block
    if overlap < block or overlap % block or overlap > policy.window:
        raise UserError(
            f"restart overlap={overlap} must be a multiple of block={block}, at most"
            f" window={policy.window}; choose {block}"
        )
