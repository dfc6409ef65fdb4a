"""The video autoencoders of Wan 2.1 and 2.2 (Wan Team 2025, arXiv 2503.20314, section 4.1).

config         sizes, statistics of the latents, presets
autoencoder    `WanVAE`: encode, decode; `decode_step`: decode frame by frame
layers         causal convolutions, resampling, shortcuts

Imports jax, flax, and `attention` and `layers` of models/.
"""

from dmd_jax.models.wan_vae.autoencoder import SHARDING_RULES, WanVAE, decode_step
from dmd_jax.models.wan_vae.config import TINY, TINY_2_2, WAN_2_1, WAN_2_2, WanVAEConfig

__all__ = [
    "SHARDING_RULES",
    "TINY",
    "TINY_2_2",
    "WAN_2_1",
    "WAN_2_2",
    "WanVAE",
    "WanVAEConfig",
    "decode_step",
]
