"""MeanFlow: the mean velocity of the teacher's ODE between any two times."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.losses.consistency import (
    AverageVelocityFn,
    mean_flow_loss,
    mean_flow_target,
    root_mean_square,
)
from dmd_jax.methods import Batch, OneKey
from dmd_jax.methods.flow_map import Difference, FlowMap, Point, Times, warmth
from dmd_jax.models.attention import forward_mode
from dmd_jax.rollouts.backward_simulation import constant


@dataclasses.dataclass(frozen=True)
class MeanFlow(FlowMap):
    """MeanFlow (Geng et al. 2025), distilled from a teacher: a network of two times, u(x_t, t, r).

    x_t - (t - r) u is x_r. The loss is that of AYF's EMD (Sabour et al. 2025) and of AnyFlow's
    first stage too, with other weights and, in AnyFlow, finite differences; at r = 0 it is that of
    `SCM`. As a `Denoiser`, the student is its map to r = 0, sampled as a consistency model.

    Attributes:
        share: of the samples whose r is below t: two draws of one law, in order. The others have
            r = t, which is the regression of the guided teacher.
        warmup: steps in which the derivative's weight grows to 1.
        power, c: of the adaptive weight (see `losses.consistency.mean_flow_loss`).

    Raises:
        ValueError: a number is out of range.
    """

    network_fields: ClassVar = {"spans": True}

    share: float = 0.5
    warmup: int = 1000
    power: float = 1.0
    c: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.share <= 1.0 or self.warmup < 0:
            raise ValueError(
                f"share={self.share} must be in [0, 1], warmup={self.warmup} 0 or more"
            )
        if self.power < 0.0 or self.c <= 0.0:
            raise ValueError(f"power={self.power} must be 0 or more, c={self.c} above 0")

    def draw_times(self, batch: Batch, key: OneKey) -> tuple[Times, Times]:
        """Two draws in order or, with the probability 1 - share, the first of them twice."""
        index, keys = batch["index"], jax.random.split(key, 3)
        a, b = (self.draw_time(index, k) for k in keys[:2])
        apart = randomness.per_sample(lambda k: jax.random.bernoulli(k, self.share), keys[2], index)
        b = jnp.where(apart, b, a)
        return jnp.maximum(a, b), jnp.minimum(a, b)

    def difference(self, generator: Denoiser, point: Point, batch: Batch) -> Difference:
        x_t, t, r = point.x_t, point.t, point.r
        warm = warmth(batch["step"], self.warmup)
        with forward_mode():
            still = average_velocity(constant(generator), batch["cond"])
            target = mean_flow_target(still, x_t, t, r, point.velocity, warmup=warm)
        u = average_velocity(generator, batch["cond"])(x_t, t, r)
        loss = mean_flow_loss(u, target, power=self.power, c=self.c)
        return loss, root_mean_square(u - target)


def average_velocity(generator: Denoiser, cond: PyTree) -> AverageVelocityFn:
    """A network with spans under a condition, as a function of x_t and two times."""
    scale = generator.prediction.time_scale
    return lambda x_t, t, r: generator.predict(x_t, t, cond, span=scale * (t - r)).raw
