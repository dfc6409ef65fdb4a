"""Digests that identify checkpoints and networks. Imports the loading of files."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from dmd_jax.weights import files
from dmd_jax.weights.loading import locate


def fingerprint(path: str | PathLike, parts: Sequence[str] = ("transformer",)) -> str:
    """A digest of the denoiser's checkpoint at `path`, in hexadecimal.

    Of a single file it is the SHA-256 of its bytes. Of a folder or a model on the hub it is the
    `digest` of its tensors and settings, which reads few of their bytes. A model that is complete
    in the cache of the hub needs no network.

    Args:
        path: as for `weights.denoiser`.
        parts: those of the checkpoint that are used. Of several it is the SHA-256 of theirs.

    Raises:
        FileNotFoundError, ValueError: as `weights.denoiser`.
    """
    found = [_of_part(path, part) for part in dict.fromkeys(parts)]
    return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()


def _of_part(path, part):
    place = locate(path, part)
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    tensors = files.open_tensors(place)
    settings = json.dumps(tensors.settings, sort_keys=True).encode()
    return digest(((name, tensors.read(name)) for name in sorted(tensors.shapes)), settings)


def digest(arrays: Iterable[tuple[str, Any]], more: bytes = b"") -> str:
    """64 bits of the SHA-256 of names, dtypes, shapes and one row of each array, in hexadecimal.

    Args:
        arrays: (name, array) pairs; the last row along the last axis but one is read, of an array
            of one axis all.
        more: bytes that are included in the digest.
    """
    result = hashlib.sha256(more)
    for name, array in arrays:
        row = np.asarray(array[..., -1, :] if array.ndim > 1 else array)
        result.update(f"{name} {array.dtype} {array.shape}".encode() + row.tobytes())
    return result.hexdigest()[:16]
