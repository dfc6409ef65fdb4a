"""Checkpoint files, to and from our trees. Imports the denoiser and the network families.

Our own files are safetensors: one tensor a weight, named by its path, and a header that holds the
family's name and plain numbers. Those of others are read through tables of names (`table`), from
whatever `files` can open. The tables below resolve families; nothing read from a file is ever
imported or executed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from safetensors.numpy import save_file

from dmd_jax.devices.paths import named_leaves, path_name
from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon, Velocity
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching
from dmd_jax.models import dit
from dmd_jax.models import wan as wan_model
from dmd_jax.models.umt5 import UMT5
from dmd_jax.models.wan_vae import WanVAE
from dmd_jax.weights import files, umt5, wan, wan_vae
from dmd_jax.weights.table import Row, differing, fill, their_shapes

# name: (config, network, sharding rules)
FAMILIES = {
    "dit": (dit.DiTConfig, dit.DiT, dit.SHARDING_RULES),
    "wan": (wan_model.WanConfig, wan_model.Wan, wan_model.SHARDING_RULES),
}
SCHEDULES = {"flow_matching": FlowMatching, "edm": EDM, "vp": VP}
PREDICTIONS = {
    "velocity": Velocity,
    "epsilon": Epsilon,
    "x0": X0,
    "edm_preconditioned": EDMPreconditioned,
}
# What the files of others hold: (part, network, its tables, {layout: a name that tells it}).
PARTS = (
    (
        "transformer",
        wan_model.Wan,
        wan,
        {
            "diffusers": "condition_embedder.time_proj.weight",
            "original": "time_projection.1.weight",
        },
    ),
    (
        "vae",
        WanVAE,
        wan_vae,
        {"diffusers": "encoder.conv_in.weight", "original": "encoder.conv1.weight"},
    ),
    (
        "text_encoder",
        UMT5,
        umt5,
        {
            "diffusers": "encoder.block.0.layer.0.SelfAttention.q.weight",
            "original": "blocks.0.attn.q.weight",
        },
    ),
)
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
    """What `save` was told to note in the file at `path`; {} if nothing, or if others wrote it."""
    header = _header(_open(path, "transformer"))
    return header["notes"] if header else {}


def abstract(path, *, part="transformer", **overrides):
    """The Denoiser at `path` with jax.ShapeDtypeStructs for weights: reads headers alone.

    Its weights are float32 in our own files, and as they are stored in those of others.
    """
    return _denoiser(_source(path, part, overrides).module)


def denoiser(path, *, part="transformer", shardings=None, **overrides):
    """The Denoiser at `path`.

    Args:
        path: a file that `save` wrote, or the name of a shipped one; or a Wan transformer of
            others: a file, a folder, or a name on the Hugging Face hub (`files.locate`).
        part: of Wan 2.2's pair, "transformer" for high noise or "transformer_2" for low.
        shardings: a tree like `abstract(path)` of jax.sharding.Sharding; None for one device.
        **overrides: fields of the network's config that say how it runs (dtype, remat, unroll).

    Raises:
        FileNotFoundError: there is no such file, or a part of it is missing.
        ValueError: it is damaged, holds something else, or its tensors differ from its header or
            from those of its family; every differing path is named with both shapes.
    """
    source = _source(path, part, overrides)
    made = _denoiser(source.module)
    return dataclasses.replace(made, net=_filled(source, made.net, shardings))


def load(path, dtype=None, *, part=None, shardings=None):
    """The network that lies at `path`, of whoever wrote it.

    Args:
        path: a file, a folder, or a name on the Hugging Face hub (`files.locate`).
        dtype: of the weights; None for what each is stored in.
        part: of a model of several parts: "transformer", "transformer_2", "vae" or
            "text_encoder"; None is the only part, or the transformer.
        shardings: a tree like `abstract_part` of jax.sharding.Sharding; None for one device.

    Returns:
        A module: `models.wan.Wan`, or that of another line of PARTS.

    Raises:
        FileNotFoundError, ValueError: as `denoiser`.
    """
    source = _source(path, part, {})
    return _filled(source, _in_dtype(_net(source.module), dtype), shardings)


def abstract_part(path, dtype=None, *, part=None):
    """What `load` returns, with jax.ShapeDtypeStructs for weights: reads headers alone."""
    return _in_dtype(_net(_source(path, part, {}).module), dtype)


class _Source(NamedTuple):
    """A checkpoint whose headers were read, and found to fit."""

    module: Any  # abstract: a Denoiser in our own files, a network in those of others
    rows: list[Row]
    tensors: files.Tensors


def _source(path, part, overrides):
    tensors = _open(path, part)
    header = _header(tensors)
    if header is None:
        source = _theirs(tensors, part, overrides)
    else:
        source = _ours(tensors, header, part, overrides)
    if lines := differing(their_shapes(_net(source.module), source.rows), tensors.shapes):
        kind = files.stranger(tensors.shapes) or "damaged, or of another version"
        raise ValueError(
            f"{tensors.path} does not hold the network of its header and names; it may be {kind}:\n"
            + lines
        )
    return source


def _open(path, part):
    """The tensors of a part of what lies at `path`, or of the shipped file of that name."""
    known = Path(path).expanduser().exists() or files.hub_name(path)
    return files.open_tensors(files.locate(path, part) if known else find(path))


def _header(tensors):
    """The header that `save` wrote; None in the files of others."""
    header = tensors.metadata.get(HEADER)
    return None if header is None else json.loads(header)


def _ours(tensors, header, part, overrides):
    _require_part(tensors, "transformer", part)
    try:
        family_config, network, _ = FAMILIES[header["family"]]
        config = family_config(**header["model"])
        schedule = _made(SCHEDULES, header["schedule"])
        prediction = _made(PREDICTIONS, header["prediction"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{tensors.path}: its header is not of this version of dmd_jax: {error}"
        ) from error
    net = _abstract_net(network, dataclasses.replace(config, **overrides))
    rows = [Row(name, name) for name in shapes(net)]
    return _Source(Denoiser(net, schedule, prediction), rows, tensors)


def _theirs(tensors, part, overrides):
    kind, network, names, layout = _recognised(tensors)
    tensors = tensors.renamed(getattr(names, "ALIASES", {}))
    _require_part(tensors, kind, part and part.removesuffix("_2"))
    try:
        config = names.config_of(tensors.shapes, layout, tensors.settings)
    except ValueError as error:
        raise ValueError(f"{tensors.path}: {error}") from error
    net = _abstract_net(network, dataclasses.replace(config, **overrides))
    rows = names.table(config, layout)
    stored = {row.ours: tensors.dtypes.get(row.theirs.format(0)) for row in rows}
    net = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, stored[path_name(path)] or x.dtype), net
    )
    return _Source(net, rows, tensors)


def _require_part(tensors, kind, part):
    if part not in (None, kind):
        raise ValueError(
            f"{tensors.path} looks like a {kind}, and a {part} is wanted: name what holds one"
        )


def _recognised(tensors):
    """(part, network, its tables, layout) of others' tensors."""
    for part, network, names, layouts in PARTS:
        for layout, name in layouts.items():
            if name in tensors.shapes:
                return part, network, names, layout
    some, kind = ", ".join(sorted(tensors.shapes)[:3]), files.stranger(tensors.shapes)
    looks = f"looks like {kind}" if kind else "is none that dmd_jax wrote, nor of a known family"
    known = sorted({part for part, *_ in PARTS})
    raise ValueError(f"{tensors.path} {looks} (it holds {some}, ...); read are Wan's {known}")


def _abstract_net(network, config):
    return jax.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))


def _net(module):
    return module.net if isinstance(module, Denoiser) else module


def _denoiser(module):
    if isinstance(module, Denoiser):
        return module
    return Denoiser(module, FlowMatching(), Velocity(time_scale=1000))


def _in_dtype(net, dtype):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), net)


def _filled(source, net, shardings):
    """The abstract `net` with its weights, in its dtypes."""
    if shardings is not None:
        net = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            net,
            _net(shardings),
        )
    return fill(net, source.rows, source.tensors.read)


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
