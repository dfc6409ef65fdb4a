"""Checkpoint files, read into our networks and written from them.

    denoiser = weights.denoiser("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype="bfloat16")
    weights.save("student.safetensors", denoiser, times=(1.0, 0.5), shift=5.0)

families       network families, schedules and predictions by the names that files contain
ours           files of this library: header, reading, writing
foreign        files of other programs: which network is in them
wan, wan_vae, umt5    their tensors by name, and how each becomes one of our arrays
table          fills a network by such a table
parts          the parts of a model: files, folders, names on the hub
files          formats: safetensors, .pt, folders of shards
pickles        reads PyTorch's files without executing anything
loading        `denoiser`, `load`: opens any of these
export         writes Wan transformers for other programs
adapters       low-rank adapters (LoRA) as trees, and in networks
adapter_files  files of adapters, of this library and of other programs
digests        fingerprints of files and networks

Imports devices, diffusion and models.
"""

from dmd_jax.weights.digests import digest, fingerprint
from dmd_jax.weights.families import (
    FAMILIES,
    abstract_net,
    build,
    shapes,
    sharding_rules,
    shardings,
)
from dmd_jax.weights.loading import abstract, abstract_part, denoiser, load, notes
from dmd_jax.weights.ours import find, save
from dmd_jax.weights.table import differing

__all__ = [
    "FAMILIES",
    "abstract",
    "abstract_net",
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
