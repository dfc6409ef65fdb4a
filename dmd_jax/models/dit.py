"""DiT: a transformer over image patches, conditioned on time and class (Peebles and Xie 2022).

It differs from the paper in RMS norms, normalised queries and keys, SwiGLU, and one modulation that
all layers share and to which each adds a learned offset (PixArt's adaLN-single, as in Wan). Imports
jax, flax, devices, and `layers` and `attention` of this room.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.devices.sharding import WEIGHTS, P
from dmd_jax.models.layers import (
    MLP,
    check_compute,
    check_sizes,
    linear,
    scan,
    scan_with_taps,
    stack,
    timestep_embedding,
)

# Which axes of which weight are split; see sharding.py. Specs are for the trailing axes.
SHARDING_RULES = (
    (r"(qkv|gate|up|time_mlp/up|modulation)/kernel$", P(WEIGHTS, "tensor")),
    (r"(out|down|time_mlp/down)/kernel$", P("tensor", WEIGHTS)),
    (r"(patch|head|span)/kernel$", P(None, WEIGHTS)),
    (r"(position|label/embedding)$", P(None, WEIGHTS)),
    (r"(bias|scale|offset)$", P()),
)


def _norm(dim, *, rngs):
    return nnx.RMSNorm(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)


def _plain_norm(x):
    """RMS norm in float32, without a learned scale: the modulation scales."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class Block(nnx.Module):
    """Attention and SwiGLU, each modulated and gated: tokens [B, L, D], modulation [B, 6, D]."""

    def __init__(self, dim, heads, hidden, *, dtype, rngs):
        self.heads = heads
        self.qkv = linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.query_norm = _norm(dim // heads, rngs=rngs)
        self.key_norm = _norm(dim // heads, rngs=rngs)
        self.out = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.gate = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.up = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, dim, dtype=dtype, rngs=rngs)
        self.offset = nnx.Param(jnp.zeros((6, dim)))

    def __call__(self, x, modulation):
        modulation = (modulation + self.offset[...])[:, :, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(modulation, 1, 0)
        x = x + gate1 * self._attend(_plain_norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self._feed(_plain_norm(x) * (1 + scale2) + shift2)

    def _attend(self, x):
        qkv = rearrange(self.qkv(x), "b l (three n h) -> three b l n h", three=3, n=self.heads)
        q, k, v = self.query_norm(qkv[0]), self.key_norm(qkv[1]), qkv[2]
        attended = jax.nn.dot_product_attention(q.astype(v.dtype), k.astype(v.dtype), v)
        return self.out(rearrange(attended, "b l n h -> b l (n h)"))

    def _feed(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A class-conditional image transformer in plain values.

    Attributes:
        image_size: height and width of the (square) image or latent.
        channels: its channels.
        num_classes: classes; label `num_classes` is the null label of classifier-free guidance.
        patch: side of a patch.
        dim, depth, heads: width, layers, attention heads.
        hidden: width of the SwiGLU; if 0, 8/3 dim, as many weights as an MLP of width 4 dim.
        spans: the network takes the span of a step too, for the mean velocity of MeanFlow. The
            weights of the span start as zeros: it starts as the network without them, from whose
            files it can be loaded.
        dtype: compute dtype of the layers, "float32" or "bfloat16"; weights, norms and modulation
            are float32 in both.
        remat: what the backward pass recomputes of a layer: "none" nothing, "full" everything,
            "offload" everything from an input that waits in the memory of the host; any other name
            is a policy of `jax.checkpoint_policies`.
        unroll: layers per iteration of the scan over layers; more compile slower and run faster.

    Raises:
        ValueError: a size is below 1, the patch does not divide the image, the heads do not divide
            the width, or the dtype or the policy is unknown.
    """

    image_size: int
    channels: int
    num_classes: int
    patch: int
    dim: int
    depth: int
    heads: int
    hidden: int = 0
    spans: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        check_sizes(self, "image_size", "channels", "num_classes", "patch", "dim", "depth", "heads")
        check_sizes(self, "unroll")
        if self.hidden < 0:
            raise ValueError(f"hidden={self.hidden} must be 0 or more")
        if self.image_size % self.patch:
            raise ValueError(f"patch={self.patch} does not divide image_size={self.image_size}")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        check_compute(self.dtype, self.remat)

    @property
    def sample_shape(self):
        """(H, W, C)."""
        return (self.image_size, self.image_size, self.channels)

    @property
    def uncond(self):
        """The null label, the unconditional input of classifier-free guidance."""
        return self.num_classes


class DiT(nnx.Module):
    """The network of a `DiTConfig`."""

    def __init__(self, config, *, rngs):
        self.config = config
        c = config
        pixels, tokens = c.patch**2 * c.channels, (c.image_size // c.patch) ** 2
        hidden = c.hidden or 32 * round(c.dim / 12)
        dtype = jnp.dtype(c.dtype)

        def block(rngs):
            return Block(c.dim, c.heads, hidden, dtype=dtype, rngs=rngs)

        self.patch = linear(pixels, c.dim, dtype=dtype, rngs=rngs)
        # As large as what they are added to: smaller embeddings have little effect for long.
        init = nnx.initializers.normal(0.5)
        self.position = nnx.Param(init(rngs.params(), (tokens, c.dim)))
        self.label = nnx.Embed(c.num_classes + 1, c.dim, embedding_init=init, rngs=rngs)
        self.time_mlp = MLP(256, c.dim, c.dim, activation=jax.nn.silu, rngs=rngs)
        self.modulation = linear(c.dim, 6 * c.dim, rngs=rngs, zero=True)
        self.blocks = stack(block, c.depth, rngs=rngs)
        self.head_modulation = linear(c.dim, 2 * c.dim, rngs=rngs, zero=True)
        self.head = linear(c.dim, pixels, rngs=rngs, zero=True)
        if c.spans:
            self.span = linear(256, c.dim, rngs=rngs, zero=True)

    def __call__(self, x, t, label, *, span=None, features=()):
        """x [B, H, W, C], t [B] in 0 ... 1000, label int32 [B] -> [B, H, W, C] in float32.

        A network with `spans` takes `span`, [B] in 0 ... t: its velocity is the mean one from t to
        t - span. None is t, the way to data.

        With `features`, numbers of layers from 0, ascending, it returns (that, the tokens after
        each of these layers: [len(features), B, L, D] in the compute dtype).
        """
        p = self.config.patch
        tokens = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        tokens = self.patch(tokens) + self.position[...]
        condition = self.time_mlp(timestep_embedding(t, 256)) + self.label(label)
        if self.config.spans:
            condition += self.span(timestep_embedding(t if span is None else span, 256))
        elif span is not None:
            raise ValueError("this DiT takes no span: its config has spans=False")
        condition = sharding.shard_batch(jax.nn.silu(condition))
        modulation = sharding.shard_batch(self.modulation(condition))
        modulation = rearrange(modulation, "b (six d) -> b six d", six=6)
        tokens, tapped = self._layers(sharding.shard_tokens(tokens), modulation, features)
        shift, scale = jnp.split(self.head_modulation(condition)[:, None], 2, axis=-1)
        out = self.head(_plain_norm(tokens) * (1 + scale) + shift)
        out = rearrange(
            out, "b (h w) (p q c) -> b (h p) (w q) c", h=x.shape[1] // p, p=p, q=p, c=x.shape[-1]
        )
        return (out, tapped) if features else out

    def _layers(self, tokens, modulation, features):
        """The scan over stacked layers; tokens [B, L, D] stay in the compute dtype."""

        def layer(tokens, block):
            out = sharding.gather(block, SHARDING_RULES)(tokens, modulation)
            return sharding.shard_tokens(out.astype(tokens.dtype)), None

        c, tokens = self.config, tokens.astype(self.config.dtype)
        how = dict(remat=c.remat, unroll=c.unroll)
        if features:
            return scan_with_taps(layer, tokens, self.blocks, features, **how)
        return scan(layer, tokens, self.blocks, **how)
