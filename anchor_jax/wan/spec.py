"""Model families, and the sizes of their networks."""

import dataclasses
import re
from typing import ClassVar

from anchor_jax.errors import UserError, shown

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
_MOST_PIXELS = 4096


@dataclasses.dataclass(frozen=True)
class Family:
    """What all models of one family share, independent of their size.

    Attributes:
      name: name in stored files.
      strides: pixel frames, rows and columns of one latent cell.
      patch: latent frames, rows and columns of one token.
      latent_channels: channels of a latent.
      frames_per_second: pixel frames per second.
      text_len: tokens of a prompt.
      text_dim: width of the text encoder's output.
      head_dim: width of an attention head.
      sizes: pixel heights and widths that the models are made for; the first is the
        default.
      clip_frames: latent frames of the clips that the models are trained on.
      latent_mean: mean of each latent channel, by which latents are normalised.
      latent_std: standard deviation of each latent channel.
    """

    name: str
    strides: tuple[int, int, int]
    patch: tuple[int, int, int]
    latent_channels: int
    frames_per_second: int
    text_len: int
    text_dim: int
    head_dim: int
    sizes: tuple[tuple[int, int], ...]
    clip_frames: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]

    # The first latent frame of a video makes one pixel frame, in every family with a
    # causal VAE.
    first_frames: ClassVar[int] = 1

    @property
    def latent_frames_per_second(self) -> float:
        """Latent frames per second; the first of a video counts as a full one."""
        return self.frames_per_second / self.strides[0]

    @property
    def grids(self) -> "dict[str, LatentGrid]":
        """Latent sizes by `HEIGHTxWIDTH` in pixels, the default first."""
        _, rows, columns = self.strides
        return {
            f"{height}x{width}": LatentGrid(height // rows, width // columns)
            for height, width in self.sizes
        }

    @property
    def size(self) -> str:
        """The default `HEIGHTxWIDTH` in pixels."""
        return next(iter(self.grids))

    @property
    def default_grid(self) -> "LatentGrid":
        """The latent size of the default pixel size."""
        return self.grids[self.size]

    def pixel_frames(self, latent_frames: int) -> int:
        """Returns the pixel frames of a video with this many latent frames."""
        return pixel_frames(latent_frames, self.strides[0])

    def pixel_size(self, grid: "LatentGrid") -> tuple[int, int]:
        """Returns height and width in pixels."""
        _, rows, columns = self.strides
        return rows * grid.height, columns * grid.width

    def parse_size(self, size: str) -> "LatentGrid":
        """Returns the latent size of videos of `HEIGHTxWIDTH` pixels.

        Raises:
          UserError: It is not a size, or is not a multiple of the strides.
        """
        match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", size)
        height, width = map(int, match.groups()) if match else (0, 0)
        _, rows, columns = self.strides
        fits = 0 < height <= _MOST_PIXELS and 0 < width <= _MOST_PIXELS
        if not fits or height % rows or width % columns:
            _, token_rows, token_columns = self.token_strides
            multiples = {token_rows, token_columns}
            raise UserError(
                f"size={shown(size)}: must be HEIGHTxWIDTH in pixels, multiples of"
                f" {' and '.join(map(str, sorted(multiples)))} of at most"
                f" {_MOST_PIXELS}, such as {', '.join(self.grids)}"
            )
        return LatentGrid(height // rows, width // columns)

    def describe_size(self, grid: "LatentGrid") -> str:
        """Returns `HEIGHTxWIDTH` in pixels, the inverse of `parse_size`."""
        _, rows, columns = self.strides
        return f"{rows * grid.height}x{columns * grid.width}"

    @property
    def token_strides(self) -> tuple[int, int, int]:
        """Pixel frames, rows and columns of one token."""
        frames, rows, columns = self.strides
        return frames * self.patch[0], rows * self.patch[1], columns * self.patch[2]


def pixel_frames(latent_frames: int, stride: int) -> int:
    """Returns the number of pixel frames of a video's first latent frames.

    Args:
      latent_frames: number of latent frames; 0 gives 0.
      stride: pixel frames of a latent frame that is not the first.
    """
    return max(0, Family.first_frames + stride * (latent_frames - 1))


WAN_2_1 = Family(
    name="wan2.1",
    strides=(4, 8, 8),
    patch=(1, 2, 2),
    latent_channels=16,
    frames_per_second=16,
    text_len=512,
    text_dim=4096,
    head_dim=128,
    sizes=((480, 832), (512, 832), (320, 576)),
    clip_frames=21,
    latent_mean=(
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    latent_std=(
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
)
"""Wan2.1, which is also the family of the tiny model and of files without a family.

The tiny model has the strides, channels and frames per second of Wan2.1, but its own
codec, text encoder and size of video.
"""


@dataclasses.dataclass(frozen=True)
class LatentGrid:
    """Latent rows and columns of the video; the defaults are those of Wan2.1."""

    height: int = WAN_2_1.sizes[0][0] // WAN_2_1.strides[1]
    width: int = WAN_2_1.sizes[0][1] // WAN_2_1.strides[2]

    def tokens(
        self,
        patch: tuple[int, int, int],
        strides: tuple[int, int, int] = WAN_2_1.strides,
    ) -> tuple[int, int]:
        """Returns rows and columns of tokens in one latent frame.

        Args:
          patch: latent frames, rows and columns of a token.
          strides: pixel frames, rows and columns of a latent cell, for the message.

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
                f" {strides[1] * rows} and {strides[2] * columns}"
            )
        return self.height // rows, self.width // columns


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one Wan2.1 transformer. Hashable, hence a static argument of jit.

    Models of another family have a subclass with another `family`, listed in
    `FAMILIES`. The family is not a field, so stored sizes do not depend on it; a recipe
    names the class.

    `remat` names a member of `jax.checkpoint_policies`, or "none". `unroll` is the
    number of layers per iteration of the compiled loop over layers.
    """

    family: ClassVar[Family] = WAN_2_1

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 1536 // WAN_2_1.head_dim
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = WAN_2_1.text_dim
    text_len: int = WAN_2_1.text_len
    latent_channels: int = WAN_2_1.latent_channels
    patch: tuple[int, int, int] = WAN_2_1.patch
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
WAN_14B = ModelConfig(
    dim=5120, ffn_dim=13824, num_heads=5120 // WAN_2_1.head_dim, num_layers=40
)
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

FAMILIES: dict[str, type[ModelConfig]] = {WAN_2_1.name: ModelConfig}
"""The class of a transformer's sizes, by the name of its family."""
GRIDS = WAN_2_1.grids
"""Latent sizes by pixel height and width, of Wan2.1."""
