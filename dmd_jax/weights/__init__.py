"""Checkpoint files, to and from our trees. Imports the denoiser and the network families.

Our own files are safetensors: one tensor a weight, named by its path, and a header that holds the
family's name and plain numbers. The tables below resolve the names; nothing read from a file is
ever imported or executed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmd_jax.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon, Velocity
from dmd_jax.models import dit
from dmd_jax.paths import named_leaves, path_name
from dmd_jax.schedule import EDM, VP, FlowMatching

# name: (config, network, sharding rules)
FAMILIES = {"dit": (dit.DiTConfig, dit.DiT, dit.SHARDING_RULES)}
SCHEDULES = {"flow_matching": FlowMatching, "edm": EDM, "vp": VP}
PREDICTIONS = {
    "velocity": Velocity,
    "epsilon": Epsilon,
    "x0": X0,
    "edm_preconditioned": EDMPreconditioned,
}
ASSETS = Path(__file__).parent.parent / "assets"
HEADER = "dmd_jax"


def build(config, *, seed=0):
    """A freshly initialised network of the family whose config this is."""
    _, network, _ = FAMILIES[_family(config)]
    return network(config, rngs=nnx.Rngs(seed))


def sharding_rules(net):
    """The sharding rules of the family of `net`."""
    return FAMILIES[_family(net.config)][2]


def shapes(tree):
    """{path: shape} of a tree of weights."""
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}


def _family(config):
    return _name(FAMILIES, lambda entry: isinstance(config, entry[0]), config)


def find(path):
    """The file at `path`, or the shipped one of that name ("mnist_teacher").

    Raises:
        FileNotFoundError: there is neither.
    """
    for candidate in (Path(path).expanduser(), ASSETS / f"{path}.safetensors"):
        if candidate.is_file():
            return candidate
    shipped = sorted(file.stem for file in ASSETS.glob("*.safetensors"))
    raise FileNotFoundError(f"no checkpoint file at {path!r}; shipped are {shipped}")


def fingerprint(path):
    """SHA-256 of a file, or of a shipped one, in hexadecimal."""
    with find(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(path, denoiser, **notes):
    """Writes a denoiser as safetensors, whole or not at all.

    Args:
        path: the file.
        denoiser: a Denoiser whose network is of a known family.
        **notes: JSON values kept in the header, such as the `times` and `shift` of a student.
    """
    config = denoiser.net.config
    header = {
        "family": _family(config),
        "model": dataclasses.asdict(config),
        "schedule": _plain(SCHEDULES, denoiser.schedule),
        "prediction": _plain(PREDICTIONS, denoiser.prediction),
        "notes": notes,
    }
    tensors = {name: jax.device_get(leaf) for name, leaf in named_leaves(denoiser.net).items()}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, {HEADER: json.dumps(header)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def notes(path):
    """What `save` was told to note in the file at `path`; {} if nothing."""
    return _read(path)[0]["notes"]


def abstract(path, **overrides):
    """The Denoiser at `path` with jax.ShapeDtypeStructs for weights: reads the header alone."""
    header, _ = _read(path)
    try:
        family_config, network, _ = FAMILIES[header["family"]]
        config = family_config(**header["model"])
        schedule = _made(SCHEDULES, header["schedule"])
        prediction = _made(PREDICTIONS, header["prediction"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its header is not of this version of dmd_jax: {error}"
        ) from error
    config = dataclasses.replace(config, **overrides)
    net = jax.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    return Denoiser(net, schedule, prediction)


def load(path, **overrides):
    """The Denoiser in a file that `save` wrote.

    Args:
        path: a file, or the name of a shipped one.
        **overrides: fields of the network's config that say how it runs (dtype, remat, unroll).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another program, or its tensors differ from its header; every
            differing path is named with both shapes.
    """
    path = find(path)
    denoiser = abstract(path, **overrides)
    _, tensors = _read(path, tensors=True)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if lines := differing(shapes(denoiser.net), found):
        raise ValueError(f"{path} does not hold the network of its header:\n" + lines)
    net = jax.tree_util.tree_map_with_path(
        lambda p, leaf: jnp.asarray(tensors[path_name(p)], leaf.dtype), denoiser.net
    )
    return dataclasses.replace(denoiser, net=net)


def differing(wanted, found):
    """One line for every path whose shape differs between two {path: shape}; '' if none does."""
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(name, "nothing"), found.get(name, "nothing")
        if a != b:
            lines.append(f"  {name}: expected {a}, found {b}")
    return "\n".join(lines)


def _read(path, *, tensors=False):
    path = find(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                some = ", ".join(sorted(names)[:3])
                raise ValueError(
                    f"{path} is a safetensors file, but not one that dmd_jax wrote (it holds "
                    f"{some}, ...): see dmd_jax.weights for the families that can be read"
                )
            arrays = {name: file.get_tensor(name) for name in names} if tensors else {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not safetensors ({error})") from None
    return json.loads(header), arrays


def _name(table, fits, value):
    for name, entry in table.items():
        if fits(entry):
            return name
    raise ValueError(f"{value!r} has no name in {sorted(table)}: add it to the table in weights/")


def _plain(table, value):
    name = _name(table, lambda cls: type(value) is cls, value)
    return {"name": name, **dataclasses.asdict(value)}


def _made(table, plain):
    plain = dict(plain)
    return table[plain.pop("name")](**plain)
