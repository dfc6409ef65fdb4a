"""Noise schedules: how data and noise are mixed, and how times are drawn.

Every schedule is a path  x_t = alpha(t) x0 + sigma(t) eps  with eps ~ N(0, I).

**Time, in the whole library: t in [0, 1]; t = 1 is noise, t = 0 is data.** A time has shape [B], or
[B, F] where the frames of a video have different times. Its axes are the leading axes of the data.

This file imports only jax and jaxtyping. Schedules are frozen dataclasses: they are hashable, and
therefore static under `jax.jit`.
"""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Key, Real, Shaped

MOST_STEPS = 10_000  # of a sampler; the times of all are in its compiled program

# The types of the library's arguments. All may be jax or numpy arrays. (The space before B keeps a
# linter from reading the shape as an expression.)
Samples: TypeAlias = Float[ArrayLike, " B *data"]
Times: TypeAlias = Float[ArrayLike, "B ..."]  # [B], or [B, F] with one time for each frame
Mask: TypeAlias = Bool[ArrayLike, "B ..."]  # [B], [B, F] or [B, *data]: True where a loss counts


def expand(a: Shaped[ArrayLike, "..."], x: Shaped[ArrayLike, "..."]) -> Shaped[Array, "..."]:
    """Appends axes of size one to `a` [B] or [B, F], so that it broadcasts against `x` [B, ...]."""
    a = jnp.asarray(a)
    return a.reshape(a.shape + (1,) * (jnp.ndim(x) - a.ndim))


def align(t: Real[ArrayLike, "..."], x: Shaped[ArrayLike, "..."]) -> Float32[Array, "..."]:
    """`expand` for times, weights and scales, in float32 whatever the dtype of `x` is."""
    return expand(jnp.asarray(t, jnp.float32), x)


def _float32(t):
    """(t as float32, the array module to compute with): a numpy array stays on the host."""
    xp = t.__array_namespace__() if hasattr(t, "__array_namespace__") else jnp
    return xp.asarray(t, dtype=xp.float32), xp


