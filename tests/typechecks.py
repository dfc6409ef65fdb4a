"""Checks the types and shapes in the signatures of the library's mathematics, in every test.

Importing this module installs jaxtyping's import hook, with beartype: it must come before the first
import of the library. jaxtyping compares the axes of one call with each other, so that a mask or a
time of another batch is found. Under jax.jit it does so while tracing, and costs nothing later.
"""

import beartype
from jaxtyping import install_import_hook

ROOMS = ("diffusion", "losses", "rollouts", "methods")

# By PEP 484, an int may be passed where a float is declared.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

install_import_hook([f"dmd_jax.{room}" for room in ROOMS], f"{__name__}.check")
