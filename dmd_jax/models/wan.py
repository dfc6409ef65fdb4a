"""Wan 2.1 and 2.2: a transformer over video latents (Wan Team 2025, arXiv 2503.20314).

One class for all its uses. Bidirectional by default; `causal` makes the same weights see blocks of
frames in order (CausVid, Yin et al. 2025), `context` is the clean video of teacher forcing, and
`cache` continues a video block by block (Self-Forcing, Huang et al. 2025). Imports jax, flax, the
infrastructure room and the attention beside it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import BlockCausal, TeacherForcing, attention
from dmd_jax.models.layers import MLP, check_compute, linear, scan, stack, timestep_embedding

P = jax.P
PATCH = (1, 2, 2)

# Which axes of which weight are split; see sharding.py. Rules speak of the trailing axes.
SHARDING_RULES = (
    (r"(query|key|value|up|modulation)/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"patch/kernel$", P(None, None, None, None, "fsdp")),
    (r"head/kernel$", P("fsdp", None)),
    (r"(bias|scale|offset)$", P()),
)


class Conditions(NamedTuple):
    """What an image-to-video network is told. Others take the text alone."""

    text: jax.Array  # [B, L, text_dim]
    frames: jax.Array  # [B, F, H, W, in_channels - out_channels], beside the latents of the video
    image: jax.Array | None = None  # [B, I, image_dim]: CLIP's features, where image_dim is not 0


@dataclasses.dataclass(frozen=True)
class Causal:
    """Which frames a frame sees, where a video is made block by block.

    Attributes:
        frames_per_block: frames that are made together and see each other.
        first_alone: the first frame is a block of its own (an image to start from).
        window: only the last so many frames, up to the end of the block itself, which counts as
            whole even if a video ends within it; None for all.
        sink: the first frames of the video, which are always seen.

    Raises:
        ValueError: a number is out of range, or a window is smaller than a block.
    """

    frames_per_block: int = 3
    first_alone: bool = False
    window: int | None = None
    sink: int = 0

    def __post_init__(self):
        if self.frames_per_block < 1 or self.sink < 0:
            raise ValueError(
                f"frames_per_block={self.frames_per_block} must be 1 or more, sink={self.sink} 0 "
                "or more"
            )
        if self.window is not None and self.window < self.frames_per_block:
            raise ValueError(
                f"window={self.window} is smaller than frames_per_block={self.frames_per_block}"
            )

    def mask(self, tokens_per_frame):
        """The same as a mask of `attention`."""
        return BlockCausal(tokens_per_frame, **dataclasses.asdict(self))

    def ring(self, slots, frames, reach):
        """How a cache of `slots` frames is used, where `frames` frames are made at once.

        Raises:
            ValueError: it holds other than the window and the sink, or too few for these frames.
        """
        if self.window is not None and slots != self.window + self.sink:
            raise ValueError(
                f"a cache of {slots} frames for window={self.window} and sink={self.sink}: it must "
                f"hold {self.window + self.sink}"
            )
        # Where everything is seen, no frame has to be kept from leaving.
        sink = 0 if self.window is None else self.sink
        if frames > slots - sink:
            raise ValueError(
                f"{frames} frames at once do not fit a cache of {slots} frames, {sink} of them for "
                "the sink"
            )
        return kv_cache.Ring(slots, sink, reach)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """A Wan transformer in plain values. The presets are at the end of this file.

    Attributes:
        dim, ffn, heads, depth: width, hidden width of the feed-forward layers, attention heads,
            layers.
        in_channels, out_channels: of the latents; the input of an image-to-video network has more
            channels than its output (`Conditions.frames`).
        text_dim: width of the text embeddings.
        image_dim: width of the image features that are attended beside the text; 0 for none.
        freq_dim: sinusoids of the time.
        reach: latent frames of the videos that the weights were trained on. A cache shows its sink
            no farther away than that, so that rollouts may be longer.
        dtype: what the layers compute in, "float32" or "bfloat16"; norms, modulation, rotations and
            softmax are float32 in both.
        remat: what the backward pass keeps of a layer: "none" recomputes nothing, "full"
            everything, any other name is one of `jax.checkpoint_policies`.
        unroll: how many layers a turn of the scan holds.

    Raises:
        ValueError: the heads do not divide the width into an even number of channels, the output
            has more channels than the input, or the dtype or the policy is unknown.
    """

    dim: int
    ffn: int
    heads: int
    depth: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    image_dim: int = 0
    freq_dim: int = 256
    reach: int = 21
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"heads={self.heads} must divide dim={self.dim} into an even number of channels"
            )
        if self.out_channels > self.in_channels:
            raise ValueError(
                f"out_channels={self.out_channels} is more than in_channels={self.in_channels}"
            )
        check_compute(self.dtype, self.remat)

    @property
    def head_dim(self):
        """Channels of one head."""
        return self.dim // self.heads

    @property
    def rope_dims(self):
        """Channels of a head that time, height and width rotate."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


