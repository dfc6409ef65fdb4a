"""The layers of Wan's autoencoders: causal convolutions, resampling, shortcuts.

Every layer is called as (x [B, T, H, W, C], cache) -> (x, cache). The cache is what the layer needs
of earlier frames; None means that x is the first frame of a video.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx

from dmd_jax.models.attention import attention
from dmd_jax.models.layers import linear


class RMSNorm(nnx.Module):
    """RMS norm over the channels, in float32; the result is float32."""

    def __init__(self, dim):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        # The published networks divide by the Euclidean norm and bound it by 1e-12 from below.
        square = jnp.maximum(jnp.mean(x * x, axis=-1, keepdims=True), 1e-24 / x.shape[-1])
        return x * jax.lax.rsqrt(square) * self.scale[...]


class CausalConv(nnx.Conv):
    """A convolution over time, height and width whose output depends on no later frame.

    Its cache is the last frames of its input that the next call needs. Before the first frame of a
    video they are zeros.
    """

    def __init__(self, inputs, outputs, kernel=(3, 3, 3), *, stride=1, dtype, rngs):
        self.past = kernel[0] - stride
        space = tuple((size // 2, size // 2) for size in kernel[1:])
        super().__init__(
            inputs,
            outputs,
            kernel,
            strides=(stride, 1, 1),
            padding=((0, 0), *space),
            dtype=dtype,
            rngs=rngs,
        )

    def zeros(self, x):
        """The cache before the first frame, for inputs of the size of x."""
        return jnp.zeros_like(x, shape=(x.shape[0], self.past, *x.shape[2:]))

    def __call__(self, x, cache):
        cache = self.zeros(x) if cache is None else cache
        x = jnp.concatenate([cache, x], axis=1)
        return super().__call__(x), x[:, -self.past :]


def _activate(norm, x):
    """silu(norm(x)) in the dtype of x."""
    return jax.nn.silu(norm(x)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear shortcut where the width changes."""

    def __init__(self, inputs, outputs, *, dtype, rngs):
        self.norm1 = RMSNorm(inputs)
        self.conv1 = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(outputs)
        self.conv2 = CausalConv(outputs, outputs, dtype=dtype, rngs=rngs)
        same = inputs == outputs
        self.shortcut = None if same else linear(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):
        first, second = cache or (None, None)
        h, first = self.conv1(_activate(self.norm1, x), first)
        h, second = self.conv2(_activate(self.norm2, h), second)
        return h + (x if self.shortcut is None else self.shortcut(x)), (first, second)


class FrameAttention(nnx.Module):
    """x + attention between the pixels of each frame, with one head."""

    def __init__(self, dim, *, dtype, rngs):
        self.norm = RMSNorm(dim)
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):
        batch, _, height, _, _ = x.shape
        qkv = self.qkv(self.norm(x).astype(x.dtype))
        q, k, v = rearrange(qkv, "b t h w (three c) -> three (b t) (h w) 1 c", three=3)
        attended = rearrange(attention(q, k, v), "(b t) (h w) 1 c -> b t h w c", b=batch, h=height)
        return x + self.out(attended), None


class Down(nnx.Module):
    """Halves height and width and, if temporal, the number of frames after the first."""

    def __init__(self, dim, temporal, *, dtype, rngs):
        self.conv = nnx.Conv(
            dim, dim, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs
        )
        self.time = (
            CausalConv(dim, dim, (3, 1, 1), stride=2, dtype=dtype, rngs=rngs) if temporal else None
        )

    def __call__(self, x, cache):
        x = self.conv(x)
        if self.time is None:
            return x, None
        return (x, x) if cache is None else self.time(x, cache)


class Up(nnx.Module):
    """Doubles height and width and, if temporal, the number of frames after the first."""

    def __init__(self, inputs, outputs, temporal, *, dtype, rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), dtype=dtype, rngs=rngs)
        self.time = (
            CausalConv(inputs, 2 * inputs, (3, 1, 1), dtype=dtype, rngs=rngs) if temporal else None
        )

    def __call__(self, x, cache):
        if self.time is not None and cache is None:
            # The first frame skips the convolution, and as in the published networks does not
            # enter its cache either.
            cache = self.time.zeros(x)
        elif self.time is not None:
            x, cache = self.time(x, cache)
            x = rearrange(x, "b t h w (two c) -> b (t two) h w c", two=2)
        return self.conv(repeat(x, "b t h w c -> b t (h p) (w q) c", p=2, q=2)), cache


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """Changes resolution and width without weights.

    Attributes:
        inputs, outputs: channels.
        time, space: factor between the resolutions in time, and in height and width.

    Raises:
        ValueError: the values of one resolution do not divide those of the other evenly.
    """

    inputs: int
    outputs: int
    time: int
    space: int

    def __post_init__(self):
        if self.many % self.few:
            raise ValueError(
                f"a shortcut from {self.inputs} to {self.outputs} channels must divide "
                f"{self.many} values among {self.few}: change the dims or the multipliers"
            )

    @property
    def factor(self):
        return self.time * self.space**2


class AverageDown(Shortcut):
    """To a lower resolution: each output channel is the mean of a group of merged values."""

    @property
    def many(self):
        return self.inputs * self.factor

    @property
    def few(self):
        return self.outputs

    def __call__(self, x, first):
        if first:
            x = jnp.pad(x, ((0, 0), (self.time - 1, 0), (0, 0), (0, 0), (0, 0)))
        merged = rearrange(
            x,
            "b (t p) (h q) (w r) c -> b t h w (c p q r)",
            p=self.time,
            q=self.space,
            r=self.space,
        )
        return reduce(merged, "b t h w (c group) -> b t h w c", "mean", c=self.outputs)


class DuplicateUp(Shortcut):
    """To a higher resolution: each input channel is copied to a group of output values."""

    @property
    def many(self):
        return self.outputs * self.factor

    @property
    def few(self):
        return self.inputs

    def __call__(self, x, first):
        repeated = rearrange(
            jnp.repeat(x, self.many // self.few, axis=-1),
            "b t h w (c p q r) -> b (t p) (h q) (w r) c",
            p=self.time,
            q=self.space,
            r=self.space,
        )
        return repeated[:, self.time - 1 :] if first else repeated


def chain(layers, x, caches):
    """Calls layers one after another; `caches` is None or one cache per layer.

    Returns:
        (x, the new cache of each layer).
    """
    new_caches = []
    for layer, cache in zip(layers, caches or [None] * len(layers), strict=True):
        x, cache = layer(x, cache)
        new_caches.append(cache)
    return x, tuple(new_caches)


class Stage(nnx.Module):
    """Residual blocks of one resolution, then the change to the next; a shortcut around both."""

    def __init__(self, layers, shortcut):
        self.layers = nnx.List(layers)
        self.shortcut = shortcut

    def __call__(self, x, caches):
        out, new_caches = chain(self.layers, x, caches)
        if self.shortcut is not None:
            out += self.shortcut(x, caches is None)
        return out, new_caches


class Head(nnx.Module):
    """The last norm, activation and convolution."""

    def __init__(self, inputs, outputs, *, dtype, rngs):
        self.norm = RMSNorm(inputs)
        self.conv = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x, cache):
        return self.conv(_activate(self.norm, x), cache)
