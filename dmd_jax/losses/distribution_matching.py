"""Distribution Matching Distillation (DMD, Yin et al. 2023): gradient, loss, critic's regression.

Values in, values out: nothing in this file calls a network, so every function can be checked by
hand. Shapes: predictions are [B, ...] or [B, F, ...]; a mask is boolean and aligned with the
leading axes.
"""

import jax
import jax.numpy as jnp

from dmd_jax.diffusion.schedule import align


def masked_mean(x, mask=None):
    """Mean of `x` [B, ...] where a boolean mask [B], [B, F] or [B, ...] is True, else 0."""
    if mask is None:
        return jnp.mean(x)
    mask = jnp.broadcast_to(align(mask, x), x.shape)
    return jnp.sum(jnp.where(mask > 0, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)


def finite_samples(x):
    """bool [B]: whether all of a sample of `x` [B, ...] is finite."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def teacher_error(x0, real_x0, *, mask=None, frames_per_block=None):
    """Mean absolute error of the teacher, mean |x0 - real_x0|: the normaliser of DMD, equation 8.

    Args:
        x0, real_x0: [B, ...]; [B, F, ...] with `frames_per_block`.
        mask: what counts, [B], [B, F] or [B, ...]; everything if None.
        frames_per_block: None for one number a sample; n for one number a block of n frames
            (LongLive 2.0).

    Returns:
        float32, of the rank of x0 and broadcastable against it; 1 where the mask keeps nothing.

    Raises:
        ValueError: the frames do not divide into blocks.
    """
    error = jnp.abs(x0.astype(jnp.float32) - real_x0.astype(jnp.float32))
    kept = (
        jnp.ones_like(error) if mask is None else jnp.broadcast_to(align(mask, error), error.shape)
    )
    shape = error.shape
    if frames_per_block is not None:
        if shape[1] % frames_per_block:
            raise ValueError(f"{shape[1]} frames do not divide into blocks of {frames_per_block}")
        blocks = (shape[0], shape[1] // frames_per_block, frames_per_block, *shape[2:])
        error, kept = error.reshape(blocks), kept.reshape(blocks)
    axes = tuple(range(1 if frames_per_block is None else 2, error.ndim))
    count = jnp.sum(kept, axes, keepdims=True)
    # A block that is masked whole has no error. 0/0 there would discard the sample's other blocks.
    mean = jnp.where(count > 0, jnp.sum(error * kept, axes, keepdims=True) / count, 1.0)
    if frames_per_block is not None:
        mean = jnp.repeat(mean[:, :, 0], frames_per_block, axis=1)
    return mean


def dmd_gradient(x0, real_x0, fake_x0, *, normalize=True, mask=None, frames_per_block=None):
    """The direction that raises the diffused reverse KL at `x0` (DMD, equations 7 and 8).

        grad = (fake_x0 - real_x0) / mean |x0 - real_x0|

    Both predictions are made at the same x_t, a noised x0. The exact gradient carries the positive
    factor (alpha / sigma)^2 in place of 1 / mean; docs/mathematics.md derives it. Teacher close to
    x0: small mean, larger gradient.

    Args:
        x0: the generator's samples, [B, ...].
        real_x0, fake_x0: the teacher's and the fake score's predictions, [B, ...].
        normalize: divide by `teacher_error`, which `mask` and `frames_per_block` are for.

    Returns:
        float32 [B, ...], with no gradient of its own. A sample for which it is not finite (a
        prediction that is not; a teacher error of zero: there is no epsilon) is zero throughout.
    """
    real_x0, fake_x0 = real_x0.astype(jnp.float32), fake_x0.astype(jnp.float32)
    grad = fake_x0 - real_x0
    if normalize:
        grad = grad / teacher_error(x0, real_x0, mask=mask, frames_per_block=frames_per_block)
    grad = jnp.where(align(finite_samples(grad), grad) > 0, grad, 0.0)
    return jax.lax.stop_gradient(grad)


def dmd_loss(x0, grad, mask=None):
    """A scalar whose value is 0.5 mean(grad^2) and whose gradient with respect to x0 is grad / N.

    N counts the elements that the mask keeps. This is 0.5 MSE(x0, stop_gradient(x0 - grad)) without
    its cancellation: x0 - stop_gradient(x0) is exactly zero in every dtype, so that `grad` is
    rounded once, to the dtype of x0, and no float64 is needed (docs/mathematics.md).

    Args:
        x0: the generator's samples, float32 or bfloat16 [B, ...].
        grad: from `dmd_gradient`, [B, ...].
        mask: what counts, [B], [B, F] or [B, ...]; everything if None.

    Raises:
        ValueError: x0 is float16, in which grad / N underflows.
    """
    if x0.dtype == jnp.float16:
        raise ValueError("dmd_loss: grad / N underflows in float16; run the generator in bfloat16")
    zero = (x0 - jax.lax.stop_gradient(x0)).astype(jnp.float32)
    return 0.5 * masked_mean(jnp.square(zero + jax.lax.stop_gradient(grad)), mask)


def denoising_loss(raw, target, weight=1.0, mask=None):
    """Regression of a network's own output: mean(weight (raw - target)^2), a float32 scalar.

    With weight 1 this is flow matching for a velocity, the simple loss of DDPM for a noise and
    EDM's loss for its preconditioned output. It trains the fake score on the generator's samples
    (DMD, equation 6; Self-Forcing regresses the velocity) and a teacher on data.

    Args:
        raw, target: [B, ...]; `Prediction.target` makes the target.
        weight: a number, or [B] or [B, F].
        mask: what counts, [B], [B, F] or [B, ...]; everything if None.
    """
    error = jnp.square(raw.astype(jnp.float32) - target.astype(jnp.float32))
    return masked_mean(align(weight, error) * error, mask)
