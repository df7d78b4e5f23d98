"""What is static about a stream, and what it carries from block to block."""

import dataclasses
from typing import Any

import jax
from flax import struct

from anchor_jax.cache.policies import Policy
from anchor_jax.cache.types import KVCache, ReadPlan
from anchor_jax.flow import Levels
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, Passes, Renoise, UniPC
from anchor_jax.wan.attention import ContextKV
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import LatentGrid, ModelConfig


@dataclasses.dataclass(frozen=True)
class StreamSetup:
    """All that is static about a stream: the one static argument of the sampler.

    `guidance` other than 1 runs every video twice, with its prompt and with the
    negative one; the context's batch is then [prompts..., negatives...]. `kernel` is
    one of `anchor_jax.wan.kernels`; None is the best for the machine at hand. Of
    `floor` is the noise level that latents get for the clean pass.
    """

    model: ModelConfig
    grid: LatentGrid
    policy: Policy
    levels: Levels
    solver: Renoise | Euler | UniPC | DpmPlusPlus = Renoise()
    guidance: float = 1.0
    kernel: Any = None
    floor: float = 0.0

    @property
    def tokens(self) -> tuple[int, int]:
        return self.grid.tokens(self.model.patch)

    @property
    def network(self) -> WanDit:
        """The generator with its attention kernel."""
        return WanDit(self.model, self.kernel)

    @property
    def copies(self) -> int:
        """How many times the model sees each video: 2 under guidance."""
        return 1 if self.guidance == 1.0 else 2

    @property
    def recent(self) -> int:
        """Clean latent frames kept for a re-cache or a restart."""
        return self.policy.window if self.policy.remembers else 0


@struct.dataclass
class BlockNoise:
    """The random numbers of one block, drawn outside: noise is data.

    `initial` is [batch, block, height, width, channel]; `fresh` has a leading axis
    of levels - 1. `floor` is like `initial`, for setups that noise the clean pass.
    """

    initial: jax.Array
    fresh: jax.Array
    floor: jax.Array | None = None


@struct.dataclass
class StreamState:
    """All that one more block needs. Saving it and going on gives the same video.

    `recent` is a ring of clean latents, [batch, frame, height, width, channel], in
    which latent frame f lies at f modulo its size.
    """

    cache: KVCache
    context: ContextKV
    recent: jax.Array


@struct.dataclass
class Block:
    """One generated block: clean latents, what it saw, and every pass.

    `committed` is the flow of the clean pass, of no use but to tests and `verify`.
    """

    latents: jax.Array
    plan: ReadPlan
    passes: Passes
    committed: jax.Array | None
