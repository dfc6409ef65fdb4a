"""SiD: DMD with another generator loss, whose gradient passes through both scores."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Real

from dmd_jax.diffusion.schedule import Samples
from dmd_jax.losses.distribution_matching import keep, with_gradient
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
        loss, grad, observed = self.matching(rollout, nets, batch, time_key, eps_key)
        return with_gradient(rollout.x0, loss, grad), observed

    def matching(
        self,
        rollout: Rollout,
        nets: Nets,
        batch: Batch,
        time_key: OneKey,
        eps_key: OneKey,
        weight: Real[ArrayLike, "..."] = 1.0,
    ) -> tuple[Scalar, Float32[Array, " B *data"], Observed]:
        """`DMD.matching`, of a loss whose gradient passes through both scores.

        A prediction that is not finite gets a gradient of zero from the loss. The backward pass of
        its network can still turn that into NaN (0 * inf), which would reach all weights of the
        generator. At the samples, where each has its own gradient, it can be set to zero. So can
        the gradient that reaches masked frames through the scores of others.
        """

        def distance(x0):
            moved = rollout._replace(x0=x0)
            real, fake, t = self.predictions(moved, nets, batch, time_key, eps_key)
            observed = self.observe(moved, real, fake, t)
            return self.distance(moved, real, fake, weight), observed

        x0 = jax.lax.stop_gradient(rollout.x0)
        (loss, observed), grad = jax.value_and_grad(distance, has_aux=True)(x0)
        grad = keep(grad.astype(jnp.float32), observed["usable"], rollout.mask)
        return loss, grad, observed

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
