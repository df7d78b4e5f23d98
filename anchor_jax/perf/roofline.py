"""Speed and memory of a stream on a chip, by arithmetic only.

A multiply-add counts as two operations. Only matrix products and convolutions are
counted; norms, activations and the arithmetic of the loop are left out.

Source: the chips' data sheets, dense bfloat16 with float32 sums.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from anchor_jax.cache.policies import Policy
from anchor_jax.wan.spec import LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig

EFFICIENCY = 0.4
"""Fraction of a chip's peak that an efficient program is assumed to reach."""

_GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of an accelerator.

    Attributes:
      name: name in our tables.
      kinds: regular expressions for jax's `device_kind`, ignoring case.
      vendor: `nvidia`, `google` or `other`.
      flops: dense bfloat16 operations per second.
      memory: size of the memory in bytes.
      bandwidth: bandwidth of the memory in bytes per second.
      devices: number of jax devices per chip.
    """

    name: str
    kinds: tuple[str, ...]
    vendor: str
    flops: float
    memory: float
    bandwidth: float
    devices: int = 1


def _chip(name, kinds, vendor, tera, gigabytes, bandwidth, devices=1) -> Chip:
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    memory = gigabytes * _GB
    return Chip(name, kinds, vendor, tera * 1e12, memory, bandwidth * 1e9, devices)


CHIPS = (
    _chip("H100 SXM", r"H100(?!.*(PCIe|NVL))", "nvidia", 989, 80, 3350),
    _chip("H200", r"\bH200\b", "nvidia", 989, 141, 4800),
    _chip("B200", r"\bG?B200", "nvidia", 2250, 180, 8000),
    _chip("A100 80GB", r"A100.*80GB|A800.*80GB", "nvidia", 312, 80, 2039),
    _chip("A100 40GB", r"A100", "nvidia", 312, 40, 1555),
    _chip("L40S", r"L40S", "nvidia", 362, 48, 864),
    _chip("RTX 5090", r"RTX 5090\b(?! Laptop)", "nvidia", 209.5, 32, 1792),
    _chip("RTX 4090", r"RTX 4090\b(?! Laptop)", "nvidia", 165.2, 24, 1008),
    _chip("TPU v4", r"TPU v4$", "google", 275, 32, 1228),
    _chip("TPU v5e", (r"TPU v5 ?lite", r"TPU v5e"), "google", 197, 16, 819),
    _chip("TPU v5p", (r"TPU v5p", r"TPU v5$"), "google", 459, 95, 2765),
    _chip("TPU v6e", (r"TPU v6 ?lite", r"TPU v6e"), "google", 918, 32, 1640),
    _chip("TPU v7x", (r"TPU ?7x", r"TPU v7x?"), "google", 2307, 192, 7380, 2),
)


def find(device_kind: str) -> Chip | None:
    """Returns the chip of one of jax's devices, or None for an unknown one."""
    for chip in CHIPS:
        if any(re.search(kind, device_kind, re.IGNORECASE) for kind in chip.kinds):
            return chip
    return None


@dataclasses.dataclass(frozen=True)
class Pass:
    """Operations of the generator for query frames over key frames."""

    projections: float  # q, k, v and o of self-attention
    self_attention: float
    cross_attention: float  # with q and o; a prompt's keys and values are stored
    feed_forward: float
    rest: float  # patches, timestep, head

    @property
    def main(self) -> float:
        """The operations without `rest`."""
        parts = (self.projections, self.self_attention, self.cross_attention)
        return sum(parts) + self.feed_forward

    @property
    def total(self) -> float:
        return self.main + self.rest


def pass_flops(config: ModelConfig, grid: LatentGrid, frames: int, keys: int) -> Pass:
    """Returns the operations of one forward of the generator.

    Args:
      config: sizes of the generator.
      grid: latent size.
      frames: number of latent frames in the pass.
      keys: number of latent frames that the pass reads, its own included.
    """
    tokens = _tokens(config, grid)
    queries, dim, layers = frames * tokens, config.dim, config.num_layers
    each = queries * layers
    patch = config.patch_size * config.latent_channels
    time = config.freq_dim + dim + 6 * dim
    return Pass(
        projections=8.0 * dim**2 * each,
        self_attention=4.0 * keys * tokens * dim * each,
        cross_attention=(4.0 * dim**2 + 4.0 * config.text_len * dim) * each,
        feed_forward=4.0 * dim * config.ffn_dim * each,
        rest=2.0 * dim * (2 * patch * queries + time * frames),
    )


