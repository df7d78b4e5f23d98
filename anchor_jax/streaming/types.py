"""The static setup of a stream, and the state that it carries between blocks."""

import dataclasses
from typing import Any

from flax import struct
from jaxtyping import Float

from anchor_jax.axes import Array, Latents
from anchor_jax.cache.policies import Policy
from anchor_jax.cache.types import KVCache, ReadPlan
from anchor_jax.flow import Levels
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, Passes, Renoise, UniPC
from anchor_jax.wan.attention import ContextKV
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import LatentGrid, ModelConfig


@dataclasses.dataclass(frozen=True)
class StreamSetup:
    """The static setup of a stream: the only static argument of the sampler.

    If `guidance` is not 1, every video is run twice, with its prompt and with the
    negative prompt. The context's batch is then [prompts..., negatives...]. `kernel` is
    one of `anchor_jax.wan.kernels`; None chooses the best for this machine. `floor` is
    the noise level of the latents in the clean pass.
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
        return self.grid.tokens(self.model.patch, self.model.family.strides)

    @property
    def network(self) -> WanDit:
        """The generator with its attention kernel."""
        return WanDit(self.model, self.kernel)

    @property
    def copies(self) -> int:
        """Number of forward passes per video: 2 with guidance, otherwise 1."""
        return 1 if self.guidance == 1.0 else 2

    @property
    def recent(self) -> int:
        """Clean latent frames stored for a re-cache or a restart."""
        return self.policy.window if self.policy.remembers else 0


@struct.dataclass
class BlockNoise:
    """The random numbers of one block, an input of the sampler.

    `fresh` is for all levels but the first, `floor` for setups that add noise in the
    clean pass.
    """

    initial: Latents
    fresh: Float[Array, "later_level batch frame height width channel"]
    floor: Latents | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PromptChange:
    """A prompt switch that takes effect before a block.

    Attributes:
      context: the new prompt, from `stream.project`.
      requested: latent frame at which it was requested, at most the block's start.
        Default: the block's start.
      cut: whether the block is a scene cut, for policies that support it.
    """

    context: ContextKV
    requested: int | None = None
    cut: bool = False


@struct.dataclass
class StreamState:
    """The complete state between blocks. A restored state gives the same video.

    `recent` is a ring buffer of clean latents. Latent frame f is at index f modulo its
    size.
    """

    cache: KVCache
    context: ContextKV | None
    recent: Latents | None


@struct.dataclass
class Block:
    """One generated block: clean latents, the read plan, and every pass.

    `committed` is the flow of the clean pass, which only tests and `verify` need.
    """

    latents: Latents
    plan: ReadPlan
    passes: Passes | None
    committed: Latents | None
