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

from dmd_jax.models import kv_cache
from dmd_jax.models.attention import BlockCausal, TeacherForcing, attention
from dmd_jax.models.wan.rope import rotate, rotate_tokens, rotations


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
    cos, sin = rotations(config.rope_dims, times, grid.height, grid.width, grid.frames)

    def attend(layer, x, _):
        query = rotate_tokens(layer.queries(x), cos, sin)
        key = rotate_tokens(layer.keys(x), cos, sin)
        return attention(query, key, layer.values(x), mask=mask), None

    return attend


def over_cache(config, grid, causal, ring, cached_frames, own_frames):
    """The frames of one block, which attend to themselves and to the earlier frames of a cache.

    Frames of the cache from the block's own first frame on are masked: an earlier call for the same
    block may have written them, or, where a finished rollout is evaluated again, later blocks.
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
    length = max(config.reach, causal.most_visible or ring.slots)

    def rotation(frames):
        positions = ring.positions(frames, end, length)
        return rotations(config.rope_dims, positions, grid.height, grid.width, length)

    own_rotation, cached_rotation = rotation(own_frames), rotation(cached_frames)
    mask = BlockCausal(causal)  # over frames: their numbers are the indices
    # Traced numbers are not checked: frames that are not a block of `causal` still see each other.
    block_end = jnp.maximum(mask.group(start), end)
    earlier = (cached_frames != kv_cache.EMPTY) & (cached_frames < start)
    allowed = jnp.concatenate(
        [mask.group_allows(block_end, cached_frames) & earlier, jnp.ones(grid.frames, bool)]
    )
    visible = jnp.repeat(allowed, grid.frame)

    def in_a_row(cached, own):
        return rearrange(jnp.concatenate([cached, own], 1), "b f t n h -> b (f t) n h")

    def attend(layer, x, cached):
        own = layer.keys(x), layer.values(x)
        own = tuple(rearrange(y, "b (f t) n h -> b f t n h", f=grid.frames) for y in own)
        query = rotate_tokens(layer.queries(x), *own_rotation)
        key = in_a_row(rotate(cached[0], *cached_rotation), rotate(own[0], *own_rotation))
        value = in_a_row(cached[1], own[1])
        return attention(query, key, value, visible=visible), jax.lax.stop_gradient(own)

    return attend
