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
        loss, grad, observed = self._matching(rollout, nets, batch, time_key, eps_key)
        return with_gradient(rollout.x0, loss, grad), observed

    def _matching(self, rollout, nets, batch, time_key, eps_key):
        """DMD's `compare`, as (the loss, its gradient at the samples, what `metrics` needs).

        A prediction that is not finite gets a gradient of zero from the loss. The backward pass of
        its network can still turn that into NaN (0 * inf), which would reach all weights of the
        generator. At the samples, where each has its own gradient, it can be set to zero.
        """

        def loss_of(x0):
            moved = rollout._replace(x0=x0)
            return DMD.compare(self, moved, nets, batch, time_key, eps_key)

        x0 = jax.lax.stop_gradient(rollout.x0)
        (loss, observed), grad = jax.value_and_grad(loss_of, has_aux=True)(x0)
        usable = expand(observed["usable"], grad)
        return loss, jnp.where(usable, grad, 0.0), observed

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
