"""Runs of the programs that end in seconds: a tiny teacher that learnt nothing, a dozen steps."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import toys
from safetensors.numpy import load_file

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.dit import DiT, DiTConfig

ROOT = Path(__file__).parents[1]
TINY = DiTConfig(image_size=28, channels=1, num_classes=10, patch=14, dim=16, depth=1, heads=2)
# Overrides that make a run of configs/dmd.py tiny.
SHORT = {
    "batch_size": 8,
    "steps": 12,
    "generator_every": 2,
    "log.every": 3,
    "log.tensorboard": False,
    "checkpoint.every": 4,
    "evaluate.every": 8,
    "evaluate.samples": 80,  # the metric network has 64 features
    "evaluate.num": 100,
    "evaluate.steps": (4, 1),
    "evaluate.teacher_steps": (3,),
}


@functools.cache
def tiny(seed=0, **changes):
    """A Denoiser of digits' shape whose weights are random."""
    config = DiTConfig(**{**TINY.__dict__, **changes})
    return Denoiser(toys.weights(lambda rngs: DiT(config, rngs=rngs), seed))


def load_module(path):
    """The module of a config program, by its path in the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(path="configs/dmd.py", variant=""):
    """The config of a program and, after the colon, its variant."""
    get_config = load_module(path).get_config
    return get_config(variant) if variant else get_config()


def short(teacher, data_dir, **overrides):
    """The overrides of a tiny run: a flat dict."""
    return SHORT | {"teacher.weights": str(teacher), "data.data_dir": data_dir} | overrides


def config(teacher, data_dir, path="configs/dmd.py", variant="", **overrides):
    """The config of a tiny run."""
    built = load_config(path, variant)
    built.update_from_flattened_dict(short(teacher, data_dir, **overrides))
    return built


def flags(workdir, values):
    """The command line of a run with these overrides."""
    overrides = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/dmd.py", f"--workdir={workdir}", *overrides]


def python(*args, **environment):
    """Runs Python in the repository, one CPU device to a process; returns the ended process."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | environment
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def tensors(path):
    """{name: array} of a safetensors file."""
    return load_file(path)


def same_tensors(a, b):
    """Whether two safetensors files hold the same names and bits."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)


def poisoned(denoiser):
    """The same network with NaN in place of every weight."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), denoiser)


def save_tiny(path, seed=0, **changes):
    """Writes `tiny` where it is asked for; returns the path."""
    weights.save(path, tiny(seed, **changes))
    return path
