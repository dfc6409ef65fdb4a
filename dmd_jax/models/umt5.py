"""UMT5's encoder (Chung et al. 2023, arXiv 2304.09151): token ids in, text embeddings out.

A T5 encoder (Raffel et al. 2020, arXiv 1910.10683) with gated feed-forward layers and, in every
layer, its own biases for relative positions. Imports jax, flax, devices, `layers` and `attention`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.devices.sharding import WEIGHTS, P
from dmd_jax.models.layers import check_compute, linear, scan, stack

# Which axes of which weight are split; see sharding.py. Specs are for the trailing axes.
SHARDING_RULES = (
    (r"(query|key|value|gate|up)/kernel$", P(WEIGHTS, "tensor")),
    (r"(out|down)/kernel$", P("tensor", WEIGHTS)),
    (r"tokens$", P(None, WEIGHTS)),
    (r"(positions|scale)$", P()),
)


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """A UMT5 encoder in plain values. The presets are at the end of this file.

    Attributes:
        vocab: number of token ids, which are in [0, vocab).
        dim, ffn, heads, head_dim, depth: width, hidden width of the feed-forward layers, attention
            heads, channels of a head (which need not divide the width), layers.
        buckets: of relative positions, half of them for earlier and half for later tokens.
        max_distance: all tokens farther away than this share a bucket.
        dtype: compute dtype of the layers, "float32" or "bfloat16"; norms, softmax and the
            residual stream are float32 in both.

    Raises:
        ValueError: `buckets` is no multiple of 4, `max_distance` is at most a quarter of it, or the
            dtype is unknown.
    """

    vocab: int
    dim: int
    ffn: int
    heads: int
    head_dim: int
    depth: int
    buckets: int = 32
    max_distance: int = 128
    dtype: str = "float32"

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"buckets={self.buckets} must be a multiple of 4, and "
                f"max_distance={self.max_distance} more than a quarter of them"
            )
        check_compute(self.dtype, "none")


def position_buckets(length, buckets, max_distance):
    """The bucket of every pair of positions: int32 [query, key] (Raffel et al. 2020, section 2.1).

    Near positions have one bucket each; farther ones share buckets, logarithmically in distance.
    """
    half, near = buckets // 2, buckets // 4
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    away = np.abs(distance)
    # float32, as when the weights were trained: the rounding decides the edges between buckets.
    ratio = np.maximum(away, 1).astype(np.float32) / np.float32(near)
    steps = np.log(ratio) / np.float32(np.log(max_distance / near)) * np.float32(half - near)
    far = np.minimum(near + steps.astype(np.int32), half - 1)
    return (np.where(away < near, away, far) + half * (distance > 0)).astype(np.int32)


class Attention(nnx.Module):
    """Multi-head attention with a learned bias per bucket and head; scores are not scaled."""

    def __init__(self, config, *, rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        self.heads = c.heads
        inner = c.heads * c.head_dim
        self.query = linear(c.dim, inner, dtype=dtype, bias=False, rngs=rngs)
        self.key = linear(c.dim, inner, dtype=dtype, bias=False, rngs=rngs)
        self.value = linear(c.dim, inner, dtype=dtype, bias=False, rngs=rngs)
        self.out = linear(inner, c.dim, dtype=dtype, bias=False, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (c.buckets, c.heads)))

    def __call__(self, x, buckets, mask):
        """x [B, L, D], buckets int32 [L, L], mask bool [B, L] of the keys -> [B, L, D]."""
        query, key, value = (
            rearrange(layer(x), "b l (n h) -> b l n h", n=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("bqnh,bknh->bnqk", query, key, preferred_element_type=jnp.float32)
        scores += rearrange(self.positions[...][buckets], "q k n -> n q k")
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        attended = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores).astype(x.dtype), value)
        return self.out(rearrange(attended, "b l n h -> b l (n h)"))


class GatedMLP(nnx.Module):
    """down(gelu(gate x) up x), the GELU by its approximation with tanh (Shazeer 2020)."""

    def __init__(self, config, *, rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        self.gate = linear(c.dim, c.ffn, dtype=dtype, bias=False, rngs=rngs)
        self.up = linear(c.dim, c.ffn, dtype=dtype, bias=False, rngs=rngs)
        self.down = linear(c.ffn, c.dim, dtype=dtype, bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.gate(x)) * self.up(x))


def _norm(dim, *, rngs):
    return nnx.RMSNorm(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """Self-attention and feed-forward layer, each with a norm before it."""

    def __init__(self, config, *, rngs):
        self.dtype = config.dtype
        self.attention_norm = _norm(config.dim, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = _norm(config.dim, rngs=rngs)
        self.ffn = GatedMLP(config, rngs=rngs)

    def __call__(self, x, buckets, mask):
        """x float32 [B, L, D] -> the same."""
        x = x + self.attention(self.attention_norm(x).astype(self.dtype), buckets, mask)
        return x + self.ffn(self.ffn_norm(x).astype(self.dtype))


class UMT5(nnx.Module):
    """The network of a `UMT5Config`."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.tokens = nnx.Param(jax.random.normal(rngs.params(), (config.vocab, config.dim)))
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.depth, rngs=rngs)
        self.norm = _norm(config.dim, rngs=rngs)

    def __call__(self, ids, mask):
        """The embeddings of texts.

        Args:
            ids: int32 [B, L] in [0, vocab).
            mask: bool or int [B, L], true for tokens and false for padding; true for at least one
                token of each text.

        Returns:
            float32 [B, L, D]. Rows of padding have no meaning.

        Raises:
            ValueError: the shapes of ids and mask differ, or are not [B, L].
        """
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"ids {ids.shape} and mask {mask.shape} must both be [B, L]")
        c = self.config
        buckets = position_buckets(ids.shape[1], c.buckets, c.max_distance)
        mask = mask.astype(bool)
        x = sharding.shard_batch(self.tokens[...][ids].astype(jnp.float32))

        def body(x, block):
            block = sharding.gather(block, SHARDING_RULES)
            return sharding.shard_batch(block(x, buckets, mask)), None

        x, _ = scan(body, x, self.blocks, remat="none", unroll=1)
        return self.norm(x)


# google/umt5-xxl, the text encoder of the Wan networks.
XXL = UMT5Config(vocab=256384, dim=4096, ffn=10240, heads=64, head_dim=64, depth=24)
TINY = UMT5Config(vocab=512, dim=64, ffn=160, heads=4, head_dim=16, depth=3)
