"""The kernel for TPU: splash attention (Pallas), which computes the mask inside the kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from dmd_jax.models.attention.masks import Mask
from dmd_jax.models.attention.padding import pad, visible_keys


@dataclasses.dataclass(frozen=True)
class _SplashMask(splash_attention.splash_attention_mask.Mask):
    """A mask in splash's interface: an array that it can slice, and a function for the kernel.

    Attributes:
        mask: ours.
        queries, keys: lengths with padding.
        real_queries: the first so many queries are not padding.
    """

    mask: Mask
    queries: int
    keys: int
    real_queries: int

    def __call__(self, group, kv_index):
        return self.mask.group_allows(group, kv_index)

    @property
    def shape(self):
        return self.queries, self.keys

    @functools.cached_property
    def q_sequence(self):
        """int32 [queries], what the kernel passes to `__call__`: the group of each query.

        Padding joins the group of the last query: a group of its own could cost a block of keys.
        """
        index = np.minimum(np.arange(self.queries), self.real_queries - 1)
        return self.mask.group(index).astype(np.int32)

    @property
    def mask_function(self):
        return self

    def __getitem__(self, index):
        """Part of the mask, [rows, columns]; computed once per group, for the sake of time."""
        rows, columns = index
        groups, row_group = np.unique(self.q_sequence[rows], return_inverse=True)
        return self(groups[:, None], np.arange(self.keys)[columns])[row_group]


def _block_size(length, most):
    """The largest block, from `most` tokens down to 128, whose padding is at most a quarter."""
    sizes = [size for size in (1024, 512, 256) if size <= most]
    return next((size for size in sizes if -length % size <= length // 4), 128)


def _over_first(kernel, count, shape, blocks):
    """A kernel without a mask that computes with the first `count` blocks of keys alone.

    The kernel reads from arrays of scalars, which may be traced, what to do for each pair of a
    block of queries and one of keys: 0 to skip it, and which block to fetch. For a pair that is
    skipped that is one that was fetched before. Only the gradient of the keys still fetches their
    hidden blocks, for it writes zeros there.

    Args:
        count: int32 [], 1 or more.
        shape: lengths of queries and keys, with padding.
        blocks: the sizes of `splash_attention.BlockSizes`.
    """

    def scalars(info, block_q, block_k, *, by_keys=False):
        queries, keys = np.indices((1, shape[0] // block_q, shape[1] // block_k))[1:]
        run = keys < count
        fetched = jnp.where(run, queries, 0) if by_keys else jnp.minimum(keys, count - 1)
        return info._replace(data_next=fetched, block_mask=2 * run.astype(jnp.int32))

    forward = scalars(kernel.fwd_mask_info, blocks["block_q"], blocks["block_kv"])
    of_queries = scalars(kernel.dq_mask_info, blocks["block_q_dq"], blocks["block_kv_dq"])
    of_keys = scalars(
        kernel.dkv_mask_info, blocks["block_q_dkv"], blocks["block_kv_dkv"], by_keys=True
    )
    return type(kernel)(forward, of_queries, of_keys, **kernel.kwargs)


def attend(q, k, v, visible, *, mask, interpret=False):
    """Attention on one device, in blocks of splash's grid; arguments as of `attention`."""
    (_, queries, heads, width), keys = q.shape, k.shape[1]
    block_q, block_k = _block_size(queries, 512), _block_size(keys, 1024)
    blocks = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q)
    blocks |= dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), block_k)
    blocks |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(block_k, 512))
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = (
        pad(x, block, 1).swapaxes(1, 2) for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    shape = q.shape[2], k.shape[2]
    head_mask = splash_attention.splash_attention_mask.FullMask(shape)
    if mask is not None:
        head_mask = _SplashMask(mask, *shape, real_queries=queries)
    kernel = splash_attention.make_splash_mha(
        splash_attention.splash_attention_mask.MultiHeadMask([head_mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(**blocks),
        interpret=interpret,
    )
    if mask is None and visible is not None:
        kernel = _over_first(kernel, (visible + block_k - 1) // block_k, shape, blocks)
    segments = None
    if (visible := visible_keys(visible, keys, block_k)) is not None:
        # Attention stays within a segment: all queries are in segment 1, hidden keys in segment 0.
        segments = splash_attention.SegmentIds(
            jnp.ones(shape[0], jnp.int32), (jnp.arange(shape[1]) < visible).astype(jnp.int32)
        )
    out = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return out.swapaxes(1, 2)[:, :queries].astype(q.dtype)
