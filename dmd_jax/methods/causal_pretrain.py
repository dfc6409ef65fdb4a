"""Causal networks trained on videos: diffusion forcing, and teacher forcing.

The first start of a causal video student, and the training of a causal teacher
(docs/causal_start.md). Both are `Pretrain` with blocks.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, Output
from dmd_jax.diffusion.schedule import Samples, Times, sample_time, shift_time
from dmd_jax.methods import Batch, Index, OneKey
from dmd_jax.methods.pretrain import Pretrain
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.samplers import CausalManyStep
from dmd_jax.rollouts.teacher_forcing import (
    After,
    TeacherForced,
    block_of,
    check_video,
    context_at,
)


@dataclasses.dataclass(frozen=True)
class DiffusionForcing(Pretrain):
    """Denoising of a whole video, in which a block sees the noisy blocks before it.

    (Chen et al. 2024, arXiv 2407.01392; CausVid, Yin et al. 2024.) One pass over the video. In
    training the context is as noisy as its own time says; in inference it is clean.

    Attributes:
        causal: blocks, window and sink; those of the student's inference.
        per_block: draw a time for each block; otherwise one for the whole video.
        bell: weigh the loss by `bell_weight`, as Self-Forcing does, not by 1.
    """

    causal: Causal = Causal()
    per_block: bool = True
    bell: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_video(self.sample_shape, self.causal)

    def sampler(self, steps: int, guidance: float) -> CausalManyStep:
        """How the trained network is sampled."""
        return CausalManyStep(steps, guidance, self.shift, self.causal, name="generator")

    def draw_times(self, key: OneKey, index: Index) -> Times:
        if not self.per_block:
            return super().draw_times(key, index)
        block = block_of(self.sample_shape[0], self.causal)

        def draw(key):
            return sample_time(key, (int(block[-1]) + 1,), shift=self.shift, clip=self.clip)[block]

        return randomness.per_sample(draw, key, index)

    def weight(self, t: Times) -> Times | float:
        return bell_weight(t, self.shift) if self.bell else 1.0

    def predict(
        self, generator: Denoiser, x_t: Samples, t: Times, cond: PyTree, batch: Batch, key: OneKey
    ) -> Output:
        return generator.predict(x_t, t, cond, causal=self.causal)


@dataclasses.dataclass(frozen=True)
class TeacherForcing(DiffusionForcing):
    """Denoising of every block of a video after the real blocks before it.

    (Causal-Forcing, arXiv 2602.02214; Causal-rCM, arXiv 2606.25473, with `per_block=False`.) One
    pass over [context | noisy], twice the tokens of the video. Training sees the context that
    inference has, up to the student's own errors.

    Attributes:
        context_time: the time, after the shift, to which the context is noised; 0 is clean. It must
            be the time at which inference writes finished blocks to its cache.
    """

    context_time: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_video(self.sample_shape, self.causal, self.context_time)

    def sampler(self, steps: int, guidance: float) -> CausalManyStep:
        return dataclasses.replace(super().sampler(steps, guidance), context_time=self.context_time)

    def predict(
        self, generator: Denoiser, x_t: Samples, t: Times, cond: PyTree, batch: Batch, key: OneKey
    ) -> Output:
        video, index, schedule = batch["data"], batch["index"], generator.schedule
        context = context_at(self.context_time, video, schedule, key, index)
        forced = TeacherForced(generator, self.causal, self.context_time)
        return forced.predict(x_t, t, After(cond, context))


def bell_weight(t: Times, shift: float) -> Float32[Array, "..."]:
    """Self-Forcing's weight of the loss: large in the middle of [0, 1], 0 at t = 1.

    exp(-2 (t - 1/2)^2) - exp(-1/2), over its mean for the shifted times of 1000 even steps.
    """

    def bell(t):
        return jnp.exp(-2.0 * jnp.square(t - 0.5)) - jnp.exp(-0.5)

    steps = shift_time(1.0 - jnp.arange(1000) / 1000, shift)
    return bell(jnp.asarray(t, jnp.float32)) / jnp.mean(bell(steps))
