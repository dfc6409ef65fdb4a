"""Score matching within a subinterval of time (Phased DMD, Fan et al. 2025, arXiv 2510.27684).

A phase of the generator ends at a time s with samples x_s. The diffusion goes on from there to
t > s, without x0:

    x_t = A x_s + B eps,   A = alpha(t) / alpha(s),   B^2 = sigma(t)^2 - A^2 sigma(s)^2

The score of x_t given x_s is -eps / B. Its mean over what led to x_t is the score of the diffused
samples, so that a regression on it is exact whatever x_s is; a regression on an estimate of x0 is
not. At s = 0, where x_s is clean data, all of this is the ordinary denoising of x0.

Times s and t are [B], or [] for s, with s < t and s < 1. Derivation: docs/mathematics.md.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dmd_jax.diffusion.schedule import Samples, Schedule, Times, align


def step(
    s: Float[Array, "..."], t: Times, schedule: Schedule
) -> tuple[Float32[Array, "B ..."], Float32[Array, "B ..."]]:
    """(A, B) of the diffusion from s to t."""
    fresh = schedule.sigma(t) * jnp.sqrt(_fresh_share(s, t, schedule))
    return _scale(s, t, schedule), fresh


def weight(s: Float[Array, "..."], t: Times, schedule: Schedule) -> Float32[Array, "B ..."]:
    """The weight of the regression: (B / sigma(t))^2 alpha(s)^2 / (alpha(s)^2 + sigma(s)^2).

    The variance of the targets grows without bound as t falls to s. With this weight, and samples
    as of data of variance 1, what is left of the loss after training is that of ordinary denoising
    at the same t. At s = 0 it is 1. Any positive weight has the same minimiser.
    """
    clean = jnp.square(_alpha(s, schedule))
    share = clean / (clean + jnp.square(_sigma(s, schedule)))
    return _fresh_share(s, t, schedule) * share


def add_noise(
    x_s: Samples, eps: Samples, s: Float[Array, "..."], t: Times, schedule: Schedule
) -> Float32[Array, " B *data"]:
    """x_t = A x_s + B eps."""
    scale, fresh = step(s, t, schedule)
    return align(scale, x_s) * x_s + align(fresh, x_s) * eps


def targets(
    x_s: Samples, eps: Samples, s: Float[Array, "..."], t: Times, schedule: Schedule
) -> tuple[Float32[Array, " B *data"], Float32[Array, " B *data"]]:
    """The exact targets (x0, eps) of a regression at `add_noise`'s x_t.

        x0 = x_s / alpha(s) - alpha(t) sigma(s)^2 / (alpha(s)^2 B) eps
        eps = sigma(t) / B eps

    They fit x_t, alpha(t) x0 + sigma(t) eps = x_t, and their means given x_t are Tweedie's of its
    score. `Prediction.target` makes that of any parametrisation from the two. Neither is a sample
    of clean data.
    """
    scale, fresh = step(s, t, schedule)
    clean = _alpha(s, schedule)
    pull = scale * jnp.square(_sigma(s, schedule)) / (clean * fresh)
    x0 = x_s / align(clean, x_s) - align(pull, x_s) * eps
    return x0, align(schedule.sigma(t) / fresh, x_s) * eps


def _fresh_share(s, t, schedule):
    """(B / sigma(t))^2: 0 at s."""
    old = _scale(s, t, schedule) * _sigma(s, schedule) / schedule.sigma(t)
    return (1.0 - old) * (1.0 + old)  # and not 1 - old^2, which loses the digits near s


def _scale(s, t, schedule):
    return schedule.alpha(t) / _alpha(s, schedule)


def _alpha(s, schedule):
    return jnp.where(s > 0, schedule.alpha(s), 1.0)


def _sigma(s, schedule):
    # Not the schedule's at s = 0: EDM's is sigma_min, and clean data have no noise.
    return jnp.where(s > 0, schedule.sigma(s), 0.0)
