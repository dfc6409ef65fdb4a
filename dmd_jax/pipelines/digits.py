"""The pipeline of networks that learned moving digits: no text encoder and no VAE.

It has the members of `wan.WanPipeline` that sampling uses: `sample_shape`, `conditions`, `frames`,
and for streams `decoder`, `latent_frames`.
Imports data.
"""

import numpy as np
from einops import repeat

from dmd_jax.data import moving_digits


class DigitsPipeline:
    """Captions to conditions, and latents to frames."""

    sample_shape = moving_digits.MovingDigits.sample_shape

    def conditions(self, prompts, negative, config, images=None):
        """As `WanPipeline.conditions`. Words that are in no caption are ignored.

        Raises:
            ValueError: images are given.
        """
        if images is not None:
            raise ValueError("networks of moving digits take no images: drop --images")
        del config
        embedded = moving_digits.padded([*prompts, negative])
        return embedded[:-1], np.broadcast_to(embedded[-1], embedded[:-1].shape)

    def frames(self, latents):
        """uint8 [T, H, W, 3], one video after the other."""
        for one in latents:
            yield self.decoder()(one[None])

    def decoder(self):
        """As `WanPipeline.decoder`; a frame depends on its own latents alone."""

        def decode(latents):
            return repeat(moving_digits.decode(np.asarray(latents[0])), "t h w 1 -> t h w c", c=3)

        return decode

    def latent_frames(self, frames):
        """As many: see `WanPipeline.latent_frames`."""
        return frames
