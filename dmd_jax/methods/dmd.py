"""DMD: the generator follows fake score minus teacher; the fake score follows the generator.

Imports the losses, the rollouts and what lies below them. A method is a frozen dataclass of
numbers.
"""

import dataclasses
from itertools import pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Prediction, guided
from dmd_jax.diffusion.schedule import check_times, sample_time
from dmd_jax.losses.distribution_matching import (
    denoising_loss,
    dmd_gradient,
    dmd_loss,
    finite_samples,
    masked_mean,
)
from dmd_jax.rollouts.backward_simulation import backward_simulation, one_step

BANDS = 4  # noise bands, equal in t, over which the gap between teacher and fake score is reported


@dataclasses.dataclass(frozen=True)
class DMD:
    """Distribution Matching Distillation (Yin et al. 2023) with DMD2's rollouts (Yin et al. 2024).

    Attributes:
        sample_shape: shape of one sample, (H, W, C) or (F, H, W, C).
        times: times of the generator's calls before the shift; (1,) makes a one-step generator.
        strides: how the times are thinned, drawn anew each step; (1, 2, 4) makes one generator for
            four, two and one calls. Each must divide the number of times.
        last_step_share: probability of forcing the last step (see `backward_simulation`). The
            critic learns the mixture of all exit steps; a share above 0 weights that mixture
            towards what inference makes, and makes up for the variety that early exits lack.
        shift: time shift of the generator's calls.
        guidance: weight of the teacher's guidance; 1 is none (see `denoiser.guided`).
        fake_guidance: weight of the fake score's guidance.
        score_shift: time shift of the times at which the scores are compared and trained.
        clip: the ends to which those times are clipped.
        above_exit: compare scores only above the time after the exit step (`ts_schedule`).
        below_exit: compare scores only below the time of the exit step (`ts_schedule_max`).
        normalize: divide each sample's gradient by the teacher's error.
        frames_per_block: frames that share a normaliser; None for all.
        regression: what the fake score's squared error is measured in; what it predicts, if None.
        batched_guidance: guide with one doubled pass, or with two passes in half the memory.

    Raises:
        ValueError: a number out of its range, strides that do not divide the times, or blocks that
            do not divide the frames.
    """

    trainable: ClassVar = ("generator", "fake_score")
    frozen: ClassVar = ("teacher",)
    uses_data: ClassVar = False

    sample_shape: tuple[int, ...]
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    strides: tuple[int, ...] = (1,)
    last_step_share: float = 0.0
    shift: float = 1.0
    guidance: float = 1.0
    fake_guidance: float = 1.0
    score_shift: float = 1.0
    clip: tuple[float, float] = (0.02, 0.98)
    above_exit: bool = False
    below_exit: bool = False
    normalize: bool = True
    frames_per_block: int | None = None
    regression: Prediction | None = None
    batched_guidance: bool = True

    def __post_init__(self):
        levels = (*self.times, 0.0)
        if not 0.0 < levels[0] <= 1.0 or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"times={self.times} must descend, from 1 at most, and end above 0")
        if not self.strides or any(n < 1 or len(self.times) % n for n in self.strides):
            raise ValueError(f"strides={self.strides} must divide the number of times={self.times}")
        if not 0.0 <= self.last_step_share <= 1.0:
            raise ValueError(f"last_step_share={self.last_step_share} must be in [0, 1]")
        check_times(self.shift, self.score_shift, clip=self.clip)
        self._check_blocks()

    def _check_blocks(self):
        size, shape = self.frames_per_block, self.sample_shape
        if size is None:
            return
        if len(shape) == 3:  # its rows would pass for frames
            raise ValueError(f"frames_per_block={size}, but images {shape} have no frames")
        if size < 1 or shape[0] % size:
            raise ValueError(f"frames_per_block={size} must divide the frames of {shape}")

    @property
    def expected_exit_step(self) -> float:
        """Mean number of a rollout's calls before its last one, over strides and exit steps."""
        lasts = [len(self.times) // stride - 1 for stride in self.strides]
        share = self.last_step_share
        return sum(share * last + (1 - share) * last / 2 for last in lasts) / len(lasts)

    def rollout(self, generator, nets, batch, key):
        """Samples of the generator, [B, *sample_shape], under `batch["cond"]`."""
        noise_key, stride_key, step_key = jax.random.split(key, 3)
        noise = randomness.normal(noise_key, batch["index"], self.sample_shape)
        cond, schedule = batch["cond"], generator.schedule
        if self.times == (1.0,):
            return one_step(generator, noise, cond, schedule=schedule)
        return backward_simulation(
            generator,
            noise,
            cond,
            step_key,
            times=self.times,
            shift=self.shift,
            stride=jax.random.choice(stride_key, jnp.asarray(self.strides)),
            last_step_share=self.last_step_share,
            schedule=schedule,
            index=batch["index"],
        )

    def generator_loss(self, generator, nets, batch, key):
        """The surrogate whose gradient is the distribution-matching gradient.

        Args:
            generator: what is differentiated.
            nets: {"teacher", "fake_score"} of Denoisers, on one schedule.
            batch: {"cond", "uncond", "index"}, each with leading axis B.
            key: a key of this step.

        Returns:
            (loss, (metrics, Rollout)).
        """
        rollout_key, time_key, eps_key = jax.random.split(key, 3)
        made = self.rollout(generator, nets, batch, rollout_key)
        x_t, t, _ = self.diffuse(made, nets["teacher"].schedule, batch["index"], time_key, eps_key)
        real, fake = self.scores(nets, x_t, t, made.cond, batch["uncond"])
        loss = self.distance(made, real, fake)
        return loss, (self.observe(made, real, fake, t), made)

    def distance(self, made, real, fake):
        """The generator's loss, from the teacher's and the fake score's x0 at one x_t."""
        grad = dmd_gradient(
            made.x0,
            real,
            fake,
            normalize=self.normalize,
            mask=made.mask,
            frames_per_block=self.frames_per_block,
        )
        return dmd_loss(made.x0, grad, made.mask)

    def critic_loss(self, critics, nets, rollout, batch, key):
        """The fake score's regression on the generator's samples (DMD, equation 6).

        Args:
            critics: {"fake_score": Denoiser}: what is differentiated.
            rollout: the generator's samples; no gradient reaches them.

        Returns:
            (loss, metrics).
        """
        fake_score = critics["fake_score"]
        schedule, prediction = fake_score.schedule, fake_score.prediction
        time_key, eps_key = jax.random.split(key)
        made = jax.lax.stop_gradient(rollout)
        x_t, t, eps = self.diffuse(made, schedule, batch["index"], time_key, eps_key)
        raw = fake_score.predict(x_t, t, made.cond).raw
        target = prediction.target(made.x0.astype(jnp.float32), eps, t, schedule)
        weight = 1.0
        if self.regression is not None:
            scale, wanted = prediction.x0_scale(t, schedule), self.regression.x0_scale(t, schedule)
            weight = jnp.square(scale / wanted)
        return denoising_loss(raw, target, weight), {}

    def diffuse(self, made, schedule, index, time_key, eps_key):
        """Noises samples to random times: (x_t [B, ...], t [B], eps [B, ...]), all float32."""
        low = made.t_to if self.above_exit else 0.0
        high = made.t_from if self.below_exit else 1.0

        def draw(key):
            return sample_time(key, low=low, high=high, shift=self.score_shift, clip=self.clip)

        t = randomness.per_sample(draw, time_key, index)
        eps = randomness.normal(eps_key, index, made.x0.shape[1:])
        return schedule.add_noise(made.x0, eps, t), t, eps

    def scores(self, nets, x_t, t, cond, uncond):
        """The x0 that the guided teacher and the fake score see in x_t: (real, fake), float32."""
        real = guided(
            nets["teacher"], x_t, t, cond, uncond, self.guidance, batched=self.batched_guidance
        )
        fake = guided(
            nets["fake_score"],
            x_t,
            t,
            cond,
            uncond,
            self.fake_guidance,
            batched=self.batched_guidance,
        )
        return real, fake

    def observe(self, made, real, fake, t):
        """What tells a healthy run from a sick one: scalars, NaN where they have no sample.

        gap/i is mean |fake - real| at times of the i-th quarter. critic/tracking is the fake
        score's squared error on the samples over the teacher's, below 1 where it knows them better.
        samples/nonfinite is the share of the samples that the loss leaves out.
        """
        x0, real, fake, t = jax.lax.stop_gradient((made.x0.astype(jnp.float32), real, fake, t))
        gap = jnp.mean(jnp.abs(fake - real), axis=tuple(range(1, x0.ndim)))
        band = jnp.clip((t * BANDS).astype(jnp.int32), 0, BANDS - 1)
        good = finite_samples(real) & finite_samples(fake) & finite_samples(x0)
        if self.normalize:  # a teacher error of zero leaves nothing to divide by
            good &= jnp.any(real != x0, axis=tuple(range(1, x0.ndim)))
        metrics = {
            f"gap/{i}": jnp.sum(gap, where=good & (band == i)) / jnp.sum(good & (band == i))
            for i in range(BANDS)
        }
        return metrics | {
            "critic/tracking": masked_mean(jnp.square(fake - x0), good)
            / masked_mean(jnp.square(real - x0), good),
            "samples/nonfinite": jnp.mean(~good),
            "samples/saturation": jnp.mean(jnp.abs(x0) > 1.05),
            "samples/contrast": jnp.std(x0),
            "samples/diversity": jnp.mean(jnp.std(x0, axis=0)),
        }
