"""`attention`: checks its arguments, splits the work over the mesh and picks the kernel.

The platform is that of the current mesh, or of the process without one. A host without a TPU can
therefore compile a program for one. With a mesh, every device runs its kernel on its own
sequences and heads. Where a sequence is split over `context`, devices exchange heads for tokens
(Ulysses, Jacobs et al. 2023); where heads do not divide, they gather keys too (see `_over_mesh`).

No kernel has a jvp: they are defined by their reverse mode. Within `forward_mode`, attention is
computed without a kernel, and `jax.jvp` works.
"""

import contextlib
import contextvars
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.devices.sharding import BATCH, HEADS, P, dividing
from dmd_jax.models.attention import cudnn, tiled
from dmd_jax.models.attention.masks import TeacherForcing
from dmd_jax.models.attention.padding import pad


def _splash(q, k, v, visible, *, mask):
    """The kernel for TPU. Its Pallas would be a tenth of what a command imports at its start."""
    from dmd_jax.models.attention import splash

    return splash.attend(q, k, v, visible, mask=mask)


# By the names of platforms: a mesh calls a GPU "cuda", a process "gpu".
_KERNELS = {"tpu": _splash, "gpu": cudnn.attend, "cuda": cudnn.attend}

_in_forward_mode = contextvars.ContextVar("in_forward_mode", default=False)


@contextlib.contextmanager
def forward_mode():
    """Within it, networks can be differentiated by `jax.jvp`, on every platform.

    `attention` is then plain jax in tiles: slower than a kernel, in memory that grows with the
    length and not its square. Its reverse mode would store every tile: take gradients outside.

        with forward_mode():
            out, tangent = jax.jvp(network, inputs, tangents)
    """
    token = _in_forward_mode.set(True)
    try:
        yield
    finally:
        _in_forward_mode.reset(token)


def attention(q, k, v, *, mask=None, visible=None):
    """Softmax attention with scores scaled by H**-0.5; the softmax is in float32.

    Under `jax.set_mesh`, arrays are global: the batch is split over data and fsdp where these
    divide it, heads over tensor, and tokens over context. If there are more keys than queries,
    tokens of the keys are not split and their heads are, over tensor and context.

    Args:
        q: [B, Lq, N, H].
        k, v: [B, Lk, N, H], in the dtype of q.
        mask: BlockCausal or TeacherForcing, static, where Lq = Lk; None: every query attends to
            every key.
        visible: int32 [], may be traced: how many keys, the first ones, exist for any query; None
            for all. Each query must be left with one key or more: the result for a query without
            keys is undefined.

    Returns:
        [B, Lq, N, H] in the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not fit together, or do not fit the mask.
    """
    _check(q, k, v, mask, visible)
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device  # None where there is no mesh
    platform = device.platform if device else jax.default_backend()
    kernel = _KERNELS.get(platform, tiled.attend)
    if _in_forward_mode.get():
        kernel = tiled.attend_forward
    kernel = functools.partial(kernel, mask=mask)
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
    if visible is not None and (visible.shape or visible.dtype != jnp.int32):
        raise ValueError(
            f"visible is {jax.typeof(visible)}: it must be int32[], the number of visible keys"
        )
    if mask is not None and keys != length:
        raise ValueError(
            f"a mask is for queries and keys of one sequence, but there are {length} queries and "
            f"{keys} keys: for a cache, use `visible` instead"
        )
    if isinstance(mask, TeacherForcing) and length != 2 * mask.half:
        raise ValueError(
            f"teacher forcing over halves of {mask.half} tokens needs {2 * mask.half} tokens, "
            f"not {length}: [clean | noisy]"
        )


def _over_mesh(kernel, axes, q, k, v, visible, *, masked):
    """Runs `kernel(q, k, v, visible)` on each device's sequences and heads.

    A query needs all keys of its head. The devices along `context` form groups (`_group_size`).
    Those of a group exchange heads for tokens: each then has fewer heads of more queries. The same
    devices of other groups have other queries of these heads, and gather their keys. Heads that do
    not divide are padded with zeros.

    Args:
        axes: {name: size} of the mesh.
        masked: whether the kernel has a mask.
    """
    context, (_, queries, heads, _), keys = axes["context"], q.shape, k.shape[1]
    size = _group_size(queries, keys, -(-heads // axes["tensor"]), context, masked)
    groups = np.arange(context).reshape(-1, size)
    batch = tuple(dividing(BATCH, q.shape[0], axes))
    split = of_keys = P(batch, "context", "tensor")
    self_attention = keys == queries
    if self_attention:
        k, v = pad(k, context, 1), pad(v, context, 1)
    else:  # keys are whole already, of all heads or of a device's own
        of_keys = P(batch, None, "tensor" if size == 1 else HEADS)
    q, k, v = (pad(x, axes["tensor"] * size, 2) for x in (q, k, v))

    def exchange(x, split_axis, concat_axis):
        if size == 1:
            return x
        among = dict(axis_index_groups=groups.tolist(), tiled=True)
        return jax.lax.all_to_all(x, "context", split_axis, concat_axis, **among)

    def all_keys(x):
        x = exchange(x, 2, 1)
        if size < context:
            among = dict(axis_index_groups=groups.T.tolist(), tiled=True)
            x = jax.lax.all_gather(x, "context", axis=1, **among)
        return x[:, :keys]

    def on_device(q, k, v, visible):
        q = exchange(q, 2, 1)
        q = q[:, :queries] if size == context else q
        k, v = (all_keys(k), all_keys(v)) if self_attention else (k, v)
        out = kernel(q, k, v, visible)
        return exchange(pad(out, size, 1), 1, 2)

    mapped = jax.shard_map(
        on_device,
        in_specs=(split, of_keys, of_keys, P()),
        out_specs=split,
        check_vma=False,  # the kernels do not say over which axes their results vary
    )
    return mapped(pad(q, context, 1), k, v, visible)[:, :queries, :heads]


def _group_size(queries, keys, heads, context, masked):
    """How many devices exchange heads for tokens with each other, of the `context` of a sequence.

    All of them under a mask, which counts queries from the start of the sequence. All of them too
    where there are more keys than queries: the keys of a cache stay where they are, split by heads.
    In other self-attention, as many as divide the heads, so that none is padded. Where there are
    fewer keys than queries, as of a prompt, every device has all keys: 1, no exchange.
    """
    if masked or keys > queries:
        return context
    return math.gcd(heads, context) if keys == queries else 1
