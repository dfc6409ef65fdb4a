"""The mesh of devices, and how arrays are split over it. Imports jax and `paths`.

`main` sets the mesh once, with `jax.set_mesh`. Modules do not receive it: the constraints of
activations below read the current mesh and do nothing if there is none (notebooks, tests). Its axes
split:

    data      the batch; every device has all weights
    fsdp      the batch and the weights, which are gathered layer by layer
    context   the tokens of a sequence, the heads of a KV cache, and the weights further
    tensor    the heads and hidden units of a layer
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding

from dmd_jax.devices import host_memory
from dmd_jax.devices.paths import path_name

P = jax.P
AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")
WEIGHTS = ("fsdp", "context")
HEADS = ("tensor", "context")

# An array with fewer elements than this may be replicated without a rule that says so.
SMALL = 2**16


def make_mesh(data=-1, fsdp=1, context=1, tensor=1, *, devices=None):
    """A mesh over all devices; one axis may be -1 and takes the devices that the others leave.

    Several slices of a TPU, which only the network of their hosts joins, split the axis `data`.
    Several nodes of GPUs count as one slice.

    Raises:
        ValueError: an axis is below 1 and not -1, the axes do not multiply to the number of
            devices, or `data` does not divide into the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, context, tensor]
    given = int(np.prod([n for n in shape if n != -1]))
    if any(n != -1 and n < 1 for n in shape):
        raise ValueError(
            f"mesh axes {dict(zip(AXES, shape, strict=True))} must be 1 or more, or -1"
        )
    if shape.count(-1) > 1 or len(devices) % given or (-1 not in shape and given != len(devices)):
        wanted = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True))
        raise ValueError(
            f"mesh({wanted}) does not fit {len(devices)} devices: the axes must "
            "multiply to that number, and one of them may be -1"
        )
    shape = [len(devices) // given if n == -1 else n for n in shape]
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})  # not all devices have it
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if devices[0].platform == "gpu":
        # The number is that of the host, and jax.make_mesh refuses several.
        grid = mesh_utils.create_device_mesh(shape, devices)
    elif shape[0] % slices:
        raise ValueError(f"mesh data={shape[0]} does not divide into the {slices} slices")
    else:
        within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return jax.sharding.Mesh(grid, AXES, axis_types=types)


def _has_mesh():
    return not jax.sharding.get_abstract_mesh().empty


def _constrain(x, spec):
    return jax.lax.with_sharding_constraint(x, spec) if _has_mesh() else x


def shard_batch(tree, axis=0):
    """Splits the batch axis of every array, the leading one or another, over data and fsdp."""
    return jax.tree.map(lambda x: _constrain(x, P(*(None,) * axis, BATCH)), tree)


def shard_tokens(x):
    """Splits tokens [B, L, D]: B over data and fsdp, L over context."""
    return _constrain(x, P(BATCH, "context"))


