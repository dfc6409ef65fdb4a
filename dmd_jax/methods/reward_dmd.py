"""DMD with a reward: by weights of its gradient, by the gradient of the reward, or by both."""

import dataclasses

import jax
import jax.numpy as jnp

from dmd_jax.losses.distribution_matching import (
    finite_samples,
    keep,
    square_norms,
    with_gradient,
)
from dmd_jax.losses.reward import effective_share, reward_weights
from dmd_jax.methods import Batch, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd import DMD
from dmd_jax.rollouts.backward_simulation import Rollout


@dataclasses.dataclass(frozen=True)
class RewardDMD(DMD):
    """DMD for samples of a high reward r(x0, cond), the callable `nets["reward"]`.

    The generator's loss is exp(beta r) DMD - reward_weight r, mean over samples:

    - beta alone is Re-DMD of Reward Forcing (Lu et al. 2025, arXiv 2512.04678): r has no gradient;
    - reward_weight alone is DMDR with ReFL (Jiang et al. 2025, arXiv 2511.13649). It moves the
      target to teacher exp(lambda r) (RTDMD, arXiv 2605.26108); docs/methods.md gives lambda.

    A sample whose reward is not finite counts zero in both terms.

    Attributes:
        beta: of the weights; 0 gives every sample the weight 1.
        reward_weight: of the reward's gradient; with 0, the reward is not differentiated.

    Raises:
        ValueError: a number is out of range.
    """

    beta: float = 0.0
    reward_weight: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "reward_weight"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")

    @property
    def needs_reward(self) -> bool:
        """Whether `nets` must have `reward`, one more frozen role: `config.reward`."""
        return True

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        # Gradients at the samples are computed here, explicitly: there a sample in which one is not
        # finite can be left out (see `DMD2.compare`).
        reward, push = self._rewarded(rollout, nets)
        weights, usable = reward_weights(reward, self.beta)
        usable = usable & finite_samples(push)
        weights = jnp.where(usable, weights, 0.0)
        loss, pull, observed = self.matching(rollout, nets, batch, time_key, eps_key, weights)
        push = keep(push.astype(jnp.float32), usable, rollout.mask)
        loss = loss - self.reward_weight * jnp.mean(jnp.where(usable, reward, 0.0))
        observed["usable"] = observed["usable"] & usable
        observed |= {"reward": reward, "weight": weights}
        observed |= {"push": square_norms(push), "pull": square_norms(pull)}
        return with_gradient(rollout.x0, loss, pull - self.reward_weight * push), observed

    def _rewarded(self, rollout, nets):
        """(the reward [B], the gradient of its mean at the samples)."""
        x0 = jax.lax.stop_gradient(rollout.x0)

        def mean(x0):
            reward = nets["reward"](x0, rollout.cond).astype(jnp.float32)
            return jnp.mean(reward), reward

        if not self.reward_weight:
            return mean(x0)[1], jnp.zeros_like(x0)
        (_, reward), push = jax.value_and_grad(mean, has_aux=True)(x0)
        return reward, push

    def metrics(self, observed: Observed) -> Metrics:
        """`DMD.metrics`, and those of the reward.

        reward/mean is over finite rewards. reward/effective is the share of the batch that the
        weights leave, 1 for equal ones. reward/ratio is the norm of the reward's gradient at the
        samples, times `reward_weight`, over that of distribution matching. samples/nonfinite counts
        what is not finite in either.
        """
        reward = observed["reward"]
        push, pull = jnp.sum(observed["push"]), jnp.sum(observed["pull"])
        return super().metrics(observed) | {
            "reward/mean": jnp.mean(reward, where=jnp.isfinite(reward)),
            "reward/effective": effective_share(observed["weight"]),
            "reward/ratio": self.reward_weight * jnp.sqrt(push / pull),
        }
