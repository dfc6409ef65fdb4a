"""Random draws that do not depend on how a batch is split. Imports jax alone.

Sample i of a global batch draws from `fold_in(key, i)`. Its noise is therefore the same whether the
batch is on one device or on many, and whether it is taken whole or accumulated in parts.
"""

import jax
import jax.numpy as jnp


def per_sample(draw, key, index):
    """Calls `draw(key_i)` for every sample.

    Args:
        draw: a function of one key.
        key: the key that all samples of the batch share.
        index: int32 [B], each sample's position in the global batch.

    Returns:
        The draws, stacked along a leading axis B.
    """
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(index)


def normal(key, index, shape):
    """Standard normal noise, float32 [B, *shape], that depends on `key` and `index` [B] only."""
    return per_sample(lambda k: jax.random.normal(k, shape, jnp.float32), key, index)
