"""f-distill: DMD2 for another divergence than the reverse KL, by weights from its discriminator."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from dmd_jax.diffusion.schedule import shift_time
from dmd_jax.losses.f_divergence import (
    Divergence,
    JensenShannon,
    calibrated_ratio,
    density_ratio,
    divergence_weight,
)
from dmd_jax.methods.dmd2 import DMD2


@dataclasses.dataclass(frozen=True)
class FDistill(DMD2):
    """f-distill (Xu et al. 2025): each sample's DMD gradient is weighted by its density ratio.

    The ratio is that of the data to the generator at x_t, although the gradient is the teacher's:
    with guidance, these are two distributions.

    Ratios are calibrated and weights normalised over the batch; with `config.accumulate`, over each
    part of it, so that results depend a little on the number of parts.

    Attributes:
        divergence: a class of `losses.f_divergence`; ReverseKL() is DMD2.
        ratio_clip: lowest and highest density ratio.
        bins, prior: see `losses.f_divergence.calibrated_ratio`. The bins are of the times before
            `score_shift`, so that each has its share of the samples.

    Raises:
        ValueError: a number is out of range.
    """

    divergence: Divergence = dataclasses.field(default=JensenShannon())
    ratio_clip: tuple[float, float] = (0.1, 20.0)
    bins: int = 10
    prior: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.ratio_clip[0] < self.ratio_clip[1]:
            raise ValueError(f"ratio_clip={self.ratio_clip} must ascend, from above 0")
        if self.bins < 1 or self.prior < 0.0:
            raise ValueError(f"bins={self.bins} must be 1 or more, prior={self.prior} 0 or more")

    def weights(
        self, logits: Float32[Array, " B"], t: Float32[Array, " B"]
    ) -> Float32[Array, " B"]:
        ratio = density_ratio(logits, self.ratio_clip)
        before = shift_time(jnp.asarray(t), 1.0 / self.score_shift)  # the inverse of the shift
        ratio = calibrated_ratio(ratio, before, bins=self.bins, prior=self.prior)
        return divergence_weight(self.divergence, ratio)
