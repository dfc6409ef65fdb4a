"""Captions of toy videos: every word has a fixed random vector, which stands in for a text encoder.

Imports only numpy.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

DIM = 64


def embed(prompts: Sequence[str]) -> list[np.ndarray]:
    """One vector per word, independent of its position: for each prompt, float32 [words, DIM].

    An empty prompt has one zero vector.
    """

    def vector(word):
        return np.random.default_rng(zlib.crc32(word.encode())).normal(size=DIM)

    zero = [np.zeros(DIM)]
    return [np.float32([vector(word) for word in prompt.split()] or zero) for prompt in prompts]


def padded(prompts: Sequence[str], length: int) -> np.ndarray:
    """`embed` as one array, padded with zeros: float32 [N, length, DIM].

    Raises:
        ValueError: a prompt has more than `length` words.
    """
    out = np.zeros((len(prompts), length, DIM), np.float32)
    for row, prompt, vectors in zip(out, prompts, embed(prompts), strict=True):
        if len(vectors) > length:
            raise ValueError(f"{prompt[:60]!r} has more than {length} words")
        row[: len(vectors)] = vectors
    return out


class WordVectors:
    """Embedded prompts in memory, with the members of `embeddings.Embeddings` that are read.

    Attributes:
        prompts: N strings.
        shape: (length, DIM).
        negative: the embedding of the empty prompt, float32 [length, DIM].
    """

    def __init__(self, prompts: Sequence[str], length: int):
        self.prompts, self.shape = list(prompts), (length, DIM)
        *rows, self.negative = padded([*prompts, ""], length)
        self._rows = np.stack(rows)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: ArrayLike) -> np.ndarray:
        """float32 [n, length, DIM], of the prompts at `index`."""
        return self._rows[np.asarray(index, np.intp)]
