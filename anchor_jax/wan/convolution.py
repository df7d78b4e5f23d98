"""Convolutions over time and space in two forms, and the choice of a form."""

import einops
import jax
import jax.numpy as jnp


def _same(kernel: jax.Array) -> list[tuple[int, int]]:
    """Returns the padding that keeps height and width, for odd kernels."""
    return [(size // 2, size // 2) for size in kernel.shape[1:3]]


def _convolve_taps(frames: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution over time and space, as one in 2-D.

    Args:
      frames: [B, F, H, W, C]; none is added in time.
      kernel: [time, height, width, C, out].
      stride: Step in time.
    """
    window = kernel.shape[0]
    count = (frames.shape[1] - window) // stride + 1
    taps = [frames[:, tap::stride][:, :count] for tap in range(window)]
    flat = einops.rearrange(jnp.concatenate(taps, axis=-1), "b f h w c -> (b f) h w c")
    flat = jax.lax.conv_general_dilated(
        flat,
        einops.rearrange(kernel, "t h w i o -> h w (t i) o"),
        window_strides=(1, 1),
        padding=_same(kernel),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return flat.reshape(frames.shape[0], count, *flat.shape[1:])


def _convolve_native(frames: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the result of `_convolve_taps`, computed as a convolution in 3-D."""
    return jax.lax.conv_general_dilated(
        frames,
        kernel,
        window_strides=(stride, 1, 1),
        padding=[(0, 0), *_same(kernel)],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


CONVOLVE = {"taps": _convolve_taps, "native": _convolve_native}


def choose_conv(conv: str, backend: str) -> str:
    """Returns the form of convolution, "taps" or "native", that `conv` means there."""
    if conv != "auto":
        return conv
    return "native" if backend in ("gpu", "cuda", "rocm") else "taps"
