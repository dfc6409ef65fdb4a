"""f-divergences of the noised samples from the noised data, as weights of the DMD gradient.

With r = p_t(x_t) / q_t(x_t), the ratio of the noised data's density to the generator's, and
D_f(p || q) = E_q[f(r)] (f-distill, Xu et al. 2025, theorem 1):

    grad D_f(p_t || q_t) = E_q[ r^2 f''(r) (grad log q_t - grad log p_t) dx_t ]

The reverse KL, DMD's, has the weight 1. Forward KL and Jeffreys weigh samples in proportion to r,
where the generator misses data, and their gradients vary the most. Every function here is
elementwise or takes one ratio per sample.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32


class Divergence:
    """D_f(p || q) = E_q[f(r)] with r = p / q: `f(r)` and `weight(r)` = r^2 f''(r), elementwise."""

    def f(self, r: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        raise TypeError(f"{type(self).__name__} must define f(r)")

    def weight(self, r: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
        raise TypeError(f"{type(self).__name__} must define weight(r)")


@dataclasses.dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p), the divergence of DMD: it seeks modes."""

    def f(self, r):
        return -jnp.log(r)

    def weight(self, r):
        return jnp.ones_like(r)


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q): it covers modes."""

    def f(self, r):
        return r * jnp.log(r)

    def weight(self, r):
        return r


@dataclasses.dataclass(frozen=True)
class JensenShannon(Divergence):
    """Jensen-Shannon, up to a factor of two: it covers modes, with bounded weights."""

    def f(self, r):
        return r * jnp.log(r) - (r + 1) * jnp.log((r + 1) / 2)

    def weight(self, r):
        return r / (1 + r)


@dataclasses.dataclass(frozen=True)
class SoftenedReverseKL(Divergence):
    """The divergence that the non-saturating loss of a GAN descends (`losses.adversarial`)."""

    def f(self, r):
        return (r + 1) * jnp.log((1 + r) / (2 * r))

    def weight(self, r):
        return 1 / (1 + r)


@dataclasses.dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """Squared Hellinger distance."""

    def f(self, r):
        return 1 - jnp.sqrt(r)

    def weight(self, r):
        return jnp.sqrt(r) / 4


@dataclasses.dataclass(frozen=True)
class Neyman(Divergence):
    """Neyman's chi-squared: it avoids samples that the data do not have."""

    def f(self, r):
        return 1 / r - 1

    def weight(self, r):
        return 2 / r


@dataclasses.dataclass(frozen=True)
class Jeffreys(Divergence):
    """The sum of forward and reverse KL."""

    def f(self, r):
        return (r - 1) * jnp.log(r)

    def weight(self, r):
        return 1 + r


def density_ratio(
    logits: Float[ArrayLike, " B"], clip: tuple[float, float] = (0.1, 20.0)
) -> Float32[Array, " B"]:
    """r = exp(D(x_t)) of a trained discriminator, clipped; 1 where the logit is not finite."""
    logits = jnp.asarray(logits, jnp.float32)
    low, high = jnp.log(jnp.asarray(clip, jnp.float32))
    return jnp.where(jnp.isfinite(logits), jnp.exp(jnp.clip(logits, low, high)), 1.0)


def calibrated_ratio(
    ratio: Float[ArrayLike, " B"], u: Float[ArrayLike, " B"], *, bins: int, prior: float
) -> Float32[Array, " B"]:
    """Ratios over their mean at similar times: the mean of an exact ratio is 1 at every time.

    Args:
        ratio: of the generator's samples.
        u: their times, mapped to [0, 1] so that drawn ones are uniform there.
        bins: number of intervals of u, of equal length, each with a mean of its own.
        prior: how many ratios of 1 are added to every bin. With 0, as published, a bin of one
            sample makes its ratio 1, and small batches are silently DMD2.
    """
    ratio, u = jnp.asarray(ratio, jnp.float32), jnp.asarray(u, jnp.float32)
    group = jnp.clip((u * bins).astype(jnp.int32), 0, bins - 1)
    total = jax.ops.segment_sum(ratio, group, bins)
    count = jax.ops.segment_sum(jnp.ones_like(ratio), group, bins)
    # A bin without samples is not read.
    mean = (total + prior) / jnp.maximum(count + prior, 1e-6)
    return ratio / mean[group]


def divergence_weight(
    divergence: Divergence, ratio: Float[ArrayLike, " B"]
) -> Float32[Array, " B"]:
    """The weight of each sample's DMD gradient, with mean 1 over the batch (f-distill, eq. 8)."""
    weight = divergence.weight(jnp.asarray(ratio, jnp.float32))
    return weight / jnp.mean(weight)
