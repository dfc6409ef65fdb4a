"""The adversarial term of DMD2 (Yin et al. 2024, section 4.3): losses and penalties of a GAN.

A discriminator D gives one logit per noisy sample. Trained to the end, its logit is
log p_t(x_t) - log q_t(x_t), the log ratio of the noised data's density to that of the generator's
noised samples. The penalties take D as a function of x_t; all else takes logits [B].
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32

from dmd_jax.diffusion.schedule import Samples, expand
from dmd_jax.losses.distribution_matching import square_norms

Logits: TypeAlias = Float[ArrayLike, " B"]
Discriminate: TypeAlias = Callable[[Samples], Logits]


def generator_adversarial_loss(fake: Logits, real: Logits | None = None) -> Float32[Array, ""]:
    """mean softplus(-D(fake)), the non-saturating loss (Goodfellow et al. 2014; DMD2).

    With the discriminator trained to the end, its gradient is that of the divergence
    `losses.f_divergence.SoftenedReverseKL`.

    Args:
        fake: logits of the generator's noisy samples.
        real: logits of as many real ones: the relativistic loss, mean softplus(-(D(fake) -
            D(real))) (Jolicoeur-Martineau 2018; R3GAN, Huang et al. 2024).
    """
    return jnp.mean(jax.nn.softplus(-fake if real is None else real - fake))


def discriminator_loss(
    fake: Logits, real: Logits, *, relativistic: bool = False
) -> Float32[Array, ""]:
    """mean softplus(D(fake)) + mean softplus(-D(real)); 2 log 2 for a D that knows nothing.

    Args:
        fake, real: logits of noisy samples, generated and real.
        relativistic: mean softplus(D(fake) - D(real)) over pairs instead; log 2 for such a D.
    """
    if relativistic:
        return jnp.mean(jax.nn.softplus(fake - real))
    return jnp.mean(jax.nn.softplus(fake) + jax.nn.softplus(-real))


def gradient_penalty(discriminate: Discriminate, x_t: Samples) -> Float32[Array, ""]:
    """mean |dD / dx_t|^2, summed over a sample's elements: R1 on real, R2 on generated samples.

    (Mescheder et al. 2018.) Its own gradient is a second derivative of D, which the attention
    kernels of accelerators do not have: there, use `finite_penalty`.

    Args:
        discriminate: x_t -> logits, each of which depends on its own sample only.
        x_t: noisy samples, noised as those that D learns from.
    """
    grad = jax.grad(lambda x: jnp.sum(discriminate(x)))(x_t)
    return jnp.mean(square_norms(grad))


def finite_penalty(
    discriminate: Discriminate, x_t: Samples, direction: Samples, size: float
) -> Float32[Array, ""]:
    """mean ((D(x_t + size direction) - D(x_t)) / size)^2, from two calls of D.

    Its mean over standard normal directions is `gradient_penalty`, up to terms of order size^2.
    APT's approximate R1 (Lin et al. 2025) is this without the division. Both points are noisy
    samples of one time. Published code compares a noisy sample with a clean one, perturbed, which
    it gives to D as if it were noisy: that does not vanish with the perturbation, and punishes D
    for reading the noise.

    Args:
        discriminate: x_t -> logits.
        x_t: noisy samples.
        direction: standard normal, of the shape of x_t.
        size: of the perturbation, in units of x_t.
    """
    difference = discriminate(x_t + size * direction) - discriminate(x_t)
    return jnp.mean(jnp.square(difference / size))


def equal_norms(grad: Samples, like: Samples) -> Float32[Array, " B *data"]:
    """`grad`, scaled so that each sample of it has the L2 norm of that sample of `like`.

    The author of DMD2 recommends equal norms of both gradients at the image as the start of a
    search for the weight of the adversarial loss. A sample whose gradient is zero stays so.
    """
    own, wanted = jnp.sqrt(square_norms(grad)), jnp.sqrt(square_norms(like))
    scale = jnp.where(own > 0.0, wanted / jnp.where(own > 0.0, own, 1.0), 0.0)
    return expand(scale, grad) * grad
