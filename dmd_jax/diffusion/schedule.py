"""Noise schedules: how data and noise mix, and which times are drawn.

Every schedule is a path  x_t = alpha(t) x0 + sigma(t) eps  with eps ~ N(0, I).

**Time, for the whole library: t in [0, 1]; t = 1 is noise, t = 0 is data.** A time has shape [B],
or [B, F] where the frames of a video differ, and is aligned with the leading axes of the data.

This room imports jax alone. Schedules are frozen dataclasses: hashable, so static under `jax.jit`.
"""

import dataclasses

import jax
import jax.numpy as jnp


def align(t, x):
    """Gives `t` [B] or [B, F] trailing axes of size one, to broadcast against `x` [B, ...]."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _float32(t):
    """(t in float32, the numpy that computes with it): an array of numpy's stays on the host."""
    xp = t.__array_namespace__() if hasattr(t, "__array_namespace__") else jnp
    return xp.asarray(t, dtype=xp.float32), xp


class Schedule:
    """A path from data to noise: `alpha(t)` scales the data, `sigma(t)` the noise; both float32.

    Of numpy's arrays the schedules below make numpy's, without a device; of all else, jax's.
    """

    def alpha(self, t):
        raise TypeError(f"{type(self).__name__} must define alpha(t)")

    def sigma(self, t):
        raise TypeError(f"{type(self).__name__} must define sigma(t)")

    def add_noise(self, x0, eps, t):
        """x_t = alpha(t) x0 + sigma(t) eps, in float32; x0 and eps [B, ...], t [B] or [B, F]."""
        return align(self.alpha(t), x0) * x0 + align(self.sigma(t), x0) * eps


@dataclasses.dataclass(frozen=True)
class FlowMatching(Schedule):
    """The straight path of rectified flow: alpha = 1 - t, sigma = t.

    (Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching".) sigma is t
    itself: there is no table to look it up in, and no shift in here (see `shift_time`).
    """

    def alpha(self, t):
        return 1.0 - self.sigma(t)

    def sigma(self, t):
        return _float32(t)[0]


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """Variance-exploding path of Karras et al. 2022, with t the ramp of its equation 5.

    alpha = 1 and sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, so
    that t = 0 is sigma_min and t = 1 is sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t):
        t, xp = _float32(t)
        return xp.ones_like(t)

    def sigma(self, t):
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + _float32(t)[0] * (high - low)) ** self.rho


@dataclasses.dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving path (Song et al. 2021, equation 33): beta rises linearly in t.

    alpha = exp(-t beta_min / 2 - t^2 (beta_max - beta_min) / 4) and alpha^2 + sigma^2 = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t):
        t, xp = _float32(t)
        return -0.5 * t * self.beta_min - 0.25 * t**2 * (self.beta_max - self.beta_min), xp

    def alpha(self, t):
        log_alpha, xp = self._log_alpha(t)
        return xp.exp(log_alpha)

    def sigma(self, t):
        log_alpha, xp = self._log_alpha(t)
        # expm1, because 1 - alpha^2 loses every digit near t = 0.
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))


def shift_time(t, shift):
    """Moves times towards noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23).

    A shift belongs to the drawing of times and to step lists, never to a schedule. shift = 1 moves
    nothing; the ends 0 and 1 stay where they are.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def check_times(*shifts, clip):
    """Raises ValueError where `shift_time` or `sample_time` has no meaning under these numbers."""
    if min(shifts) <= 0.0:
        raise ValueError(f"a time shift is {min(shifts)}; it must be above 0, and 1 moves nothing")
    if not 0.0 <= clip[0] < clip[1] <= 1.0:
        raise ValueError(f"clip={clip} must ascend within [0, 1]")


def step_times(steps):
    """Times of a sampler's `steps` network calls, evenly spaced: (1, ..., 1 / steps)."""
    return tuple(1.0 - i / steps for i in range(steps))


def sample_time(key, shape=(), *, low=0.0, high=1.0, shift=1.0, clip=(0.02, 0.98)):
    """Draws times: uniform on [low, high), then shifted, then clipped.

    Args:
        key: a JAX random key.
        shape: shape of the result.
        low, high: the interval before the shift; numbers or arrays that broadcast to `shape`. The
            restricted range of Self-Forcing's `ts_schedule` is the exit step's own interval here.
        shift: see `shift_time`.
        clip: the ends to which shifted times are clipped. A score says little at either end.

    Returns:
        float32 times of shape `shape`.
    """
    t = jax.random.uniform(key, shape, minval=low, maxval=high)
    return jnp.clip(shift_time(t, shift), *clip)
