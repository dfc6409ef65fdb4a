"""The probability-flow ODE in Euler steps: how a teacher samples.

This file imports jax, jaxtyping and diffusion/.
"""

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
    check_step_times(times)
    shifted = shift_time(jnp.asarray((*times, 0.0), jnp.float32), shift)

    def step(x, t_pair):
        t, t_next = (jnp.full(x.shape[0], s) for s in t_pair)
        return euler_step(x, denoiser(x, t, cond), t, t_next, schedule), None

    x = schedule.sigma(shifted[0]) * noise.astype(jnp.float32)
    x, _ = jax.lax.scan(step, x, (shifted[:-1], shifted[1:]))
    return x


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