def common_part(tokens, frame):
    """The most tokens by which a sequence can be cut so that no part crosses a border.

    Borders are those of frames and those between the devices that `shard_tokens` splits it over.

    Args:
        tokens: length of the sequence.
        frame: tokens of a frame.
    """
    context = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    return 1 if tokens % context else math.gcd(frame, tokens // context)


def shard_heads(tree, axis=0):
    """Splits keys and values [..., N, H]: their heads N, and the batch axis as `shard_batch`."""
    return jax.tree.map(lambda x: _constrain(x, heads_spec(x.ndim, axis)), tree)


def heads_spec(ndim, axis):
    """The spec of keys and values [..., N, H]: heads over tensor and context, the batch at `axis`.

    Heads that do not divide are padded, within a program.
    """
    return P(*(None,) * axis, BATCH, *(None,) * (ndim - axis - 3), HEADS, None)


def tokens_to_heads(x):
    """`shard_heads` of keys or values [B, L, N, H] whose tokens are split over context.

    Without the first constraint, the projection that makes them would run on gathered tokens.
    """
    return shard_heads(_constrain(x, P(BATCH, "context", "tensor")))


def gather(layer, rules):
    """Gathers a layer's weights just before their use, over all axes but tensor.

    Those in the memory of the host come to the devices first, each device's part to it.
    """
    if not _has_mesh():
        return host_memory.to_device(layer)

    def whole(path, weight):
        mesh, spec = jax.sharding.get_abstract_mesh(), _find(rules, path_name(path)) or P()
        if host_memory.holds(weight):  # in parts: otherwise the host would gather it
            weight = _constrain(host_memory.to_device(weight), fit(spec, weight.shape, mesh))
        spec = P(*("tensor" if "tensor" in (axes or ()) else None for axes in spec))
        return _constrain(weight, fit(spec, weight.shape, mesh))

    return jax.tree_util.tree_map_with_path(whole, layer)


# Names of the parts of a kernel: of an `Int8` or a `LowRank` of models/layers, or in an adapter.
_PART = re.compile(r"/(?:kernel/value/(?:base/)?(values|scales|base|A|B)|(A|B)/kernel)$")


def _find(rules, name, used=None):
    """The spec of the first rule that matches `name`; None if none does.

    The parts of a kernel follow it: A [in, rank] is split as its input axis, B [rank, out] and
    scales [1, out] as its output axis. Where A or B would so be split over `tensor` alone, it is
    split over `WEIGHTS` too: with moments and averages, adapters are large.
    """
    if part := _PART.search(name):
        spec = _find(rules, name[: part.start()] + "/kernel", used)
        which = part[1] or part[2]
        if not spec or which in ("values", "base"):
            return spec
        own = spec[-2] if which == "A" else spec[-1]
        if own == "tensor" and which in ("A", "B"):
            own = ("tensor", *WEIGHTS)
        return P(own, None) if which == "A" else P(None, own)
    for pattern, spec in rules:
        if re.search(pattern, name):
            if used is not None:
                used.add(pattern)
            return spec
    return None


def infer(tree, rules, mesh):
    """Shardings for a tree of weights, or of optimizer state whose paths end as those of weights.

    Args:
        tree: arrays or jax.ShapeDtypeStructs.
        rules: (regular expression, jax.P) pairs; the first that `re.search` finds in a path wins. A
            spec describes the trailing axes, so that stacked layers need no rule of their own. A
            dimension is split over as many of its axes, the first ones, as divide it.
        mesh: the mesh of `make_mesh`.

    Returns:
        A tree of NamedSharding.

    Raises:
        ValueError: a rule matches nothing, or a large array is matched by no rule.
    """
    used, lost = set(), []

    def place(path, leaf):
        name = path_name(path)
        spec = _find(rules, name, used)
        if spec is None and leaf.size > SMALL:
            lost.append(f"{name} {leaf.shape}")
        return NamedSharding(mesh, fit(spec or P(), leaf.shape, mesh))

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    if lost:
        raise ValueError("no sharding rule matches these large arrays; add one: " + ", ".join(lost))
    if idle := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(f"these sharding rules match no weight; correct or remove them: {idle}")
    return shardings


def fit(spec, shape, mesh):
    """Left-pads a spec to the rank of `shape`, and leaves each dimension its `dividing` axes."""
    padded = (None,) * (len(shape) - len(spec)) + tuple(spec)[max(0, len(spec) - len(shape)) :]

    def fitting(axes, n):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(dividing(axes, n, mesh.shape)) or None

    return P(*map(fitting, padded, shape))


def dividing(names, size, axes):
    """The first axes of `names`, as many as together divide `size`; `axes` is {name: devices}."""
    for name in names:
        if size % axes[name]:
            return
        size //= axes[name]
        yield name


def relevant(rules, names):
    """The rules that `infer` would use for weights of these names, in order."""
    used = set()
    for name in names:
        _find(rules, name, used)
    return tuple(rule for rule in rules if rule[0] in used)


def replicate(tree):
    """Replicates arrays on all devices, so that every host can read them."""
    if not _has_mesh():
        return tree
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), P()))


def fetch(tree):
    """The tree with numpy arrays; None for each on all hosts but the first, which call it too.

    One array after the other is whole on the devices: all of them may be too large.
    """

    def whole(x):
        x = replicate(x)
        return np.asarray(x) if jax.process_index() == 0 else None

    return jax.tree.map(whole, tree)


def even_batch(size):
    """The smallest batch of at least `size` rows that data and fsdp split evenly."""
    axes = jax.sharding.get_abstract_mesh().shape
    return size + -size % (axes.get("data", 1) * axes.get("fsdp", 1))


def batch_part(mesh, size):
    """The part of a global batch of `size` rows on this host's devices: (index, count).

    Hosts whose devices differ along context or tensor only have the same part.

    Raises:
        ValueError: the rows on its devices are not such a part; order the mesh by hosts.
    """
    local = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((size,)).values()
    ends = {(rows.start or 0, size if rows.stop is None else rows.stop) for (rows,) in local}
    rows = sorted(ends)
    start, length = rows[0][0], sum(stop - first for first, stop in rows)
    if start + length != rows[-1][1] or size % length or start % length:
        raise ValueError(
            f"this host's devices hold rows {rows} of a batch of {size}, not one of its equal "
            f"parts: order the mesh so that its data and fsdp axes follow the hosts; it is {mesh}"
        )
    return start // length, size // length


def global_batch(tree):
    """Builds global arrays, split over data and fsdp, from each host's part of a batch."""
    if not _has_mesh():
        return jax.tree.map(jax.numpy.asarray, tree)
    sharding = NamedSharding(jax.sharding.get_mesh(), P(BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
