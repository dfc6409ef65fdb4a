"""A GAN small enough to work out by hand: features, a linear discriminator, and DMD2's gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from toys import FLOW, Affine, affine, exact, normal

from dmd_jax.diffusion.denoiser import X0, Denoiser

KEY = jax.random.key(3)
BATCH = {"cond": jnp.zeros((6, 1)), "uncond": jnp.zeros((6, 1)), "index": jnp.arange(6)}
BATCH["data"] = normal(7, 6, 2)
SLOPE = jnp.array([0.8, -0.5])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Featured:
    """A network whose only features are `scale` times its input, flat, as one token."""

    net: Any
    scale: Any

    def __call__(self, x, t, cond, features=()):
        out = self.net(x, t, cond)
        return (out, self.scale * x.reshape(1, len(x), 1, -1)) if features else out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A discriminator <slope, feature>."""

    slope: Any
    blocks: tuple = dataclasses.field(default=(0,), metadata={"static": True})

    def __call__(self, features):
        return features[0, :, 0] @ self.slope


def networks(slope=SLOPE):
    """A generator of shifts, one a sample; affine scores; a linear discriminator."""

    def featured(net):
        return Denoiser(Featured(net, jnp.float32(1.0)), FLOW, X0(time_scale=1.0))

    return {
        "generator": affine(0.5, jnp.zeros((6, 2))),
        "teacher": featured(exact([[0.5, 0.0]], 0.7).net),
        "fake_score": featured(Affine(jnp.float32(0.3), jnp.float32(0.1))),
        "discriminator": Linear(jnp.asarray(slope, jnp.float32)),
    }


def gradient(method, nets=None, batch=BATCH):
    """(gradient at the samples, observed, rollout) of the generator's loss."""
    nets = nets or networks()
    loss = jax.jit(jax.value_and_grad(method.generator_loss, has_aux=True))
    (_, (observed, rollout)), grad = loss(nets["generator"], nets, batch, KEY)
    return grad.net.shift, observed, rollout


def noisy(method, rollout):
    """x_t and t of the generator's loss."""
    _, time_key, eps_key = jax.random.split(KEY, 3)
    return method.diffuse(rollout, FLOW, BATCH["index"], time_key, eps_key)[:2]
