"""Networks small enough to work out by hand, teachers known in closed form, and an HLO reader."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmd_jax.diffusion.denoiser import X0, Denoiser, Velocity
from dmd_jax.diffusion.schedule import FlowMatching, Schedule, align
from dmd_jax.models.dit import DiT, DiTConfig
from dmd_jax.models.wan import Wan, WanConfig

FLOW = FlowMatching()
TINY = DiTConfig(
    image_size=8, channels=1, num_classes=3, patch=4, dim=16, depth=2, heads=2, hidden=32
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """E[x0 | x_t] for data drawn from sum_k N(means[k], std^2 I) / K, in closed form.

    Given x_t, component k has the mean m_k + alpha s^2 / v (x_t - alpha m_k) and the weight
    N(x_t; alpha m_k, v I), where v = alpha^2 s^2 + sigma^2. One component is the Gaussian.
    """

    means: Any  # [K, D]
    std: Any  # []
    schedule: Schedule = dataclasses.field(default=FlowMatching(), metadata={"static": True})

    def __call__(self, x_t, t, cond):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variance = jnp.square(alpha * self.std) + jnp.square(sigma)
        away = x_t[:, None] - alpha[:, None, None] * self.means  # [B, K, D]
        weight = jax.nn.softmax(-0.5 * jnp.sum(jnp.square(away), -1) / variance[:, None])
        pull = (alpha * self.std**2 / variance)[:, None, None]
        return jnp.einsum("bk,bkd->bd", weight, self.means + pull * away)


def exact(means, std, schedule=FLOW):
    """The exact denoiser of a Gaussian mixture; means [K, D]."""
    net = Mixture(jnp.asarray(means, jnp.float32), jnp.float32(std), schedule)
    return Denoiser(net, schedule, X0(time_scale=1.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """scale x + shift, whatever the time; a condition, if there is one, is added."""

    scale: Any
    shift: Any

    def __call__(self, x, t, cond):
        return align(self.scale, x) * x + self.shift + (0.0 if cond is None else cond)


def affine(scale, shift, schedule=FLOW):
    """A generator x0 = scale x + shift of fresh buffers."""
    net = Affine(jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
    return Denoiser(net, schedule, X0(time_scale=1.0))


class MLP(nnx.Module):
    """A network of vectors [B, D] with Fourier features of the time."""

    def __init__(self, dim, hidden, *, rngs):
        self.first = nnx.Linear(dim + 9, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x, t, cond):
        angles = t[:, None] * jnp.pi * 2.0 ** jnp.arange(-1, 3)
        x = jnp.concatenate([x, jnp.cos(angles), jnp.sin(angles), t[:, None]], -1)
        return self.last(jax.nn.silu(self.second(jax.nn.silu(self.first(x)))))


def weights(make, seed):
    """The module that `make(rngs)` builds, of random weights everywhere: a DiT starts as zero."""
    shapes = jax.eval_shape(lambda: make(nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        size = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10.0
        value = rng.standard_normal(leaf.shape) / np.sqrt(size)
        return jnp.asarray(value + ("scale" in jax.tree_util.keystr(path)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def tiny_dit(seed, **changes):
    """A DiT of 2 layers, 16 channels and random weights."""
    config = dataclasses.replace(TINY, **changes)
    return weights(lambda rngs: DiT(config, rngs=rngs), seed)


def tiny_mlp(seed, dim=2, hidden=16):
    """An MLP of random weights."""
    return weights(lambda rngs: MLP(dim, hidden, rngs=rngs), seed)


def normal(seed, *shape):
    """Standard normal, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def video_networks():
    """Three Wan networks of three configurations, for latents [B, F, 4, 4, 3]."""

    def network(dim, depth, seed):
        config = WanConfig(dim, 24, 2, depth, 3, 3, text_dim=5, freq_dim=8, reach=6)
        return Denoiser(weights(lambda rngs: Wan(config, rngs=rngs), seed))

    return {
        "generator": network(16, 2, 0),
        "teacher": network(32, 3, 1),
        "fake_score": network(16, 1, 2),
    }


