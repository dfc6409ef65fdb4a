"""Checkpoint files, read into our networks and written from them.

    denoiser = weights.denoiser("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype="bfloat16")
    weights.save("student.safetensors", denoiser, times=(1.0, 0.5), shift=5.0)

`families` has the tables that resolve names, `ours` our own files, `foreign` and the tables beside
it those of other programs, `files` the formats, `loading` what reads either, `export` what writes
for other programs. Imports devices, diffusion and models.
"""

from dmd_jax.weights.digests import digest, fingerprint
from dmd_jax.weights.families import FAMILIES, build, shapes, sharding_rules, shardings
from dmd_jax.weights.loading import abstract, abstract_part, denoiser, load, notes
from dmd_jax.weights.ours import find, save
from dmd_jax.weights.table import differing

__all__ = [
    "FAMILIES",
    "abstract",
    "abstract_part",
    "build",
    "denoiser",
    "differing",
    "digest",
    "find",
    "fingerprint",
    "load",
    "notes",
    "save",
    "shapes",
    "sharding_rules",
    "shardings",
]