def _layer_norm(dim, *, learned, eps=1e-6, rngs):
    return nnx.LayerNorm(
        dim, epsilon=eps, use_bias=learned, use_scale=learned, dtype=jnp.float32, rngs=rngs
    )


class Patch(nnx.Module):
    """Each 1 x 2 x 2 patch of the latents becomes a token: [B, F, H, W, C] -> [B, F, T, D]."""

    def __init__(self, channels, dim, *, dtype, rngs):
        self.dtype = dtype
        init = nnx.initializers.xavier_uniform(in_axis=(0, 1, 2, 3))
        self.kernel = nnx.Param(init(rngs.params(), (*PATCH, channels, dim)))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x):
        t, p, q = PATCH
        patches = rearrange(
            x, "b (f t) (h p) (w q) c -> b f (h w) (t p q c)", t=t, p=p, q=q
        ).astype(self.dtype)
        kernel = rearrange(self.kernel[...], "t p q c d -> (t p q c) d").astype(self.dtype)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys are normalised over all heads together."""

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
        return self.out(rearrange(attended, "b l n h -> b l (n h)"))


class CrossAttention(Attention):
    """Attends to the text and, where there are image features, to them, and adds the two."""

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
        self.norm = _layer_norm(c.dim, learned=False, rngs=rngs)
        self.self_attention = Attention(c, rngs=rngs)
        self.cross_norm = _layer_norm(c.dim, learned=True, rngs=rngs)
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
            attend: (this layer's self-attention, its input) -> (output [B, L, N, H], aux).

        Returns:
            (tokens, aux).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(
            modulation + self.offset[...], 2, 0
        )
        attended, aux = attend(
            self.self_attention, _modulate(self.norm(x), scale1, shift1, x.dtype)
        )
        x = _add(x, self.self_attention.project(attended), gate1)
        x = x + self.cross_attention(self.cross_norm(x).astype(x.dtype), *conditions)
        fed = self.ffn(_modulate(self.norm(x), scale2, shift2, x.dtype))
        return _add(x, fed, gate2), aux


def _per_frame(x, frames):
    """Tokens [B, L, D] by the frames that share a modulation: [B, F, L / F, D]."""
    return rearrange(x, "b (f t) d -> b f t d", f=frames)


def _modulate(x, scale, shift, dtype):
    """x (1 + scale) + shift in float32; x [B, L, D], scale and shift [B, F or 1, D]."""
    grouped = _per_frame(x, scale.shape[1])
    out = grouped * (1 + scale[:, :, None]) + shift[:, :, None]
    return rearrange(out, "b f t d -> b (f t) d").astype(dtype)


def _add(x, update, gate):
    """x + gate update in float32, in the dtype of x."""
    gated = _per_frame(update.astype(jnp.float32), gate.shape[1]) * gate[:, :, None]
    return (x.astype(jnp.float32) + rearrange(gated, "b f t d -> b (f t) d")).astype(x.dtype)


def _angles(dim, length):
    """Rotations of `dim` channels at positions 0 ... length - 1: complex128 [length, dim / 2]."""
    frequencies = 1e4 ** (-np.arange(0, dim, 2) / dim)
    return np.exp(1j * np.outer(np.arange(length), frequencies))


def rotations(rope_dims, times, height, width, length):
    """The rotary embedding of frames of height x width tokens (Su et al. 2021).

    Args:
        rope_dims: channels of a head for time, height and width.
        times: int32 [F], positions of the frames in [0, length): may be traced.

    Returns:
        (cos, sin), float32 [F, T, 1, head_dim / 2], rounded once from float64.
    """
    temporal, rows, columns = (
        _angles(dim, n) for dim, n in zip(rope_dims, (length, height, width), strict=True)
    )
    spatial = np.concatenate(
        [repeat(rows, "h d -> (h w) d", w=width), repeat(columns, "w d -> (h w) d", h=height)], -1
    )

    def both(part):
        time = jnp.asarray(part(temporal), jnp.float32)[times]
        space = jnp.asarray(part(spatial), jnp.float32)
        shape = (time.shape[0], height * width)
        time = jnp.broadcast_to(time[:, None], (*shape, time.shape[-1]))
        return jnp.concatenate([time, jnp.broadcast_to(space, (*shape, space.shape[-1]))], -1)

    return both(np.real)[:, :, None], both(np.imag)[:, :, None]


def rotate(x, cos, sin):
    """Turns adjacent pairs of channels: x [B, F, T, N, H], cos and sin [F, T, 1, H / 2]."""
    pairs = rearrange(x.astype(jnp.float32), "... (h two) -> ... h two", two=2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return rearrange(turned, "... h two -> ... (h two)").astype(x.dtype)


def _rotate_tokens(x, cos, sin):
    """`rotate` of tokens in a row: x [B, F T, N, H]."""
    by_frame = rearrange(x, "b (f t) n h -> b f t n h", f=cos.shape[0])
    return rearrange(rotate(by_frame, cos, sin), "b f t n h -> b (f t) n h")


def _expect(name, array, *sizes):
    """Raises ValueError where an array has other sizes; a size in words may be any number."""
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
        self.head_norm = _layer_norm(c.dim, learned=False, rngs=rngs)
        self.head_offset = nnx.Param(jax.random.normal(rngs.params(), (2, c.dim)) / c.dim**0.5)
        self.head = linear(c.dim, c.out_channels * int(np.prod(PATCH)), rngs=rngs, zero=True)

    def __call__(self, x, timestep, text, *, causal=None, context=None, cache=None, start=None):
        """The velocity eps - x0 of noisy latents.

        Args:
            x: latents [B, F, H, W, C] with even H and W, C = out_channels.
            timestep: 0 ... 1000, [B], or [B, F] for a time of each frame's own.
            text: [B, L, text_dim], of which every row is attended, the zeros of the padding too;
                or `Conditions`.
            causal: a Causal for blocks of frames in order; None sees everything.
            context: clean latents [B, F, H, W, C]: the blocks of x see the clean blocks before
                them (teacher forcing). Needs `causal`.
            cache: a KVCache of `empty_cache`: x is the next block of a video, or the same one
                again. Needs `causal` and `start`.
            start: with a cache, int32 []: the number of the first frame of x in the video.

        Returns:
            [B, F, H, W, out_channels] in float32; with a cache, (that, the new cache).

        Raises:
            ValueError: shapes or arguments that do not go together.
        """
        self._check(x, timestep, text, causal, context, cache, start)
        frames, image = None, None
        if isinstance(text, Conditions):
            text, frames, image = text
        height, width = x.shape[2] // PATCH[1], x.shape[3] // PATCH[2]
        tokens = self._tokens(x, frames)
        embedding = self._time(timestep)
        if context is not None:
            tokens = jnp.concatenate([self._tokens(context, frames), tokens], axis=1)
            embedding = self._with_clean(embedding, x.shape[1])
        conditions = self._conditions(text, image)
        geometry = (x.shape[1], height, width)
        if cache is None:
            tokens = self._see_all(tokens, embedding, conditions, geometry, causal, context)
        else:
            tokens, cache = self._continue(
                tokens, embedding, conditions, geometry, causal, cache, start
            )
        if context is not None:
            tokens = tokens[:, -x.shape[1] * height * width :]
            embedding = embedding[:, -x.shape[1] :]
        velocity = self._head(tokens, embedding, geometry)
        return velocity if cache is None else (velocity, cache)

    def empty_cache(self, batch, frames, height, width):
        """A cache for `frames` frames of [H, W] latents.

        With a window, these are its own and the sink's; without, all that the video will have.
        """
        c = self.config
        tokens = height // PATCH[1] * (width // PATCH[2])
        return kv_cache.empty(c.depth, batch, frames, tokens, c.heads, c.head_dim, c.dtype)

    def _check(self, x, timestep, text, causal, context, cache, start):
        """Refuses what would fail deep inside, or mean something else."""
        c = self.config
        _expect("x", x, "B", "F", "H", "W", c.out_channels)
        batch, _, height, width, _ = x.shape
        if height % 2 or width % 2:
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
        if cache is not None:
            tokens = height // PATCH[1] * (width // PATCH[2])
            sizes = c.depth, batch, "slots", tokens, c.heads, c.head_dim
            _expect("the keys of the cache", cache.keys, *sizes)

    def _check_conditions(self, x, told):
        c = self.config
        if (told.frames is None) != (c.in_channels == c.out_channels) or (told.image is None) != (
            c.image_dim == 0
        ):
            raise ValueError(
                "an image-to-video network (in_channels > out_channels, or image_dim) needs its "
                "`Conditions`, and no other takes them"
            )
        _expect("text", told.text, x.shape[0], "L", c.text_dim)
        if told.frames is not None:
            _expect("frames", told.frames, *x.shape[:-1], c.in_channels - c.out_channels)
        if told.image is not None:
            _expect("image", told.image, x.shape[0], "I", c.image_dim)

    def _tokens(self, x, frames):
        x = x if frames is None else jnp.concatenate([x, frames.astype(x.dtype)], axis=-1)
        tokens = rearrange(self.patch(x), "b f t d -> b (f t) d")
        return sharding.shard_tokens(tokens)

    def _time(self, timestep):
        """[B] or [B, F] -> float32 [B, 1 or F, D]."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        embedding = self.time_mlp(timestep_embedding(timestep, self.config.freq_dim))
        return sharding.shard_batch(embedding)

    def _with_clean(self, embedding, frames):
        """The embeddings of clean frames at time 0 before those of the noisy ones: [B, 2F, D]."""
        shape = (embedding.shape[0], frames, embedding.shape[-1])
        clean = self._time(jnp.zeros(shape[:1]))
        return jnp.concatenate(
            [jnp.broadcast_to(clean, shape), jnp.broadcast_to(embedding, shape)], axis=1
        )

    def _conditions(self, text, image):
        """(text, image or None), as the layers attend to them."""
        dtype = jnp.dtype(self.config.dtype)
        image = None if image is None else self.image_mlp(image)
        return self.text_mlp(text.astype(dtype)), image

    def _see_all(self, tokens, embedding, conditions, geometry, causal, context):
        """All layers over the whole sequence at once; tokens [B, L, D]."""
        frames, height, width = geometry
        mask = causal and causal.mask(height * width)
        times = np.arange(frames)
        if context is not None:
            mask, times = TeacherForcing(mask, frames * height * width), np.tile(times, 2)
        cos, sin = rotations(self.config.rope_dims, times, height, width, frames)

        def attend(layer, x):
            query = _rotate_tokens(layer.queries(x), cos, sin)
            key = _rotate_tokens(layer.keys(x), cos, sin)
            return attention(query, key, layer.values(x), mask=mask), None

        modulation = self._modulation(embedding)

        def body(tokens, block):
            block = sharding.gather(block, SHARDING_RULES)
            tokens, _ = block(tokens, modulation, conditions, attend)
            return sharding.shard_tokens(tokens), None

        c = self.config
        return scan(body, tokens, self.blocks, remat=c.remat, unroll=c.unroll)[0]

    def _continue(self, tokens, embedding, conditions, geometry, causal, cache, start):
        """All layers over one block, which also sees what the cache holds: (tokens, cache)."""
        frames, height, width = geometry
        ring = causal.ring(cache.frames.shape[0], frames, self.config.reach)
        own = start + jnp.arange(frames)
        slots = ring.slot(own)
        held = cache.frames.at[slots].set(own)
        dims, length = self.config.rope_dims, ring.table
        end = start + frames

        def turn(which):
            return rotations(dims, ring.positions(which, end), height, width, length)

        own_turn, held_turn = turn(own), turn(held)
        mask = causal.mask(1)  # of frames
        seen = mask.sees(jnp.maximum(mask.reach(start), end), held) & (held != kv_cache.EMPTY)
        visible = jnp.repeat(seen, height * width)

        def attend(layer, x, kept):
            key, value = (
                old.at[:, slots].set(rearrange(new, "b (f t) n h -> b f t n h", f=frames))
                for old, new in zip(kept, (layer.keys(x), layer.values(x)), strict=True)
            )
            query = _rotate_tokens(layer.queries(x), *own_turn)
            in_a_row = "b f t n h -> b (f t) n h"
            turned = rearrange(rotate(key, *held_turn), in_a_row)
            out = attention(query, turned, rearrange(value, in_a_row), visible=visible)
            # What later blocks see of this one is a constant to them.
            return out, jax.lax.stop_gradient((key, value))

        modulation = self._modulation(embedding)

        def body(tokens, layer):
            block, kept = layer
            block = sharding.gather(block, SHARDING_RULES)
            tokens, kept = block(
                tokens, modulation, conditions, lambda layer, x: attend(layer, x, kept)
            )
            return sharding.shard_tokens(tokens), kept

        c = self.config
        layers = (self.blocks, (cache.keys, cache.values))
        tokens, (keys, values) = scan(body, tokens, layers, remat=c.remat, unroll=c.unroll)
        return tokens, kv_cache.KVCache(keys, values, held)

    def _modulation(self, embedding):
        """float32 [B, F or 1, 6, D]."""
        modulation = self.modulation(jax.nn.silu(embedding))
        return sharding.shard_batch(rearrange(modulation, "b f (six d) -> b f six d", six=6))

    def _head(self, tokens, embedding, geometry):
        shift, scale = jnp.moveaxis(embedding[:, :, None] + self.head_offset[...], 2, 0)
        out = self.head(_modulate(self.head_norm(tokens), scale, shift, jnp.float32))
        frames, height, _ = geometry
        t, p, q = PATCH
        return rearrange(
            out, "b (f h w) (t p q c) -> b (f t) (h p) (w q) c", f=frames, h=height, t=t, p=p, q=q
        )


