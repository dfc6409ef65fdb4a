"""rCM: distribution matching on the student's samples beside sCM on data."""

import dataclasses

import jax

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods import Batch, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.scm import SCM
from dmd_jax.rollouts.backward_simulation import Rollout


@dataclasses.dataclass(frozen=True)
class RCM(DMD):
    """rCM (Zheng et al. 2025, arXiv 2510.08431): the sum of DMD's loss and sCM's.

    DMD descends a reverse KL, which drops modes; sCM on data, which covers them, holds it back. The
    critic learns as in DMD. rCM begins with DMD after sCM's warm-up; here both begin at once.

    Attributes:
        consistency: weight of sCM's loss. Both gradients are normalised at the sample, so that 1 is
            one size; rCM's published weights are about 0.07 for a video of Wan.
        time_mean, time_std, warmup, tangent_c: of `SCM`.

    Raises:
        ValueError: a number is out of range, or `video`: sCM needs a student that makes all frames
            at once.
    """

    consistency: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.6
    warmup: int = 1000
    tangent_c: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.consistency <= 0.0:
            raise ValueError(f"consistency={self.consistency} must be above 0; DMD is without")
        if self.video is not None:
            raise ValueError(f"video={self.video}: sCM is for students that make a sample at once")
        self.scm  # noqa: B018  checks its numbers

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def scm(self) -> SCM:
        """The method of the other loss."""
        return SCM(
            self.sample_shape,
            guidance=self.guidance,
            time_mean=self.time_mean,
            time_std=self.time_std,
            warmup=self.warmup,
            tangent_c=self.tangent_c,
            batched_guidance=self.batched_guidance,
        )

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, Rollout]]:
        """The sum; `batch` has the entries of both methods."""
        matching, (observed, rollout) = super().generator_loss(generator, nets, batch, key)
        key = jax.random.fold_in(key, 1)
        consistency, (residual, _) = self.scm.generator_loss(generator, nets, batch, key)
        return matching + self.consistency * consistency, (observed | residual, rollout)

    def metrics(self, observed: Observed) -> Metrics:
        return super().metrics(observed) | self.scm.metrics(observed)
