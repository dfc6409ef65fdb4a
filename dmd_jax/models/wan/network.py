"""The Wan transformer: latents, time and text in, velocity out.

One class for all its uses. It is bidirectional by default. With `causal`, the same weights attend
to blocks of frames in order (CausVid, Yin et al. 2025); with `context`, noisy blocks attend to
clean ones (teacher forcing); with `cache`, a video is continued block by block (Self-Forcing, Huang
et al. 2025).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.models import kv_cache
from dmd_jax.models.layers import (
    MLP,
    linear,
    scan,
    scan_with_taps,
    stack,
    timestep_embedding,
)
from dmd_jax.models.wan.config import PATCH
from dmd_jax.models.wan.layers import SHARDING_RULES, Block, ImageMLP, Patch, layer_norm, modulate
from dmd_jax.models.wan.self_attention import Grid, over_cache, over_sequence


class Conditions(NamedTuple):
    """The conditioning of an image-to-video network. Other networks take the text alone."""

    text: jax.Array  # [B, L, text_dim]
    frames: jax.Array  # [B, F, H, W, in_channels - out_channels], concatenated to the latents
    image: jax.Array | None = None  # [B, I, image_dim]: CLIP's features, where image_dim is not 0


def _grid(x):
    """The tokens of latents x [B, F, H, W, C]."""
    return Grid(x.shape[1], x.shape[2] // PATCH[1], x.shape[3] // PATCH[2])


def _expect(name, array, *sizes):
    """Raises ValueError where an array has other sizes; a size that is a string may be any."""
    same = [isinstance(size, str) or size == n for size, n in zip(sizes, array.shape, strict=False)]
    if len(sizes) != array.ndim or not all(same):
        raise ValueError(f"{name} {array.shape} must be [{', '.join(map(str, sizes))}]")


class Wan(nnx.Module):
    """The network of a `WanConfig`."""

    def __init__(self, config, *, rngs):
        self.config = config
        c, dtype = config, jnp.dtype(config.dtype)
        self.patch = Patch(c.in_channels, c.dim, dtype=dtype, rngs=rngs)
        self.text_mlp = MLP(
            c.text_dim, c.dim, c.dim, activation=jax.nn.gelu, dtype=dtype, rngs=rngs
        )
        if c.image_dim:
            self.image_mlp = ImageMLP(c.image_dim, c.dim, dtype=dtype, rngs=rngs)
        self.time_mlp = MLP(c.freq_dim, c.dim, c.dim, activation=jax.nn.silu, rngs=rngs)
        self.modulation = linear(c.dim, 6 * c.dim, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(c, rngs=rngs), c.depth, rngs=rngs)
        self.head_norm = layer_norm(c.dim, learned=False, rngs=rngs)
        self.head_offset = nnx.Param(jax.random.normal(rngs.params(), (2, c.dim)) / c.dim**0.5)
        self.head = linear(c.dim, c.out_channels * int(np.prod(PATCH)), rngs=rngs, zero=True)

    def __call__(
        self,
        x,
        timestep,
        text,
        *,
        causal=None,
        context=None,
        context_time=None,
        cache=None,
        start=None,
        features=(),
    ):
        """The velocity eps - x0 of noisy latents.

        Args:
            x: latents [B, F, H, W, C] with even H and W, C = out_channels.
            timestep: 0 ... 1000, [B], or [B, F] for each frame's own.
            text: [B, L, text_dim]; all rows are attended, the zeros of the padding too. Or
                `Conditions`.
            causal: a Causal, for blocks of frames in order; None for bidirectional attention.
            context: latents [B, F, H, W, C], clean or noised to `context_time`: the blocks of x
                attend to the blocks of the context before them (teacher forcing). Needs `causal`.
            context_time: with a context, the time to which it is noised, 0 ... 1000, [] or [B];
                None for 0, clean.
            cache: a KVCache of `empty_cache`: x is one block, which attends to the frames of the
                cache before it. Needs `causal` and `start`.
            start: with a cache, int32 []: the number of the first frame of x in the video; it must
                be the first of a block.
            features: numbers of layers, from 0, ascending, whose tokens are returned too; without
                context and cache.

        Returns:
            [B, F, H, W, out_channels] in float32; with a cache, (that, a KVCache of the block's own
            frames, for `kv_cache.write`); with `features`, (that, [len(features), B, L, D] in the
            compute dtype).

        Raises:
            ValueError: shapes or arguments that do not fit together.
        """
        self._check(x, timestep, text, causal, context, context_time, cache, start)
        if features and (context is not None or cache is not None):
            raise ValueError("features are those of whole videos: without `context` and `cache`")
        frames, image = None, None
        if isinstance(text, Conditions):
            text, frames, image = text
        grid = _grid(x)
        tokens = self._tokens(x, frames)
        embedding = self._time(timestep)
        if context is not None:
            tokens = jnp.concatenate([self._tokens(context, frames), tokens], axis=1)
            context_time = jnp.broadcast_to(0.0 if context_time is None else context_time, len(x))
            embedding = self._with_context(embedding, context_time, grid.frames)
        conditions = self._conditions(text, image)
        if cache is None:
            attend = over_sequence(self.config, grid, causal, context is not None)
            tokens, aux = self._layers(tokens, embedding, conditions, attend, features=features)
        else:
            tokens, aux = self._continue(tokens, embedding, conditions, grid, causal, cache, start)
        if context is not None:
            tokens = tokens[:, -grid.frames * grid.frame :]
            embedding = embedding[:, -grid.frames :]
        velocity = self._head(tokens, embedding, grid)
        return velocity if cache is None and not features else (velocity, aux)

    def empty_cache(self, batch, frames, height, width):
        """A cache for `frames` frames of [H, W] latents.

        With a window, `frames` is window + sink or more; without, the frames of the whole video.
        """
        c = self.config
        tokens = height // PATCH[1] * (width // PATCH[2])
        return kv_cache.empty(c.depth, batch, frames, tokens, c.heads, c.head_dim, c.dtype)

    def _check(self, x, timestep, text, causal, context, context_time, cache, start):
        """Rejects arguments that would fail deep inside, or compute something else."""
        c = self.config
        _expect("x", x, "B", "F", "H", "W", c.out_channels)
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x {x.shape} must have even H and W")
        if timestep.shape not in (x.shape[:1], x.shape[:2]):
            raise ValueError(f"timestep {timestep.shape} must be {x.shape[:1]} or {x.shape[:2]}")
        self._check_conditions(x, text if isinstance(text, Conditions) else Conditions(text, None))
        if causal is None and (context is not None or cache is not None):
            raise ValueError("context and cache need `causal`: which frames are a block?")
        if (cache is None) != (start is None) or (cache is not None and context is not None):
            raise ValueError("a cache needs `start`, and no `context`")
        if context is not None:
            _expect("context", context, *x.shape)
        self._check_context_time(x, context, context_time)
        if cache is not None:
            self._check_cache(x, causal, cache)

    def _check_context_time(self, x, context, context_time):
        if context_time is None:
            return
        if context is None:
            raise ValueError("context_time is the time of a `context`, and there is none")
        if jnp.shape(context_time) not in ((), x.shape[:1]):
            raise ValueError(
                f"context_time {jnp.shape(context_time)} must be () or {x.shape[:1]}: all frames "
                "of a context have one time"
            )

    def _check_conditions(self, x, cond):
        c = self.config
        if (cond.frames is None) != (c.in_channels == c.out_channels) or (cond.image is None) != (
            c.image_dim == 0
        ):
            raise ValueError(
                "an image-to-video network (in_channels > out_channels, or image_dim) needs its "
                "`Conditions`, and no other takes them"
            )
        _expect("text", cond.text, x.shape[0], "L", c.text_dim)
        if cond.frames is not None:
            _expect("frames", cond.frames, *x.shape[:-1], c.in_channels - c.out_channels)
        if cond.image is not None:
            _expect("image", cond.image, x.shape[0], "I", c.image_dim)

    def _check_cache(self, x, causal, cache):
        c, frames, slots = self.config, x.shape[1], cache.frames.shape[0]
        sizes = c.depth, x.shape[0], "slots", _grid(x).frame, c.heads, c.head_dim
        _expect("the keys of the cache", cache.keys, *sizes)
        if frames > causal.frames_per_block:
            raise ValueError(
                f"x has {frames} frames, but a block has {causal.frames_per_block}: with a cache, "
                "call the network for one block at a time"
            )
        if frames > slots:
            raise ValueError(f"{frames} frames do not fit a cache of {slots} frames")

    def _tokens(self, x, frames):
        """[B, F, H, W, C] -> [B, L, D]."""
        x = x if frames is None else jnp.concatenate([x, frames.astype(x.dtype)], axis=-1)
        return sharding.shard_tokens(self.patch(x))

    def _time(self, timestep):
        """[B] or [B, F] -> float32 [B, 1 or F, D]."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        embedding = self.time_mlp(timestep_embedding(timestep, self.config.freq_dim))
        return sharding.shard_batch(embedding)

    def _with_context(self, embedding, context_time, frames):
        """The embeddings of the context's frames, at its time, before those of x: [B, 2F, D]."""
        shape = (embedding.shape[0], frames, embedding.shape[-1])
        context = self._time(context_time)
        return jnp.concatenate(
            [jnp.broadcast_to(context, shape), jnp.broadcast_to(embedding, shape)], axis=1
        )

    def _conditions(self, text, image):
        """(text [B, L, D], image [B, I, D] or None) for the layers' cross-attention."""
        dtype = jnp.dtype(self.config.dtype)
        image = None if image is None else self.image_mlp(image)
        return self.text_mlp(text.astype(dtype)), image

    def _modulation(self, embedding):
        """float32 [B, F or 1, 6, D]."""
        modulation = self.modulation(jax.nn.silu(embedding))
        return sharding.shard_batch(rearrange(modulation, "b f (six d) -> b f six d", six=6))

    def _continue(self, tokens, embedding, conditions, grid, causal, cache, start):
        """The layers over one block and a cache: (tokens, a KVCache of the block's frames)."""
        ring = kv_cache.ring(causal, cache.slots)
        frames = start + jnp.arange(grid.frames)
        attend = over_cache(self.config, grid, causal, ring, cache.frames, frames)
        tokens, own = self._layers(tokens, embedding, conditions, attend, cache[:2])
        return tokens, kv_cache.KVCache(*own, frames)

    def _layers(self, tokens, embedding, conditions, attend, cached=None, features=()):
        """The scan over layers.

        Args:
            tokens: [B, L, D].
            attend: see `self_attention`.
            cached: (keys, values) of a KVCache.
            features: numbers of the layers whose tokens are returned.

        Returns:
            (tokens, the K/V that `attend` returned, stacked over layers); with `features`,
            (tokens, the tokens after these layers).
        """
        modulation = self._modulation(embedding)

        def body(tokens, layer):
            block, cached = layer
            block = sharding.gather(block, SHARDING_RULES)
            tokens, own = block(
                tokens, modulation, conditions, lambda layer, x: attend(layer, x, cached)
            )
            return sharding.shard_tokens(tokens), own

        how = dict(remat=self.config.remat, unroll=self.config.unroll)
        if features:
            return scan_with_taps(body, tokens, (self.blocks, cached), features, **how)
        return scan(body, tokens, (self.blocks, cached), **how)

    def _head(self, tokens, embedding, grid):
        """[B, L, D] -> [B, F, H, W, out_channels] in float32."""
        shift, scale = jnp.moveaxis(embedding[:, :, None] + self.head_offset[...], 2, 0)
        out = self.head(modulate(self.head_norm(tokens), scale, shift, jnp.float32))
        t, p, q = PATCH
        return rearrange(
            out,
            "b (f h w) (t p q c) -> b (f t) (h p) (w q) c",
            f=grid.frames,
            h=grid.height,
            t=t,
            p=p,
            q=q,
        )
