"""Causal ODE regression: a few-step start of a causal student, from stored trajectories."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import Samples, check_step_times, check_times, shift_time
from dmd_jax.losses.distribution_matching import denoising_loss
from dmd_jax.methods import Batch, Nets, Observed, OneKey, Scalar
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.samplers import CausalFewStep, few_step
from dmd_jax.rollouts.teacher_forcing import After, TeacherForced, check_video


@dataclasses.dataclass(frozen=True)
class CausalODE:
    """Regression on the end of a causal teacher's ODE (Causal-Forcing, arXiv 2602.02214).

    The trajectories are those of `python -m dmd_jax.ode_pairs`. From a point of one, and from the
    real blocks before, the student gives the end of the trajectory in one call. The end, and not
    the real video: given its own noise and the past, a causal teacher's end is determined, and a
    regression has a solution that is not blurred (docs/causal_start.md).

    Attributes:
        sample_shape: (F, H, W, C).
        causal: blocks, window and sink; those of the student's inference.
        times: times of the student's calls before the shift: the levels of the trajectories.
        shift: time shift of the student's calls.

    Raises:
        ValueError: a number is out of range, or the samples have no whole blocks.
    """

    trainable: ClassVar = ("generator",)
    frozen: ClassVar = ()
    uses_data: ClassVar = True

    sample_shape: tuple[int, ...]
    causal: Causal = Causal()
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    shift: float = 5.0

    def __post_init__(self):
        check_step_times(self.times)
        check_times(shift=self.shift, clip=(0.0, 1.0))
        check_video(self.sample_shape, self.causal)

    def sampler(self, steps: int, guidance: float) -> CausalFewStep:
        """How the trained generator is sampled; see `samplers.few_step`."""
        return few_step(self.times, steps, guidance, self.shift, self.causal)

    def notes(self) -> dict[str, Any]:
        """Entries for the header of the exported generator: how to sample it."""
        return self.sampler(len(self.times), 1.0).notes()

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, None]]:
        """The squared error of x0, from one point of each trajectory, for all its frames.

        Args:
            generator: the network that is differentiated.
            nets: unused.
            batch: {"data", "trajectory", "cond", "index"} of `data.OdePairs`: real videos, and
                {time: [B, *sample_shape]} with the end at time 0.
            key: the key of this training step.

        Returns:
            (loss, (no metrics, no rollout)).

        Raises:
            ValueError: the batch has no trajectories, or those of other times.
        """
        x_t, t = trajectory_points(batch, self.times, self.shift, key)
        student = TeacherForced(generator, self.causal)
        x0 = student(x_t, t, After(batch["cond"], batch["data"]))
        return denoising_loss(x0, batch["trajectory"][0.0]), ({}, None)


def trajectory_points(
    batch: Batch, times: Sequence[float], shift: float, key: OneKey
) -> tuple[Samples, Float32[Array, " B"]]:
    """One point of each trajectory of a batch, drawn among the student's times: (x_t, t).

    Args:
        batch: of `data.OdePairs` or `data.ImagePairs`.
        times: of the student's calls, before the shift.
        shift: of these calls.
        key: of the draw.

    Raises:
        ValueError: the batch has no trajectories, or those of other times.
    """
    if "trajectory" not in batch:
        raise ValueError(
            "this method learns from trajectories: make them with `python -m dmd_jax.ode_pairs`, "
            "and read them by config.data = dict(cls=OdePairs, ...), or ImagePairs"
        )
    wanted = [float(shift_time(t, shift)) for t in times]
    stored = sorted((t for t in batch["trajectory"] if t), reverse=True)
    if len(stored) != len(wanted) or not all(map(_near, stored, wanted)):
        raise ValueError(
            f"the trajectories have points at the times {_rounded(stored)}, but times="
            f"{times} with shift={shift} are {_rounded(wanted)}: give the method the "
            "times and the shift with which `python -m dmd_jax.ode_pairs` was called"
        )
    levels, points = jnp.float32(stored), jnp.stack([batch["trajectory"][t] for t in stored])
    number = randomness.per_sample(
        lambda k: jax.random.randint(k, (), 0, len(levels)), key, batch["index"]
    )
    return points[number, jnp.arange(points.shape[1])], levels[number]


def _near(a, b):
    return math.isclose(a, b, abs_tol=1e-4)


def _rounded(times):
    return [round(t, 4) for t in times]
