"""SiD: DMD with another generator loss, whose gradient passes through both scores."""

import dataclasses

from dmd_jax.losses.score_identity import sid_loss
from dmd_jax.methods.dmd import DMD


@dataclasses.dataclass(frozen=True)
class SiD(DMD):
    """Score identity Distillation (Zhou et al. 2024): DMD's rollouts, times and critic, SiD's loss.

    Attributes:
        alpha: weight of the squared difference of the scores (see
            `losses.score_identity.sid_loss`).
    """

    alpha: float = 1.0

    def distance(self, made, real, fake):
        return sid_loss(
            made.x0,
            real,
            fake,
            alpha=self.alpha,
            normalize=self.normalize,
            mask=made.mask,
            frames_per_block=self.frames_per_block,
        )