def context_flops(config: ModelConfig) -> float:
    """Returns the operations of a prompt's projection for cross-attention."""
    kept = 4.0 * config.dim**2 * config.num_layers
    return config.text_len * (2.0 * config.dim * (config.text_dim + config.dim) + kept)


def text_flops(config: TextConfig, length: int | None = None) -> float:
    """Returns the operations of encoding one prompt of `tokens` tokens."""
    length = config.text_len if length is None else length
    inner = config.attention_dim
    layer = 8.0 * config.dim * inner + 4.0 * length * inner
    layer += 6.0 * config.dim * config.ffn_dim
    return length * layer * config.num_layers


def text_params(config: TextConfig) -> int:
    """Returns the number of the text encoder's parameters."""
    layer = 4 * config.dim * config.attention_dim + 3 * config.dim * config.ffn_dim
    layer += 2 * config.dim + config.num_buckets * config.num_heads
    return config.vocab * config.dim + config.num_layers * layer + config.dim


def model_params(config: ModelConfig) -> int:
    """Returns the number of the generator's parameters."""
    dim, ffn = config.dim, config.ffn_dim
    attention = 4 * (dim**2 + dim) + 2 * dim
    layer = 2 * attention + 2 * dim * ffn + ffn + dim + 2 * dim + 6 * dim
    patch = config.patch_size * config.latent_channels
    text = (config.text_dim + 1) * dim + (dim + 1) * dim
    time = (config.freq_dim + 1) * dim + (dim + 1) * dim + (dim + 1) * 6 * dim
    ends = (patch + 1) * dim + (dim + 1) * patch + 2 * dim
    return config.num_layers * layer + text + time + ends


def cache_bytes(
    config: ModelConfig, grid: LatentGrid, slots: int, width: int = 2
) -> float:
    """Returns the bytes of keys and values of `frames` latent frames."""
    frame = _tokens(config, grid) * config.dim * width
    return 2.0 * config.num_layers * slots * frame


def pass_bytes(
    config: ModelConfig, grid: LatentGrid, keys: int, width: int = 2
) -> float:
    """Returns the bytes of weights, keys and values that one pass must read."""
    weights = width * config.num_layers * _layer_weights(config)
    return weights + cache_bytes(config, grid, keys, width)


def _layer_weights(config: ModelConfig) -> int:
    """Returns the weights of a layer that each pass reads."""
    return 6 * config.dim**2 + 2 * config.dim * config.ffn_dim


def _tokens(config: ModelConfig, grid: LatentGrid) -> int:
    rows, columns = grid.tokens(config.patch)
    return rows * columns


@dataclasses.dataclass(frozen=True)
class Conv:
    """One layer of the decoder on one latent frame; 1 x 1 x 1 mixes channels.

    `rows`, `columns` and `frames` describe the output.
    """

    window: tuple[int, int, int]
    inputs: int
    outputs: int
    frames: int
    rows: int
    columns: int

    @property
    def flops(self) -> float:
        places = self.frames * self.rows * self.columns
        return 2.0 * math.prod(self.window) * self.inputs * self.outputs * places

    @property
    def kept(self) -> int:
        """Number of values that a stream stores: the last two input frames."""
        held = self.window[0] - 1
        return held * self.rows * self.columns * self.inputs

    @property
    def params(self) -> int:
        return math.prod(self.window) * self.inputs * self.outputs + self.outputs


