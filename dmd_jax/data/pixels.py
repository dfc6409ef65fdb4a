"""Conversion of pixels between bytes in [0, 255] and floats in [-1, 1], and into folded latents.

Files, pictures and metrics use bytes, networks use floats. This file imports only numpy.
"""

import numpy as np
from numpy.typing import ArrayLike


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Maps bytes to floats, 0 to -1 and 255 to 1: `pixels / 127.5 - 1`.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32 in [-1, 1], the same shape.

    Raises:
        ValueError: `pixels` are not uint8. Floats have most likely been converted already; a second
            conversion would make them a uniform grey, which no later check detects.
    """
    if pixels.dtype != np.uint8:
        raise ValueError(f"to_float takes uint8 pixels in [0, 255], not {pixels.dtype}")
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(pixels: ArrayLike) -> np.ndarray:
    """Maps floats to the nearest byte, clipped to [0, 255]; the inverse of `to_float`.

    Args:
        pixels: floats of any precision, NumPy or JAX, finite, nominally in [-1, 1], any shape.

    Returns:
        uint8 in [0, 255], the same shape.
    """
    levels = (np.asarray(pixels, dtype=np.float32) + 1) * np.float32(127.5)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def fold(videos: np.ndarray, size: int, mean: float, std: float) -> np.ndarray:
    """Folds squares of pixels into channels, and normalises them: latents without a VAE.

    Args:
        videos: uint8 [..., H, W, 1].
        size: side of a square, which divides H and W.
        mean, std: of the pixels as floats. Normalised latents have the scale of the noise.

    Returns:
        float32 [..., H / size, W / size, size^2].
    """
    *lead, height, width, _ = videos.shape
    levels = (to_float(videos) - np.float32(mean)) / np.float32(std)
    split = levels.reshape(*lead, height // size, size, width // size, size)
    return split.swapaxes(-3, -2).reshape(*lead, height // size, width // size, size**2)


def unfold(latents: np.ndarray, size: int, mean: float, std: float) -> np.ndarray:
    """The inverse of `fold`: uint8 [..., H, W, 1]."""
    *lead, height, width, _ = latents.shape
    split = latents.reshape(*lead, height, width, size, size).swapaxes(-3, -2)
    return to_uint8(split.reshape(*lead, height * size, width * size, 1) * std + mean)
