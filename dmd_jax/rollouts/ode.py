"""The probability-flow ODE in Euler steps: how a teacher samples.

This file imports jax, jaxtyping and diffusion/.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from dmd_jax.diffusion.denoiser import DenoiserFn
from dmd_jax.diffusion.schedule import (
    Samples,
    Schedule,
    Times,
    align,
    check_step_times,
    shift_time,
)


def ode(
    denoiser: DenoiserFn,
    noise: Samples,
    cond: PyTree,
    *,
    times: Sequence[float],
    schedule: Schedule,
    shift: float = 1.0,
) -> Float32[Array, " B *data"]:
    """Solves the probability-flow ODE from noise to data in Euler steps (DDIM, Song et al. 2020).

    For flow matching this is Euler's method on the velocity.

    Args:
        denoiser: such as a Denoiser or a guided teacher.
        noise: standard normal.
        cond: the condition of every call.
        times: the times of the calls before the shift, descending from 1. The last step goes to
            clean data.
        schedule: the denoiser's schedule.
        shift: see `schedule.shift_time`.

    Returns:
        The x0 of the last call.

    Raises:
        ValueError: `times` do not descend from 1 at most to above 0.
    """
    return trajectory(denoiser, noise, cond, times=times, kept=(), schedule=schedule, shift=shift)[
        :, -1
    ]


def trajectory(
    denoiser: DenoiserFn,
    noise: Samples,
    cond: PyTree,
    *,
    times: Sequence[float],
    kept: Sequence[float],
    schedule: Schedule,
    shift: float = 1.0,
) -> Float32[Array, " B points *data"]:
    """`ode`, with points of the path: x at the times `kept`, then the end.

    Args:
        kept: some of `times`, in their order.

    Raises:
        ValueError: also where `kept` has a time that is not one of `times`.
    """
    check_step_times(times)
    check_kept(times, kept)
    places = _places(times, kept)
    shifted = shift_time(jnp.asarray((*times, 0.0), jnp.float32), shift)

    def step(carry, now):
        x, points = carry
        t, t_next, place = now
        points = points.at[:, place].set(x)
        t, t_next = (jnp.full(x.shape[0], s) for s in (t, t_next))
        return (euler_step(x, denoiser(x, t, cond), t, t_next, schedule), points), None

    x = schedule.sigma(shifted[0]) * noise.astype(jnp.float32)
    points = jnp.zeros((x.shape[0], len(kept) + 1, *x.shape[1:]), jnp.float32)
    (x, points), _ = jax.lax.scan(step, (x, points), (shifted[:-1], shifted[1:], places))
    return points.at[:, -1].set(x)


def check_kept(times: Sequence[float], kept: Sequence[float]) -> None:
    """Raises ValueError where `trajectory` cannot keep a point because no step starts there."""
    if missing := [t for t in kept if not any(math.isclose(t, s) for s in times)]:
        raise ValueError(
            f"the time {missing[0]} lies between two of the {len(times)} steps: change the number "
            "of steps, or keep another point"
        )


def _places(times, kept):
    """int32 [steps]: which kept point each step starts from; the last place, the end's, if none."""
    near = [[i for i, t in enumerate(kept) if math.isclose(t, s)] for s in times]
    return jnp.asarray([i[0] if i else len(kept) for i in near], jnp.int32)


def euler_step(
    x_t: Samples, x0: Samples, t: Times, t_next: Times, schedule: Schedule
) -> Float32[Array, " B *data"]:
    """One step along the path from x_t, whose clean data are predicted to be x0: x at t_next.

    Times are float32 and never rounded further: published code that forms t - t_next in bfloat16
    makes it wrong by a tenth.
    """
    x_t, x0 = x_t.astype(jnp.float32), x0.astype(jnp.float32)
    eps = (x_t - align(schedule.alpha(t), x_t) * x0) / align(schedule.sigma(t), x_t)
    # Not add_noise at t = 0: EDM's sigma(0) is sigma_min, and clean data have no noise.
    return jnp.where(align(t_next, x0) > 0, schedule.add_noise(x0, eps, t_next), x0)
