"""The tables that resolve names in files: network families, schedules and predictions.

An export holds a family's name and plain numbers. They are looked up here; nothing that is read
from a file is imported or executed. Imports the families, the denoiser and the mesh.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon, Velocity
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching
from dmd_jax.models import discriminator, dit, wan

# name: (config, network, sharding rules)
FAMILIES = {
    "dit": (dit.DiTConfig, dit.DiT, dit.SHARDING_RULES),
    "wan": (wan.WanConfig, wan.Wan, wan.SHARDING_RULES),
    "discriminator": (
        discriminator.DiscriminatorConfig,
        discriminator.Discriminator,
        discriminator.SHARDING_RULES,
    ),
}
SCHEDULES = {"flow_matching": FlowMatching, "edm": EDM, "vp": VP}
PREDICTIONS = {
    "velocity": Velocity,
    "epsilon": Epsilon,
    "x0": X0,
    "edm_preconditioned": EDMPreconditioned,
}


def build(config: Any, *, seed: int = 0) -> nnx.Module:
    """A randomly initialised network of the family of `config`.

    Raises:
        ValueError: no family in FAMILIES has such a config.
    """
    _, network, _ = FAMILIES[family_of(config)]
    return network(config, rngs=nnx.Rngs(seed))


@functools.cache  # several roles often have one config, and tracing a network takes its time
def abstract_net(network: type[nnx.Module], config: Any) -> nnx.Module:
    """`network(config)` with jax.ShapeDtypeStructs for weights."""
    return jax.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))


def with_fields(config: Any, fields: dict[str, Any], path: Path) -> Any:
    """A network's config with other values of some fields.

    Args:
        path: the file of the network, for errors.

    Raises:
        ValueError: the config has no such field.
    """
    if missing := [name for name in fields if not hasattr(config, name)]:
        raise ValueError(
            f"{path}: {', '.join(missing)} cannot be set, because {type(config).__name__} has no "
            "such field: add it there, or leave it out here (docs/teachers.md)"
        )
    return dataclasses.replace(config, **fields)


def family_of(config: Any) -> str:
    """The name of the family whose config this is; ValueError if there is no such family."""
    return _name(FAMILIES, lambda entry: isinstance(config, entry[0]), config)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a tree of weights."""
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}


def sharding_rules(network: Any) -> tuple:
    """The sharding rules of the family of a network, bare or in a Denoiser."""
    net = network.net if isinstance(network, Denoiser) else network
    return FAMILIES[family_of(net.config)][2]


def shardings(tree: Any, networks: Iterable[Any], mesh: jax.sharding.Mesh) -> Any:
    """The shardings of weights on a mesh, by the rules of their families.

    Args:
        tree: a tree of weights, or of states whose paths end as those of weights; arrays or
            jax.ShapeDtypeStructs.
        networks: one of each family that `tree` holds weights of, bare or in a Denoiser.
        mesh: the mesh of `sharding.make_mesh`.

    Returns:
        A tree of NamedSharding like `tree`.

    Raises:
        ValueError: of `sharding.infer`.
    """
    rules = [rule for network in networks for rule in sharding_rules(network)]
    return sharding.infer(tree, tuple(dict.fromkeys(rules)), mesh)


def to_plain(table: dict[str, type], value: Any) -> dict[str, Any]:
    """A schedule or prediction as JSON: its name in `table`, and its fields."""
    name = _name(table, lambda cls: type(value) is cls, value)
    return {"name": name, **dataclasses.asdict(value)}


def from_plain(table: dict[str, type], plain: dict[str, Any]) -> Any:
    """The inverse of `to_plain`; KeyError or TypeError where the table has no such value."""
    plain = dict(plain)
    kind = table[plain.pop("name")]
    return kind(**{name: float(number) for name, number in plain.items()})


def _name(table, fits, value):
    for name, entry in table.items():
        if fits(entry):
            return name
    raise ValueError(f"{value!r} has no name in {sorted(table)}: add it to the table in weights/")