def decoder_layers(config: VaeConfig, grid: LatentGrid) -> Iterator[Conv]:
    """Yields the decoder's layers for a latent frame after the first.

    Source: wan/README.md, "VAE decoder".
    """
    rows, columns, frames = grid.height, grid.width, 1
    top = config.base_dim * config.dim_mult[-1]
    whole, flat, point, time = (3, 3, 3), (1, 3, 3), (1, 1, 1), (3, 1, 1)
    yield Conv(point, config.z_dim, config.z_dim, frames, rows, columns)
    yield Conv(whole, config.z_dim, top, frames, rows, columns)
    for _ in range(4):
        yield Conv(whole, top, top, frames, rows, columns)
    yield Conv(point, top, 3 * top, frames, rows, columns)
    yield Conv(point, top, top, frames, rows, columns)
    width = top
    temporal = (*reversed(config.temporal_downsample), None)
    for mult, doubles in zip(reversed(config.dim_mult), temporal, strict=True):
        out = config.base_dim * mult
        for block in range(config.num_res_blocks + 1):
            inputs = out if block else width
            yield Conv(whole, inputs, out, frames, rows, columns)
            yield Conv(whole, out, out, frames, rows, columns)
            if inputs != out:
                yield Conv(point, inputs, out, frames, rows, columns)
        width = out
        if doubles:
            yield Conv(time, out, 2 * out, frames, rows, columns)
            frames *= 2
        if doubles is not None:
            rows, columns, width = 2 * rows, 2 * columns, out // 2
            yield Conv(flat, out, width, frames, rows, columns)
    yield Conv(whole, width, config.pixel_channels, frames, rows, columns)


def decode_flops(config: VaeConfig, grid: LatentGrid) -> float:
    """Returns the operations of decoding one latent frame."""
    pixels, top = grid.height * grid.width, config.base_dim * config.dim_mult[-1]
    convolutions = sum(layer.flops for layer in decoder_layers(config, grid))
    return convolutions + 4.0 * pixels**2 * top


@dataclasses.dataclass(frozen=True)
class Stream:
    """The sizes that determine a stream's speed and memory.

    Attributes:
      model: sizes of the generator.
      grid: latent size.
      keys: latent frames that a block reads, its own included.
      slots: latent frames in the cache.
      recache: latent frames in the re-cache of a switch, or 0.
      recache_keys: latent frames that the re-cache reads, its own included.
      block: latent frames denoised together.
      levels: number of noise levels; a clean pass follows.
      text: sizes of the text encoder, or None.
      codec: sizes of the VAE, or None.
    """

    model: ModelConfig
    grid: LatentGrid
    keys: int = 12
    slots: int = 12
    recache: int = 9
    recache_keys: int = 12
    block: int = 3
    levels: int = 4
    text: TextConfig | None = None
    codec: VaeConfig | None = None

    @property
    def pixel_frames(self) -> int:
        """Pixel frames of a block that is not the first."""
        return self.model.family.strides[0] * self.block


def make_stream(
    model: ModelConfig, grid: LatentGrid, policy: Policy, levels: int = 4, **parts
) -> Stream:
    """Returns the sizes of a policy's stream; `parts` are `text` and `codec`.

    A junction counts as visible, which is the slower case.
    """
    junction = policy.junction_frames
    recache = policy.recache(2 * policy.window)
    frames = recache.frames if recache else 0
    kept = 0 if recache and recache.sink else policy.sink
    return Stream(
        model=model,
        grid=grid,
        keys=policy.window + junction,
        slots=policy.slots,
        recache=frames,
        recache_keys=frames + kept + junction,
        block=policy.block,
        levels=levels,
        **parts,
    )


def block_seconds(stream: Stream, chip: Chip, efficiency: float = 1.0) -> float:
    """Returns the seconds of a block, with decoding if there is a codec."""
    count = stream.levels + 1
    work = pass_flops(stream.model, stream.grid, stream.block, stream.keys).main
    moved = pass_bytes(stream.model, stream.grid, stream.keys)
    one = max(work / (chip.flops * efficiency), moved / chip.bandwidth)
    return count * one + _decode_seconds(stream, chip, efficiency)


