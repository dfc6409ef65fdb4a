"""Low-rank adapters (LoRA, Hu et al. 2021) as trees, and in networks; `adapter_files` has files.

An adapter of a network is a dict of arrays. For a kernel "blocks/qkv/kernel" [..., in, out] it has
"blocks/qkv/A/kernel" [..., in, rank] and "blocks/qkv/B/kernel" [..., rank, out]; the network
computes with W + scale A B, where scale = alpha / rank. Stacked layers have stacked factors.
Imports jax and the layers that use them.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.devices import host_memory
from dmd_jax.devices.paths import named_leaves, path_name
from dmd_jax.models.layers import LowRank, is_int8

Adapter = dict[str, Any]


def factor(kernel: str, name: str) -> str:
    """The path of factor "A" or "B" of a kernel: "blocks/qkv/kernel" -> "blocks/qkv/A/kernel"."""
    return f"{kernel.removesuffix('kernel')}{name}/kernel"


def kernels(adapter: Adapter) -> list[str]:
    """The paths of the kernels that an adapter changes."""
    return [name.replace("/A/kernel", "/kernel") for name in adapter if name.endswith("/A/kernel")]


def abstract(net: nnx.Module, matrices: str, rank: int) -> Adapter:
    """The adapter of a network, as float32 jax.ShapeDtypeStructs.

    Args:
        net: a network, or its jax.ShapeDtypeStructs.
        matrices: regular expression, searched in paths such as "blocks/qkv/kernel".
        rank: of all factors.

    Raises:
        ValueError: the pattern matches nothing, or a weight that is no matrix of a linear layer.
    """
    adapter, shapes = {}, named_leaves(net)
    for name in filter(re.compile(matrices).search, shapes):
        shape = shapes[name].shape
        if not name.endswith("/kernel") or len(shape) not in (2, 3):
            raise ValueError(
                f"matrices={matrices!r} matches {name} {shape}, which is no kernel [in, out] of a "
                "linear layer, nor a stack of them"
            )
        *stack, inputs, outputs = shape
        for which, sizes in (("A", (inputs, rank)), ("B", (rank, outputs))):
            adapter[factor(name, which)] = jax.ShapeDtypeStruct((*stack, *sizes), jnp.float32)
    if not adapter:
        some = [name for name in shapes if name.endswith("kernel")][:3]
        raise ValueError(f"matrices={matrices!r} matches no weight; there are {', '.join(some)}")
    return adapter


def random(shapes: Adapter, seed: int) -> Adapter:
    """An adapter of the shapes of `abstract`, whose network is exactly the base: B is zero.

    A is uniform in +-1 / sqrt(in), as in PEFT.
    """
    keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(shapes))

    def draw(key, name, x):
        if name.endswith("/B/kernel"):
            return jnp.zeros(x.shape, x.dtype)
        bound = x.shape[-2] ** -0.5
        return jax.random.uniform(key, x.shape, x.dtype, -bound, bound)

    return {name: draw(key, name, shapes[name]) for key, name in zip(keys, shapes, strict=True)}


def attach(net: nnx.Module, adapter: Adapter, scale: float) -> nnx.Module:
    """The network with the adapter beside its kernels: W, also an `Int8`, stays, and is shared."""

    def weight(path, base):
        name = path_name(path)
        A, B = (adapter.get(factor(name, which)) for which in "AB")
        return base if A is None else LowRank(base, A, B, scale)

    return jax.tree_util.tree_map_with_path(weight, net, is_leaf=is_int8)


def merge(net: nnx.Module, adapter: Adapter, scale: float) -> nnx.Module:
    """The network with float32 weights W + scale A B; of an `Int8`, W is rounded."""

    def weight(path, base):
        name, base = path_name(path), host_memory.to_device(base)
        base = (base.plain if is_int8(base) else base).astype(jnp.float32)
        A, B = (adapter.get(factor(name, which)) for which in "AB")
        return base if A is None else base + scale * jnp.matmul(A, B, precision="highest")

    return jax.tree_util.tree_map_with_path(weight, net, is_leaf=is_int8)


def rank_of(adapter: Adapter) -> int:
    """The rank of an adapter."""
    return next(x.shape[-1] for name, x in adapter.items() if name.endswith("/A/kernel"))
