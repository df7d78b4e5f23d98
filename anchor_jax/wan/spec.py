"""Sizes of the Wan2.1 networks."""

import dataclasses

REMAT = (
    "none",
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
_COUNTS = (
    *("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim"),
    *("text_dim", "text_len", "latent_channels", "unroll"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one Wan2.1 transformer. Hashable, hence a static argument of jit.

    `remat` names a member of `jax.checkpoint_policies`, or is "none". `unroll` is the
    number of layers per iteration of the compiled loop over layers.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0
    eps: float = 1e-6
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ModelConfig: {name}={getattr(self, name)} must be at least 1"
                )
        if len(self.patch) != 3 or not all(
            type(x) is int and x > 0 for x in self.patch
        ):
            raise ValueError(
                f"ModelConfig: patch={self.patch} must be three whole numbers of at"
                " least 1"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"ModelConfig: dim={self.dim} must be a multiple of"
                f" num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"ModelConfig: dim / num_heads = {self.head_dim} must be even,"
                " since RoPE rotates pairs"
            )
        if self.remat not in REMAT:
            raise ValueError(
                f"ModelConfig: remat={self.remat!r} must be one of {REMAT}"
            )
        if self.patch[0] != 1:
            raise ValueError(
                f"ModelConfig: patch={self.patch} must not span latent frames;"
                " its first entry must be 1"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_size(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]


WAN_1_3B = ModelConfig()
WAN_14B = ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TINY = ModelConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=4,
    freq_dim=64,
    text_dim=64,
    text_len=16,
    rope_theta=100.0,
    dtype="float32",
    unroll=4,
)
PRESETS = {"1.3B": WAN_1_3B, "14B": WAN_14B, "tiny": TINY}


@dataclasses.dataclass(frozen=True)
class LatentGrid:
    """Latent rows and columns of the video: pixels / 8."""

    height: int = 60
    width: int = 104

    def tokens(self, patch: tuple[int, int, int]) -> tuple[int, int]:
        """Returns rows and columns of tokens in one latent frame.

        Raises:
          ValueError: The patch does not divide the grid, or the grid is empty.
        """
        _, rows, columns = patch
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"latent size {self.height}x{self.width} must be at least 1x1"
            )
        if self.height % rows or self.width % columns:
            raise ValueError(
                f"latent size {self.height}x{self.width} must divide by the patch"
                f" {rows}x{columns}: choose pixel sizes that are multiples of"
                f" {8 * rows} and {8 * columns}"
            )
        return self.height // rows, self.width // columns


GRIDS = {
    "480x832": LatentGrid(60, 104),
    "512x832": LatentGrid(64, 104),
    "320x576": LatentGrid(40, 72),
}
"""Latent sizes by pixel height and width."""