def program_seconds(
    stream: Stream, chip: Chip, efficiency: float = EFFICIENCY
) -> dict[str, float]:
    """Returns the seconds of a stream's programs: step, switch, decode, text.

    `switch` is the re-cache alone, and is left out of a stream without one.
    """
    found = {
        "step": block_seconds(dataclasses.replace(stream, codec=None), chip, efficiency)
    }
    if stream.recache:
        found["switch"] = _recache(stream).main / (chip.flops * efficiency)
    if stream.codec:
        found["decode"] = _decode_seconds(stream, chip, efficiency)
    if stream.text:
        found["text"] = _prompt_seconds(stream, chip, efficiency)
    return found


def attention_seconds(
    stream: Stream, chip: Chip, efficiency: float = EFFICIENCY
) -> dict[str, float]:
    """Returns the seconds of self-attention in `step` and `switch`."""
    speed = chip.flops * efficiency
    one = pass_flops(stream.model, stream.grid, stream.block, stream.keys)
    found = {"step": (stream.levels + 1) * one.self_attention / speed}
    if stream.recache:
        found["switch"] = _recache(stream).self_attention / speed
    return found


def _recache(stream: Stream) -> Pass:
    keys = stream.recache_keys
    return pass_flops(stream.model, stream.grid, stream.recache, keys)


def frames_per_second(stream: Stream, chip: Chip, efficiency: float = 1.0) -> float:
    """Returns pixel frames per second in a long stream."""
    return stream.pixel_frames / block_seconds(stream, chip, efficiency)


def switch_seconds(stream: Stream, chip: Chip, efficiency: float = EFFICIENCY) -> float:
    """Returns the time from a new prompt to its first pixels on an idle chip.

    It covers encoding the prompt, the re-cache, and the block.
    """
    seconds = _prompt_seconds(stream, chip, efficiency)
    if stream.recache:
        seconds += _recache(stream).main / (chip.flops * efficiency)
    return seconds + block_seconds(stream, chip, efficiency)


def first_seconds(stream: Stream, chip: Chip, efficiency: float = EFFICIENCY) -> float:
    """Returns the time from the first prompt to the first pixels once compiled."""
    first = dataclasses.replace(stream, keys=stream.block)
    prompt = _prompt_seconds(stream, chip, efficiency)
    return prompt + block_seconds(first, chip, efficiency)


def _prompt_seconds(stream: Stream, chip: Chip, efficiency: float) -> float:
    speed = chip.flops * efficiency
    seconds = context_flops(stream.model) / speed
    if stream.text:
        read = 2 * text_params(stream.text) / chip.bandwidth
        seconds += max(text_flops(stream.text) / speed, read)
    return seconds


def _decode_seconds(stream: Stream, chip: Chip, efficiency: float) -> float:
    if stream.codec is None:
        return 0.0
    work = stream.block * decode_flops(stream.codec, stream.grid)
    return work / (chip.flops * efficiency)


def resident_bytes(stream: Stream, width: int = 2) -> dict[str, float]:
    """Returns the bytes of long-lived arrays by part, with `width` bytes per number."""
    parts = {
        "generator": float(width * model_params(stream.model)),
        "cache": cache_bytes(stream.model, stream.grid, stream.slots, width),
    }
    if stream.text:
        parts["text encoder"] = float(width * text_params(stream.text))
    if stream.codec:
        layers = list(decoder_layers(stream.codec, stream.grid))
        parts["decoder"] = float(width * sum(layer.params for layer in layers))
        parts["decoder state"] = float(width * sum(layer.kept for layer in layers))
    return parts


def working_bytes(stream: Stream, width: int = 2) -> float:
    """Returns an estimate of the largest program's working memory.

    For the generator it is a pass's own arrays, and the keys and values that it reads,
    rotated and in the kernel's order. For the decoder it is one latent frame at the
    widest layer, times a factor measured with compilers (3 to 9).
    """
    frames = stream.block + stream.slots
    generator = cache_bytes(stream.model, stream.grid, frames, width)
    if stream.codec is None:
        return generator
    widest = max(
        layer.frames * layer.rows * layer.columns * layer.inputs
        for layer in decoder_layers(stream.codec, stream.grid)
    )
    return max(generator, 9.0 * width * widest)
