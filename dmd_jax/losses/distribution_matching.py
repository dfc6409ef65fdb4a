"""Distribution Matching Distillation (DMD, Yin et al. 2023): gradient, loss, the critic's loss.

Nothing in this file calls a network: every function takes predictions and can be checked by hand.
Predictions are [B, ...], or [B, F, ...] for videos. A mask is boolean, [B], [B, F] or [B, ...]: it
is True for the elements that count, and None counts all of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Real

from dmd_jax.diffusion.schedule import Mask, Samples, align, expand


def masked_mean(x: Samples, mask: Mask | None = None) -> Float[Array, ""]:
    """Mean of `x` over the elements that the mask keeps; 0 if it keeps none."""
    if mask is None:
        return jnp.mean(x)
    mask = jnp.broadcast_to(expand(mask, x), x.shape)
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def finite_samples(x: Samples) -> Bool[Array, " B"]:
    """Whether all elements of a sample are finite."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def keep(x: Samples, samples: Bool[Array, " B"], mask: Mask | None = None) -> Samples:
    """x in those samples, of them what the mask keeps; 0 elsewhere, whatever is there."""
    where = expand(samples, x)
    return jnp.where(where if mask is None else where & expand(mask, x), x, 0.0)


def square_norms(x: Samples) -> Float[Array, " B"]:
    """The sum of the squares of each sample's elements."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def with_gradient(x0: Samples, value: Float[Array, ""], grad: Samples) -> Float32[Array, ""]:
    """A loss with this value and the gradient `grad` with respect to x0, both constants here.

    For losses whose gradients at the samples are computed explicitly, and changed there.
    """
    zero = (x0 - jax.lax.stop_gradient(x0)).astype(jnp.float32)
    value, grad = jax.lax.stop_gradient((value, grad))
    return value + jnp.sum(zero * grad)


def teacher_error(
    x0: Samples,
    real_x0: Samples,
    *,
    mask: Mask | None = None,
    frames_per_block: int | None = None,
) -> Float32[Array, "B ..."]:
    """Mean absolute error of the teacher, mean |x0 - real_x0|: the normaliser of DMD, equation 8.

    Args:
        x0: the generator's samples; [B, F, ...] with `frames_per_block`.
        real_x0: the teacher's predictions.
        mask: the elements over which the mean is taken.
        frames_per_block: None for one mean per sample; n for one mean per block of n frames
            (LongLive 2.0).

    Returns:
        The error, with axes of size one so that it broadcasts against x0; 1 where the mask keeps
        nothing.

    Raises:
        ValueError: the frames do not divide into blocks.
    """
    error = jnp.abs(x0.astype(jnp.float32) - real_x0.astype(jnp.float32))
    kept = True if mask is None else expand(mask, error)
    kept = jnp.broadcast_to(kept, error.shape)
    shape = error.shape
    if frames_per_block is not None:
        if shape[1] % frames_per_block:
            raise ValueError(f"{shape[1]} frames do not divide into blocks of {frames_per_block}")
        blocks = (shape[0], shape[1] // frames_per_block, frames_per_block, *shape[2:])
        error, kept = error.reshape(blocks), kept.reshape(blocks)
    axes = tuple(range(1 if frames_per_block is None else 2, error.ndim))
    count = jnp.sum(kept, axes, keepdims=True)
    # A block whose mask is False throughout has no error. 0/0 would discard the whole sample.
    total = jnp.sum(jnp.where(kept, error, 0.0), axes, keepdims=True)
    mean = jnp.where(count > 0, total / count, 1.0)
    if frames_per_block is not None:
        mean = jnp.repeat(mean[:, :, 0], frames_per_block, axis=1)
    return mean


def dmd_gradient(
    x0: Samples,
    real_x0: Samples,
    fake_x0: Samples,
    *,
    normalize: bool = True,
    mask: Mask | None = None,
    frames_per_block: int | None = None,
) -> Float32[Array, " B *data"]:
    """The gradient of the diffused reverse KL at `x0`, rescaled (DMD, equations 7 and 8).

        grad = (fake_x0 - real_x0) / mean |x0 - real_x0|

    Both predictions are for the same x_t, a noised x0. The exact gradient has the positive factor
    (alpha / sigma)^2 in place of 1 / mean; docs/mathematics.md derives it. The closer the teacher's
    prediction is to x0, the smaller the mean and the larger the gradient.

    Args:
        x0: the generator's samples.
        real_x0: the teacher's predictions.
        fake_x0: the fake score's predictions.
        normalize: divide by `teacher_error`, to which `mask` and `frames_per_block` are passed.

    Returns:
        A constant: it has no gradient with respect to any argument. It is zero for a sample in
        which it is not finite: a prediction is not finite, or the teacher's error is zero (no
        epsilon is added).
    """
    real_x0, fake_x0 = real_x0.astype(jnp.float32), fake_x0.astype(jnp.float32)
    grad = fake_x0 - real_x0
    if normalize:
        grad = grad / teacher_error(x0, real_x0, mask=mask, frames_per_block=frames_per_block)
    grad = jnp.where(expand(finite_samples(grad), grad), grad, 0.0)
    return jax.lax.stop_gradient(grad)


def dmd_loss(x0: Samples, grad: Samples, mask: Mask | None = None) -> Float32[Array, ""]:
    """A loss with the value 0.5 mean(grad^2) and the gradient grad / N with respect to x0.

    N is the number of elements that the mask keeps. The function is
    0.5 mean((x0 - stop_gradient(x0 - grad))^2), without its cancellation: x0 - stop_gradient(x0) is
    exactly zero in every dtype, so that `grad` is rounded only once, to the dtype of x0, and no
    float64 is needed (docs/mathematics.md).

    Args:
        x0: the generator's samples, float32 or bfloat16.
        grad: from `dmd_gradient`.
        mask: the elements over which the mean is taken.

    Raises:
        ValueError: x0 is float16, in which grad / N underflows.
    """
    if x0.dtype == jnp.float16:
        raise ValueError("dmd_loss: grad / N underflows in float16; run the generator in bfloat16")
    zero = (x0 - jax.lax.stop_gradient(x0)).astype(jnp.float32)
    return 0.5 * masked_mean(jnp.square(zero + jax.lax.stop_gradient(grad)), mask)


def denoising_loss(
    raw: Samples,
    target: Samples,
    weight: Real[ArrayLike, "..."] = 1.0,
    mask: Mask | None = None,
) -> Float32[Array, ""]:
    """Regression of a network's raw output: mean(weight (raw - target)^2).

    With weight 1 this is flow matching for a velocity, the simple loss of DDPM for a noise and
    EDM's loss for its preconditioned output. It trains the fake score on the generator's samples
    (DMD, equation 6; Self-Forcing regresses the velocity) and a teacher on data.

    Args:
        raw: the network's output.
        target: what it should be, from `Prediction.target`.
        weight: a number, or an array [B] or [B, F].
        mask: the elements over which the mean is taken.
    """
    error = jnp.square(raw.astype(jnp.float32) - target.astype(jnp.float32))
    return masked_mean(align(weight, error) * error, mask)
