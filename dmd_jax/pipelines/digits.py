"""The pipeline of networks that learned moving or bouncing digits: no text encoder and no VAE.

It has the members of `wan.WanPipeline` that sampling uses: `sample_shape`, `conditions`, `frames`,
and for streams `decoder`, `latent_frames`.
Imports data.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import repeat

from dmd_jax.data import bouncing_digits, moving_digits, word_vectors

DATA = {"moving_digits": moving_digits, "bouncing_digits": bouncing_digits}


class DigitsPipeline:
    """Captions to conditions, and latents to frames.

    Attributes:
        sample_shape: (F, H, W, C) of the latents.
    """

    def __init__(self, notes: Mapping[str, Any]):
        """`notes` are those of the network's file, with `data` one of `DATA`."""
        self._data = DATA[notes["data"]]
        self.sample_shape = tuple(
            notes.get("sample_shape", moving_digits.MovingDigits.sample_shape)
        )

    def conditions(self, prompts, negative, config, images=None):
        """As `WanPipeline.conditions`. Words that are in no caption are ignored.

        Raises:
            ValueError: images are given, or a prompt is too long.
        """
        if images is not None:
            raise ValueError("networks of digits take no images: drop --images")
        del config
        try:
            embedded = word_vectors.padded([*prompts, negative], self._data.TEXT_LENGTH)
        except ValueError as error:
            raise ValueError(f"{error}; say {self._data.PROMPTS[0]!r}") from error
        return embedded[:-1], np.broadcast_to(embedded[-1], embedded[:-1].shape)

    def frames(self, latents):
        """uint8 [T, H, W, 3], one video after the other."""
        for one in latents:
            yield self.decoder()(one[None])

    def decoder(self):
        """As `WanPipeline.decoder`; a frame depends on its own latents alone."""

        def decode(latents):
            return repeat(self._data.decode(np.asarray(latents[0])), "t h w 1 -> t h w c", c=3)

        return decode

    def latent_frames(self, frames):
        """As many: see `WanPipeline.latent_frames`."""
        return frames
