"""Pretrain: trains a teacher on data, by denoising. It needs no teacher and no critic."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, Output
from dmd_jax.diffusion.schedule import Samples, Times, check_times, expand, sample_time
from dmd_jax.losses.distribution_matching import denoising_loss
from dmd_jax.methods import Batch, Index, Nets, Observed, OneKey, Scalar
from dmd_jax.rollouts.samplers import ManyStep, Sampler


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Denoising score matching on data, with condition dropout for guidance (Ho and Salimans 2022).

    Attributes:
        sample_shape: shape of one sample.
        dropout: probability that a sample's condition is replaced by the unconditional input.
        shift: time shift of the drawn times.
        clip: lowest and highest of those times.

    Raises:
        ValueError: a number is out of range.
    """

    trainable: ClassVar = ("generator",)
    frozen: ClassVar = ()
    uses_data: ClassVar = True

    sample_shape: tuple[int, ...]
    dropout: float = 0.1
    shift: float = 1.0
    clip: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1]")
        check_times(shift=self.shift, clip=self.clip)

    def sampler(self, steps: int, guidance: float) -> Sampler:
        """How the trained network is sampled."""
        return ManyStep(steps, guidance, self.shift, name="generator")

    def notes(self) -> dict[str, Any]:
        """Entries for the header of the exported network: how to sample it."""
        return self.sampler(1, 1.0).notes()

    def generator_loss(
        self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey
    ) -> tuple[Scalar, tuple[Observed, None]]:
        """Regression of the network's output on `batch["data"]` [B, *sample_shape].

        Args:
            generator: the network that is differentiated.
            nets: unused.
            batch: {"data", "cond", "uncond", "index"}, each with leading axis B.
            key: the key of this training step.

        Returns:
            (loss, (no metrics, no rollout)).
        """
        drop_key, time_key, eps_key, context_key = jax.random.split(key, 4)
        index, x0, schedule = batch["index"], batch["data"], generator.schedule

        drop = randomness.per_sample(
            lambda k: jax.random.bernoulli(k, self.dropout), drop_key, index
        )
        cond = jax.tree.map(
            lambda u, c: jnp.where(expand(drop, c), u, c), batch["uncond"], batch["cond"]
        )
        t = self.draw_times(time_key, index)
        eps = randomness.normal(eps_key, index, self.sample_shape)
        x_t = schedule.add_noise(x0, eps, t)
        raw = self.predict(generator, x_t, t, cond, batch, context_key).raw
        target = generator.prediction.target(x0, eps, t, schedule)
        return denoising_loss(raw, target, self.weight(t)), ({}, None)

    def draw_times(self, key: OneKey, index: Index) -> Times:
        """The times of the samples, [B]; a subclass may draw one for each frame, [B, F]."""
        return randomness.per_sample(
            lambda k: sample_time(k, shift=self.shift, clip=self.clip), key, index
        )

    def weight(self, t: Times) -> Times | float:
        """The weight of the loss at times t."""
        return 1.0

    def predict(
        self, generator: Denoiser, x_t: Samples, t: Times, cond: PyTree, batch: Batch, key: OneKey
    ) -> Output:
        """The network's call for x_t. Only a subclass uses `batch` and `key`."""
        return generator.predict(x_t, t, cond)
