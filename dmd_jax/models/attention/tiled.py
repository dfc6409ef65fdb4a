"""The kernel for every other platform: plain jax in float32, in tiles of queries and keys.

The forward pass keeps a running maximum and sum of each query's softmax; the backward pass computes
the scores again (FlashAttention, Dao et al. 2022). Memory grows with the length, not its square.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.models.attention.masks import query_ranges
from dmd_jax.models.attention.padding import pad, visible_keys

# The score of a masked key. Finite, because a tile may hold nothing else, and the difference of two
# infinities is not a number; softmax turns it into zero all the same.
MASKED = -1e30

# Keys of a tile, and its queries if there are no fewer keys. The fastest on two cores.
TILE = 768


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, visible, mask):
    return _forward(q, k, v, visible, mask)[0]


def _forward(q, k, v, visible, mask):
    """(out [B, Lq, N, H], what `_backward` needs)."""
    size_q, size_k, pairs, allowed = _tiles(mask, visible, q.shape[1], k.shape[1])

    def of_head(tiles):
        q, k, v = (x.astype(jnp.float32) for x in tiles)
        q = q * q.shape[-1] ** -0.5

        def of_pair(sums, pair):
            out, total, largest = sums
            i, j = pair
            scores = jnp.where(allowed(i, j), q[i] @ k[j].T, MASKED)
            highest = jnp.maximum(largest[i], jnp.max(scores, axis=1))
            weights, kept = jnp.exp(scores - highest[:, None]), jnp.exp(largest[i] - highest)
            return (
                out.at[i].set(out[i] * kept[:, None] + weights @ v[j]),
                total.at[i].set(total[i] * kept + jnp.sum(weights, axis=1)),
                largest.at[i].set(highest),
            ), None

        zeros = jnp.zeros(q.shape[:2])
        sums = jnp.zeros_like(q), zeros, zeros + MASKED
        (out, total, largest), _ = jax.lax.scan(of_pair, sums, pairs)
        return out / total[..., None], largest + jnp.log(total)

    tiles = _cut(q, size_q), _cut(k, size_k), _cut(v, size_k)
    out, log_total = jax.lax.map(of_head, tiles)
    out = _join(out, q)
    return out, (q, k, v, visible, out, log_total)


def _backward(mask, saved, gradient):
    """Gradients of q, k and v.

    Scores are computed as [keys, queries]: no product then transposes anything as large as a tile.
    """
    q, k, v, visible, out, log_total = saved
    size_q, size_k, pairs, allowed = _tiles(mask, visible, q.shape[1], k.shape[1])
    # The softmax subtracts it from the gradient of every score of a query: [B, Lq, N].
    mean = jnp.einsum("bqnh,bqnh->bqn", *(x.astype(jnp.float32) for x in (gradient, out)))

    def of_head(tiles):
        q, gradient, log_total, mean, k, v = (x.astype(jnp.float32) for x in tiles)
        scale = q.shape[-1] ** -0.5
        q = q * scale

        def of_pair(sums, pair):
            dq, dk, dv = sums
            i, j = pair
            scores = jnp.where(allowed(i, j).T, k[j] @ q[i].T, MASKED)
            weights = jnp.exp(scores - log_total[i])
            d_scores = weights * (v[j] @ gradient[i].T - mean[i])
            return (
                dq.at[i].add(k[j].T @ d_scores),
                dk.at[j].add(d_scores @ q[i]),
                dv.at[j].add(weights @ gradient[i]),
            ), None

        sums = jnp.zeros_like(q.swapaxes(1, 2)), jnp.zeros_like(k), jnp.zeros_like(v)
        (dq, dk, dv), _ = jax.lax.scan(of_pair, sums, pairs)
        return scale * dq.swapaxes(1, 2), dk, dv

    of_queries = _cut(q, size_q), _cut(gradient, size_q), log_total, _cut(mean, size_q)
    dq, dk, dv = jax.lax.map(of_head, (*of_queries, _cut(k, size_k), _cut(v, size_k)))
    return _join(dq, q), _join(dk, k), _join(dv, v), None


_attend.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="mask")
def attend(q, k, v, visible, *, mask):
    """Attention on one device; arguments as of `attention`."""
    return _attend(q, k, v, visible, mask)


@functools.partial(jax.jit, static_argnames="mask")
def attend_forward(q, k, v, visible, *, mask):
    """`attend` with a jvp, which needs no more memory; its reverse mode would store every tile."""
    return _forward(q, k, v, visible, mask)[0]


def _tiles(mask, visible, queries, keys):
    """Tiles of queries and of keys, of one size each; the last of a sequence is padded with zeros.

    Returns:
        (queries of a tile, keys of a tile, pairs, allowed): pairs, int32 [pairs, 2], are the tiles
        (of queries, of keys) with anything to attend to; allowed(i, j), bool [Tq, Tk], is the mask
        between tile i of the queries and tile j of the keys.
    """
    size_k = _tile_size(keys, TILE)
    size_q = _tile_size(queries, TILE * TILE // size_k)
    visible = visible_keys(visible, keys, size_k)
    pairs = {
        (i, j)
        for start, stop, ranges in query_ranges(mask, queries, keys)
        for i in range(start // size_q, -(-stop // size_q))
        for first, end in ranges
        for j in range(first // size_k, -(-end // size_k))
    }

    def allowed(i, j):
        q_index, kv_index = i * size_q + jnp.arange(size_q), j * size_k + jnp.arange(size_k)
        tile = True if visible is None else kv_index < visible
        if mask is not None:
            tile &= mask.allows(q_index[:, None], kv_index)
        return jnp.broadcast_to(tile, (size_q, size_k))

    return size_q, size_k, np.array(sorted(pairs), np.int32), allowed


def _tile_size(length, most):
    """The size of as few equal tiles as possible, each of at most `most` tokens."""
    return -(-length // -(-length // most))


def _cut(x, size):
    """[B, L, N, ...] -> tiles of each sample and head, [B N, tiles, size, ...], zero-padded."""
    x = jnp.moveaxis(pad(x, size, 1), 2, 1)
    return x.reshape(-1, x.shape[2] // size, size, *x.shape[3:])


def _join(tiles, like):
    """The inverse of `_cut`, in the shape and dtype of `like` [B, L, N, H]."""
    batch, length, heads, width = like.shape
    whole = tiles.reshape(batch, heads, -1, width)[:, :, :length]
    return whole.swapaxes(1, 2).astype(like.dtype)
