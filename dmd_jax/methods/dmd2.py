"""DMD2: DMD with an adversarial term, by a discriminator on features of a diffusion network."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float32, PyTree, Real

from dmd_jax.devices import randomness
from dmd_jax.diffusion.schedule import Samples
from dmd_jax.losses.adversarial import (
    discriminator_loss,
    equal_norms,
    finite_penalty,
    generator_adversarial_loss,
    gradient_penalty,
)
from dmd_jax.losses.distribution_matching import (
    finite_samples,
    keep,
    square_norms,
    with_gradient,
)
from dmd_jax.methods import Batch, Metrics, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd import DMD
from dmd_jax.rollouts.backward_simulation import Rollout, constant


@dataclasses.dataclass(frozen=True)
class DMD2(DMD):
    """DMD2 (Yin et al. 2024): the generator's noisy samples should also pass as noisy data.

    The discriminator sees the x_t at which the scores are compared (generator) or trained (critic),
    and real samples at the same times, with noise of their own.

    Attributes:
        features: the role whose features the discriminator reads under the condition: "teacher",
            which stays as it is, or "fake_score", which learns them too.
        backbone_weight: weight of the discriminator's loss in the gradient of the fake score; 0
            trains the heads alone. Its heads' own weight is 1.
        gan_weight: weight of the adversarial term in the generator's loss.
        balance: scale the adversarial gradient of each sample to the norm of its
            distribution-matching gradient, both at the sample, before `gan_weight`.
        relativistic: the loss of pairs, see `losses.adversarial`.
        r1, r2: weights gamma of the penalties gamma / 2 |dD / dx_t|^2 on real and on generated
            samples.
        perturbation: the penalties by finite differences of this size; None for exact ones.

    Raises:
        ValueError: a number is out of range, the features are of no score, or `video` compares
            parts of videos.
    """

    trainable: ClassVar = ("generator", "fake_score", "discriminator")
    uses_data: ClassVar = True

    features: str = "teacher"
    backbone_weight: float = 0.01
    gan_weight: float = 0.03
    balance: bool = False
    relativistic: bool = False
    r1: float = 0.0
    r2: float = 0.0
    perturbation: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.features not in ("teacher", "fake_score"):
            raise ValueError(f"features={self.features!r} must be 'teacher' or 'fake_score'")
        for name in ("backbone_weight", "gan_weight", "r1", "r2"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.video is not None and not self.video.makes_whole_videos:
            raise ValueError(
                f"the discriminator would tell parts of videos, as {self.video} makes them, from "
                "real videos by their length or their beginning: compare whole videos"
            )
        if self.perturbation is not None and self.perturbation <= 0.0:
            raise ValueError(
                f"perturbation={self.perturbation} must be above 0, or None for exact penalties"
            )

    def logits(
        self, nets: Nets, x_t: Samples, t: Float32[Array, " B"], cond: PyTree
    ) -> Float32[Array, " B"]:
        """The discriminator's logits of noisy samples."""
        discriminator = nets["discriminator"]
        network = nets[self.features]
        return discriminator(network.predict(x_t, t, cond, features=discriminator.blocks).aux)

    def weights(
        self, logits: Float32[Array, " B"], t: Float32[Array, " B"]
    ) -> Float32[Array, " B"] | float:
        """The weight of each sample's distribution-matching gradient, from its logit at time t."""
        return 1.0

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        keys = time_key, eps_key
        # Gradients at the samples are computed here, explicitly: there they have norms, and there a
        # sample in which one is not finite can be left out (see `SiD.matching`).
        gan, push, weight = self.adversarial(rollout, nets, batch, *keys)
        loss, pull, observed = self.matching(rollout, nets, batch, *keys, weight)
        observed |= {"push": square_norms(push), "pull": square_norms(pull)}
        if self.balance:
            push = equal_norms(push, pull)
        loss, grad = loss + self.gan_weight * gan, pull + self.gan_weight * push
        return with_gradient(rollout.x0, loss, grad), observed

    def adversarial(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Float32[Array, " B *data"], Real[ArrayLike, "..."]]:
        """The adversarial term of given samples (DMD2, section 4.3), before `gan_weight`.

        Returns:
            (the loss, its gradient with respect to rollout.x0, `weights` by its logits).
        """
        schedule, x0 = nets["teacher"].schedule, jax.lax.stop_gradient(rollout.x0)

        def diffused(x0):
            moved = rollout._replace(x0=x0)
            return self.diffuse(moved, schedule, batch["index"], time_key, eps_key)[:2]

        paired, t = None, diffused(x0)[1]
        if self.relativistic:
            real_t = self._noisy_data(batch, schedule, t, jax.random.fold_in(eps_key, 1))
            paired = _finite(self.logits(nets, real_t, t, batch["cond"]))

        def loss(x0):
            logits = _finite(self.logits(nets, *diffused(x0), rollout.cond))
            return generator_adversarial_loss(logits, paired), logits

        (gan, logits), push = jax.value_and_grad(loss, has_aux=True)(x0)
        push = keep(push.astype(jnp.float32), finite_samples(push), rollout.mask)
        return gan, push, jax.lax.stop_gradient(self.weights(logits, t))

    def _noisy_data(self, batch, schedule, t, key):
        """The real samples of a batch at times t, with noise from `key`."""
        data = batch["data"]
        return schedule.add_noise(data, randomness.normal(key, batch["index"], data.shape[1:]), t)

    def critic_loss(
        self, critics: Nets, nets: Nets, rollout: Rollout, batch: Batch, key: OneKey
    ) -> tuple[dict[str, Scalar], Observed]:
        """The fake score's regression (see `DMD`), and the discriminator's loss with its penalties.

        Args:
            critics: {"fake_score", "discriminator"}, the networks that are differentiated.
            nets: all roles.
            rollout: the generator's samples.
            batch: with real samples and their conditions: "data", "cond".

        Returns:
            ({role: loss}, per-sample values for `metrics`).
        """
        fake_score, schedule = critics["fake_score"], critics["fake_score"].schedule
        denoising, observed = super().critic_loss(
            {"fake_score": fake_score}, nets, rollout, batch, key
        )
        time_key, eps_key, real_key, *probe_keys = jax.random.split(jax.random.fold_in(key, 1), 5)
        nets = {**nets, **critics, "fake_score": _slowed(fake_score, self.backbone_weight)}
        rollout = jax.lax.stop_gradient(rollout)
        fake_t, t, _ = self.diffuse(rollout, schedule, batch["index"], time_key, eps_key)
        real_t = self._noisy_data(batch, schedule, t, real_key)

        def of_fake(x_t):
            return self.logits(nets, x_t, t, rollout.cond)

        def of_real(x_t):
            return self.logits(nets, x_t, t, batch["cond"])

        fake, real = of_fake(fake_t), of_real(real_t)
        loss = discriminator_loss(fake, real, relativistic=self.relativistic)
        sides = (self.r1, of_real, real_t), (self.r2, of_fake, fake_t)
        for (gamma, of_side, x_t), probe_key in zip(sides, probe_keys, strict=True):
            if gamma:
                penalty = self._penalty(of_side, x_t, batch["index"], probe_key)
                loss = loss + 0.5 * gamma * penalty
        observed = observed | jax.lax.stop_gradient({"real_logit": real, "fake_logit": fake})
        return {"fake_score": denoising, "discriminator": loss}, observed

    def _penalty(self, discriminate, x_t, index, key):
        if self.perturbation is None:
            return gradient_penalty(discriminate, x_t)
        direction = randomness.normal(key, index, x_t.shape[1:])
        return finite_penalty(discriminate, x_t, direction, self.perturbation)

    def metrics(self, observed: Observed) -> Metrics:
        """`DMD.metrics`, in steps that update the generator; and those of the discriminator.

        discriminator/gap is the mean logit of real samples minus that of generated ones, 0 where it
        cannot tell them apart. discriminator/accuracy is the share of samples on the right side of
        0, of both kinds. gan/ratio is the norm of the adversarial gradient at the samples over that
        of distribution matching, before `gan_weight` and `balance`: 1 / ratio is the weight that
        makes them equal.
        """
        real, fake = observed["real_logit"], observed["fake_logit"]
        metrics = {
            "discriminator/gap": jnp.mean(real - fake),
            "discriminator/accuracy": 0.5 * (jnp.mean(real > 0.0) + jnp.mean(fake < 0.0)),
        }
        if "x0" not in observed:
            return metrics
        ratio = jnp.sqrt(jnp.sum(observed["push"]) / jnp.sum(observed["pull"]))
        return super().metrics(observed) | metrics | {"gan/ratio": ratio}


def _finite(logits):
    """Logits, 0 where they are not finite; no gradient comes from there."""
    return jnp.where(jnp.isfinite(logits), logits, 0.0)


def _slowed(network, weight):
    """The same network, whose weights get `weight` times their gradient; its input all of it."""
    fixed = constant(network)
    if not weight:  # the backward pass through the weights is not made at all
        return fixed

    def slow(x, fixed):
        return fixed + weight * (x - fixed) if isinstance(x, jax.Array) else x

    return jax.tree.map(slow, network, fixed)
