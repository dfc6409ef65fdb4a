"""The kernel for CUDA: cuDNN flash attention in 16 bits, one call for each group of a mask."""

import functools

import jax
import jax.numpy as jnp

from dmd_jax.models.attention import tiled
from dmd_jax.models.attention.masks import query_ranges
from dmd_jax.models.attention.padding import pad, visible_keys


def attend(q, k, v, visible, *, mask):
    """Attention on one device; arguments as of `attention`.

    cuDNN takes 16 bits and heads of at most 128 channels, a multiple of 8: all else is computed in
    tiles. Sequences are padded to even lengths, because jax has no gradient of the kernel at odd
    ones.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return tiled.attend(q, k, v, visible, mask=mask)
    out = []
    for start, stop, ranges in query_ranges(mask, q.shape[1], k.shape[1]):
        keys, values = (jnp.concatenate([x[:, a:b] for a, b in ranges], 1) for x in (k, v))
        shown = None if visible is None else jnp.concatenate([visible[a:b] for a, b in ranges])
        out.append(_attend_group(q[:, start:stop], keys, values, shown))
    return jnp.concatenate(out, axis=1)


def _attend_group(q, k, v, visible):
    """Queries that all attend to the same keys: those that are visible."""
    queries, (batch, keys) = q.shape[1], k.shape[:2]
    q, k, v = (pad(x, 2, 1) for x in (q, k, v))
    visible, lengths = visible_keys(visible, keys, 2), None
    if visible is not None:
        # The kernel takes a number of keys, or a mask [Lq, Lk], which would be too large. The order
        # of the keys does not matter: visible ones first, and their number.
        order = jnp.argsort(~visible, stable=True)
        k, v = (jnp.take(x, order, axis=1) for x in (k, v))
        lengths = jnp.full(batch, jnp.sum(visible), jnp.int32)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q, k, v, key_value_seq_lengths=lengths)[:, :queries]
