"""Sequences padded to whole blocks, as the kernels and the mesh need them. Imports only jax."""

import jax.numpy as jnp


def pad(x, multiple, axis):
    """Zeros at the end of an axis, so that its length is a multiple of `multiple`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def visible_keys(visible, keys, multiple):
    """How many keys are visible, the first ones, after padding to a multiple of `multiple`.

    Args:
        visible: how many of the `keys`; None for all.

    Returns:
        The number without padding; None if all keys are visible and there is no padding.
    """
    return keys if visible is None and keys % multiple else visible
