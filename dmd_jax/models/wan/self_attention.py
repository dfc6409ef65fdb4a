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
    """The frames of one block, which attend to themselves and to the frames of a cache.

    The block's K/V are constants for later blocks: `attend` returns them under stop_gradient. The
    block itself differentiates through them.

    Args:
        config: WanConfig.
        causal: Causal.
        ring: kv_cache.Ring.
        cached_frames: int32 [slots], of the KVCache.
        own_frames: int32 [F], numbers of the block's frames in the video.
    """
    slots, end = ring.slot(own_frames), own_frames[-1] + 1
    frames = cached_frames.at[slots].set(own_frames)
    length = max(config.reach, causal.most_visible or ring.slots)

    def rotation(frames):
        positions = ring.positions(frames, end, length)
        return rotations(config.rope_dims, positions, grid.height, grid.width, length)

    own_rotation, rotation_of_slots = rotation(own_frames), rotation(frames)
    mask = BlockCausal(causal)  # over frames: their numbers are the indices
    # Traced numbers are not checked: frames that are not a block of `causal` still see each other.
    block_end = jnp.maximum(mask.group(own_frames[0]), end)
    allowed = mask.group_allows(block_end, frames) & (frames != kv_cache.EMPTY)
    visible = jnp.repeat(allowed, grid.frame)

    def attend(layer, x, cached):
        own = layer.keys(x), layer.values(x)
        own = tuple(rearrange(y, "b (f t) n h -> b f t n h", f=grid.frames) for y in own)
        key, value = (old.at[:, slots].set(new) for old, new in zip(cached, own, strict=True))
        query = rotate_tokens(layer.queries(x), *own_rotation)
        key, value = (
            rearrange(y, "b f t n h -> b (f t) n h")
            for y in (rotate(key, *rotation_of_slots), value)
        )
        return attention(query, key, value, visible=visible), jax.lax.stop_gradient(own)

    return attend
