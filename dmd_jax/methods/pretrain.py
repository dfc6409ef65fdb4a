"""Pretrain: trains a teacher on data, by denoising. No teacher, no critic."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dmd_jax.devices import randomness
from dmd_jax.diffusion.schedule import check_times, sample_time
from dmd_jax.losses.distribution_matching import denoising_loss


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Denoising score matching on data, with condition dropout for guidance (Ho and Salimans 2022).

    Attributes:
        sample_shape: shape of one sample.
        dropout: share of the conditions that are replaced by the unconditional one.
        shift: time shift of the drawn times.
        clip: the ends to which they are clipped.

    Raises:
        ValueError: a number out of its range.
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
        check_times(self.shift, clip=self.clip)

    def generator_loss(self, generator, nets, batch, key):
        """Regression of what the network predicts, on `batch["data"]` [B, *sample_shape]."""
        drop_key, time_key, eps_key = jax.random.split(key, 3)
        index, x0, schedule = batch["index"], batch["data"], generator.schedule

        def choose(drop, uncond, cond):
            return jnp.where(drop.reshape(drop.shape + (1,) * (cond.ndim - 1)), uncond, cond)

        drop = randomness.per_sample(
            lambda k: jax.random.bernoulli(k, self.dropout), drop_key, index
        )
        cond = jax.tree.map(lambda u, c: choose(drop, u, c), batch["uncond"], batch["cond"])
        t = randomness.per_sample(
            lambda k: sample_time(k, shift=self.shift, clip=self.clip), time_key, index
        )
        eps = randomness.normal(eps_key, index, self.sample_shape)
        raw = generator.predict(schedule.add_noise(x0, eps, t), t, cond).raw
        loss = denoising_loss(raw, generator.prediction.target(x0, eps, t, schedule))
        return loss, ({}, None)
