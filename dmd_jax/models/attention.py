"""Attention: one function, with a kernel for each platform and no L x L array on any.

    tpu         splash attention (Pallas), masks computed inside the kernel
    cuda        cuDNN flash attention in 16 bits, one call per block of a mask
    all else    tiles of queries and keys, in float32

The platform is that of the mesh in force: a program for a TPU is compiled on a host without one.
Where there is a mesh, every device runs its kernel on its own sequences and heads; a sequence that
is split over `context` comes together by exchanging heads for tokens (Ulysses, Jacobs et al. 2023).
Masks are plain values, from which every kernel derives what it needs. Imports jax and `sharding`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from dmd_jax.devices.sharding import BATCH, P

# A score that softmax turns into zero, yet finite: hidden minus hidden is not NaN.
HIDDEN = -1e30

# Keys of a tile, and its queries where keys are no fewer. Chosen by time on two cores.
TILE = 768


class Mask:
    """Which keys a query sees, in two steps, so that the second needs comparisons alone.

    `reach(q_index)` sums a query up in one integer, equal for queries that see the same;
    `sees(reach, kv_index)` decides. Both work by element on numpy and jax integers and broadcast.
    """

    def allows(self, q_index, kv_index):
        """Whether the query at `q_index` sees the key at `kv_index`; both count from 0."""
        return self.sees(self.reach(q_index), kv_index)


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Frames in blocks: a query sees its own block and what came before it.

    With a window, of the keys before the end of its block the last `window` frames and the first
    `sink` frames.

    Attributes:
        tokens_per_frame: tokens of a frame.
        frames_per_block: frames of a block; the last block may have fewer.
        first_alone: the first frame is a block of its own (an image that is continued).
        window: in frames, own block included; None is all.
        sink: frames at the start that stay visible when the window has left them.

    Raises:
        ValueError: a size that is not positive, or a window shorter than a block.
    """

    tokens_per_frame: int
    frames_per_block: int = 1
    first_alone: bool = False
    window: int | None = None
    sink: int = 0

    def __post_init__(self):
        if min(self.tokens_per_frame, self.frames_per_block) < 1 or self.sink < 0:
            raise ValueError(
                "tokens_per_frame and frames_per_block must be at least 1, and sink at least 0: "
                f"{self}"
            )
        if self.window is not None and self.window < self.frames_per_block:
            raise ValueError(
                f"a window of {self.window} frames hides part of a query's own block: make it "
                f"at least frames_per_block ({self.frames_per_block})"
            )

    @property
    def block(self):
        """Tokens of a whole block."""
        return self.tokens_per_frame * self.frames_per_block

    def reach(self, q_index):
        """Where the query's block ends, in tokens, as if the last block were whole."""
        first = self.tokens_per_frame if self.first_alone else self.block
        return first + ((q_index - first) // self.block + 1) * self.block

    def sees(self, reach, kv_index):
        seen = kv_index < reach
        if self.window is None:
            return seen
        near = kv_index >= reach - self.window * self.tokens_per_frame
        return seen & (near | (kv_index < self.sink * self.tokens_per_frame))


@dataclasses.dataclass(frozen=True)
class TeacherForcing(Mask):
    """Clean frames followed by the same frames noisy: [clean | noisy].

    Clean queries see clean keys as `causal` says. Noisy queries see their own noisy block and,
    where `causal` would show them more, the clean keys of earlier blocks instead.

    Attributes:
        causal: the blocks, window and sink.
        half: tokens of one half.
    """

    causal: BlockCausal
    half: int

    def reach(self, q_index):
        """The end of the block within its half, as of BlockCausal; negative for noisy queries."""
        noisy = q_index >= self.half
        reach = self.causal.reach(q_index - noisy * self.half)
        return reach * (1 - 2 * noisy)

    def sees(self, reach, kv_index):
        clean, end = reach > 0, abs(reach)
        earlier = kv_index < end - self.causal.block
        clean_key = self.causal.sees(end, kv_index) & (kv_index < self.half) & (clean | earlier)
        place = kv_index - self.half
        own = (reach < 0) & (place >= 0) & (place >= end - self.causal.block) & (place < end)
        return clean_key | own


def attention(q, k, v, *, mask=None, visible=None):
    """Softmax attention with scores scaled by H**-0.5; the softmax is in float32.

    Under `jax.set_mesh`, arrays are global: the batch is split over data and fsdp, heads over
    tensor and tokens over context, wherever these divide.

    Args:
        q: [B, Lq, N, H].
        k, v: [B, Lk, N, H], in the dtype of q.
        mask: BlockCausal or TeacherForcing, static; None: every query sees every key.
        visible: bool [Lk], traced: keys that may be seen at all (the filled slots of a cache). Each
            query must be left with one key at least: what it sees else is undefined.

    Returns:
        [B, Lq, N, H] in the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit together, or do not fit the mask.
    """
    _check(q, k, v, mask, visible)
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device  # None where there is no mesh
    platform = device.platform if device else jax.default_backend()
    kernel = functools.partial(_KERNELS.get(platform, _anywhere), mask=mask)
    if mesh.size <= 1:
        return kernel(q, k, v, visible)
    return _over_mesh(kernel, mesh.shape, q, k, v, visible, masked=mask is not None)


def _check(q, k, v, mask, visible):
    same = q.ndim == k.ndim == 4 and q.dtype == k.dtype == v.dtype
    if not same or not k.shape == v.shape == (q.shape[0], k.shape[1], *q.shape[2:]):
        raise ValueError(
            "attention takes q [B, Lq, N, H] and k and v [B, Lk, N, H], all of one dtype, but got "
            f"{jax.typeof(q)}, {jax.typeof(k)} and {jax.typeof(v)}"
        )
    length, keys = q.shape[1], k.shape[1]
    if visible is not None and (visible.shape != (keys,) or visible.dtype != bool):
        raise ValueError(f"visible is {jax.typeof(visible)}, but {keys} keys need bool[{keys}]")
    if mask is not None and keys != length:
        raise ValueError(
            f"a mask speaks of one sequence, but there are {length} queries and {keys} keys: for "
            "a cache, use `visible` instead"
        )
    if isinstance(mask, TeacherForcing) and length != 2 * mask.half:
        raise ValueError(
            f"teacher forcing over halves of {mask.half} tokens needs {2 * mask.half} tokens, "
            f"not {length}: [clean | noisy]"
        )


# --- Across devices -------------------------------------------------------------------------------


def _over_mesh(kernel, axes, q, k, v, visible, *, masked):
    """Runs `kernel(q, k, v, visible)` on every device's part of the sequences and heads.

    A split sequence needs all keys beside each query. Heads are exchanged for tokens, filled up
    with zeros where they do not divide; but without a mask, where that is less to send (few keys)
    or to compute (heads do not divide), keys are whole on every device and queries stay.
    """
    context, (_, queries, heads, _), keys = axes["context"], q.shape, k.shape[1]
    batch = tuple(_dividing(BATCH, q.shape[0], axes))
    tensor = tuple(_dividing(("tensor",), heads, axes))
    heads //= axes["tensor"] if tensor else 1
    whole_keys = not masked and (heads % context > 0 or 0 < (context - 1) * keys < queries)

    def exchanged(q, k, v, visible):
        exchange = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
        q, k, v = (exchange(_fill(x, context, 2), split_axis=2, concat_axis=1) for x in (q, k, v))
        out = kernel(q[:, :queries], k[:, :keys], v[:, :keys], visible)
        return exchange(_fill(out, context, 1), split_axis=1, concat_axis=2)[:, :, :heads]

    split, of_keys = P(batch, "context", tensor), P(batch, None, tensor)
    if not whole_keys:
        of_keys, k, v = split, _fill(k, context, 1), _fill(v, context, 1)
    mapped = jax.shard_map(
        kernel if whole_keys or context == 1 else exchanged,
        in_specs=(split, of_keys, of_keys, P()),
        out_specs=split,
        check_vma=False,
    )
    return mapped(_fill(q, context, 1), k, v, visible)[:, :queries]


def _dividing(names, size, axes):
    """The first of these axes of the mesh, as many as together divide `size`."""
    for name in names:
        if size % axes[name]:
            return
        size //= axes[name]
        yield name


def _fill(x, block, axis):
    """Pads an axis with zeros, at its end, to whole blocks of this size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _shown(visible, keys, block):
    """Which keys may be seen, in whole blocks: bool [Lk and padding]; None for all of them."""
    if visible is None and keys % block == 0:
        return None
    return _fill(jnp.ones(keys, bool) if visible is None else visible, block, 0)


@functools.lru_cache(maxsize=64)
def _blocks(mask, queries, keys):
    """Cuts the queries where what they see changes: [(start, stop, ranges of keys)]."""
    if mask is None:
        return [(0, queries, [(0, keys)])]
    reach = mask.reach(np.arange(queries))
    starts = np.flatnonzero(np.diff(reach, prepend=reach[0] - 1))
    blocks = []
    for start, stop in zip(starts, [*starts[1:], queries], strict=True):
        seen = mask.sees(reach[start], np.arange(keys))
        edges = np.flatnonzero(np.diff(seen, prepend=False, append=False))
        blocks.append((int(start), int(stop), edges.reshape(-1, 2).tolist()))
    return blocks


# --- TPU ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _SplashMask(splash.splash_attention_mask.Mask):
    """A mask as splash takes it: it is also the function that the kernel computes it with.

    `queries` and `keys` are lengths with padding; `real` of the queries are none.
    """

    mask: Mask
    queries: int
    keys: int
    real: int

    def __call__(self, reach, kv_index):
        return self.mask.sees(reach, kv_index)

    @property
    def shape(self):
        return self.queries, self.keys

    @functools.cached_property
    def q_sequence(self):
        """What the kernel knows of each query: its reach. Padding does as the last query does."""
        return self.mask.reach(np.minimum(np.arange(self.queries), self.real - 1)).astype(np.int32)

    @property
    def mask_function(self):
        return self

    def __getitem__(self, index):
        """A block of the mask [rows, columns]; queries with the same reach are evaluated once."""
        rows, columns = index
        reach, place = np.unique(self.q_sequence[rows], return_inverse=True)
        return self(reach[:, None], np.arange(self.keys)[columns])[place]


def _block_size(length, most):
    """The largest block, from `most` tokens down to 128, whose padding is at most a quarter."""
    sizes = [size for size in (1024, 512, 256) if size <= most]
    return next((size for size in sizes if -length % size <= length // 4), 128)


def _splash(q, k, v, visible, *, mask, interpret=False):
    """Splash attention on one device; sequences are padded to whole blocks of its grid."""
    (_, queries, heads, width), keys = q.shape, k.shape[1]
    block_q, block_k = _block_size(queries, 512), _block_size(keys, 1024)
    blocks = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q)
    blocks |= dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), block_k)
    blocks |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(block_k, 512))
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = (
        _fill(x, block, 1).swapaxes(1, 2) for x, block in ((q, block_q), (k, block_k), (v, block_k))
    )
    shape = q.shape[2], k.shape[2]
    seen = splash.splash_attention_mask.FullMask(shape)
    if mask is not None:
        seen = _SplashMask(mask, *shape, real=queries)
    kernel = splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([seen] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**blocks),
        interpret=interpret,
    )
    segments = None
    if (shown := _shown(visible, keys, block_k)) is not None:
        segments = splash.SegmentIds(jnp.ones(shape[0], jnp.int32), shown.astype(jnp.int32))
    out = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return out.swapaxes(1, 2)[:, :queries].astype(q.dtype)


# --- CUDA -----------------------------------------------------------------------------------------


def _cudnn(q, k, v, visible, *, mask):
    """cuDNN flash attention on one device, if it has these numbers; else as anywhere.

    Sequences are padded to even lengths: jax refuses to derive the kernel at others.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return _anywhere(q, k, v, visible, mask=mask)
    out = []
    for start, stop, ranges in _blocks(mask, q.shape[1], k.shape[1]):
        queries = _fill(q[:, start:stop], 2, 1)
        keys, values = (jnp.concatenate([x[:, a:b] for a, b in ranges], 1) for x in (k, v))
        shown = None if visible is None else jnp.concatenate([visible[a:b] for a, b in ranges])
        shown, lengths = _shown(shown, keys.shape[1], 2), None
        keys, values = _fill(keys, 2, 1), _fill(values, 2, 1)
        if shown is not None:
            # The kernel takes a number of keys and no other mask that is not [Lq, Lk]; the order
            # of keys does not matter, so the visible ones come first.
            order = jnp.argsort(~shown, stable=True)
            keys, values = (jnp.take(x, order, axis=1) for x in (keys, values))
            lengths = jnp.full(q.shape[0], jnp.sum(shown), jnp.int32)
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        attended = attend(queries, keys, values, key_value_seq_lengths=lengths)
        out.append(attended[:, : stop - start])
    return jnp.concatenate(out, axis=1)


# --- Anywhere -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(q, k, v, visible, mask):
    """Attention in plain jax on one device, in memory that grows with the length alone.

    Tile by tile; the backward pass computes the scores anew (Dao et al. 2022).
    """
    return _forward(q, k, v, visible, mask)[0]


def _forward(q, k, v, visible, mask):
    size_q, size_k, pairs, seen = _tiles(mask, visible, q.shape[1], k.shape[1])

    def of_head(tiles):
        q, k, v = (x.astype(jnp.float32) for x in tiles)
        q = q * q.shape[-1] ** -0.5

        def of_pair(sums, pair):
            out, total, largest = sums
            i, j = pair
            scores = jnp.where(seen(i, j), q[i] @ k[j].T, HIDDEN)
            highest = jnp.maximum(largest[i], jnp.max(scores, axis=1))
            weights, kept = jnp.exp(scores - highest[:, None]), jnp.exp(largest[i] - highest)
            return (
                out.at[i].set(out[i] * kept[:, None] + weights @ v[j]),
                total.at[i].set(total[i] * kept + jnp.sum(weights, axis=1)),
                largest.at[i].set(highest),
            ), None

        zeros = jnp.zeros(q.shape[:2])
        sums = jnp.zeros_like(q), zeros, zeros + HIDDEN
        (out, total, largest), _ = jax.lax.scan(of_pair, sums, pairs)
        return out / total[..., None], largest + jnp.log(total)

    tiles = _cut(q, size_q), _cut(k, size_k), _cut(v, size_k)
    out, total = jax.lax.map(of_head, tiles)
    out = _join(out, q)
    return out, (q, k, v, visible, out, total)


def _backward(mask, saved, gradient):
    """Scores are held as [keys, queries]: so no product transposes anything as large as a tile."""
    q, k, v, visible, out, total = saved
    size_q, size_k, pairs, seen = _tiles(mask, visible, q.shape[1], k.shape[1])
    # What the softmax takes off the gradient of every score of a query: [B, Lq, N].
    mean = jnp.einsum("bqnh,bqnh->bqn", *(x.astype(jnp.float32) for x in (gradient, out)))

    def of_head(tiles):
        q, gradient, total, mean, k, v = (x.astype(jnp.float32) for x in tiles)
        scale = q.shape[-1] ** -0.5
        q = q * scale

        def of_pair(sums, pair):
            dq, dk, dv = sums
            i, j = pair
            scores = jnp.where(seen(i, j).T, k[j] @ q[i].T, HIDDEN)
            weights = jnp.exp(scores - total[i])
            slope = weights * (v[j] @ gradient[i].T - mean[i])
            return (
                dq.at[i].add(k[j].T @ slope),
                dk.at[j].add(slope @ q[i]),
                dv.at[j].add(weights @ gradient[i]),
            ), None

        sums = jnp.zeros_like(q.swapaxes(1, 2)), jnp.zeros_like(k), jnp.zeros_like(v)
        (dq, dk, dv), _ = jax.lax.scan(of_pair, sums, pairs)
        return scale * dq.swapaxes(1, 2), dk, dv

    of_queries = _cut(q, size_q), _cut(gradient, size_q)
    of_queries += total, _cut(mean, size_q)
    dq, dk, dv = jax.lax.map(of_head, (*of_queries, _cut(k, size_k), _cut(v, size_k)))
    return _join(dq, q), _join(dk, k), _join(dv, v), None


_tiled.defvjp(_forward, _backward)
_anywhere = jax.jit(_tiled, static_argnames="mask")


def _tiles(mask, visible, queries, keys):
    """Equal tiles of queries and of keys; the last of a sequence may have fewer, and zeros.

    Returns:
        (queries of a tile, keys of a tile, pairs, seen): pairs int32 [pairs, 2] are the tiles that
        see each other, seen(i, j) is what the one sees of the other, bool [Tq, Tk].
    """
    size_k = _even(keys, TILE)
    size_q = _even(queries, TILE * TILE // size_k)
    shown = _shown(visible, keys, size_k)
    pairs = {
        (i, j)
        for start, stop, ranges in _blocks(mask, queries, keys)
        for i in range(start // size_q, -(-stop // size_q))
        for first, end in ranges
        for j in range(first // size_k, -(-end // size_k))
    }

    def seen(i, j):
        seen = True if shown is None else shown.reshape(-1, size_k)[j]
        if mask is not None:
            q_index, kv_index = i * size_q + jnp.arange(size_q), j * size_k + jnp.arange(size_k)
            seen &= mask.allows(q_index[:, None], kv_index)
        return jnp.broadcast_to(seen, (size_q, size_k))

    return size_q, size_k, np.array(sorted(pairs), np.int32), seen


def _even(length, most):
    """The size of equal tiles, as few as can be, of at most `most`."""
    return -(-length // -(-length // most))


def _cut(x, size):
    """[B, L, N, ...] -> tiles of samples and heads, [B N, tiles, size, ...]; zeros at the end."""
    x = jnp.moveaxis(_fill(x, size, 1), 2, 1)
    return x.reshape(-1, x.shape[2] // size, size, *x.shape[3:])


def _join(tiles, like):
    """Undoes `_cut`, to the shape and dtype of `like` [B, L, N, H]."""
    batch, length, heads, width = like.shape
    whole = tiles.reshape(batch, heads, -1, width)[:, :, :length]
    return whole.swapaxes(1, 2).astype(like.dtype)


_KERNELS = {"tpu": _splash, "gpu": _cudnn, "cuda": _cudnn}
