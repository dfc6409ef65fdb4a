"""Solvers of the probability-flow ODE that are of higher order than Euler's.

Imports jax and schedule. A denoiser is any callable (x_t, t, cond) -> x0.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.diffusion.schedule import shift_time

# At t = 1, flow matching has alpha = 0 and an infinite log(alpha / sigma), by which UniPC divides
# the axis of times. diffusers takes sigma = 1 - 1e-6 there, and this is alpha in its float32.
LEAST_ALPHA = 17 * 2.0**-24


def unipc(denoiser, noise, cond, *, times, schedule, shift=1.0):
    """Follows the probability-flow ODE from noise to data by UniPC-2 (Zhao et al. 2023).

    Algorithm 5 and 6 of arXiv 2302.04867: multistep, prediction of x0, B(h) = e^h - 1, order 2
    but for the first and the last step. Each x0 serves twice, to correct the step that led to it
    and to predict the next one, so that a step costs one network call.

    On the same times this is diffusers' UniPCMultistepScheduler with `use_flow_sigmas`, but that
    the network is told its time exactly, which diffusers truncates to an integer of 1000. Wan's
    own list of times is 0.999 times that of `schedule.step_times`.

    Args:
        denoiser: any callable (x_t, t, cond) -> x0, a guided teacher for one.
        noise: standard normal, [B, ...].
        times: the times of the calls before the shift, descending from 1; the last step goes to 0.
            They and `shift` are plain numbers: all that depends on them is computed beforehand.

    Returns:
        x0, float32 [B, ...].

    Raises:
        ValueError: `times` do not descend within (0, 1].
    """
    ends = (*times, 0.0)
    if not times or times[0] > 1 or any(a <= b for a, b in pairwise(ends)):
        raise ValueError(f"times={times} must descend within (0, 1], such as step_times(4)")
    # As a network sees them; and the host's, so that no device is needed to compute with them.
    shifted = np.float32([shift_time(t, shift) for t in ends])
    with jax.ensure_compile_time_eval():  # a schedule of the user's own may be in jax alone
        levels = schedule.alpha(shifted).tolist(), schedule.sigma(shifted).tolist()
    corrections, predictions = _coefficients(*levels)

    def step(carry, now):
        x, start, x0_1, x0_2 = carry  # x is predicted from start; the last two predictions of x0
        t, correction, prediction = now
        x0 = denoiser(x, jnp.full(x.shape[0], t), cond).astype(jnp.float32)
        start = _combine(correction, start, x0, x0_1, x0_2)
        return (_combine(prediction, start, x0, x0_1), start, x0, x0_1), None

    x = schedule.sigma(shifted[0]) * noise.astype(jnp.float32)
    nothing = jnp.zeros_like(x)
    steps = shifted[:-1], np.float32(corrections), np.float32(predictions)
    (x, *_), _ = jax.lax.scan(step, (x, x, nothing, nothing), steps)
    return x


def _combine(weights, *arrays):
    return sum(weight * array for weight, array in zip(weights, arrays, strict=True))


def _coefficients(alphas, sigmas):
    """The weights of every step, in the host's float64: lambda = log(alpha / sigma) needs it.

    Returns:
        (corrections, predictions), lists of N rows: what is at t_i, of (what was at t_{i-1}, x0_i,
        x0_{i-1}, x0_{i-2}); and what will be at t_{i+1}, of (what is at t_i, x0_i, x0_{i-1}).
    """
    lambdas = [
        math.log(max(alpha, LEAST_ALPHA) / sigma) if sigma else math.inf
        for alpha, sigma in zip(alphas, sigmas, strict=True)
    ]
    steps = len(sigmas) - 1
    corrections, predictions = [(1.0, 0.0, 0.0, 0.0)], []  # there is nothing to correct at first
    for i in range(steps):
        keep = sigmas[i + 1] / sigmas[i]
        h = lambdas[i + 1] - lambdas[i]
        gain = -alphas[i + 1] * math.expm1(-h)
        if i == 0 or i == steps - 1:  # order 1
            predictions.append((keep, gain, 0.0))
            corrections.append((keep, gain / 2, gain / 2, 0.0))
            continue
        r = (lambdas[i - 1] - lambdas[i]) / h
        # The predictor's one weight is 1/2; the corrector's two solve its equation 14 with h < 0.
        predictions.append((keep, gain * (1 - 0.5 / r), gain * 0.5 / r))
        phi_1 = math.expm1(-h) / -h - 1
        b_1, b_2 = phi_1 / math.expm1(-h), 2 * (phi_1 / -h - 0.5) / math.expm1(-h)
        old = (b_1 - b_2) / (1 - r)
        new = b_1 - old
        corrections.append((keep, gain * new, gain * (1 - new - old / r), gain * old / r))
    return corrections[:steps], predictions
