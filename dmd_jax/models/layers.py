"""Layers that several network families share: linear, time embedding, stacks of layers.

Imports jax, flax and `devices.paths`.
"""

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dmd_jax.devices import host_memory
from dmd_jax.devices.paths import path_name

LAYER_INPUT = "layer input"  # its name in `jax.checkpoint_policies`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """In place of a kernel W [..., in, out]: W + scale A B, with a LoRA adapter (Hu et al. 2021).

    Attributes:
        base: W, an array or an `Int8`.
        A, B: [..., in, rank] and [..., rank, out], float32.
        scale: alpha / rank.
    """

    base: Any
    A: Any
    B: Any
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def plain(self):
        """W, an array."""
        return _plain(self.base)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """In place of a kernel W [..., in, out]: whole multiples of one scale for each output channel.

    They are the nearest to W: |W - values scales| <= scales / 2.

    Attributes:
        values: int8 [..., in, out], -127 ... 127.
        scales: float32 [..., 1, out], the largest |W| of a channel over 127.
    """

    values: Any
    scales: Any

    @property
    def plain(self):
        """The rounded W, float32."""
        return self.values * self.scales


class Linear(nnx.Linear):
    """nnx.Linear, whose kernel may be an `Int8` or a `LowRank`: x W + scale (x A) B.

    The sum W + scale A B is never formed. In bfloat16 it would drop every change that is smaller
    than half a unit in the last place of W, and its gradient would be a whole matrix.
    """

    def __call__(self, x):
        kernel = self.kernel.get_value()
        if not _is_special(kernel):
            return super().__call__(x)
        plain = jax.tree.map(_plain, self, is_leaf=_is_special)
        out = nnx.Linear.__call__(plain, x)
        if isinstance(kernel, Int8):
            return out
        x, A, B = self.promote_dtype((x, kernel.A, kernel.B), dtype=self.dtype)
        return out + kernel.scale * ((x @ A) @ B)


def is_int8(x):
    """Whether a node of a tree is an `Int8`."""
    return isinstance(x, Int8)


def _is_special(x):
    return isinstance(x, LowRank | Int8)


def _plain(x):
    return x.plain if _is_special(x) else x


def in_int8(net):
    """The shapes of a network with `Int8` in place of the kernels of its stacked layers.

    What is not stacked (embeddings, modulation, head) is as it was: a small part of the weights.

    Args:
        net: a network, or its jax.ShapeDtypeStructs.

    Raises:
        ValueError: no layer of the network is a stacked `Linear`.
    """

    def rounded(kernel):
        *stack, _, out = kernel.shape
        scales = jax.ShapeDtypeStruct((*stack, 1, out), jnp.float32)
        return Int8(jax.ShapeDtypeStruct(kernel.shape, jnp.int8), scales)

    return map_kernels(rounded, net)


def map_kernels(change, net):
    """A network with `change(kernel)` in place of the kernels of its stacked layers.

    Args:
        change: of an array or an `Int8` [depth, in, out].
        net: a network, or its jax.ShapeDtypeStructs.

    Raises:
        ValueError: no layer of the network is a stacked `Linear`.
    """
    found = []

    def changed(path, x):
        if path_name(path) != "kernel" or len(_shape(x)) < 3:
            return x
        found.append(x)
        return change(x)

    def layer(x):
        if not isinstance(x, Linear):
            return x
        return jax.tree_util.tree_map_with_path(changed, x, is_leaf=_is_special)

    result = jax.tree.map(layer, net, is_leaf=lambda x: isinstance(x, Linear))
    if not found:
        raise ValueError(
            "this is for layers that are `models.layers.Linear` and stacked by `stack`, and this "
            "network has none (docs/training.md)"
        )
    return result


def _shape(kernel):
    return (kernel.values if isinstance(kernel, Int8) else kernel).shape


def linear(inputs, outputs, *, dtype=jnp.float32, rngs, zero=False, bias=True):
    """A linear layer with compute dtype `dtype`, initialised by Xavier's uniform rule or zeros."""
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
    return Linear(inputs, outputs, kernel_init=init, use_bias=bias, dtype=dtype, rngs=rngs)


