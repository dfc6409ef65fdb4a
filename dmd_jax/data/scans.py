"""Small scans of digits, of which videos are made. Imports numpy, Pillow and, late, `mnist5k`."""

import functools

import numpy as np
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = 20  # largest extent of the ink of a scan, in pixels


@functools.cache
def small_scans(split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The scans of `mnist5k` without their margins, resized.

    Args:
        split: "train" or "test".
        size: height and width in pixels.

    Returns:
        (uint8 [N, size, size], labels [N]).
    """
    # Imported here because it imports TensorFlow Datasets, which takes seconds.
    from dmd_jax.data import mnist5k

    with np.load(mnist5k.FILE) as file:
        scans, labels = file[f"{split}_images"][..., 0], file[f"{split}_labels"]
    return np.stack([_small(scan, size) for scan in scans]), labels


def _small(scan, size):
    """The scan without its margins, resized: uint8 [28, 28] -> [size, size]."""
    inked = (np.flatnonzero(scan.any(axis)) for axis in (1, 0))
    top, left = (min((at[0] + at[-1] + 1) // 2, 28 - INK // 2) - INK // 2 for at in inked)
    image = Image.fromarray(scan).crop((left, top, left + INK, top + INK))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))
