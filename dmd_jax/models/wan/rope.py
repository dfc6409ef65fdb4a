"""Rotary position embedding (Su et al. 2021) of time, height and width. Imports jax and numpy."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat


def _angles(dim, length):
    """Rotations of `dim` channels at positions 0 ... length - 1: complex128 [length, dim / 2]."""
    frequencies = 1e4 ** (-np.arange(0, dim, 2) / dim)
    return np.exp(1j * np.outer(np.arange(length), frequencies))


def rotations(rope_dims, times, height, width, length):
    """The rotation of every token of frames of height x width tokens.

    Args:
        rope_dims: channels of a head for time, height and width.
        times: int32 [F], positions of the frames in [0, length); may be traced.

    Returns:
        (cos, sin), float32 [F, T, 1, head_dim / 2], computed in float64 and rounded once.
    """
    temporal, rows, columns = (
        _angles(dim, n) for dim, n in zip(rope_dims, (length, height, width), strict=True)
    )
    spatial = np.concatenate(
        [repeat(rows, "h d -> (h w) d", w=width), repeat(columns, "w d -> (h w) d", h=height)], -1
    )

    def both(part):
        time = jnp.asarray(part(temporal), jnp.float32)[times]
        space = jnp.asarray(part(spatial), jnp.float32)
        shape = (time.shape[0], height * width)
        time = jnp.broadcast_to(time[:, None], (*shape, time.shape[-1]))
        return jnp.concatenate([time, jnp.broadcast_to(space, (*shape, space.shape[-1]))], -1)

    return both(np.real)[:, :, None], both(np.imag)[:, :, None]


def rotate(x, cos, sin):
    """Rotates adjacent pairs of channels: x [B, ..., N, H], cos and sin [..., 1, H / 2]."""
    pairs = rearrange(x.astype(jnp.float32), "... (h two) -> ... h two", two=2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return rearrange(rotated, "... h two -> ... (h two)").astype(x.dtype)
