"""Attention by its formula, its masks in plain words, and the comparison that its tests share."""

import foreign
import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.models.attention import BlockCausal

# Sums of some hundred products in float32 (6e-8 each), then an exponential, in the norm.
ROUNDING = 3e-6
# The same with inputs and results of 8 bits (4e-3 each).
ROUNDING_BF16 = 1e-2


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


def dense(q, k, v, *, mask=None, visible=None):
    """Attention by its formula, in float32 or float64, with all scores in memory."""
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(q.shape[-1])
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(plain(mask, q.shape[1]), scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), v)


def inputs(queries, keys=None, batch=1, heads=2, width=8, dtype=jnp.float32):
    """(q, k, v) with scores of several units: a softmax that is neither flat nor a maximum."""
    keys = keys or queries
    lengths = {"q": queries, "k": keys, "v": keys}
    return tuple(
        jnp.asarray(foreign.tensor(name, (batch, length, heads, width), 1.5), dtype)
        for name, length in lengths.items()
    )


def with_gradients(f):
    """f -> (out, gradients of its product with a fixed direction by q, k and v), compiled."""

    def value(q, k, v, *visible):
        out = f(q, k, v, *visible)
        direction = foreign.tensor("direction", out.shape)
        return jnp.vdot(out.astype(jnp.float32), direction), out

    def both(q, k, v, *visible):
        gradients, out = jax.grad(value, (0, 1, 2), has_aux=True)(q, k, v, *visible)
        return out, *gradients

    return jax.jit(both)


def assert_same(outputs, wanted, tolerance=ROUNDING):
    for name, a, b in zip(("out", "dq", "dk", "dv"), outputs, wanted, strict=True):
        assert a.shape == b.shape, name
        assert foreign.relative_error(a, b) < tolerance, name
