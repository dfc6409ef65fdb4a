"""`attention`: checks its arguments, splits the work over the mesh and picks the kernel.

The platform is that of the current mesh, or of the process without one. A host without a TPU can
therefore compile a program for one. With a mesh, every device runs its kernel on its own
sequences and heads. A sequence that is split over `context` is gathered by an exchange of heads for
tokens (Ulysses, Jacobs et al. 2023).

No kernel has a jvp: they are defined by their reverse mode. Within `forward_mode`, attention is
computed without a kernel, and `jax.jvp` works.
"""

import contextlib
import contextvars
import functools

import jax

from dmd_jax.devices.sharding import BATCH, P
from dmd_jax.models.attention import cudnn, splash, tiled
from dmd_jax.models.attention.masks import TeacherForcing
from dmd_jax.models.attention.padding import pad

# By the names of platforms: a mesh calls a GPU "cuda", a process "gpu".
_KERNELS = {"tpu": splash.attend, "gpu": cudnn.attend, "cuda": cudnn.attend}

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

    Under `jax.set_mesh`, arrays are global: the batch is split over data and fsdp, heads over
    tensor and tokens over context, wherever these divide.

    Args:
        q: [B, Lq, N, H].
        k, v: [B, Lk, N, H], in the dtype of q.
        mask: BlockCausal or TeacherForcing, static, where Lq = Lk; None: every query attends to
            every key.
        visible: bool [Lk], may be traced: which keys exist for any query (the filled slots of a
            cache); None for all. Each query must be left with one key or more: the result for a
            query without keys is undefined.

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
    if visible is not None and (visible.shape != (keys,) or visible.dtype != bool):
        raise ValueError(f"visible is {jax.typeof(visible)}, but {keys} keys need bool[{keys}]")
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

    A query needs all keys. Where the sequence is split over `context`, there are two ways. Heads
    are exchanged for tokens: each device then has whole sequences of fewer heads. Or the keys are
    gathered on every device and the queries stay split: chosen where the keys are so few that less
    is sent, or where the heads do not divide, and the exchange would pad them with zeros. A mask
    needs the exchange, because it counts queries from the start of the sequence.

    Args:
        axes: {name: size} of the mesh.
        masked: whether the kernel has a mask.
    """
    context, (_, queries, heads, _), keys = axes["context"], q.shape, k.shape[1]
    batch = tuple(_dividing(BATCH, q.shape[0], axes))
    tensor = tuple(_dividing(("tensor",), heads, axes))
    heads //= axes["tensor"] if tensor else 1
    gather_keys = not masked and (heads % context > 0 or 0 < (context - 1) * keys < queries)

    def exchanged(q, k, v, visible):
        exchange = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
        q, k, v = (exchange(pad(x, context, 2), split_axis=2, concat_axis=1) for x in (q, k, v))
        out = kernel(q[:, :queries], k[:, :keys], v[:, :keys], visible)
        return exchange(pad(out, context, 1), split_axis=1, concat_axis=2)[:, :, :heads]

    split, of_keys = P(batch, "context", tensor), P(batch, None, tensor)
    if not gather_keys:
        of_keys, k, v = split, pad(k, context, 1), pad(v, context, 1)
    mapped = jax.shard_map(
        kernel if gather_keys or context == 1 else exchanged,
        in_specs=(split, of_keys, of_keys, P()),
        out_specs=split,
        check_vma=False,  # the kernels do not say over which axes their results vary
    )
    return mapped(pad(q, context, 1), k, v, visible)[:, :queries]


def _dividing(names, size, axes):
    """The first axes of `names`, as many as together divide `size`."""
    for name in names:
        if size % axes[name]:
            return
        size //= axes[name]
        yield name