def timestep_embedding(t, dim):
    """Sinusoids of t [...] as float32 [..., dim], for an even dim (Vaswani et al. 2017).

    Cosines come first. Frequencies fall from 1 to almost 1e-4.
    """
    frequencies = jnp.exp(-jnp.log(1e4) * jnp.arange(dim // 2) / (dim // 2))
    angles = t[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class MLP(nnx.Module):
    """Linear, activation, Linear: [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs, hidden, outputs, *, activation, dtype=jnp.float32, rngs):
        self.activation = activation
        self.up = linear(inputs, hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(self.activation(self.up(x)))


def stack(make, depth, *, rngs):
    """`depth` equal layers as one module, whose weights have a leading axis for `scan`.

    Args:
        make: rngs -> a layer.
    """
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def check_sizes(config, *names):
    """Raises ValueError where one of these fields of a config is no int from 1 on.

    numpy's are refused too: the header of a checkpoint, which is JSON, could not hold them.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an int, 1 or more")


def check_compute(dtype, remat):
    """Raises ValueError if `dtype` or `remat` of a config is not one that `scan` supports."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: use 'float32' or 'bfloat16'")
    if remat not in ("none", "full", "offload") and not hasattr(jax.checkpoint_policies, remat):
        raise ValueError(
            f"remat={remat!r}: use 'none', 'full', 'offload' or a name of jax.checkpoint_policies"
        )


def scan(layer, carry, xs, *, remat, unroll):
    """jax.lax.scan over stacked layers.

    Args:
        layer: (carry, x) -> (carry, y).
        remat: what the backward pass recomputes of a layer: "none" nothing, "full" everything,
            "offload" everything from an input that waits in the memory of the host; any other name
            is a policy of `jax.checkpoint_policies`.
        unroll: layers per iteration of the loop.
    """
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst=host_memory.KIND,
        )
        layer = jax.checkpoint(_named_input(layer), policy=policy)
    elif remat != "none":
        policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
        layer = jax.checkpoint(layer, policy=policy)
    return jax.lax.scan(layer, carry, xs, unroll=unroll)


def _named_input(layer):
    """The layer, whose input has the name by which a policy of rematerialisation finds it."""

    def named(carry, x):
        return layer(jax.tree.map(lambda c: checkpoint_name(c, LAYER_INPUT), carry), x)

    return named


def scan_with_taps(layer, carry, xs, taps, *, remat, unroll):
    """`scan` in pieces that end at some layers, whose outputs are returned too.

    In one scan, all layers would have to return their output. Where only the outputs are used, the
    compiler leaves out the layers after the last tap.

    Args:
        layer, carry, xs, remat, unroll: as for `scan`; the layers' own results are dropped.
        taps: numbers of layers, from 0, ascending.

    Returns:
        (carry, the carries after the layers `taps`, stacked).

    Raises:
        ValueError: `taps` do not ascend, or name a layer that is not there.
    """
    depth = jax.tree.leaves(xs)[0].shape[0]
    ends = (-1, *taps, depth)
    if not taps or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"features={taps} must ascend and name layers in [0, {depth})")
    outputs = []
    for before, last in pairwise(ends[:-1]):
        piece = jax.tree.map(lambda x: x[before + 1 : last + 1], xs)  # noqa: B023
        carry, _ = scan(layer, carry, piece, remat=remat, unroll=unroll)
        outputs.append(carry)
    rest = jax.tree.map(lambda x: x[taps[-1] + 1 :], xs)
    carry, _ = scan(layer, carry, rest, remat=remat, unroll=unroll)
    return carry, jnp.stack(outputs)
