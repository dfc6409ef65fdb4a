"""What a dry run prints of a run: parameters and bytes, and its FLOPs.

Imports `cost`, `memory`, models and the configuration.
"""

import math

import jax

from dmd_jax.devices.paths import tree_bytes
from dmd_jax.models.layers import is_int8
from dmd_jax.training import memory
from dmd_jax.training.configuration import config_role
from dmd_jax.training.cost import cost

IN_HOST = "in the memory of the host"


def describe(run):
    """The text about a `run.Run`: what the devices store, by role, and what they compute."""
    state = run.state_shape()
    moved = ", ".join(sorted(memory.optimizers_in_host(run.config, run.nets)))
    lines = [
        f"{'role':<12}{'parameters':>14}{'dtype':>10}{'weights':>14}",
        *_role_lines(run),
        _line("average", tree_bytes((state.ema, state.more_ema))),
        _line("optimizers", tree_bytes(state.opt_state), moved and f"of {moved} {IN_HOST}"),
    ]
    if (cache := run.cache_shape()) is not None:
        lines.append(_line(f"cache of {cache.slots} latent frames", tree_bytes(cache)))
    lines += [
        f"one checkpoint: {tree_bytes(state) / 2**20:.1f} MiB; devices: {run.mesh.size} "
        f"({run.mesh.devices.flat[0].device_kind}), {dict(run.mesh.shape)}",
        *(f"{name}: {text}" for name, text in cost(run).lines().items()),
    ]
    return "\n".join(lines)


def _role_lines(run):
    """A line for each network: the trained ones, or their adapters, come first."""
    for role, tree in run.bind.trainable.items():
        base, count = run.bind.bases.get(role), _parameters(tree)
        yield _line(_columns(role, count, "float32"), 4 * count, base and f"adapter of {base}")
    for name, tree in run.frozen.items():
        role = config_role(name)
        int8, host = memory.in_int8(run.config, role), memory.in_host(run.config, role)
        columns = _columns(name, _parameters(tree), "int8" if int8 else tree.net.config.dtype)
        yield _line(columns, tree_bytes(tree), host and f"layers {IN_HOST}")
    for name, tree in run.others.items():
        yield _line(_columns(name, _parameters(tree), "stored"), tree_bytes(tree))


def _columns(role, parameters, dtype):
    return f"{role:<12}{parameters:>14,}{dtype:>10}"


def _line(columns, size, note=None):
    """A line with a size in bytes and, where there is one, a note."""
    return f"{columns:<36}{size / 2**20:>10.1f} MiB" + (f", {note}" if note else "")


def _parameters(tree):
    """How many weights a tree has; the scales of an `Int8` are none."""
    leaves = jax.tree.leaves(tree, is_leaf=is_int8)
    return sum(math.prod((x.values if is_int8(x) else x).shape) for x in leaves)
