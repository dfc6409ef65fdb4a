"""SiD: DMD with another generator loss, whose gradient passes through both scores."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from dmd_jax.diffusion.schedule import Samples, expand
from dmd_jax.losses.score_identity import sid_loss
from dmd_jax.methods import Batch, Nets, Observed
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
        self,
        rollout: Rollout,
        nets: Nets,
        batch: Batch,
        time_key: Key[Array, ""],
        eps_key: Key[Array, ""],
    ) -> tuple[Float32[Array, ""], Observed]:
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
        grad = jax.lax.stop_gradient(jnp.where(usable, grad, 0.0))
        # Adds zero to the value, and makes `grad` the gradient with respect to the samples.
        zero = (rollout.x0 - x0).astype(jnp.float32)
        return jax.lax.stop_gradient(loss) + jnp.sum(zero * grad), observed

    def distance(self, rollout: Rollout, real: Samples, fake: Samples) -> Float32[Array, ""]:
        return sid_loss(
            rollout.x0,
            real,
            fake,
            alpha=self.alpha,
            normalize=self.normalize,
            mask=rollout.mask,
            frames_per_block=self.frames_per_block,
        )
