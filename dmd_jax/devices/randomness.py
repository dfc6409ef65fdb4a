"""Random numbers that do not depend on how a batch is split. Imports only jax.

Sample i of a global batch uses the key `fold_in(key, i)`. Its noise is therefore the same on one
device and on many, and with and without gradient accumulation.
"""

import jax
import jax.numpy as jnp


def per_sample(draw, key, index):
    """Calls `draw(key_i)` for every sample.

    Args:
        draw: a function of one key.
        key: the key of the batch.
        index: int32 [B], each sample's position in the global batch.

    Returns:
        The results, stacked along a leading axis B.
    """
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(index)


def normal(key, index, shape):
    """Standard normal noise, float32 [B, *shape], that depends on `key` and `index` [B] only."""
    return per_sample(lambda k: jax.random.normal(k, shape, jnp.float32), key, index)
