"""DiT: a transformer over image patches, conditioned on time and class (Peebles and Xie 2022).

Modern in its parts: RMS norms, normalised queries and keys, SwiGLU, and one time projection shared
    by
all layers to which each adds a learned offset (PixArt's adaLN-single, which Wan uses too). The
layers are stacked and scanned. Imports jax, flax and the infrastructure room.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dmd_jax import sharding

P = jax.P

# Which axes of which weight are split; see sharding.py. Rules speak of the trailing axes.
SHARDING_RULES = (
    (r"(qkv|gate|up|time_mlp/up|modulation)/kernel$", P("fsdp", "tensor")),
    (r"(out|down|time_mlp/down)/kernel$", P("tensor", "fsdp")),
    (r"(patch|head)/kernel$", P(None, "fsdp")),
    (r"(position|label/embedding)$", P(None, "fsdp")),
    (r"(bias|scale|offset)$", P()),
)


def _linear(inputs, outputs, *, dtype, rngs, zero=False):
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)


def _norm(dim, *, rngs):
    return nnx.RMSNorm(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)


def _plain_norm(x):
    """RMS norm in float32 with no learned scale: the modulation has one."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def timestep_embedding(t, dim):
    """Sinusoids of t [B]: float32 [B, dim], cosines first; the lowest frequency is 1 / 10000."""
    frequencies = jnp.exp(-jnp.log(1e4) * jnp.arange(dim // 2) / (dim // 2))
    angles = t[:, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MLP(nnx.Module):
    """Linear, SiLU, Linear: [B, inputs] -> [B, dim]."""

    def __init__(self, inputs, dim, *, dtype, rngs):
        self.up = _linear(inputs, dim, dtype=dtype, rngs=rngs)
        self.down = _linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.up(x)))


class Block(nnx.Module):
    """Attention and SwiGLU, each modulated and gated: tokens [B, L, D], modulation [B, 6, D]."""

    def __init__(self, dim, heads, hidden, *, dtype, rngs):
        self.heads = heads
        self.qkv = _linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.query_norm = _norm(dim // heads, rngs=rngs)
        self.key_norm = _norm(dim // heads, rngs=rngs)
        self.out = _linear(dim, dim, dtype=dtype, rngs=rngs)
        self.gate = _linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.up = _linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.down = _linear(hidden, dim, dtype=dtype, rngs=rngs)
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


class DiT(nnx.Module):
    """Class-conditional image transformer.

    Args:
        image_size: height and width of the (square) image or latent.
        channels: its channels.
        num_classes: classes; label `num_classes` is the null label of classifier-free guidance.
        patch: side of a patch.
        dim, depth, heads: width, layers, attention heads.
        hidden: width of the SwiGLU; if None 8/3 dim, which has the weights of a plain MLP of 4 dim.
        dtype: what the layers compute in; weights, norms and modulation stay float32.
        remat: what the backward pass keeps of a layer: "none" recomputes nothing, "full"
            everything, any other name is one of `jax.checkpoint_policies`.
        unroll: how many layers a turn of the scan holds; all of them compile slower and run faster.
        rngs: nnx.Rngs for the weights.

    Raises:
        ValueError: the patch does not divide the image, the heads do not divide the width, or the
            policy is unknown.
    """

    def __init__(
        self,
        *,
        image_size,
        channels,
        num_classes,
        patch,
        dim,
        depth,
        heads,
        hidden=None,
        dtype=jnp.float32,
        remat="none",
        unroll=1,
        rngs,
    ):
        if image_size % patch:
            raise ValueError(f"patch={patch} does not divide image_size={image_size}")
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}")
        if remat not in ("none", "full") and not hasattr(jax.checkpoint_policies, remat):
            raise ValueError(
                f"remat={remat!r}: use 'none', 'full' or a name of jax.checkpoint_policies"
            )
        self.patch_size, self.num_classes, self.dtype = patch, num_classes, jnp.dtype(dtype)
        self.grid, self.remat, self.unroll = image_size // patch, remat, unroll
        hidden = hidden or 32 * round(dim / 12)
        pixels = patch * patch * channels

        self.patch = _linear(pixels, dim, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (self.grid**2, dim)))
        self.label = nnx.Embed(
            num_classes + 1, dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.time_mlp = MLP(256, dim, dtype=jnp.float32, rngs=rngs)
        self.modulation = _linear(dim, 6 * dim, dtype=jnp.float32, rngs=rngs, zero=True)
        make = lambda key: Block(dim, heads, hidden, dtype=dtype, rngs=nnx.Rngs(key))  # noqa: E731
        self.blocks = jax.vmap(make)(jax.random.split(rngs.params(), depth))
        self.head_modulation = _linear(dim, 2 * dim, dtype=jnp.float32, rngs=rngs, zero=True)
        self.head = _linear(dim, pixels, dtype=jnp.float32, rngs=rngs, zero=True)

    def __call__(self, x, t, label):
        """x [B, H, W, C], t [B] in 0..1000, label int32 [B] -> [B, H, W, C]."""
        p = self.patch_size
        tokens = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        tokens = sharding.shard_tokens(self.patch(tokens.astype(self.dtype)) + self.position[...])
        condition = jax.nn.silu(self.time_mlp(timestep_embedding(t, 256)) + self.label(label))
        tokens = self._layers(
            tokens, rearrange(self.modulation(condition), "b (six d) -> b six d", six=6)
        )
        shift, scale = jnp.split(self.head_modulation(condition)[:, None], 2, axis=-1)
        out = self.head(_plain_norm(tokens) * (1 + scale) + shift)
        return rearrange(
            out, "b (h w) (p q c) -> b (h p) (w q) c", h=self.grid, p=p, q=p, c=x.shape[-1]
        )

    def _layers(self, tokens, modulation):
        def layer(tokens, block):
            tokens = sharding.gather(block, SHARDING_RULES)(tokens, modulation)
            return sharding.shard_tokens(tokens.astype(self.dtype)), None

        if self.remat != "none":
            keep = None if self.remat == "full" else getattr(jax.checkpoint_policies, self.remat)
            layer = jax.checkpoint(layer, policy=keep)
        return jax.lax.scan(layer, tokens.astype(self.dtype), self.blocks, unroll=self.unroll)[0]
