"""Decoupled DMD: the teacher's guidance and distribution matching, at times of their own."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dmd_jax.diffusion.denoiser import conditional_and_unconditional
from dmd_jax.diffusion.schedule import expand
from dmd_jax.losses.distribution_matching import (
    dmd_gradient,
    dmd_loss,
    finite_samples,
    square_norms,
)
from dmd_jax.methods import Batch, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd import DMD
from dmd_jax.rollouts.backward_simulation import Rollout

Keys: TypeAlias = tuple[OneKey, OneKey]  # of the times and of the noise


@dataclasses.dataclass(frozen=True)
class DecoupledDMD(DMD):
    """Decoupled DMD (Liu et al. 2025, arXiv 2511.22677): DMD's gradient in its two parts.

    The gradient of DMD with a teacher of guidance w is the sum of distribution matching, fake -
    cond, and of guidance augmentation, (w - 1) (uncond - cond). Here each is computed at a time and
    noise of its own, and divided by its own mean |x0 - cond|. `above_exit` and `below_exit` are
    those of distribution matching.

    Attributes:
        hybrid: draw the times of the augmentation below the time of the exit step only, where the
            sample's content is still open; those of distribution matching from the whole range. The
            paper's ablation found this the best; without it, only the draws are independent.

    Raises:
        ValueError: `guidance` is 1, the fake score is guided, or, with `hybrid`, the two shifts
            differ or blocks exit at times of their own.
    """

    hybrid: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.guidance == 1.0 or self.fake_guidance != 1.0:
            raise ValueError(
                f"guidance={self.guidance}, fake_guidance={self.fake_guidance}: the augmentation "
                "is the teacher's guidance, which must not be 1, and the fake score's must be 1"
            )
        if self.hybrid and self.score_shift != self.shift:
            raise ValueError(
                f"hybrid=True with shift={self.shift} and score_shift={self.score_shift}: the "
                "augmentation's times end at that of the generator's call, so that both shifts "
                "must be the same"
            )
        if self.hybrid and self.video is not None and not self.video.shares_exit:
            raise ValueError(
                f"hybrid=True needs one exit step for all blocks, and blocks of {self.video} have "
                "exits of their own"
            )

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        keys = time_key, eps_key
        others = jax.random.fold_in(time_key, 1), jax.random.fold_in(eps_key, 1)
        grad, observed = self.gradient(rollout, nets, batch, keys, others)
        return dmd_loss(rollout.x0, grad, rollout.mask), observed

    def gradient(
        self,
        rollout: Rollout,
        nets: Nets,
        batch: Batch,
        matching_keys: Keys,
        augmentation_keys: Keys,
    ) -> tuple[Float32[Array, " B *data"], Observed]:
        """The sum of both parts at given samples, for `dmd_loss`, and what `metrics` needs."""
        schedule, teacher = nets["teacher"].schedule, nets["teacher"]
        how = dict(
            normalize=self.normalize, mask=rollout.mask, frames_per_block=self.frames_per_block
        )
        x_t, t, _ = self.diffuse(rollout, schedule, batch["index"], *matching_keys)
        real = teacher(x_t, t, rollout.cond)
        fake = nets["fake_score"](x_t, t, rollout.cond)
        matching = dmd_gradient(rollout.x0, real, fake, **how)

        open_times = dataclasses.replace(self, above_exit=False, below_exit=self.hybrid)
        x_t, at, _ = open_times.diffuse(rollout, schedule, batch["index"], *augmentation_keys)
        cond, uncond = conditional_and_unconditional(
            teacher, x_t, at, rollout.cond, batch["uncond"], batched=self.batched_guidance
        )
        augmentation = (self.guidance - 1.0) * dmd_gradient(rollout.x0, cond, uncond, **how)

        observed = self.observe(rollout, real, fake, t)
        observed["matching"] = square_norms(matching)
        observed["augmentation"] = square_norms(augmentation)
        # One part alone would not rest where the sum does.
        usable = observed["usable"] & finite_samples(cond - uncond)
        observed["usable"] = jax.lax.stop_gradient(usable)
        return jnp.where(expand(usable, matching), matching + augmentation, 0.0), observed

    def metrics(self, observed: Observed) -> Metrics:
        """`DMD.metrics`, whose teacher here is the unguided one, and augmentation/ratio.

        That is the norm of the augmentation over that of distribution matching, which has to hold
        it: augmentation has no fixed point of its own, and samples saturate where a slow fake score
        leaves the ratio high. Watch samples/contrast with it.
        """
        ratio = jnp.sqrt(jnp.sum(observed["augmentation"]) / jnp.sum(observed["matching"]))
        return super().metrics(observed) | {"augmentation/ratio": ratio}
