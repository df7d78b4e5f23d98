"""The causal video VAE: pixel frames to latent frames and back, whole or streamed."""

import dataclasses
import functools
from typing import Any

import einops
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from anchor_jax.axes import Array, Latents, Params, Pixels
from anchor_jax.wan.convolution import CONVOLVE, choose_conv
from anchor_jax.wan.spec import WAN_2_1, pixel_frames

Past = Any  # nested dicts of the frames that the causal layers look back at

Features = Float[Array, "batch frame height width channel"]
Resized = Float[Array, "batch new_frame new_height new_width new_channel"]


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the VAE; the defaults are those of Wan2.1.

    `conv` says how a causal convolution is computed: "taps" joins the three frames that
    it reads along channels and convolves in 2-D, "native" convolves in 3-D. They agree
    up to rounding. "auto" is the native one where JAX's default backend is a GPU, which
    would write the joined frames to memory, and taps elsewhere; the choice is made when
    a program is traced, so state the form when you compile for a device that this
    machine lacks.

    Each level but the last halves height and width, and the frames where
    `temporal_downsample` says so. Before the first, squares of `pixel_patch` by
    `pixel_patch` pixels are joined along channels.
    """

    base_dim: int = 96
    z_dim: int = WAN_2_1.latent_channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    pixel_patch: int = 1
    latent_mean: tuple[float, ...] = WAN_2_1.latent_mean
    latent_std: tuple[float, ...] = WAN_2_1.latent_std
    conv: str = "auto"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.conv not in ("auto", *CONVOLVE):
            raise ValueError(
                f"conv={self.conv!r} must be 'auto', 'taps' or 'native'; 'auto' is"
                " right unless a program is compiled for another machine"
            )
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"{len(self.temporal_downsample)} entries in temporal_downsample,"
                f" must be one less than the {len(self.dim_mult)} of dim_mult"
            )
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(
                f"latent_mean and latent_std have {len(self.latent_mean)} and"
                f" {len(self.latent_std)} entries, but z_dim={self.z_dim};"
                " give one mean and one deviation per latent channel"
            )

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        return self.pixel_patch * 2 ** len(self.temporal_downsample)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixel frames, rows and columns of one latent cell."""
        return self.temporal_stride, self.spatial_stride, self.spatial_stride

    @property
    def pixel_channels(self) -> int:
        """Channels that the encoder takes and the decoder makes."""
        return 3 * self.pixel_patch**2


@flax.struct.dataclass
class VaeState:
    """The state of a streamed encode or decode: the last inputs of each causal layer.

    `past` is nested like the parameters. A convolution keeps 2 frames; the
    encoder's temporal downsamplers keep 1. Frames before the stream are zero.
    """

    past: Past


def _before(past: Past | None, name: str) -> Past | None:
    """Returns the past of one layer, or None at the start of a stream."""
    return None if past is None else past[name]


VAES: dict[str, VaeConfig] = {WAN_2_1.name: VaeConfig()}
"""The sizes of a family's published VAE, by the name of the family."""


class CausalConv(nn.Module):
    """A convolution over time and space that sees no later frame.

    Space is padded to keep its size; in time the past frames precede. Source:
    wan/README.md, "VAE layers".
    """

    config: VaeConfig
    features: int
    window: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1

    @nn.compact
    def __call__(
        self,
        x: Features,
        past: Float[Array, "batch before height width channel"] | None,
    ) -> tuple[
        Float[Array, "batch new_frame height width {self.features}"],
        Float[Array, "batch kept height width channel"],
    ]:
        """Returns the features of every `stride`-th frame, and the new past.

        Args:
          x: frames of the layer before.
          past: The frames before x, as many as the last call kept: 2, or 1 with a
            stride of 2. None is two frames of zeros.
        """
        config, held = self.config, jnp.dtype(self.config.param_dtype)
        shape = (*self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, held)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), held)
        if past is None:
            past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        frames = jnp.concatenate([past, x], axis=1)
        convolve = CONVOLVE[choose_conv(config.conv, jax.default_backend())]
        y = convolve(frames, kernel.astype(x.dtype), self.stride)
        y = y + bias.astype(x.dtype)
        self.sow("intermediates", "output", y)
        return y, frames[:, self.stride - 3 :]


class ChannelNorm(nn.Module):
    """Scales each pixel's channels to a root mean square of one, then by `scale`.

    Computed in float32; the original computes in the activations' type. Source:
    wan/README.md, "VAE layers".
    """

    config: VaeConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "*axes channel"]
    ) -> Float[Array, "*axes channel"]:
        held = jnp.dtype(self.config.param_dtype)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], held)
        wide = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        # A floor under the squares, not under the norm: the root of zero has no
        # gradient.
        unit = wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
        return (unit * x.shape[-1] ** 0.5).astype(x.dtype) * scale.astype(x.dtype)


