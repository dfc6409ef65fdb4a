"""Wan 2.1 and 2.2: a transformer over video latents (Wan Team 2025, arXiv 2503.20314).

config            sizes, presets
network           `Wan`, its inputs and outputs
layers            patches, attention, blocks; their sharding rules
rope              rotary embedding of time, height and width
self_attention    which frames attend to which: the whole sequence, or one block and a cache

Imports jax, flax, devices, and `attention`, `kv_cache` and `layers` of models/.
"""

from dmd_jax.models.attention import Causal
from dmd_jax.models.wan.config import (
    I2V_14B,
    I2V_A14B,
    PATCH,
    T2V_1_3B,
    T2V_14B,
    T2V_A14B,
    TI2V_5B,
    TINY,
    WanConfig,
)
from dmd_jax.models.wan.layers import SHARDING_RULES
from dmd_jax.models.wan.network import Conditions, Wan

__all__ = [
    "I2V_14B",
    "I2V_A14B",
    "PATCH",
    "SHARDING_RULES",
    "T2V_1_3B",
    "T2V_14B",
    "T2V_A14B",
    "TI2V_5B",
    "TINY",
    "Causal",
    "Conditions",
    "Wan",
    "WanConfig",
]
