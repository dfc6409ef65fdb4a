"""Which frames attend to which: over a whole sequence, or from one block to a cache.

Both functions compute what all layers share (masks, rotations) and return `attend`, which the scan
over layers calls: (projections of a layer, their input [B, L, D], the layer's part of the cache or
None) -> (output [B, L, N, H], the K/V of the input or None).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dmd_jax.devices import sharding
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import BlockCausal, TeacherForcing, attention
from dmd_jax.models.wan.rope import rotate, rotations


class Grid(NamedTuple):
    """Tokens of a video."""

    frames: int
    height: int
    width: int

    @property
    def frame(self):
        """Tokens of a frame."""
        return self.height * self.width


def over_sequence(config, grid, causal, teacher_forcing):
    """All frames at once.

    Args:
        config: WanConfig.
        causal: Causal; None for a bidirectional network.
        teacher_forcing: the sequence is [clean | noisy]; both halves have the same positions.
    """
    mask = causal and BlockCausal(causal, grid.frame)
    times = np.arange(grid.frames)
    if teacher_forcing:
        mask, times = TeacherForcing(mask, grid.frames * grid.frame), np.tile(times, 2)
    rotation = rotations(config.rope_dims, times, grid.height, grid.width, grid.frames)
    rotation = tuple(map(_in_a_row, rotation))

    def attend(layer, x, _):
        query, key = rotate(layer.queries(x), *rotation), rotate(layer.keys(x), *rotation)
        return attention(query, key, layer.values(x), mask=mask), None

    return attend


def over_cache(config, grid, causal, ring, cached_frames, own_frames):
    """The frames of one block, which attend to themselves and to the earlier frames of a cache.

    Frames of the cache from the block's own first frame on are masked: an earlier call for the same
    block may have written them, or, where a finished rollout is evaluated again, later blocks.
    Attention takes the block's own keys and, after them, as many of the cache as can be visible,
    those that are first: so it needs no mask but their number.

    `attend` returns the block's own K/V under stop_gradient: later blocks see constants, the block
    itself does not.

    Args:
        config: WanConfig.
        causal: Causal.
        ring: kv_cache.Ring.
        cached_frames: int32 [slots], of the KVCache.
        own_frames: int32 [F], numbers of the block's frames in the video.
    """
    start, end = own_frames[0], own_frames[-1] + 1
    most = causal.most_visible or ring.slots
    length = max(config.reach, most)

    def rotation(frames):
        positions = ring.positions(frames, end, length)
        return rotations(config.rope_dims, positions, grid.height, grid.width, length)

    mask = BlockCausal(causal)  # over frames: their numbers are the indices
    # Traced numbers are not checked: frames that are not a block of `causal` still see each other.
    block_end = jnp.maximum(mask.group(start), end)
    earlier = (cached_frames != kv_cache.EMPTY) & (cached_frames < start)
    allowed = mask.group_allows(block_end, cached_frames) & earlier
    order = jnp.argsort(~allowed, stable=True)[: most - grid.frames]
    visible = (grid.frames + jnp.sum(allowed, dtype=jnp.int32)) * grid.frame
    own_rotation = tuple(map(_in_a_row, rotation(own_frames)))
    cached_rotation = rotation(cached_frames[order])

    def by_frame(own):
        return rearrange(own, "b (f t) n h -> b f t n h", f=grid.frames)

    def followed(own, cached):
        return jnp.concatenate([own, jax.vmap(_in_a_row)(cached)], axis=1)

    def attend(layer, x, cached):
        query = rotate(layer.queries(x), *own_rotation)
        # Split by heads, as the cache is: that is the larger part, and stays where it is.
        own_key, own_value = map(sharding.tokens_to_heads, (layer.keys(x), layer.values(x)))
        cached_key, cached_value = (x[:, order] for x in cached)
        key = followed(rotate(own_key, *own_rotation), rotate(cached_key, *cached_rotation))
        attended = attention(query, key, followed(own_value, cached_value), visible=visible)
        return attended, jax.lax.stop_gradient((by_frame(own_key), by_frame(own_value)))

    return attend


def _in_a_row(x):
    """[F, T, ...] by frame -> [F T, ...] by token."""
    return rearrange(x, "f t ... -> (f t) ...")