class ImageMLP(nnx.Module):
    """CLIP's features as the layers attend to them: [B, I, inputs] -> [B, I, D]."""

    def __init__(self, inputs, dim, *, dtype, rngs):
        self.norm_in = _layer_norm(inputs, learned=True, eps=1e-5, rngs=rngs)
        self.mlp = MLP(inputs, inputs, dim, activation=exact_gelu, dtype=dtype, rngs=rngs)
        self.norm_out = _layer_norm(dim, learned=True, eps=1e-5, rngs=rngs)

    def __call__(self, x):
        return self.norm_out(self.mlp(self.norm_in(x))).astype(self.mlp.up.dtype)


class Experts(nnx.Module):
    """Wan 2.2's pair of networks: one for high noise, one for low.

    Attributes:
        high, low: the networks, of one configuration.
        boundary: the timestep, 0 ... 1000, from which on the first is asked.
    """

    def __init__(self, high, low, boundary):
        self.high, self.low, self.boundary = high, low, boundary

    @property
    def config(self):
        """Of both."""
        return self.high.config

    def __call__(self, x, timestep, text):
        """As a bidirectional Wan; all samples of a batch have one timestep, as samplers give it."""
        return jax.lax.cond(
            timestep.reshape(-1)[0] >= self.boundary,
            lambda: self.high(x, timestep, text),
            lambda: self.low(x, timestep, text),
        )


def exact_gelu(x):
    """GELU by the error function, not by its approximation with tanh."""
    return jax.nn.gelu(x, approximate=False)


T2V_1_3B = WanConfig(dim=1536, ffn=8960, heads=12, depth=30)
T2V_14B = WanConfig(dim=5120, ffn=13824, heads=40, depth=40)
I2V_14B = dataclasses.replace(T2V_14B, in_channels=36, image_dim=1280)
# Wan 2.2. The A14B networks come in pairs, one for high noise and one for low, of one shape.
TI2V_5B = WanConfig(dim=3072, ffn=14336, heads=24, depth=30, in_channels=48, out_channels=48)
T2V_A14B = T2V_14B
I2V_A14B = dataclasses.replace(T2V_14B, in_channels=36)
TINY = WanConfig(dim=96, ffn=256, heads=4, depth=4, text_dim=64)
