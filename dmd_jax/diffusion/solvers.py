"""Solvers of the probability-flow ODE of higher order than Euler's.

This file imports jax, numpy, jaxtyping, `schedule` and `denoiser`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

from dmd_jax.diffusion.denoiser import DenoiserFn
from dmd_jax.diffusion.schedule import Samples, Schedule, check_step_times, shift_time

# At t = 1, flow matching has alpha = 0, and UniPC's time axis, log(alpha / sigma), is infinite.
# diffusers takes sigma = 1 - 1e-6 there; this is the alpha that follows in float32.
LEAST_ALPHA = 17 * 2.0**-24


def unipc(
    denoiser: DenoiserFn,
    noise: Samples,
    cond: PyTree,
    *,
    times: Sequence[float],
    schedule: Schedule,
    shift: float = 1.0,
) -> Float32[Array, " B *data"]:
    """Solves the probability-flow ODE from noise to data by UniPC-2 (Zhao et al. 2023).

    Algorithms 5 and 6 of arXiv 2302.04867: multistep, with x0 predicted and B(h) = e^h - 1; of
    order 2, except in the first and the last step. Each x0 is used twice, to correct the step that
    led to it and to predict the next one: a step costs one network call.

    At the same times this is diffusers' UniPCMultistepScheduler with `use_flow_sigmas`, except that
    diffusers truncates the network's time to an integer out of 1000. Wan's own list of times is
    0.999 times `schedule.step_times`.

    Args:
        denoiser: such as a Denoiser or a guided teacher.
        noise: standard normal.
        cond: the condition of every call.
        times: the times of the calls before the shift, descending from 1. The last step goes to
            clean data. `times` and `shift` are plain numbers, because the coefficients are computed
            in Python.
        schedule: the denoiser's schedule.
        shift: see `schedule.shift_time`.

    Returns:
        x0.

    Raises:
        ValueError: `times` do not descend from 1 at most to above 0.
    """
    check_step_times(times)
    # The network's times. A numpy array, because the coefficients are computed on the host.
    shifted = np.float32([shift_time(t, shift) for t in (*times, 0.0)])
    with jax.ensure_compile_time_eval():  # a user's schedule may return jax arrays only
        alphas, sigmas = schedule.alpha(shifted).tolist(), schedule.sigma(shifted).tolist()
    alphas[-1], sigmas[-1] = 1.0, 0.0  # clean data, also where sigma(0) is not 0, as in EDM
    corrections, predictions = _coefficients(alphas, sigmas)

    def step(carry, now):
        x, start, x0_1, x0_2 = carry  # x was predicted from start; x0_1, x0_2: the last two x0
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
    """The linear coefficients of every step, in float64, which lambda = log(alpha / sigma) needs.

    Returns:
        (corrections, predictions), two lists with one row for each of the N steps. A row of
        corrections gives x at t_i from (x at t_{i-1}, x0_i, x0_{i-1}, x0_{i-2}); a row of
        predictions gives x at t_{i+1} from (x at t_i, x0_i, x0_{i-1}).
    """
    lambdas = [
        math.log(max(alpha, LEAST_ALPHA) / sigma) if sigma else math.inf
        for alpha, sigma in zip(alphas, sigmas, strict=True)
    ]
    steps = len(sigmas) - 1
    corrections, predictions = [(1.0, 0.0, 0.0, 0.0)], []  # the first step corrects nothing
    for i in range(steps):
        keep = sigmas[i + 1] / sigmas[i]
        h = lambdas[i + 1] - lambdas[i]
        gain = -alphas[i + 1] * math.expm1(-h)
        if i == 0 or i == steps - 1:  # order 1
            predictions.append((keep, gain, 0.0))
            corrections.append((keep, gain / 2, gain / 2, 0.0))
            continue
        r = (lambdas[i - 1] - lambdas[i]) / h
        # The predictor's only weight is 1/2; the corrector's two solve equation 14 with h < 0.
        predictions.append((keep, gain * (1 - 0.5 / r), gain * 0.5 / r))
        phi_1 = math.expm1(-h) / -h - 1
        b_1, b_2 = phi_1 / math.expm1(-h), 2 * (phi_1 / -h - 0.5) / math.expm1(-h)
        old = (b_1 - b_2) / (1 - r)
        new = b_1 - old
        corrections.append((keep, gain * new, gain * (1 - new - old / r), gain * old / r))
    return corrections[:steps], predictions
