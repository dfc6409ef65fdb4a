"""Causal consistency distillation: a few-step start of a causal student, without stored data."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, Int

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, guided
from dmd_jax.diffusion.schedule import check_step_times, check_times, expand, shift_time
from dmd_jax.losses.distribution_matching import denoising_loss
from dmd_jax.methods import Batch, Nets, Observed, OneKey, Scalar
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.ode import euler_step
from dmd_jax.rollouts.samplers import CausalFewStep, CausalManyStep, few_step
from dmd_jax.rollouts.teacher_forcing import After, TeacherForced, check_video, context_at


@dataclasses.dataclass(frozen=True)
class CausalConsistency:
    """Consistency distillation (Song et al. 2023) of a causal teacher under teacher forcing.

    (Causal-Forcing++, arXiv 2605.15141, stage 2b.) The student learns to give the same x0 for two
    neighbouring points of the teacher's ODE, of which one step of the teacher makes one from the
    other. Both see real, clean blocks before theirs. All frames of a video share one time.

    The published grid ends at t = .0962, and nothing ties the student to data below it. This one
    goes on to 0, where the target is the point itself. The target comes from the student as it is,
    without gradient (as in Causal-rCM, arXiv 2606.25473), not from an average of its weights.

    Attributes:
        sample_shape: (F, H, W, C).
        causal: blocks, window and sink; those of the student's inference.
        steps: intervals of the grid, evenly spaced before the shift.
        shift: time shift of the grid, and of the student's calls.
        times: times of the student's calls before the shift, for sampling it.
        guidance: weight of the teacher's guidance (see `denoiser.guided`).
        context_time: as for `TeacherForcing`; that of the teacher's training.
        batched_guidance: guidance by one pass over a doubled batch, or by two in half the memory.

    Raises:
        ValueError: a number is out of range, or the samples have no whole blocks.
    """

    trainable: ClassVar = ("generator",)
    frozen: ClassVar = ("teacher",)
    uses_data: ClassVar = True

    sample_shape: tuple[int, ...]
    causal: Causal = Causal()
    steps: int = 48
    shift: float = 5.0
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    guidance: float = 3.0
    context_time: float = 0.0
    batched_guidance: bool = True

    def __post_init__(self):
        check_step_times(self.times)
        check_times(shift=self.shift, clip=(0.0, 1.0))
        check_video(self.sample_shape, self.causal, self.context_time)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    @property
    def grid(self) -> Float32[Array, " points"]:
        """The `steps` + 1 times of the grid, from 1 to 0, after the shift."""
        return shift_time(
            1.0 - jnp.arange(self.steps + 1, dtype=jnp.float32) / self.steps, self.shift
        )

    def sampler(self, steps: int, guidance: float) -> CausalFewStep:
        """How the trained generator is sampled; see `samplers.few_step`."""
        return few_step(
            self.times, steps, guidance, self.shift, self.causal, context_time=self.context_time
        )

    def teacher_sampler(self, steps: int, guidance: float) -> CausalManyStep:
        """How the causal teacher is sampled."""
        return CausalManyStep(steps, guidance, self.shift, self.causal, self.context_time)

    def notes(self) -> dict[str, Any]:
        """Entries for the header of the exported generator: how to sample it."""
        return self.sampler(len(self.times), 1.0).notes()

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, None]]:
        """The squared difference of x0 at neighbouring times, which are drawn for each sample.

        Args:
            generator: the network that is differentiated.
            nets: {"teacher"}, a causal network of the student's schedule.
            batch: {"data", "cond", "uncond", "index"}, each with leading axis B.
            key: the key of this training step.

        Returns:
            (loss, (no metrics, no rollout)).
        """
        interval_key, key = jax.random.split(key)
        interval = randomness.per_sample(
            lambda k: jax.random.randint(k, (), 0, self.steps), interval_key, batch["index"]
        )
        return self.difference(generator, nets["teacher"], batch, interval, key), ({}, None)

    def difference(
        self,
        generator: Denoiser,
        teacher: Denoiser,
        batch: Batch,
        interval: Int[ArrayLike, " B"],
        key: OneKey,
    ) -> Scalar:
        """The loss on given intervals of the grid, 0 ... steps - 1."""
        eps_key, context_key = jax.random.split(key)
        video, index, schedule = batch["data"], batch["index"], teacher.schedule
        t, t_next = self.grid[interval], self.grid[interval + 1]
        context = context_at(self.context_time, video, schedule, context_key, index)
        cond, uncond = After(batch["cond"], context), After(batch["uncond"], context)
        student, teacher = (
            TeacherForced(net, self.causal, self.context_time) for net in (generator, teacher)
        )

        eps = randomness.normal(eps_key, index, self.sample_shape)
        x_t = schedule.add_noise(video, eps, t)
        x0 = guided(teacher, x_t, t, cond, uncond, self.guidance, batched=self.batched_guidance)
        x_next = euler_step(x_t, x0, t, t_next, schedule)
        # At t = 0 a velocity's x0 is the point itself; other predictions would have to learn it.
        target = jnp.where(expand(t_next > 0, x_next), student(x_next, t_next, cond), x_next)
        return denoising_loss(student(x_t, t, cond), jax.lax.stop_gradient(target))