class Schedule:
    """A path from data to noise: `alpha(t)` scales the data, `sigma(t)` scales the noise.

    Both have the shape of t and are float32. The schedules in this file return a numpy array for a
    numpy array, computed without a device, and a jax array for everything else.
    """

    def alpha(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        raise TypeError(f"{type(self).__name__} must define alpha(t)")

    def sigma(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        raise TypeError(f"{type(self).__name__} must define sigma(t)")

    def add_noise(self, x0: Samples, eps: Samples, t: Times) -> Float32[Array, " B *data"]:
        """x_t = alpha(t) x0 + sigma(t) eps; t is [B] or [B, F]."""
        return align(self.alpha(t), x0) * x0 + align(self.sigma(t), x0) * eps


@dataclasses.dataclass(frozen=True)
class FlowMatching(Schedule):
    """The straight path of rectified flow: alpha = 1 - t, sigma = t.

    (Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching".) sigma is t
    itself, not an entry of a table, and it contains no shift (see `shift_time`).
    """

    def alpha(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        return 1.0 - self.sigma(t)

    def sigma(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        return _float32(t)[0]


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """Variance-exploding path of Karras et al. 2022, where t is the ramp of its equation 5.

    alpha = 1 and sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho. At
    t = 0, sigma is sigma_min and not 0: only a solver's last step goes to clean data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        t, xp = _float32(t)
        return xp.ones_like(t)

    def sigma(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + _float32(t)[0] * (high - low)) ** self.rho


@dataclasses.dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving path (Song et al. 2021, equation 33): beta is linear in t.

    alpha = exp(-t beta_min / 2 - t^2 (beta_max - beta_min) / 4) and alpha^2 + sigma^2 = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t):
        t, xp = _float32(t)
        return -0.5 * t * self.beta_min - 0.25 * t**2 * (self.beta_max - self.beta_min), xp

    def alpha(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        log_alpha, xp = self._log_alpha(t)
        return xp.exp(log_alpha)

    def sigma(self, t: Real[ArrayLike, "*shape"]) -> Float32[ArrayLike, "*shape"]:
        log_alpha, xp = self._log_alpha(t)
        # expm1, because 1 - alpha^2 loses all its digits near t = 0.
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))


def shift_time(
    t: Real[ArrayLike, "*shape"], shift: Real[ArrayLike, ""]
) -> Real[ArrayLike, "*shape"]:
    """Moves times towards noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23).

    The shift is a property of drawn times and of step lists, never of a schedule. shift = 1 changes
    nothing; 0 and 1 are fixed points.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def check_times(*, clip: tuple[float, float], **shifts: float) -> None:
    """Raises ValueError for a clip or a shift that `sample_time` and `shift_time` cannot use."""
    for name, shift in shifts.items():
        if not 0.0 < shift < math.inf:
            raise ValueError(f"{name}={shift} must be above 0; 1 changes nothing")
    if not 0.0 <= clip[0] < clip[1] <= 1.0:
        raise ValueError(f"clip={clip} must ascend within [0, 1]")


def check_step_times(times: Sequence[float]) -> None:
    """Raises ValueError for a list that is not one of a sampler's call times."""
    ends = (*times, 0.0)
    if not 0.0 < ends[0] <= 1.0 or any(a <= b for a, b in pairwise(ends)):
        raise ValueError(
            f"times={times} must descend, from 1 at most, and end above 0, such as step_times(4)"
        )


def check_steps(steps: int) -> None:
    """Raises ValueError for a number of steps that is not 1 to MOST_STEPS."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps={steps} must be 1 or more, and {MOST_STEPS:,} at most")


def step_times(steps: int) -> tuple[float, ...]:
    """The times of a sampler's `steps` network calls, evenly spaced: (1, ..., 1 / steps)."""
    return tuple(1.0 - i / steps for i in range(steps))


def draw_step_times(
    key: Key[Array, ""], fewest: int, most: int, clip: tuple[float, float] = (0.02, 0.98)
) -> Float32[Array, " most"]:
    """Draws the times of a sampler with a random number of calls (the dynamic schedule of CDM).

    The number n is uniform in `fewest` ... `most`. The first call is at 1; the others are uniform,
    one in each of n - 1 equal intervals of `clip`.

    Args:
        key: a JAX random key.
        fewest, most: bounds of the number of calls.
        clip: lowest and highest time of the calls after the first.

    Returns:
        The n times, descending, and 0 in the places that are left.
    """
    number_key, time_key = jax.random.split(key)
    number = jax.random.randint(number_key, (), fewest, most + 1)
    place = jnp.arange(most)
    low, high = clip
    later = (place - jax.random.uniform(time_key, (most,))) / jnp.maximum(number - 1, 1)
    times = jnp.where(place == 0, 1.0, high - (high - low) * later)
    return jnp.where(place < number, times, 0.0)


def sample_time(
    key: Key[Array, ""],
    shape: tuple[int, ...] = (),
    *,
    low: Real[ArrayLike, "..."] = 0.0,
    high: Real[ArrayLike, "..."] = 1.0,
    shift: float = 1.0,
    clip: tuple[float, float] = (0.02, 0.98),
) -> Float32[Array, "..."]:
    """Draws times: uniform on [low, high), then shifted, then clipped.

    Args:
        key: a JAX random key.
        shape: shape of the result.
        low, high: the interval before the shift, broadcast to `shape`. Self-Forcing's `ts_schedule`
            restricts it to the interval of the exit step.
        shift: see `shift_time`.
        clip: lowest and highest time after the shift. At t = 0 and t = 1, a score carries almost no
            information.

    Returns:
        Times of shape `shape`.
    """
    t = jax.random.uniform(key, shape, minval=low, maxval=high)
    return jnp.clip(shift_time(t, shift), *clip)
