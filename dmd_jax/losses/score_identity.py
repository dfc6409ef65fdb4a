"""Score identity Distillation (Zhou et al. 2024, "SiD"), in the normalised form of Self-Forcing."""

import jax
import jax.numpy as jnp

from dmd_jax.diffusion.schedule import align
from dmd_jax.losses.distribution_matching import finite_samples, masked_mean, teacher_error


def sid_loss(x0, real_x0, fake_x0, *, alpha=1.0, normalize=True, mask=None, frames_per_block=None):
    """mean( (r - f) ((r - x0) - alpha (r - f)) / mean |x0 - r| ) with r = real_x0, f = fake_x0.

    Nothing is detached but the normaliser: the gradient passes through x0 and, by way of x_t,
    through both predictions. With alpha = 1 the numerator is (r - f) (f - x0).

    Args:
        x0, real_x0, fake_x0: [B, ...], predictions at one x_t that was made from x0.
        alpha: weight of the squared difference (SiD, equation 23); 1 in Self-Forcing, 1.2 in SiD.
        normalize: divide by `teacher_error`, which takes `mask` and `frames_per_block`.
        mask: what counts, [B], [B, F] or [B, ...]; everything if None.
        frames_per_block: frames that share a normaliser; None for all.

    Returns:
        A float32 scalar. A sample with a prediction that is not finite, or a teacher error of zero,
        counts as zero and gives x0 no gradient.
    """
    x0, real_x0, fake_x0 = (a.astype(jnp.float32) for a in (x0, real_x0, fake_x0))
    error = jnp.ones_like(x0)
    if normalize:
        error = teacher_error(x0, real_x0, mask=mask, frames_per_block=frames_per_block)
    error = jax.lax.stop_gradient(error)
    good = finite_samples(jnp.where(error > 0, real_x0, jnp.nan)) & finite_samples(fake_x0)
    # Replaced before the arithmetic, not after: a discarded NaN would still have a gradient of NaN.
    good = align(good, x0) > 0
    real_x0, fake_x0, error = (jnp.where(good, a, 1.0) for a in (real_x0, fake_x0, error))
    difference = real_x0 - fake_x0
    return masked_mean(difference * ((real_x0 - x0) - alpha * difference) / error, mask)
