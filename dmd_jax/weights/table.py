"""Rows that map tensors of other programs to our weights, and the filling of a network by them.

The table of a family is a list of `Row`s, one for each tensor of a file. The same rows serve both
directions, because einops patterns can be reversed. Imports `devices.paths` and
`models.layers`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from einops import rearrange

from dmd_jax.devices.paths import named_leaves, path_name
from dmd_jax.models.layers import Int8

ALIGNMENT = 64  # bytes; XLA uses host memory without a copy at such addresses
STRIP = 32  # rows of a matrix that are copied at once
LARGEST = 2**20  # numbers that are copied at once, unless one row has more


class Row(NamedTuple):
    """One of our weights, and its name and layout in the file of another program."""

    ours: str  # path in our tree: "blocks/attention/query/kernel"
    theirs: str  # name in the file; "{}" is the number of a layer: they are stacked along axis 0
    pattern: str = ""  # einops, theirs -> ours, of one layer: "o i -> i o"; "" if equal

    def to_ours(self, tensor):
        """Converts the tensor of one layer from their layout to ours."""
        return rearrange(tensor, self.pattern) if self.pattern else tensor

    def to_theirs(self, tensor):
        """Converts the tensor of one layer from our layout to theirs."""
        if not self.pattern:
            return tensor
        theirs, ours = self.pattern.split("->")
        return rearrange(tensor, f"{ours} -> {theirs}")


def their_shapes(net, rows):
    """{name: shape} of every tensor in a file of `net`, by the rows of its layout.

    Raises:
        ValueError: the rows and the weights of `net` differ.
    """
    ours = {name: leaf.shape for name, leaf in named_leaves(net).items()}
    if odd := ours.keys() ^ {row.ours for row in rows}:
        raise ValueError(f"the table and the network differ in {sorted(odd)}")
    shapes = {}
    for row in rows:
        shape = ours[row.ours]
        layers = range(shape[0]) if "{}" in row.theirs else ()
        one = np.broadcast_to(np.float32(0), shape[1:] if layers else shape)  # takes no memory
        names = [row.theirs.format(i) for i in layers] or [row.theirs]
        shapes |= dict.fromkeys(names, row.to_theirs(one).shape)
    return shapes


def theirs(net, rows):
    """Yields (name, array) of every tensor in a file of `net`; copies one weight at a time.

    The inverse of `fill`, bit for bit.
    """
    ours = named_leaves(net)
    for row in rows:
        weight = jax.device_get(ours[row.ours])
        if "{}" in row.theirs:
            for i, layer in enumerate(weight):
                yield row.theirs.format(i), row.to_theirs(layer)
        else:
            yield row.theirs, row.to_theirs(weight)


def differing(wanted, found):
    """One line for each path whose shape differs between two {path: shape}; '' if all agree."""
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(name, "nothing"), found.get(name, "nothing")
        if a != b:
            lines.append(f"  {name}: expected {a}, found {b}")
    return "\n".join(lines)


def fill(net, rows, read):
    """Fills a network with the tensors of a file.

    Each shard of a weight is written into one buffer of its size. A CPU device uses this buffer
    without a copy; others copy it, and it is released. Each thread reads one tensor of the file at
    a time.

    Args:
        net: a network, or its jax.ShapeDtypeStructs.
        rows: the `Row`s of its family in the layout of the file, one for each weight.
        read: name -> numpy array.

    Returns:
        The network, with the dtypes and shardings of `net`; a weight without a sharding goes to the
        default device. Values are rounded at most once. For an `Int8`, the tensors are read twice:
        the scales of their channels come first.

    Raises:
        ValueError: a tensor has numbers that are infinite or NaN; it is named.
    """
    by_name = {row.ours: row for row in rows}

    def placed(leaf, part):
        if leaf.sharding is None:  # not committed: a jitted function may move it to a mesh
            return jax.device_put(part((slice(None),) * len(leaf.shape)))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    with ThreadPoolExecutor() as threads:

        def weight(path, leaf):
            row = by_name[path_name(path)]
            if not isinstance(leaf, Int8):
                return placed(leaf, partial(_part, row, leaf, None, read, threads))
            scales = _scales(row, leaf.scales, read, threads)
            values = partial(_part, row, leaf.values, scales, read, threads)
            return Int8(placed(leaf.values, values), placed(leaf.scales, scales.__getitem__))

        return jax.tree_util.tree_map_with_path(weight, net, is_leaf=lambda x: isinstance(x, Int8))


def _part(row, leaf, scales, read, threads, index):
    """The part `index` (a slice for each axis) of a weight, its layers stacked in one buffer."""
    ranges = [range(size)[where] for size, where in zip(leaf.shape, index, strict=True)]
    part = _aligned([len(axis) for axis in ranges], leaf.dtype)
    if scales is not None:
        scales = np.broadcast_to(scales, leaf.shape)[index]  # takes no memory
    if "{}" in row.theirs:

        def layer(i):
            name = row.theirs.format(ranges[0][i])
            own = None if scales is None else scales[i]
            _copy(name, row.to_ours(read(name))[index[1:]], part[i, ...], own)

        list(threads.map(layer, range(len(part))))
    else:
        _copy(row.theirs, row.to_ours(read(row.theirs))[index], part, scales)
    return part


def _scales(row, leaf, read, threads):
    """The scales of an `Int8`: the largest |number| of each channel over 127, 1 if all are zero."""
    if "{}" in row.theirs:
        names = map(row.theirs.format, range(leaf.shape[0]))
        largest = np.stack(list(threads.map(lambda name: _largest(row, name, read), names)))
    else:
        largest = _largest(row, row.theirs, read)
    return np.where(largest > 0, largest / np.float32(127), np.float32(1))


def _largest(row, name, read):
    """float32 [..., 1, out]: the largest |number| of each channel of kernels [..., in, out]."""
    tensor = row.to_ours(read(name))
    largest = np.zeros((*tensor.shape[:-2], 1, tensor.shape[-1]), np.float32)
    for at in _strips(tensor):
        channels = (*at[:-2], slice(None), at[-1])
        found = np.abs(tensor[at].astype(np.float32)).max(-2, keepdims=True)
        largest[channels] = np.maximum(largest[channels], found)
    if not _is_finite(largest):
        raise _not_finite(name)
    return largest


def _aligned(shape, dtype):
    """An uninitialised array at an address that a CPU device uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(name, tensor, part, scales=None):
    """Copies a tensor to a part of a weight; with `scales` [..., in, out], what `Int8` holds."""
    tensor, part = np.atleast_1d(tensor, part)
    for at in _strips(tensor):
        strip = tensor[at]
        if scales is not None:
            strip = np.rint(strip.astype(np.float32) / scales[at])
        # Rounded before it is transposed: numpy does both at once number by number, slowly.
        strip = strip.astype(part.dtype, copy=False)
        if not _is_finite(strip):
            raise _not_finite(name)
        part[at] = strip


def _strips(tensor):
    """Indices of parts in the order of the file that fit the cache while they are transposed."""
    first = np.argmax(tensor.strides)
    rows = tensor.shape[first]
    step = max(1, min(STRIP, LARGEST * rows // max(1, tensor.size)))
    for i in range(0, rows, step):
        at = [slice(None)] * tensor.ndim
        at[first] = slice(i, i + step)
        yield tuple(at)


def _not_finite(name):
    return ValueError(f"{name} has numbers that are infinite or NaN")


def _is_finite(array):
    """Whether no number is infinite or NaN."""
    if array.dtype == ml_dtypes.bfloat16:  # whose own test is slow
        return not np.any(array.view(np.uint16) & 0x7F80 == 0x7F80)
    return bool(np.isfinite(array).all())
