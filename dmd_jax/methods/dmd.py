"""DMD: the generator descends along fake score minus teacher; the fake score learns its samples.

A method is a frozen dataclass of numbers.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, PyTree, Real

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, Prediction, guided
from dmd_jax.diffusion.schedule import (
    Samples,
    Schedule,
    align,
    check_step_times,
    check_times,
    draw_step_times,
    expand,
    sample_time,
)
from dmd_jax.losses.distribution_matching import (
    denoising_loss,
    dmd_gradient,
    dmd_loss,
    finite_samples,
    teacher_error,
)
from dmd_jax.methods import Batch, Index, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.causal import CausalRollout
from dmd_jax.rollouts.backward_simulation import Rollout, backward_simulation, one_step
from dmd_jax.rollouts.blocks import BLOCKS, GRADED
from dmd_jax.rollouts.samplers import Sampler, few_step

BANDS = 4  # intervals of t, of equal length, in which the metric gap/i is reported


@dataclasses.dataclass(frozen=True)
class DMD:
    """Distribution Matching Distillation (Yin et al. 2023) with DMD2's rollouts (Yin et al. 2024).

    Attributes:
        sample_shape: shape of one sample, (H, W, C) or (F, H, W, C).
        times: times of the generator's calls before the shift; (1,) makes a one-step generator.
        video: how a causal generator makes videos, `SelfForcing` or `CausVid`; None for a generator
            that makes a sample at once.
        strides: one of them is drawn at every training step, and the rollout uses every stride-th
            of `times`; (1, 2, 4) trains one generator for four, two and one calls. Each must divide
            the number of times. With `video`, only (1,).
        step_range: fewest and most calls of a rollout. Their number, and the times of all but the
            first, are drawn at every training step, in place of `times` and `strides`: one
            generator for any number of steps (CDM, arXiv 2605.06376). None for `times`.
        last_step_share: probability of forcing the last step (see `backward_simulation`). The fake
            score learns the mixture of all exit steps. A share above 0 gives more weight in
            that mixture to the last step, the only one whose samples inference returns.
        shift: time shift of the generator's calls.
        guidance: weight of the teacher's guidance; 1 disables it (see `denoiser.guided`).
        fake_guidance: weight of the fake score's guidance.
        score_shift: time shift of the times at which the scores are compared and trained.
        clip: lowest and highest of those times.
        above_exit: compare scores only above the time after the exit step (`ts_schedule`).
        below_exit: compare scores only below the time of the exit step (`ts_schedule_max`).
        normalize: divide each sample's gradient by the teacher's error.
        frames_per_block: number of frames that share a normaliser; None for all frames.
        regression: the quantity whose squared error the fake score's loss is; None for its own
            output.
        batched_guidance: guidance by one pass over a doubled batch, or by two passes in half the
            memory.

    Raises:
        ValueError: a number is out of range, a stride does not divide the number of times, or the
            blocks do not divide the frames.
    """

    trainable: ClassVar = ("generator", "fake_score")
    frozen: ClassVar = ("teacher",)

    sample_shape: tuple[int, ...]
    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    video: CausalRollout | None = None
    strides: tuple[int, ...] = (1,)
    step_range: tuple[int, int] | None = None
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
        check_step_times(self.times)
        if not self.strides or any(n < 1 or len(self.times) % n for n in self.strides):
            raise ValueError(f"strides={self.strides} must divide the number of times={self.times}")
        if not 0.0 <= self.last_step_share <= 1.0:
            raise ValueError(f"last_step_share={self.last_step_share} must be in [0, 1]")
        check_times(shift=self.shift, score_shift=self.score_shift, clip=self.clip)
        self._check_blocks()
        self._check_step_range()
        if self.video is not None:
            self.video.check(self.sample_shape)
            if self.strides != (1,):
                raise ValueError(f"strides={self.strides}: a causal rollout uses all of `times`")
            if (self.above_exit or self.below_exit) and not self.video.shares_exit:
                raise ValueError(
                    "above_exit and below_exit need one exit step for all blocks, and blocks of "
                    f"{self.video} have exits of their own"
                )

    def _check_blocks(self):
        size, shape = self.frames_per_block, self.sample_shape
        if size is None:
            return
        if len(shape) == 3:  # an image: its rows would be taken for frames
            raise ValueError(f"frames_per_block={size}, but images {shape} have no frames")
        if size < 1 or shape[0] % size:
            raise ValueError(f"frames_per_block={size} must divide the frames of {shape}")

    def _check_step_range(self):
        if self.step_range is None:
            return
        fewest, most = self.step_range
        if not 1 <= fewest <= most:
            raise ValueError(f"step_range={self.step_range} must be (fewest, most), from 1 on")
        if self.strides != (1,) or self.video is not None:
            raise ValueError(
                f"step_range={self.step_range} draws the calls of an image's or a whole video's "
                f"rollout anew: strides={self.strides} must be (1,), and `video` None"
            )

    @property
    def uses_data(self) -> bool:
        """Whether rollouts start from real samples."""
        return self.video is not None and self.video.uses_data

    @property
    def needs_vae(self) -> bool:
        """Whether rollouts call the network `vae`, one more frozen role."""
        return self.video is not None and self.video.needs_vae

    def sampler(self, steps: int, guidance: float) -> Sampler:
        """How the trained generator is sampled in `steps` calls.

        Raises:
            ValueError: guidance, which is in the weights of a student already.
        """
        make = few_step if self.video is None else self.video.sampler
        return make(self.times, steps, guidance, self.shift)

    def notes(self) -> dict[str, Any]:
        """Entries for the header of the exported generator: how to sample it."""
        return self.sampler(len(self.times), 1.0).notes()

    def streams(self, generator: Denoiser, cond: PyTree) -> Any:
        """The state of videos that go on from step to step; None for other rollouts."""
        if self.video is None:
            return None
        return self.video.streams(generator, self.sample_shape, cond)

    @property
    def trips(self) -> dict[str, float]:
        """Expected numbers of iterations, see `training.flops.count`."""
        trips = {"": self.expected_exit_step}
        if self.video is not None:
            trips[BLOCKS], trips[GRADED] = self.video.expected_blocks(self.sample_shape)
        return trips

    @property
    def expected_exit_step(self) -> float:
        """Mean number of a rollout's calls before its last one, over strides and exit steps."""
        if self.step_range is None:
            lasts = [len(self.times) // stride - 1 for stride in self.strides]
        else:
            lasts = [(sum(self.step_range) - 2) / 2]
        share = self.last_step_share
        return sum(share * last + (1 - share) * last / 2 for last in lasts) / len(lasts)

    def rollout(self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey) -> Rollout:
        """Samples of the generator, [B, *sample_shape], under the condition `batch["cond"]`."""
        noise_key, stride_key, step_key = jax.random.split(key, 3)
        noise = randomness.normal(noise_key, batch["index"], self.sample_shape)
        if self.video is not None:
            return self.video(
                generator,
                noise,
                nets,
                batch,
                step_key,
                times=self.times,
                shift=self.shift,
                last_step_share=self.last_step_share,
            )
        cond, schedule = batch["cond"], generator.schedule
        times, stride = self.times, 1
        if self.step_range is not None:
            times = draw_step_times(stride_key, *self.step_range)
        elif self.times == (1.0,):
            return one_step(generator, noise, cond, schedule=schedule)
        else:
            stride = jax.random.choice(stride_key, jnp.asarray(self.strides))
        return backward_simulation(
            generator,
            noise,
            cond,
            step_key,
            times=times,
            shift=self.shift,
            stride=stride,
            last_step_share=self.last_step_share,
            schedule=schedule,
            index=batch["index"],
        )

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, Rollout]]:
        """A loss whose gradient is the distribution-matching gradient.

        Args:
            generator: the network that is differentiated.
            nets: {"teacher", "fake_score"}, Denoisers with one schedule.
            batch: {"cond", "uncond", "index"}, each with leading axis B.
            key: the key of this training step.

        Returns:
            (loss, (per-sample values for `metrics`, Rollout)).
        """
        rollout_key, time_key, eps_key = jax.random.split(key, 3)
        rollout = self.rollout(generator, nets, batch, rollout_key)
        loss, observed = self.compare(rollout, nets, batch, time_key, eps_key)
        return loss, (observed, rollout)

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        """The generator's loss on given samples, and what `metrics` needs of its parts."""
        real, fake, t = self.predictions(rollout, nets, batch, time_key, eps_key)
        return self.distance(rollout, real, fake), self.observe(rollout, real, fake, t)

    def matching(
        self,
        rollout: Rollout,
        nets: Nets,
        batch: Batch,
        time_key: OneKey,
        eps_key: OneKey,
        weight: Real[ArrayLike, "..."] = 1.0,
    ) -> tuple[Scalar, Float32[Array, " B *data"], Observed]:
        """`distance` for given samples, and its gradient there: for methods that add another one.

        Args:
            weight: of each sample's gradient, [B]; or one number.

        Returns:
            (the loss, its gradient with respect to rollout.x0, what `metrics` needs).
        """
        real, fake, t = self.predictions(rollout, nets, batch, time_key, eps_key)

        def distance(x0):
            return self.distance(rollout._replace(x0=x0), real, fake, weight)

        loss, grad = jax.value_and_grad(distance)(jax.lax.stop_gradient(rollout.x0))
        return loss, grad.astype(jnp.float32), self.observe(rollout, real, fake, t)

    def predictions(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Float[Array, " B *data"], Float[Array, " B *data"], Float32[Array, " B"]]:
        """Both scores' x0 for given samples, noised to random times: (real, fake, t)."""
        schedule = nets["teacher"].schedule
        x_t, t, _ = self.diffuse(rollout, schedule, batch["index"], time_key, eps_key)
        return *self.scores(nets, x_t, t, rollout.cond, batch["uncond"]), t

    def distance(
        self, rollout: Rollout, real: Samples, fake: Samples, weight: Real[ArrayLike, "..."] = 1.0
    ) -> Scalar:
        """The generator's loss, from the teacher's and the fake score's x0 for the same x_t.

        Args:
            weight: of each sample's gradient, [B]; or one number.
        """
        grad = dmd_gradient(
            rollout.x0,
            real,
            fake,
            normalize=self.normalize,
            mask=rollout.mask,
            frames_per_block=self.frames_per_block,
        )
        return dmd_loss(rollout.x0, align(weight, grad) * grad, rollout.mask)

    def critic_loss(
        self, critics: Nets, nets: Nets, rollout: Rollout, batch: Batch, key: OneKey
    ) -> tuple[Scalar, Observed]:
        """The fake score's regression on the generator's samples (DMD, equation 6).

        Args:
            critics: {"fake_score": Denoiser}, the network that is differentiated.
            rollout: the generator's samples. They get no gradient; the loss counts only what their
                mask keeps.

        Returns:
            (loss, per-sample values for `metrics`).
        """
        fake_score = critics["fake_score"]
        time_key, eps_key = jax.random.split(key)
        rollout = jax.lax.stop_gradient(rollout)
        x_t, t, eps = self.diffuse(rollout, fake_score.schedule, batch["index"], time_key, eps_key)
        loss = self.regress(fake_score, x_t, t, rollout.x0, eps, rollout)
        return loss, {}

    def regress(
        self,
        fake_score: Denoiser,
        x_t: Samples,
        t: Float32[Array, " B"],
        x0: Samples,
        eps: Samples,
        rollout: Rollout,
        weight: Real[ArrayLike, "..."] = 1.0,
    ) -> Scalar:
        """The fake score's loss at x_t, whose data and noise are x0 and eps.

        Args:
            weight: of each sample, [B], before that of `regression`; or one number.
        """
        schedule, prediction = fake_score.schedule, fake_score.prediction
        raw = fake_score.predict(x_t, t, rollout.cond).raw
        target = prediction.target(x0.astype(jnp.float32), eps, t, schedule)
        if self.regression is not None:
            own, wanted = prediction.x0_scale(t, schedule), self.regression.x0_scale(t, schedule)
            weight = weight * jnp.square(own / wanted)
        return denoising_loss(raw, target, weight, rollout.mask)

    def diffuse(
        self, rollout: Rollout, schedule: Schedule, index: Index, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Float32[Array, " B *data"], Float32[Array, " B"], Float32[Array, " B *data"]]:
        """Adds noise to the samples at random times: (x_t, t, eps)."""
        low = rollout.t_to if self.above_exit else 0.0
        high = rollout.t_from if self.below_exit else 1.0

        def draw(key):
            return sample_time(key, low=low, high=high, shift=self.score_shift, clip=self.clip)

        t = randomness.per_sample(draw, time_key, index)
        eps = randomness.normal(eps_key, index, rollout.x0.shape[1:])
        return schedule.add_noise(rollout.x0, eps, t), t, eps

    def scores(
        self, nets: Nets, x_t: Samples, t: Float32[Array, " B"], cond: PyTree, uncond: PyTree
    ) -> tuple[Float[Array, " B *data"], Float[Array, " B *data"]]:
        """The guided x0 of the teacher and of the fake score, at x_t: (real, fake)."""
        weights = {"teacher": self.guidance, "fake_score": self.fake_guidance}
        real, fake = (
            guided(nets[role], x_t, t, cond, uncond, weight, batched=self.batched_guidance)
            for role, weight in weights.items()
        )
        return real, fake

    def observe(
        self, rollout: Rollout, real: Samples, fake: Samples, t: Float32[Array, " B"]
    ) -> Observed:
        """The per-sample values that `metrics` needs, over what the rollout's mask keeps."""
        x0, real, fake, t = jax.lax.stop_gradient((rollout.x0.astype(jnp.float32), real, fake, t))
        kept = None  # unlike an array of True, this costs nothing
        if rollout.mask is not None:
            kept = jnp.broadcast_to(expand(rollout.mask, x0), x0.shape)
        error = 1.0
        if self.normalize:
            error = teacher_error(
                x0, real, mask=rollout.mask, frames_per_block=self.frames_per_block
            )

        def total(values):
            return jnp.sum(values, axis=tuple(range(1, x0.ndim)), where=kept)

        observed = {
            "x0": x0,
            "t": t,
            "usable": finite_samples(x0) & finite_samples((fake - real) / error),
            "count": total(jnp.ones_like(x0)),
            "gap": total(jnp.abs(fake - real)),
            "real_error": total(jnp.square(real - x0)),
            "fake_error": total(jnp.square(fake - x0)),
        }
        return observed if kept is None else observed | {"kept": kept}

    def metrics(self, observed: Observed) -> Metrics:
        """Metrics of the run's health over the whole batch; NaN where no sample counts.

        gap/i is mean |fake - real| at times in the i-th quarter of [0, 1]. critic/tracking is the
        fake score's squared error on the samples over the teacher's: below 1, the fake score knows
        them better. samples/nonfinite is the share of samples that are not finite or whose gradient
        the loss sets to zero.

        Args:
            observed: values of `observe` for all samples of the batch.
        """
        x0, usable, kept = observed["x0"], observed["usable"], observed.get("kept")
        band = jnp.clip((observed["t"] * BANDS).astype(jnp.int32), 0, BANDS - 1)

        def ratio(above, below, samples):
            return jnp.sum(observed[above], where=samples) / jnp.sum(observed[below], where=samples)

        metrics = {f"gap/{i}": ratio("gap", "count", usable & (band == i)) for i in range(BANDS)}
        spread = jnp.std(x0, axis=0, where=kept)
        return metrics | {
            "critic/tracking": ratio("fake_error", "real_error", usable),
            "samples/nonfinite": jnp.mean(~usable),
            "samples/saturation": jnp.mean(jnp.abs(x0) > 1.05, where=kept),
            "samples/contrast": jnp.std(x0, where=kept),
            "samples/diversity": jnp.mean(
                spread, where=None if kept is None else jnp.any(kept, axis=0)
            ),
        }
