"""The masks of attention in plain words, token by token."""

import numpy as np

from dmd_jax.models.attention import BlockCausal


def block_of(frame, mask):
    """The number of the block that a frame is in."""
    if mask.causal.first_alone:
        return 0 if frame == 0 else 1 + (frame - 1) // mask.causal.frames_per_block
    return frame // mask.causal.frames_per_block


def end_of(block, mask):
    """The number of frames up to the end of a block."""
    if mask.causal.first_alone:
        return 1 + block * mask.causal.frames_per_block
    return (block + 1) * mask.causal.frames_per_block


def causal_sees(mask, query, key):
    query, key = query // mask.tokens_per_frame, key // mask.tokens_per_frame
    block = block_of(query, mask)
    if block_of(key, mask) > block:
        return False
    if mask.causal.window is None or key < mask.causal.sink:
        return True
    return key >= end_of(block, mask) - mask.causal.window


def forced_sees(mask, query, key):
    blocks, half = mask.blocks, mask.half
    if query < half:
        return key < half and causal_sees(blocks, query, key)
    query -= half
    query_block = block_of(query // blocks.tokens_per_frame, blocks)
    key_block = block_of(key % half // blocks.tokens_per_frame, blocks)
    if key >= half:
        return key_block == query_block
    return key_block < query_block and causal_sees(blocks, query, key)


def plain(mask, length):
    """The mask by the functions above, token by token: bool [length, length]."""
    sees = causal_sees if isinstance(mask, BlockCausal) else forced_sees
    return np.array([[sees(mask, i, j) for j in range(length)] for i in range(length)])
