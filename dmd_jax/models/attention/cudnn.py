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
        shown = visible
        if visible is not None:
            shown = sum(jnp.clip(visible - a, 0, b - a) for a, b in ranges)
        out.append(_attend_group(q[:, start:stop], keys, values, shown))
    return jnp.concatenate(out, axis=1)


def _attend_group(q, k, v, visible):
    """Queries that all attend to the same keys: the first `visible`."""
    queries, (batch, keys) = q.shape[1], k.shape[:2]
    q, k, v = (pad(x, 2, 1) for x in (q, k, v))
    visible = visible_keys(visible, keys, 2)
    lengths = None if visible is None else jnp.full(batch, visible, jnp.int32)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q, k, v, key_value_seq_lengths=lengths)[:, :queries]
