"""SiD: DMD with another generator loss, whose gradient passes through both scores."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Real

from dmd_jax.diffusion.schedule import Samples, expand
from dmd_jax.losses.distribution_matching import with_gradient
from dmd_jax.losses.score_identity import sid_loss
from dmd_jax.methods import Batch, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd import DMD
from dmd_jax.rollouts.backward_simulation import Rollout


@dataclasses.dataclass(frozen=True)
class SiD(DMD):
    """Score identity Distillation (Zhou et al. 2024): DMD's rollouts, times and critic, SiD's loss.

    Attributes:
        alpha: weight of the squared difference of the scores (see
            `losses.score_identity.sid_loss`).
    """

    alpha: float = 1.0

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        """DMD's `compare`, with the loss's gradient at the samples computed here, explicitly.

        A prediction that is not finite gets a gradient of zero from the loss. The backward pass of
        its network can still turn that into NaN (0 * inf), which would reach all weights of the
        generator. At the samples, where each has its own gradient, it can be set to zero.
        """
        compare = super().compare

        def loss_of(x0):
            return compare(rollout._replace(x0=x0), nets, batch, time_key, eps_key)

        x0 = jax.lax.stop_gradient(rollout.x0)
        (loss, observed), grad = jax.value_and_grad(loss_of, has_aux=True)(x0)
        usable = expand(observed["usable"], grad)
        return with_gradient(rollout.x0, loss, jnp.where(usable, grad, 0.0)), observed

    def distance(
        self, rollout: Rollout, real: Samples, fake: Samples, weight: Real[ArrayLike, "..."] = 1.0
    ) -> Scalar:
        return sid_loss(
            rollout.x0,
            real,
            fake,
            alpha=self.alpha,
            normalize=self.normalize,
            mask=rollout.mask,
            frames_per_block=self.frames_per_block,
            weight=weight,
        )
