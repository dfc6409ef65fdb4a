"""Names of the arrays in a tree: the same in sharding rules, errors, weights and checkpoints.

Imports jax and numpy.
"""

import math
from typing import Any

import jax
import numpy as np


def path_name(path) -> str:
    """A key path as text: 'blocks/qkv/kernel'.

    nnx.Param appends `value` to every path; it is removed.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path name, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: two leaves would share a name.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"{name}: two leaves of the tree share this path; rename one.")
        leaves[name] = leaf
    return leaves


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, concrete or abstract, over all devices and hosts."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
