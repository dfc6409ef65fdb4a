"""The precision of matrix products. Imports jax."""

import jax


def use_float32_products(*dtypes: str) -> None:
    """Makes "float32" mean float32, where all networks of a program compute in it.

    By default a GPU rounds the operands of a float32 matrix product to TF32, a TPU to bfloat16. The
    products of bfloat16 operands are exact in float32, so the setting has nothing to add to them. A
    program with bfloat16 networks does without it, because it also reaches into attention kernels.

    Args:
        dtypes: in which the networks compute.
    """
    if all(dtype == "float32" for dtype in dtypes):
        jax.config.update("jax_default_matmul_precision", "float32")
