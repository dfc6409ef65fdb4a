"""The directory of compiled programs, which `plan` fills and `main` reads. Imports jax."""

import os
from pathlib import Path

import jax

DIRECTORY = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/dmd_jax")


def store_programs(directory: str) -> None:
    """Stores what is compiled from now on in a directory, and takes from it what it has.

    Must be called before the first compilation of the process.

    Args:
        directory: "" changes nothing.
    """
    if directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
