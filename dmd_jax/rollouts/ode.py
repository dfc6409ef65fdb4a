"""The probability-flow ODE in Euler steps: how a teacher samples.

This file imports jax, jaxtyping and diffusion/.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from dmd_jax.diffusion.denoiser import DenoiserFn
from dmd_jax.diffusion.schedule import Samples, Schedule, align, check_step_times, shift_time


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
        x0 = denoiser(x, t, cond).astype(jnp.float32)
        eps = (x - align(schedule.alpha(t), x) * x0) / align(schedule.sigma(t), x)
        # Not add_noise at t = 0: EDM's sigma(0) is sigma_min, and clean data have no noise.
        return jnp.where(t_pair[1] > 0, schedule.add_noise(x0, eps, t_next), x0), None

    x = schedule.sigma(shifted[0]) * noise.astype(jnp.float32)
    x, _ = jax.lax.scan(step, x, (shifted[:-1], shifted[1:]))
    return x
