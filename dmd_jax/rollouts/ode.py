"""The probability-flow ODE in Euler steps: how a teacher samples. Imports jax and the schedule."""

import jax
import jax.numpy as jnp

from dmd_jax.diffusion.schedule import align, shift_time


def ode(denoiser, noise, cond, *, times, schedule, shift=1.0):
    """Follows the probability-flow ODE from noise to data in Euler steps (DDIM, Song et al. 2020).

    For flow matching this is Euler's method on the velocity.

    Args:
        denoiser: any callable (x_t, t, cond) -> x0, a guided teacher for one.
        noise: standard normal, [B, ...].
        times: the times of the calls before the shift, descending from 1; the last step goes to 0.

    Returns:
        x0, float32 [B, ...].
    """
    shifted = shift_time(jnp.asarray((*times, 0.0), jnp.float32), shift)

    def step(x, t_pair):
        t, t_next = (jnp.full(x.shape[0], s) for s in t_pair)
        x0 = denoiser(x, t, cond)
        eps = (x - align(schedule.alpha(t), x) * x0) / align(schedule.sigma(t), x)
        return schedule.add_noise(x0, eps, t_next), None

    x = schedule.sigma(shifted[0]) * noise.astype(jnp.float32)
    x, _ = jax.lax.scan(step, x, (shifted[:-1], shifted[1:]))
    return x
