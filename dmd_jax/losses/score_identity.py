"""Score identity Distillation (Zhou et al. 2024, "SiD"), in the normalised form of Self-Forcing."""

import jax
import jax.numpy as jnp

from dmd_jax.losses.distribution_matching import finite_samples, masked_mean, teacher_error
from dmd_jax.schedule import align


def sid_loss(x0, real_x0, fake_x0, *, alpha=1.0, mask=None):
    """mean( (r - f) ((r - x0) - alpha (r - f)) / mean |x0 - r| ) with r = real_x0, f = fake_x0.

    Nothing is detached but the normaliser: the gradient passes through x0 and, by way of x_t,
        through
    both predictions. With alpha = 1 the numerator is (r - f) (f - x0).

    Args:
        x0, real_x0, fake_x0: [B, ...], predictions at one x_t that was made from x0.
        alpha: weight of the squared difference (SiD, equation 23); 1 in Self-Forcing, 1.2 in SiD.
        mask: what counts, [B], [B, F] or [B, ...]; everything if None.

    Returns:
        A float32 scalar. A sample that is not finite counts as zero.
    """
    x0, real_x0, fake_x0 = (a.astype(jnp.float32) for a in (x0, real_x0, fake_x0))
    difference = real_x0 - fake_x0
    loss = difference * ((real_x0 - x0) - alpha * difference)
    loss = loss / jax.lax.stop_gradient(teacher_error(x0, real_x0, mask=mask))
    return masked_mean(jnp.where(align(finite_samples(loss), loss) > 0, loss, 0.0), mask)
