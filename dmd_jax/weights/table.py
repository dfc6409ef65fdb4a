"""How another program's tensors become ours, as data, and how a network is filled from them.

A family's tables are lists of `Row`s, one for every tensor that its file must hold. The same rows
are read in both directions: einops patterns can be turned round. Imports `paths` alone.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange

from dmd_jax.devices.paths import named_leaves, path_name

ALIGNMENT = 64  # bytes; what XLA asks of host memory that it uses in place
STRIP = 32  # rows of a matrix in a file


class Row(NamedTuple):
    """One weight of ours and its name and layout in another program's file."""

    ours: str  # path in our tree: "blocks/attention/query/kernel"
    theirs: str  # name in the file; "{}" stands for the layer, and stacks ours along axis 0
    pattern: str = ""  # einops, one layer's tensor of theirs -> ours: "o i -> i o"; "" for as it is

    def to_ours(self, tensor):
        """One layer's tensor, from their layout to ours."""
        return rearrange(tensor, self.pattern) if self.pattern else tensor

    def to_theirs(self, tensor):
        """One layer's tensor, from our layout to theirs."""
        if not self.pattern:
            return tensor
        theirs, ours = self.pattern.split("->")
        return rearrange(tensor, f"{ours} -> {theirs}")


def their_shapes(net, rows):
    """{name: shape} of every tensor that a file of `net` holds, by the rows of its layout.

    Raises:
        ValueError: the rows are not exactly the weights of `net`.
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
    """Yields (name, array) of every tensor of a file of `net`; one weight is on the host at a time.

    The inverse of `fill`: bits are those of the weights.
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
    """One line for every path whose shape differs between two {path: shape}; '' if none does."""
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(name, "nothing"), found.get(name, "nothing")
        if a != b:
            lines.append(f"  {name}: expected {a}, found {b}")
    return "\n".join(lines)


def fill(net, rows, read):
    """`net` with all its weights taken from another program's tensors.

    A weight is written into one buffer, of the size of a device's part of it, that becomes the
    device's or is released once it is there; of the file, one tensor a thread is in memory.

    Args:
        net: a network, or its jax.ShapeDtypeStructs; every weight of it has a row.
        rows: the `Row`s of its family and of the layout of the file.
        read: name -> numpy array.

    Returns:
        The network, its weights in the dtypes of `net` and placed by the shardings of `net`, on
        the default device where there are none. The values are rounded once at most.
    """
    by_name = {row.ours: row for row in rows}

    with ThreadPoolExecutor() as threads:

        def weight(path, leaf):
            part = partial(_part, by_name[path_name(path)], leaf, read, threads)
            if leaf.sharding is None:  # free to go where it is used: to a mesh, for one
                return jax.device_put(part((slice(None),) * len(leaf.shape)))
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        return jax.tree_util.tree_map_with_path(weight, net)


def _part(row, leaf, read, threads, index):
    """The part `index` (a slice for each axis) of a weight, all its layers in one buffer."""
    held = [range(size)[where] for size, where in zip(leaf.shape, index, strict=True)]
    part = _aligned([len(axis) for axis in held], leaf.dtype)
    if "{}" in row.theirs:

        def layer(i):
            _copy(row.to_ours(read(row.theirs.format(held[0][i])))[index[1:]], part[i, ...])

        list(threads.map(layer, range(len(part))))
    else:
        _copy(row.to_ours(read(row.theirs))[index], part)
    return part


def _aligned(shape, dtype):
    """An empty array at an address that a CPU device takes over as its own, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(tensor, part):
    """Copies in the order of the file, by strips that a cache holds while they are turned round."""
    tensor, part = np.atleast_1d(tensor, part)
    first = np.argmax(tensor.strides)
    tensor, part = np.moveaxis(tensor, first, 0), np.moveaxis(part, first, 0)
    for i in range(0, len(part), STRIP):
        # Rounded before it is turned: in one go, numpy converts one number at a time.
        part[i : i + STRIP] = tensor[i : i + STRIP].astype(part.dtype, copy=False)
