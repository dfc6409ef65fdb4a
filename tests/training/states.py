"""A small training state, its checkpoints, and ways to damage them."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dmd_jax.training.checkpoints import Checkpointer


class Net(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.inner = nnx.Linear(3, width, rngs=rngs)
        self.outer = nnx.Linear(width, 2, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: jax.Array
    nets: dict[str, Any]
    opt_state: Any


def new_state(seed: int = 0, width: int = 512) -> State:
    nets = {name: Net(width, nnx.Rngs(seed + i)) for i, name in enumerate(("generator", "critic"))}
    roles = {name: optax.adam(1e-3) for name in nets}
    tx = optax.multi_transform(roles, {name: name for name in nets})
    return State(jnp.int32(seed), nets, tx.init(nets))


ABSTRACT = jax.eval_shape(new_state)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def save_steps(workdir: Path, steps: tuple[int, ...]) -> None:
    with Checkpointer(workdir) as checkpointer:
        for step in steps:
            checkpointer.save(step, new_state(step), {"note": f"at {step}"})


def in_child(program: str, *args: object, devices: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def values_file(checkpoint: Path) -> Path:
    """The file that holds most of the numbers."""
    return max(checkpoint.glob("state/**/d/*"), key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
