"""Consistency distillation in discrete steps: neighbouring points of the teacher's ODE agree."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Int

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import expand
from dmd_jax.losses.consistency import consistency_loss, ect_time, root_mean_square
from dmd_jax.methods import Batch, OneKey
from dmd_jax.methods.flow_map import Difference, FlowMap, Point, Times
from dmd_jax.rollouts.ode import euler_step


@dataclasses.dataclass(frozen=True)
class Consistency(FlowMap):
    """Consistency distillation (Song et al. 2023) in the steps of ECT (Geng et al. 2024).

    The student's x0 at t learns its own x0 at r < t, to which an Euler step of the guided teacher
    leads. Steps shrink in stages: `gap` is 1 / shrink, its square, ..., never below `least_gap`.
    shrink = 1 / g with least_gap = g is one step length g from the start. The target is of the
    student as it is, without gradient; Song's average of its weights, which iCT dropped, is absent.

    Attributes:
        shrink: ECT's q.
        stage: training steps of a stage.
        least_gap: where the gap stops.
        huber: c of the metric (see `losses.consistency.consistency_loss`).

    Raises:
        ValueError: a number is out of range.
    """

    shrink: float = 2.0
    stage: int = 200
    least_gap: float = 0.01
    huber: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        if self.shrink <= 1.0 or self.stage < 1:
            raise ValueError(f"shrink={self.shrink} must be above 1, stage={self.stage} 1 or more")
        if not 0.0 < self.least_gap <= 1.0 or self.huber <= 0.0:
            raise ValueError(
                f"least_gap={self.least_gap} must be in (0, 1], huber={self.huber} above 0"
            )

    def gap(self, step: Int[ArrayLike, " B"]) -> Float32[Array, " B"]:
        """The gap of `ect_time` at a training step."""
        stages = 1.0 + jnp.asarray(step) // self.stage
        return jnp.maximum(self.shrink**-stages, self.least_gap).astype(jnp.float32)

    def draw_times(self, batch: Batch, key: OneKey) -> tuple[Times, Times]:
        t = self.draw_time(batch["index"], key)
        return t, ect_time(t, self.gap(batch["step"]))

    def difference(self, generator: Denoiser, point: Point, batch: Batch) -> Difference:
        t, r, cond = point.t, point.r, batch["cond"]
        x_r = euler_step(point.x_t, point.x0, t, r, generator.schedule)
        target = jax.lax.stop_gradient(generator(x_r, r, cond))
        x0 = generator(point.x_t, t, cond)
        residual = root_mean_square((x0 - target) / expand(t - r, x0))
        return consistency_loss(x0, target, t, r, huber=self.huber), residual
