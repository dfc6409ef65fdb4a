"""Heads that tell real samples from generated ones by the features of another network.

A discriminator is a diffusion network's tokens after some of its layers, and a small head for each
of these layers (DMD2, Yin et al. 2024, section 4.3). Imports jax, flax and `layers` of this room.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dmd_jax.models.layers import check_sizes, linear, stack

P = jax.P

# Small next to the network whose features they read: every device has them whole.
SHARDING_RULES = (
    (r"(attend|project|combine|logit)/kernel$", P()),
    (r"(bias|scale|offset)$", P()),
)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The heads of a discriminator in plain values.

    Attributes:
        dim: width of the features.
        blocks: numbers of the layers, from 0, ascending, after which they are taken. The network is
            evaluated up to the last of them only.
        hidden: width of a head.
        heads: number of weighted means of the tokens in a head.

    Raises:
        ValueError: a size is below 1, the blocks do not ascend from 0, or the means do not divide
            the width.
    """

    dim: int
    blocks: tuple[int, ...]
    hidden: int = 128
    heads: int = 4

    def __post_init__(self):
        check_sizes(self, "dim", "hidden", "heads")
        if not self.blocks or self.blocks[0] < 0 or sorted(set(self.blocks)) != list(self.blocks):
            raise ValueError(f"blocks={self.blocks} must ascend, from 0 or more")
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}")


class Head(nnx.Module):
    """Learned weighted means over the tokens, then an MLP: [B, L, D] -> [B]; zero at first."""

    def __init__(self, config, *, rngs):
        c = config
        self.heads = c.heads
        self.norm = nnx.LayerNorm(c.dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.attend = linear(c.dim, c.heads, rngs=rngs)
        self.project = linear(c.dim, c.hidden, rngs=rngs)
        self.combine = linear(c.hidden, c.hidden, rngs=rngs)
        # Zero, so that the generator gets no gradient from a head that has learned nothing.
        self.logit = linear(c.hidden, 1, rngs=rngs, zero=True)

    def __call__(self, tokens):
        tokens = self.norm(tokens)
        weight = jax.nn.softmax(self.attend(tokens), axis=1)
        values = rearrange(jax.nn.silu(self.project(tokens)), "b l (n h) -> b l n h", n=self.heads)
        pooled = rearrange(jnp.einsum("bln,blnh->bnh", weight, values), "b n h -> b (n h)")
        return self.logit(jax.nn.silu(self.combine(pooled)))[:, 0]


class Discriminator(nnx.Module):
    """The heads of a `DiscriminatorConfig`, in float32."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.heads = stack(lambda rngs: Head(config, rngs=rngs), len(config.blocks), rngs=rngs)

    @property
    def blocks(self):
        """The layers whose features are read."""
        return self.config.blocks

    def __call__(self, features):
        """The mean of the heads' logits: [len(blocks), B, L, D] -> float32 [B], above 0 for real.

        The losses take this mean, not each head: trained to the end, it is a log-density ratio.
        """
        logits = jax.vmap(lambda head, tokens: head(tokens))(self.heads, features)
        return jnp.mean(logits, axis=0)
