"""DMD1: distribution matching beside a regression on stored ends of the teacher's ODE."""

import dataclasses

import jax
import jax.numpy as jnp

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.losses.regression import Distance, SquaredError
from dmd_jax.methods import Batch, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.causal_ode import trajectory_points
from dmd_jax.methods.dmd import DMD
from dmd_jax.rollouts.backward_simulation import Rollout


@dataclasses.dataclass(frozen=True)
class DMD1(DMD):
    """The first DMD (Yin et al. 2023, arXiv 2311.18828): `DMD` and the regression of equation 9.

    From the noise of a stored pair, the student's one call should give the end of the teacher's
    ODE. Distribution matching alone may leave out a mode; the pairs name all of them. The pairs are
    those of `python -m dmd_jax.ode_pairs`, with the guidance of this method. Distribution matching
    draws noise of its own, for their conditions.

    With several `times`, the call is from a point of the stored trajectory at one of them, drawn
    for each sample.

    Attributes:
        times: also those of the stored points.
        regression_weight: weight of the regression; 0 is `DMD`.
        regression_distance: what is regressed, a class of `losses.regression`.

    Raises:
        ValueError: a number is out of range, or `video`: a causal student's blocks see the blocks
            before them, which pairs do not have.
    """

    times: tuple[float, ...] = (1.0,)
    regression_weight: float = 0.25
    regression_distance: Distance = dataclasses.field(default=SquaredError())

    def __post_init__(self):
        super().__post_init__()
        if self.regression_weight < 0.0:
            raise ValueError(f"regression_weight={self.regression_weight} must be 0 or more")
        if self.video is not None:
            raise ValueError(f"video={self.video}: for a causal student there is CausalODE")

    @property
    def uses_data(self) -> bool:
        return True

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, Rollout]]:
        """The sum of both losses.

        Args:
            batch: of `data.ImagePairs`: {"trajectory", "cond", "uncond", "index"}.

        Raises:
            ValueError: the batch has no trajectories, or those of other times.
        """
        matching, (observed, rollout) = super().generator_loss(generator, nets, batch, key)
        # 0 to 2 are the keys of DMD's rollout, times and noise.
        x_t, t = trajectory_points(batch, self.times, self.shift, jax.random.fold_in(key, 3))
        x0, end = generator(x_t, t, batch["cond"]), batch["trajectory"][0.0]
        regression = jnp.mean(self.regression_distance(x0, end))
        observed["end_error"] = jax.lax.stop_gradient(SquaredError()(x0, end))
        return matching + self.regression_weight * regression, (observed, rollout)

    def metrics(self, observed: Observed) -> Metrics:
        """`DMD.metrics`, and regression/error: the root mean square of x0 minus the stored end."""
        error = jnp.sqrt(jnp.mean(observed["end_error"]))
        return super().metrics(observed) | {"regression/error": error}
