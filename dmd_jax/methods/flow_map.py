"""What consistency models and MeanFlow share: points of data on the teacher's ODE, and sampling."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Int

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, Velocity, guided
from dmd_jax.diffusion.schedule import FlowMatching, align, check_step_times, check_times
from dmd_jax.methods import Batch, Index, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.rollouts.samplers import FewStep, few_step

Times: TypeAlias = Float32[Array, " B"]
# The loss, and each sample's root mean square of what the exact map leaves at zero.
Difference: TypeAlias = tuple[Scalar, Float32[Array, " B"]]


class Point(NamedTuple):
    """Noisy data, and the teacher there.

    Attributes:
        x_t, t: data noised to t.
        r: the earlier time of the loss.
        x0, velocity: of the guided teacher at x_t.
    """

    x_t: Float32[Array, " B *data"]
    t: Times
    r: Times
    x0: Float32[Array, " B *data"]
    velocity: Float32[Array, " B *data"]


@dataclasses.dataclass(frozen=True)
class FlowMap:
    """A student that jumps along its teacher's guided ODE, from points of noised data.

    The map is D(x_t, t) = x_t - t v, what a network of velocities is as a `Denoiser`: it starts as
    the teacher and is the identity at t = 0, as a consistency model has to be. There is no critic.
    Subclasses define `difference`.

    Attributes:
        sample_shape: shape of one sample.
        times: times of the student's calls before the shift, for sampling it.
        shift: time shift of those calls.
        guidance: weight of the teacher's guidance (see `denoiser.guided`).
        time_mean, time_std: times are drawn with log(t / (1 - t)) ~ N(mean, std^2). t / (1 - t) is
            the noise over the data, EDM's sigma: these are EDM's P_mean and P_std, and a shift s of
            the times adds log s to the mean.
        batched_guidance: guidance by one pass over a doubled batch, or by two in half the memory.

    Raises:
        ValueError: a number is out of range.
    """

    trainable: ClassVar = ("generator",)
    frozen: ClassVar = ("teacher",)
    uses_data: ClassVar = True

    sample_shape: tuple[int, ...]
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    shift: float = 1.0
    guidance: float = 1.0
    time_mean: float = 0.0
    time_std: float = 1.6
    batched_guidance: bool = True

    def __post_init__(self):
        check_step_times(self.times)
        check_times(shift=self.shift, clip=(0.0, 1.0))
        if self.time_std <= 0.0:
            raise ValueError(f"time_std={self.time_std} must be above 0")

    def sampler(self, steps: int, guidance: float) -> FewStep:
        """How the trained generator is sampled; see `samplers.few_step`."""
        return few_step(self.times, steps, guidance, self.shift)

    def notes(self) -> dict[str, Any]:
        """Entries for the header of the exported generator: how to sample it."""
        return self.sampler(len(self.times), 1.0).notes()

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, None]]:
        """The loss at drawn points of noised data.

        Args:
            generator: the network that is differentiated, of velocities.
            nets: {"teacher"}, of the schedule FlowMatching().
            batch: {"data", "cond", "uncond", "index", "step"}, each with leading axis B; "step" is
                the number of the training step.
            key: the key of this training step.

        Returns:
            (loss, (per-sample values for `metrics`, no rollout)).

        Raises:
            ValueError: other networks.
        """
        require_flow(generator, nets["teacher"])
        time_key, eps_key = jax.random.split(key)
        point = self.point(nets["teacher"], batch, time_key, eps_key)
        loss, residual = self.difference(generator, point, batch)
        return loss, ({"residual": jax.lax.stop_gradient(residual)}, None)

    def difference(self, generator: Denoiser, point: Point, batch: Batch) -> Difference:
        """The loss and the residuals at given points."""
        raise TypeError(f"{type(self).__name__} must define difference(...)")

    def draw_times(self, batch: Batch, key: OneKey) -> tuple[Times, Times]:
        """(t, r) of each sample, r at most t: here t is drawn, and r is 0, where the map leads."""
        t = self.draw_time(batch["index"], key)
        return t, jnp.zeros_like(t)

    def draw_time(self, index: Index, key: OneKey) -> Times:
        """Logit-normal times."""
        normal = randomness.normal(key, index, ())
        return jax.nn.sigmoid(self.time_mean + self.time_std * normal)

    def point(self, teacher: Denoiser, batch: Batch, time_key: OneKey, eps_key: OneKey) -> Point:
        """The batch's data at drawn times, and the guided teacher there."""
        t, r = self.draw_times(batch, time_key)
        eps = randomness.normal(eps_key, batch["index"], self.sample_shape)
        x_t = teacher.schedule.add_noise(batch["data"], eps, t)
        cond, uncond, how = batch["cond"], batch["uncond"], dict(batched=self.batched_guidance)
        x0 = guided(teacher, x_t, t, cond, uncond, self.guidance, **how)
        return Point(x_t, t, r, x0, (x_t - x0) / align(t, x_t))

    def metrics(self, observed: Observed) -> Metrics:
        """map/residual: the root mean square of what the exact map leaves at zero.

        It is the number to watch: the losses divide by it, or by its power.
        """
        return {"map/residual": jnp.sqrt(jnp.mean(jnp.square(observed["residual"])))}


def require_flow(generator: Denoiser, teacher: Denoiser) -> None:
    """Raises ValueError where the networks are not those of flow matching."""
    if not isinstance(generator.prediction, Velocity):
        raise ValueError(
            f"config.generator predicts {generator.prediction}, but a flow map is made of a "
            "network of velocities, Velocity(), which is the identity at t = 0"
        )
    if not isinstance(teacher.schedule, FlowMatching):
        raise ValueError(
            f"config.teacher has the schedule {teacher.schedule}, but a flow map's path is that of "
            "FlowMatching()"
        )


def warmth(step: Int[ArrayLike, " B"], warmup: int) -> Float32[Array, " B"]:
    """The weight of tangents: from 0 to 1 in the first `warmup` steps."""
    return jnp.minimum((jnp.asarray(step, jnp.float32) + 1.0) / max(warmup, 1), 1.0)
