"""Score identity Distillation (SiD, Zhou et al. 2024), in the normalised form of Self-Forcing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Real

from dmd_jax.diffusion.schedule import Mask, Samples, align, expand
from dmd_jax.losses.distribution_matching import finite_samples, masked_mean, teacher_error


def sid_loss(
    x0: Samples,
    real_x0: Samples,
    fake_x0: Samples,
    *,
    alpha: float = 1.0,
    normalize: bool = True,
    mask: Mask | None = None,
    frames_per_block: int | None = None,
    weight: Real[ArrayLike, "..."] = 1.0,
) -> Float32[Array, ""]:
    """mean( (r - f) ((r - x0) - alpha (r - f)) / mean |x0 - r| ) with r = real_x0, f = fake_x0.

    The normaliser alone is a constant: gradients pass through x0 and, by way of x_t, through both
    predictions. With alpha = 1 the numerator is (r - f) (f - x0).

    Args:
        x0: the generator's samples.
        real_x0: the teacher's predictions.
        fake_x0: the fake score's predictions, for the same x_t, a noised x0.
        alpha: weight of the squared difference (SiD, equation 23); 1 in Self-Forcing, 1.2 in SiD.
        normalize: divide by `teacher_error`, to which `mask` and `frames_per_block` are passed.
        mask: the elements over which the mean is taken; None for all.
        frames_per_block: number of frames that share a normaliser; None for all frames.
        weight: of each sample, [B]; or one number.

    Returns:
        The loss. A sample with a prediction that is not finite, or with a teacher error of zero,
        contributes zero to it, and zero to the gradients of all arguments. A network's own backward
        pass may turn such a zero into NaN (0 * inf): `methods.sid` discards that.
    """
    x0, real_x0, fake_x0 = (a.astype(jnp.float32) for a in (x0, real_x0, fake_x0))
    error = jnp.ones_like(x0)
    if normalize:
        error = teacher_error(x0, real_x0, mask=mask, frames_per_block=frames_per_block)
    error = jax.lax.stop_gradient(error)
    usable = expand(finite_samples((fake_x0 - real_x0) / error), x0)
    # Replaced before the arithmetic: where() on its result would still have a gradient of NaN.
    real_x0, fake_x0, error = (jnp.where(usable, a, 1.0) for a in (real_x0, fake_x0, error))
    difference = real_x0 - fake_x0
    loss = difference * ((real_x0 - x0) - alpha * difference) / error
    return masked_mean(align(weight, loss) * loss, mask)
