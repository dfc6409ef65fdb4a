"""sCM: consistency distillation in continuous time, by the derivative along the teacher's ODE."""

import dataclasses

from jaxtyping import PyTree

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.losses.consistency import (
    VelocityFn,
    normalized_tangent,
    root_mean_square,
    scm_loss,
    scm_tangent,
    trigflow,
    trigflow_angle,
    trigflow_point,
    trigflow_velocity,
)
from dmd_jax.methods import Batch
from dmd_jax.methods.flow_map import Difference, FlowMap, Point, warmth
from dmd_jax.models.attention import forward_mode
from dmd_jax.rollouts.backward_simulation import constant


@dataclasses.dataclass(frozen=True)
class SCM(FlowMap):
    """sCM (Lu and Song 2024) of a flow-matching network, seen as one of TrigFlow.

    A call for the tangent (`jax.jvp`, without gradient), then one for the gradient. Of the paper's
    parts, the adaptive weight by a learned variance is absent: normalised tangents have one size.

    Attributes:
        warmup: steps in which the tangent's part with the network's derivative grows to its full
            weight.
        tangent_c: c of g / (|g| + c) (see `losses.consistency.normalized_tangent`).

    Raises:
        ValueError: a number is out of range.
    """

    warmup: int = 1000
    tangent_c: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.warmup < 0 or self.tangent_c <= 0.0:
            raise ValueError(
                f"warmup={self.warmup} must be 0 or more, tangent_c={self.tangent_c} above 0"
            )

    def difference(self, generator: Denoiser, point: Point, batch: Batch) -> Difference:
        angle, cond = trigflow_angle(point.t), batch["cond"]
        z = trigflow_point(point.x_t, angle)
        direction = trigflow_velocity(point.x_t, point.velocity, angle)
        warm = warmth(batch["step"], self.warmup)
        with forward_mode():
            still = seen(constant(generator), cond)
            g = scm_tangent(still, z, angle, direction, warmup=warm)
        F = seen(generator, cond)(z, angle)
        return scm_loss(F, normalized_tangent(g, self.tangent_c)), root_mean_square(g)


def seen(generator: Denoiser, cond: PyTree) -> VelocityFn:
    """A network of velocities under a condition, as a function of TrigFlow."""
    return trigflow(lambda x_t, t: generator.predict(x_t, t, cond).raw)
