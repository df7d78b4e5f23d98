"""Sequences and their chunks as integers: which frames are made, under which prompt.

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
      start: first new latent frame.
      new: number of new frames.
      switch_at: latent frame of the first block under the new prompt, or None.
      prompt: number of the prompt at the chunk's start, 0 or 1.
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
        """Number of the last block's prompt, which is the prompt of the loss."""
        return self.prompt if self.switch_at is None else 1


@dataclasses.dataclass(frozen=True)
class SequencePlan:
    """The division of sequences into chunks.

    Attributes:
      frames: latent frames that the loss sees. All are new in a sequence's first chunk.
      block: frames denoised together. Later chunks repeat one earlier block.
      length: largest length of a sequence, in latent frames.
      switches: latent frames. Each sequence switches prompts at one of them. If empty,
        a sequence has one prompt.
    """

    frames: int = WAN_2_1.clip_frames
    block: int = 3
    length: int = 240
    switches: tuple[int, ...] = tuple(range(21, 202, 18))

    def __post_init__(self):
        if self.block < 1 or self.frames < self.block or self.frames % self.block:
            raise ValueError(
                f"plan: frames={self.frames} must be a multiple of block={self.block},"
                " which must be at least 1"
            )
        if self.frames == self.block < self.length:
            raise ValueError(
                f"plan: frames={self.frames} leave no new frames in a later chunk,"
                f" which repeats one block; choose at least {2 * self.block}"
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
        """Returns the latent frame at which a sequence switches prompts."""
        if not self.switches:
            return None
        rng = np.random.default_rng((seed, number, 1))
        return int(rng.choice(self.switches))

    def chunk(self, start: int, switch: int | None) -> ChunkSpan | None:
        """Returns the chunk that starts at a frame, or None at the sequence's end."""
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
        """Returns all chunks of a sequence whose switch, if any, is at a frame."""
        found, start = [], 0
        while span := self.chunk(start, switch):
            found.append(span)
            start = span.end
        return tuple(found)

    def visited(self, every: int) -> tuple[int, ...]:
        """Returns the first frames of the chunks that update the generator.

        A generator update takes its own chunk after `every` chunks of the critic.
        All chunks are visited if `every` + 1 and the number of chunks have no common
        divisor (training/README.md, "Steps").

        Args:
          every: chunks of the critic per chunk of the generator.
        """
        starts = [span.start for span in self.chunks(None)]
        return tuple(starts[:: math.gcd(every + 1, len(starts))])