def _pointwise(config: VaeConfig, features: int, name: str | None = None) -> nn.Dense:
    """Returns a layer that mixes the channels of each pixel."""
    return nn.Dense(
        features, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class ResidualBlock(nn.Module):
    """Two norm-SiLU-convolution steps around a shortcut.

    Source: wan/README.md, "VAE layers".
    """

    config: VaeConfig
    features: int

    @nn.compact
    def __call__(
        self, x: Features, past: Past | None
    ) -> tuple[Float[Array, "batch frame height width {self.features}"], Past]:
        """Returns the result of the two steps, and the new past."""
        config, kept = self.config, {}
        y = x
        for norm, conv in (("residual_0", "residual_2"), ("residual_3", "residual_6")):
            y = nn.silu(ChannelNorm(config, name=norm)(y))
            layer = CausalConv(config, self.features, name=conv)
            y, kept[conv] = layer(y, _before(past, conv))
        if x.shape[-1] != self.features:
            x = _pointwise(config, self.features, "shortcut")(x)
        y = y + x
        self.sow("intermediates", "output", y)
        return y, kept


class AttentionBlock(nn.Module):
    """Single-head attention among the pixels of each frame.

    Source: wan/README.md, "VAE layers".
    """

    config: VaeConfig

    @nn.compact
    def __call__(self, x: Features, past: Past | None) -> tuple[Features, Past]:
        """Returns an array like x, and an empty past."""
        del past  # frames do not attend to one another here
        height, width, channels = x.shape[2:]
        y = ChannelNorm(self.config, name="norm")(x)
        y = einops.rearrange(y, "b f h w c -> b f (h w) c")
        q, k, v = jnp.split(_pointwise(self.config, 3 * channels, "to_qkv")(y), 3, -1)
        logits = jnp.einsum("bfqc,bfkc->bfqk", q, k).astype(jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5).astype(v.dtype)
        y = _pointwise(self.config, channels, "proj")(
            jnp.einsum("bfqk,bfkc->bfqc", weights, v)
        )
        return x + einops.rearrange(
            y, "b f (h w) c -> b f h w c", h=height, w=width
        ), {}


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` also the frames after the first.

    Source: wan/README.md, "VAE layers", "VAE time".
    """

    config: VaeConfig
    temporal: bool

    @nn.compact
    def __call__(
        self, x: Features, past: Past | None
    ) -> tuple[Float[Array, "batch new_frame height//2 width//2 channel"], Past]:
        """Returns the smaller frames and the new past."""
        features = x.shape[-1]
        y = nn.Conv(
            features,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            name="resample",
        )(x)
        if not self.temporal:
            return y, {}
        layer = CausalConv(self.config, features, (3, 1, 1), 2, name="time_conv")
        if past is not None:
            y, kept = layer(y, past["time_conv"])
            return y, {"time_conv": kept}
        # The first frame skips the convolution, but the second reads it.
        halved, kept = layer(y, y[:, :0])
        return jnp.concatenate([y[:, :1], halved], axis=1), {"time_conv": kept}


class Upsample(nn.Module):
    """Doubles height and width and halves channels; with `temporal` doubles the frames.

    The first frame of a stream is not doubled. Source: wan/README.md, "VAE layers",
    "VAE time".
    """

    config: VaeConfig
    temporal: bool

    @nn.compact
    def __call__(
        self, x: Features, past: Past | None
    ) -> tuple[Float[Array, "batch new_frame 2*height 2*width channel//2"], Past]:
        """Returns the larger frames, with half the channels, and the new past."""
        features, kept = x.shape[-1], {}
        if self.temporal:
            x, kept = self._double(x, past)
        x = einops.repeat(x, "b f h w c -> b f (h r) (w s) c", r=2, s=2)
        x = nn.Conv(
            features // 2,
            (3, 3),
            padding=1,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            name="resample",
        )(x)
        self.sow("intermediates", "output", x)
        return x, kept

    def _double(self, x: Features, past: Past | None) -> tuple[Resized, Past]:
        """Returns two frames for each of x, but one for the first of a stream.

        The convolution never sees that first frame: it starts at the second, with
        zeros before it.
        """
        first = x[:, :1] if past is None else x[:, :0]
        later = x[:, first.shape[1] :]
        layer = CausalConv(self.config, 2 * x.shape[-1], (3, 1, 1), name="time_conv")
        later, kept = layer(later, _before(past, "time_conv"))
        later = einops.rearrange(later, "b f h w (two c) -> b (f two) h w c", two=2)
        return jnp.concatenate([first, later], axis=1), {"time_conv": kept}


class Trunk(nn.Module):
    """Base of encoder and decoder, which runs named layers in sequence."""

    config: VaeConfig

    def run(self, x: Features, past: Past | None) -> tuple[Resized, Past]:
        """Returns the output of the layers and head on x, and the new past.

        All of x is in memory at once at every level; `stream` does the same in pieces.
        """
        kept = {}
        for name, layer in self.layers():
            x, kept[name] = layer(x, _before(past, name))
        x = nn.silu(self.head_0(x))
        x, kept["head_2"] = self.head_2(x, _before(past, "head_2"))
        return x, kept

    def stream(
        self, x: Features, past: Past | None, piece: int
    ) -> tuple[Resized, Past]:
        """Returns the result of `run`, computed in a loop over pieces of x.

        Only the first frame of a stream, which runs apart, records intermediates.

        Args:
          x: k * piece frames, and one more first where past is None.
          past: past from the previous call, or None at the start of a stream.
          piece: number of frames that run together, which are those of one latent
            frame.
        """
        outputs = []
        if past is None:
            first, past = self.run(x[:, :1], None)
            outputs, x = [first], x[:, 1:]
        if x.shape[1]:
            x = einops.rearrange(x, "b (k f) h w c -> k b f h w c", f=piece)
            past, later = _scan_pieces(self, past, x)
            later = einops.rearrange(later, "k b f h w c -> b (k f) h w c")
            outputs.append(later)
        return jnp.concatenate(outputs, axis=1), past


@functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
def _scan_pieces(trunk: Trunk, past: Past, x: Features) -> tuple[Past, Resized]:
    """Returns the past after a piece x, and its output; pieces are scanned."""
    y, past = trunk.run(x, past)
    return past, y


def _middle(config: VaeConfig, features: int) -> list[nn.Module]:
    """Returns the layers at the coarsest level."""
    return [
        ResidualBlock(config, features),
        AttentionBlock(config),
        ResidualBlock(config, features),
    ]


def _named(prefix: str, layers) -> list[tuple[str, nn.Module]]:
    return [(f"{prefix}_{number}", layer) for number, layer in enumerate(layers)]


class Encoder(Trunk):
    """Pixels to the parameters of the latent distribution, before the last mixing.

    Source: wan/README.md, "VAE encoder".
    """

    def setup(self) -> None:
        config = self.config
        stages = []
        for level, mult in enumerate(config.dim_mult):
            width = config.base_dim * mult
            for _ in range(config.num_res_blocks):
                stages.append(ResidualBlock(config, width))
            if level < len(config.temporal_downsample):
                stages.append(Downsample(config, config.temporal_downsample[level]))
        self.conv1 = CausalConv(config, config.base_dim)
        self.downsamples = stages
        self.middle = _middle(config, config.base_dim * config.dim_mult[-1])
        self.head_0 = ChannelNorm(config)
        self.head_2 = CausalConv(config, 2 * config.z_dim)

    def layers(self) -> list[tuple[str, nn.Module]]:
        stages = _named("downsamples", self.downsamples)
        return [("conv1", self.conv1), *stages, *_named("middle", self.middle)]


class Decoder(Trunk):
    """Latents to pixels, after the first mixing.

    Source: wan/README.md, "VAE decoder".
    """

    def setup(self) -> None:
        config = self.config
        stages = []
        temporal = config.temporal_downsample[::-1]
        for level, mult in enumerate(reversed(config.dim_mult)):
            width = config.base_dim * mult
            for _ in range(config.num_res_blocks + 1):
                stages.append(ResidualBlock(config, width))
            if level < len(temporal):
                stages.append(Upsample(config, temporal[level]))
        top = config.base_dim * config.dim_mult[-1]
        self.conv1 = CausalConv(config, top)
        self.middle = _middle(config, top)
        self.upsamples = stages
        self.head_0 = ChannelNorm(config)
        self.head_2 = CausalConv(config, config.pixel_channels)

    def layers(self) -> list[tuple[str, nn.Module]]:
        stages = _named("upsamples", self.upsamples)
        return [("conv1", self.conv1), *_named("middle", self.middle), *stages]


class WanVae(nn.Module):
    """The VAE of Wan with the mean as its code; channels last.

    Pixels are in [-1, 1] and latents of about unit variance. With the strides 4 and 8
    of Wan2.1, 1 + 4k frames of H x W pixels are 1 + k latent frames of H/8 x W/8: the
    first latent frame makes one pixel frame, every other as many as the stride in time.
    A stream is decoded in pieces of any length, with the state of one call passed to
    the next; the pieces make the same video as the whole. The first call of a stream
    passes None, and is compiled separately. For a piece of any length, one latent frame
    at a time is in memory between the layers.

    Source: wan/README.md, "VAE"; Wan (arXiv:2503.20314), section 4.1.
    """

    config: VaeConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.conv1 = _pointwise(config, 2 * config.z_dim)
        self.conv2 = _pointwise(config, config.z_dim)

    def __call__(
        self, pixels: Pixels
    ) -> Float[Array, "batch whole_frame pixel_height pixel_width 3"]:
        """Returns the pixels of whole latent frames after encoding and decoding."""
        return self.decode(self.encode(pixels))

    def encode(self, pixels: Pixels) -> Latents:
        """Returns the latents of a video, float32.

        Pixel frames beyond the last 1 + 4k are dropped.
        """
        stride = self.config.temporal_stride
        whole = pixel_frames((pixels.shape[1] - 1) // stride + 1, stride)
        return self.encode_stream(pixels[:, :whole], None)[0]

    def encode_stream(
        self, pixels: Pixels, state: VaeState | None
    ) -> tuple[Latents, VaeState]:
        """Returns the latents of the next pixel frames, float32, and the new state.

        A stream's first call takes 1 + 4k frames, later calls take 4k.
        """
        mean, state = self.encode_mean(pixels, state)
        centre, inverse = self._normal(mean.dtype)
        return ((mean - centre) * inverse).astype(jnp.float32), state

    def encode_mean(
        self, pixels: Pixels, state: VaeState | None = None
    ) -> tuple[Latents, VaeState]:
        """Returns the mean of the latents' distribution, not yet normalised."""
        self._check_pixels(pixels, state)
        past = None if state is None else state.past
        x = self._patched(pixels.astype(self.config.dtype))
        x, past = self.encoder.stream(x, past, self.config.temporal_stride)
        mean, _ = jnp.split(self.conv1(x), 2, axis=-1)
        return mean, VaeState(past=past)

    def decode(self, latents: Latents) -> Pixels:
        """Returns the video of the latents, float32 in [-1, 1]."""
        return self.decode_stream(latents, None)[0]

    def decode_stream(
        self, latents: Latents, state: VaeState | None
    ) -> tuple[Pixels, VaeState]:
        """Returns the next pixel frames, float32 in [-1, 1], and the new state."""
        pixels, state = self.decode_raw(latents, state)
        return jnp.clip(pixels.astype(jnp.float32), -1.0, 1.0), state

    def decode_raw(
        self, latents: Latents, state: VaeState | None = None
    ) -> tuple[Pixels, VaeState]:
        """Returns the result of `decode_stream` before clipping."""
        latents = latents.astype(self.config.dtype)
        centre, inverse = self._normal(latents.dtype)
        past = None if state is None else state.past
        x = self.conv2(latents / inverse + centre)
        pixels, past = self.decoder.stream(x, past, 1)
        return self._unpatched(pixels), VaeState(past=past)

    def _patched(self, pixels: Pixels) -> Resized:
        """Returns pixels with each patch's rows and columns along channels."""
        size = self.config.pixel_patch
        return einops.rearrange(
            pixels, "b f (h y) (w x) c -> b f h w (c x y)", y=size, x=size
        )

    def _unpatched(self, patches: Features) -> Pixels:
        """Returns the inverse of `_patched`."""
        size = self.config.pixel_patch
        return einops.rearrange(
            patches, "b f h w (c x y) -> b f (h y) (w x) c", y=size, x=size
        )

    def _normal(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Returns the latents' mean and inverse deviation, rounded as in Wan2.1."""
        config = self.config
        return jnp.asarray(config.latent_mean, dtype), 1 / jnp.asarray(
            config.latent_std, dtype
        )

    def _check_pixels(self, pixels: Pixels, state: VaeState | None) -> None:
        """Raises ValueError if the number of frames or their size cannot be halved."""
        stride, grid = self.config.temporal_stride, self.config.spatial_stride
        frames, height, width = pixels.shape[1:4]
        first = 1 if state is None else 0
        if frames <= 0 or (frames - first) % stride:
            raise ValueError(
                f"{frames} pixel frames; expected {first} + a multiple of {stride}"
                f" {'at the start of' if first else 'later in'} a stream; cut or pad"
            )
        if height % grid or width % grid:
            raise ValueError(
                f"pixel frames of {height} x {width}; both must be multiples of {grid};"
                " crop or resize"
            )


@dataclasses.dataclass(frozen=True)
class VaeCodec:
    """The VAE as a streaming decoder: static, with the state passed along."""

    config: VaeConfig = VaeConfig()

    def decode(
        self, params: Params, state: VaeState | None, latents: Latents
    ) -> tuple[Pixels, VaeState]:
        """Returns pixels in [-1, 1], and the state.

        A state of None starts a video, whose first latent frame makes one pixel frame.
        """
        return WanVae(self.config).apply(
            {"params": params}, latents, state, method="decode_stream"
        )

    def encode(self, params: Params, pixels: Pixels) -> Latents:
        """Returns the latents of a video of 1 + 4k frames."""
        return WanVae(self.config).apply({"params": params}, pixels, method="encode")
