"""Rewards of samples in distribution matching: the weights they give, and how many samples count.

A reward is a number per sample, [B], that is to be high.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Real


def reward_weights(
    reward: Float[Array, " B"], beta: float
) -> tuple[Float32[Array, " B"], Bool[Array, " B"]]:
    """exp(beta r), the weight of each sample's DMD gradient (Reward Forcing, Lu et al. 2025).

    Not normalised and not clipped, as published: in a part of a batch a sample has the weight that
    it has in the whole.

    Returns:
        (weights, constants; whether reward and weight are finite). A weight that is not is zero.
    """
    reward = jax.lax.stop_gradient(reward.astype(jnp.float32))
    weights = jnp.exp(beta * reward)
    usable = jnp.isfinite(reward) & jnp.isfinite(weights)
    return jnp.where(usable, weights, 0.0), usable


def effective_share(weights: Real[Array, " B"]) -> Float32[Array, ""]:
    """The share of a batch that its weights leave: (sum w)^2 / (B sum w^2), from 1 / B to 1."""
    weights = weights / jnp.max(weights)  # squares of large ones would overflow
    return jnp.square(jnp.sum(weights)) / (len(weights) * jnp.sum(jnp.square(weights)))