class Halved:
    """In place of an autoencoder: the last frame as an image is its half, plus their number."""

    def last_as_image(self, latents):
        return 0.5 * latents[:, -1:] + latents.shape[1]


def collectives(compiled):
    """[(operation, shapes)] of what a compiled program sends between devices."""
    pattern = r"= (\([^)]*\)|\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    found = re.findall(pattern, compiled.as_text())
    return [
        (
            name,
            [tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\[([\d,]*)\]", out)],
        )
        for out, name in found
    ]


def assert_close(actual, wanted, rtol=1e-5, atol=1e-6):
    """Compares trees leaf by leaf, naming the leaf that differs."""
    compare = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: compare(a, b, err_msg=jax.tree_util.keystr(path)), actual, wanted
    )


def assert_same(actual, wanted):
    """Compares trees bit for bit."""
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path)),
        actual,
        wanted,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianVideo:
    """Exact networks for a video of Gaussian frames: N(mean + rho (the frame before - mean), v).

    v is std^2 for the first frame and std^2 (1 - rho^2) for the others, so that each frame alone is
    N(mean, std^2). It is a causal network with blocks of one frame: it needs a clean `context`.

    Attributes:
        solves: False for the denoiser E[x0 | x_t, context]; True for the end of its ODE from x_t,
            the map of a perfect student: mean + sqrt(v / var(x_t)) (x_t - alpha mean).
    """

    mean: Any
    std: Any
    rho: Any
    solves: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, x_t, t, cond, *, causal, context, context_time):
        assert causal.frames_per_block == 1
        mean, variance = self.given(context)
        alpha, sigma = align(FLOW.alpha(t), x_t), align(FLOW.sigma(t), x_t)
        total = jnp.square(alpha) * variance + jnp.square(sigma)
        gain = jnp.sqrt(variance / total) if self.solves else alpha * variance / total
        return mean + gain * (x_t - alpha * mean)

    def given(self, context):
        """Mean and variance of each frame, given the real one before it."""
        first = jnp.arange(context.shape[1]).reshape(-1, *[1] * (context.ndim - 2)) == 0
        before = jnp.roll(context, 1, axis=1)
        mean = jnp.where(first, self.mean, self.mean + self.rho * (before - self.mean))
        return mean, jnp.where(first, 1.0, 1.0 - self.rho**2) * self.std**2


def gaussian_video(mean=0.0, std=1.0, rho=0.0, *, solves=False):
    """The Denoiser of a `GaussianVideo`."""
    net = GaussianVideo(*(jnp.float32(x) for x in (mean, std, rho)), solves)
    return Denoiser(net, FLOW, X0(time_scale=1.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianFlow:
    """Mean velocity of the exact ODE of N(mean, std^2) data from t to t - span, in closed form.

    It is (x_t - x_r) / (t - r), solved so that nothing is divided by t - r: with span 0 it is the
    velocity, with span t that of the exact map to data. A condition is added to the mean.

    Attributes:
        jumps: what a call without a span is: True for the map to data, False for the velocity.
    """

    mean: Any
    std: Any
    jumps: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, x_t, t, cond=None, *, span=None):
        if span is None:
            span = t if self.jumps else jnp.zeros_like(t)
        mean = self.mean if cond is None else self.mean + align(cond, x_t)
        t, r = align(t, x_t), align(t - span, x_t)
        now, then = (jnp.hypot((1 - at) * self.std, at) for at in (t, r))
        slope = (self.std**2 * (t + r - 2) + t + r) / (now * (now + then))
        return slope * (x_t - (1 - t) * mean) - mean


def gaussian_flow(mean=0.0, std=1.0, *, jumps=False):
    """The Denoiser of a `GaussianFlow`."""
    return Denoiser(GaussianFlow(jnp.float32(mean), jnp.float32(std), jumps), FLOW, Velocity(1.0))
