"""Sequences and their chunks, as integers: what is generated when, under which prompt.

Source: training/README.md, "Sequences and chunks".
"""

import dataclasses
import math

import numpy as np

from anchor_jax.wan.spec import WAN_2_1


@dataclasses.dataclass(frozen=True)
class ChunkSpan:
    """One chunk of a sequence.

    Attributes:
      start: its first new latent frame.
      new: its new frames.
      switch_at: latent frame of the first block under the new prompt, if it holds that.
      prompt: the prompt that it begins with, 0 or 1.
    """

    start: int
    new: int
    switch_at: int | None
    prompt: int

    @property
    def end(self) -> int:
        return self.start + self.new

    @property
    def last_prompt(self) -> int:
        """The prompt of its last block, under which its loss is taken."""
        return self.prompt if self.switch_at is None else 1


@dataclasses.dataclass(frozen=True)
class SequencePlan:
    """How sequences are cut into chunks.

    Attributes:
      frames: latent frames that the loss sees, all new in a sequence's first chunk.
      block: frames denoised together; later chunks show one block again.
      length: frames after which no chunk begins that would not fit.
      switches: frames of which each sequence takes one for its prompt switch; none:
        sequences have one prompt.
    """

    frames: int = WAN_2_1.clip_frames
    block: int = 3
    length: int = 240
    switches: tuple[int, ...] = tuple(range(21, 202, 18))

    def __post_init__(self):
        if self.block < 1 or self.frames < self.block or self.frames % self.block:
            raise ValueError(
                f"plan: frames={self.frames} must be a multiple of block={self.block},"
                " which must be 1 or more"
            )
        if self.frames == self.block < self.length:
            raise ValueError(
                f"plan: frames={self.frames} leave a later chunk, which shows one block"
                f" again, no new ones; choose at least {2 * self.block}"
            )
        if self.length < self.frames:
            raise ValueError(
                f"plan: length={self.length} must hold a first chunk of"
                f" frames={self.frames}"
            )
        late = [at for at in self.switches if not 0 < at < self.length]
        if late:
            raise ValueError(
                f"plan: switches at {late} must lie between 0 and length={self.length}"
            )

    def switch(self, seed: int, number: int) -> int | None:
        """Returns the latent frame at which a sequence's prompt switches."""
        if not self.switches:
            return None
        rng = np.random.default_rng((seed, number, 1))
        return int(rng.choice(self.switches))

    def chunk(self, start: int, switch: int | None) -> ChunkSpan | None:
        """Returns the chunk that begins at a frame, None where the sequence ends."""
        new = self.frames if start == 0 else self.frames - self.block
        if start + new > self.length:
            return None
        switch_at, prompt = None, 0
        if switch is not None:
            first = -(-switch // self.block) * self.block
            prompt = int(first < start)
            if start <= first < start + new:
                switch_at = first
        return ChunkSpan(start, new, switch_at, prompt)

    def chunks(self, switch: int | None) -> tuple[ChunkSpan, ...]:
        """Returns all chunks of a sequence with a switch at that frame, if any."""
        found, start = [], 0
        while span := self.chunk(start, switch):
            found.append(span)
            start = span.end
        return tuple(found)

    def visited(self, every: int) -> tuple[int, ...]:
        """Returns the first frames of the chunks that generator updates fall on.

        A generator update takes a chunk of its own, after every few of the critic's;
        all chunks are visited where the two numbers have no divisor in common
        (training/README.md, "Steps").

        Args:
          every: chunks of the critic to one of the generator.
        """
        starts = [span.start for span in self.chunks(None)]
        return tuple(starts[:: math.gcd(every + 1, len(starts))])
