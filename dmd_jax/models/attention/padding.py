"""Sequences padded to whole blocks, as the kernels and the mesh need them. Imports only jax."""

import jax.numpy as jnp


def pad(x, multiple, axis):
    """Zeros at the end of an axis, so that its length is a multiple of `multiple`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def visible_keys(visible, keys, multiple):
    """`visible`, bool [keys] or None for all, of keys that are padded to a multiple of `multiple`.

    Padding is not visible.

    Returns:
        bool [padded keys], or None if all keys are visible and there is no padding.
    """
    if visible is None and keys % multiple == 0:
        return None
    return pad(jnp.ones(keys, bool) if visible is None else visible, multiple, 0)
