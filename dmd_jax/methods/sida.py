"""SiDA: SiD with the adversarial term of DMD2."""

import dataclasses

from dmd_jax.methods import Batch, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd2 import DMD2
from dmd_jax.methods.sid import SiD
from dmd_jax.rollouts.backward_simulation import Rollout


@dataclasses.dataclass(frozen=True)
class SiDA(SiD, DMD2):
    """Adversarial score identity distillation (Zhou et al. 2024, arXiv 2410.14919).

    The generator's loss is that of `SiD` and `gan_weight` times that of `DMD2`'s discriminator.
    """

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        loss, pull, observed = self._matching(rollout, nets, batch, time_key, eps_key)
        gan, _, push = self._adversarial(rollout, nets, batch, time_key, eps_key)
        return self._sum(rollout, loss, pull, gan, push, observed)
