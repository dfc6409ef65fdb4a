"""What several network families are made of: linear layers, time embedding, stacks of layers.

Imports jax and flax.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def linear(inputs, outputs, *, dtype=jnp.float32, rngs, zero=False, bias=True):
    """A linear layer that computes in `dtype`; Xavier's uniform weights, or zeros."""
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, kernel_init=init, use_bias=bias, dtype=dtype, rngs=rngs)


def timestep_embedding(t, dim):
    """Sinusoids of t [...]: float32 [..., dim], cosines first; the lowest frequency is 1e-4."""
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
    """`depth` layers of one kind as one module, whose weights have a leading axis for the layer.

    Args:
        make: rngs -> a layer.
    """
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), depth))


def check_compute(dtype, remat):
    """Raises ValueError where a config's `dtype` or `remat` is none that the stacks know."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: use 'float32' or 'bfloat16'")
    if remat not in ("none", "full") and not hasattr(jax.checkpoint_policies, remat):
        raise ValueError(
            f"remat={remat!r}: use 'none', 'full' or a name of jax.checkpoint_policies"
        )


def scan(layer, carry, xs, *, remat, unroll):
    """jax.lax.scan of a body over stacked layers, with a choice of what the backward pass keeps.

    Args:
        layer: (carry, x) -> (carry, y).
        remat: "none" recomputes nothing, "full" everything, any other name is one of
            `jax.checkpoint_policies`.
        unroll: how many layers a turn of the loop holds.
    """
    if remat != "none":
        policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
        layer = jax.checkpoint(layer, policy=policy)
    return jax.lax.scan(layer, carry, xs, unroll=unroll)
