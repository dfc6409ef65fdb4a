"""The layers of a Wan transformer, and how their weights are split. See `network` for the whole."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.devices.sharding import WEIGHTS, P
from dmd_jax.models.attention import attention
from dmd_jax.models.layers import MLP, linear
from dmd_jax.models.wan.config import PATCH

# Which axes of which weight are split; see sharding.py. Specs are for the trailing axes.
SHARDING_RULES = (
    (r"(query|key|value|up|modulation)/kernel$", P(WEIGHTS, "tensor")),
    (r"(out|down)/kernel$", P("tensor", WEIGHTS)),
    (r"patch/kernel$", P(None, None, None, None, WEIGHTS)),
    (r"head/kernel$", P(WEIGHTS, None)),
    (r"(bias|scale|offset)$", P()),
)


def layer_norm(dim, *, learned, eps=1e-6, rngs):
    """A LayerNorm in float32, with or without scale and bias."""
    return nnx.LayerNorm(
        dim, epsilon=eps, use_bias=learned, use_scale=learned, dtype=jnp.float32, rngs=rngs
    )


def exact_gelu(x):
    """GELU by the error function, not by its approximation with tanh."""
    return jax.nn.gelu(x, approximate=False)


class Patch(nnx.Module):
    """Each 1 x 2 x 2 patch of the latents becomes a token: [B, F, H, W, C] -> [B, L, D]."""

    def __init__(self, channels, dim, *, dtype, rngs):
        self.dtype = dtype
        init = nnx.initializers.xavier_uniform(in_axis=(0, 1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (*PATCH, channels, dim)))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x):
        t, p, q = PATCH
        patches = rearrange(
            x, "b (f t) (h p) (w q) c -> b (f h w) (t p q c)", t=t, p=p, q=q
        ).astype(self.dtype)
        kernel = rearrange(self.kernel[...], "t p q c d -> (t p q c) d").astype(self.dtype)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class ImageMLP(nnx.Module):
    """Projects CLIP's features for cross-attention: [B, I, inputs] -> [B, I, D]."""

    def __init__(self, inputs, dim, *, dtype, rngs):
        self.norm_in = layer_norm(inputs, learned=True, eps=1e-5, rngs=rngs)
        self.mlp = MLP(inputs, inputs, dim, activation=exact_gelu, dtype=dtype, rngs=rngs)
        self.norm_out = layer_norm(dim, learned=True, eps=1e-5, rngs=rngs)

    def __call__(self, x):
        return self.norm_out(self.mlp(self.norm_in(x))).astype(self.mlp.up.dtype)


class Attention(nnx.Module):
    """The projections of multi-head attention. Queries and keys have an RMS norm over all heads."""

    def __init__(self, config, *, rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        self.heads = c.heads
        self.query = linear(c.dim, c.dim, dtype=dtype, rngs=rngs)
        self.key = linear(c.dim, c.dim, dtype=dtype, rngs=rngs)
        self.value = linear(c.dim, c.dim, dtype=dtype, rngs=rngs)
        self.out = linear(c.dim, c.dim, dtype=dtype, rngs=rngs)
        self.query_norm = nnx.RMSNorm(c.dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.key_norm = nnx.RMSNorm(c.dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)

    def split(self, x):
        """[B, L, D] -> [B, L, N, H]."""
        return rearrange(x, "b l (n h) -> b l n h", n=self.heads)

    def queries(self, x):
        return self.split(self.query_norm(self.query(x)).astype(x.dtype))

    def keys(self, x):
        return self.split(self.key_norm(self.key(x)).astype(x.dtype))

    def values(self, x):
        return self.split(self.value(x))

    def project(self, attended):
        """[B, L, N, H] -> [B, L, D]."""
        return self.out(rearrange(attended, "b l n h -> b l (n h)"))


class CrossAttention(Attention):
    """Attention to the text, plus attention to the image features where there are any."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        if config.image_dim:
            c, dtype = config, jnp.dtype(config.dtype)
            self.image_key = linear(c.dim, c.dim, dtype=dtype, rngs=rngs)
            self.image_value = linear(c.dim, c.dim, dtype=dtype, rngs=rngs)
            self.image_key_norm = nnx.RMSNorm(c.dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x, text, image):
        query = self.queries(x)
        attended = attention(query, self.keys(text), self.values(text))
        if image is not None:
            key = self.image_key_norm(self.image_key(image)).astype(x.dtype)
            attended += attention(query, self.split(key), self.split(self.image_value(image)))
        return self.project(attended)


class Block(nnx.Module):
    """Self-attention, cross-attention, feed-forward layer; the first and the last are modulated."""

    def __init__(self, config, *, rngs):
        c = config
        self.norm = layer_norm(c.dim, learned=False, rngs=rngs)
        self.self_attention = Attention(c, rngs=rngs)
        self.cross_norm = layer_norm(c.dim, learned=True, rngs=rngs)
        self.cross_attention = CrossAttention(c, rngs=rngs)
        self.ffn = MLP(
            c.dim, c.ffn, c.dim, activation=jax.nn.gelu, dtype=jnp.dtype(c.dtype), rngs=rngs
        )
        self.offset = nnx.Param(jax.random.normal(rngs.params(), (6, c.dim)) / c.dim**0.5)

    def __call__(self, x, modulation, conditions, attend):
        """One layer.

        Args:
            x: tokens [B, L, D] in the compute dtype.
            modulation: float32 [B, F or 1, 6, D].
            conditions: (text [B, L', D], image [B, I, D] or None).
            attend: how self-attention runs: (the projections of this layer, their input
                [B, L, D]) -> (output [B, L, N, H], K/V or None). See `self_attention`.

        Returns:
            (tokens [B, L, D], K/V or None).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(
            modulation + self.offset[...], 2, 0
        )
        attended, own = attend(self.self_attention, modulate(self.norm(x), scale1, shift1, x.dtype))
        x = _add_gated(x, self.self_attention.project(attended), gate1)
        x = x + self.cross_attention(self.cross_norm(x).astype(x.dtype), *conditions)
        update = self.ffn(modulate(self.norm(x), scale2, shift2, x.dtype))
        return _add_gated(x, update, gate2), own


def modulate(x, scale, shift, dtype):
    """x (1 + scale) + shift in float32; x [B, L, D], scale and shift [B, F or 1, D]."""
    x, scale, shift = _aligned(x, scale, shift)
    return rearrange(x * (1 + scale) + shift, "b n t d -> b (n t) d").astype(dtype)


def _add_gated(x, update, gate):
    """x + gate update in float32, in the dtype of x; gate [B, F or 1, D]."""
    update, gate = _aligned(update.astype(jnp.float32), gate)
    gated = rearrange(update * gate, "b n t d -> b (n t) d")
    return (x.astype(jnp.float32) + gated).astype(x.dtype)


def _aligned(x, *modulations):
    """Tokens in n parts of one modulation each: [B, n, L / n, D], and [B, n, 1, D] to multiply by.

    A part lies within a frame and on one device. Cut by frames, tokens that are split over devices
    would have to be gathered.

    Args:
        x: tokens [B, L, D].
        modulations: [B, F or 1, D].
    """
    tokens, frames = x.shape[1], modulations[0].shape[1]
    part = tokens if frames == 1 else sharding.common_part(tokens, tokens // frames)
    times = tokens // part // frames
    spread = (jnp.repeat(m, times, axis=1)[:, :, None] for m in modulations)
    return rearrange(x, "b (n t) d -> b n t d", t=part), *spread
