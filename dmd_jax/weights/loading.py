"""Loads networks: the file is opened and recognised, compared by headers, then read.

Imports `files`, `ours`, `foreign` and `table`.
"""

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from dmd_jax.devices.disk import local_path
from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.diffusion.schedule import FlowMatching
from dmd_jax.models.layers import in_int8
from dmd_jax.weights import files, foreign, ours, parts
from dmd_jax.weights.families import shapes
from dmd_jax.weights.table import Row, differing, fill, their_shapes


def notes(path: str | PathLike) -> dict[str, Any]:
    """The notes that `save` wrote into the file at `path`; {} in files of other programs."""
    header = ours.read_header(files.open_tensors(locate(path, "transformer")))
    return header["notes"] if header else {}


def abstract(path: str | PathLike, *, part: str = "transformer", **overrides: Any) -> Denoiser:
    """The Denoiser at `path` with jax.ShapeDtypeStructs for weights; reads headers only.

    Arguments and errors are those of `denoiser`. The weights are float32 in files of this library,
    and have the stored dtype in files of other programs.
    """
    return _denoiser(_source(path, part, overrides).module)


def denoiser(
    path: str | PathLike,
    *,
    part: str = "transformer",
    shardings: Any = None,
    int8: bool = False,
    **overrides: Any,
) -> Denoiser:
    """The Denoiser at `path`.

    Args:
        path: a file that `save` wrote, or the name of a shipped one; or a Wan transformer of
            another program: a file, a folder, or a name on the Hugging Face hub (`parts.locate`).
        part: of Wan 2.2's pair, "transformer" for high noise or "transformer_2" for low.
        shardings: a tree like `abstract(path)` of jax.sharding.Sharding; None for one device. Or of
            jax.ShapeDtypeStruct with shardings: the weights then get their dtypes, shard by shard.
        int8: whether kernels of the layers are rounded to eight bits (`models.layers.in_int8`),
            shard by shard; `shardings` are then of such a tree.
        **overrides: fields of the network's config that say how it runs (dtype, remat, unroll).
            `spans=True` makes a DiT of one without spans, whose output is the same at first.

    Raises:
        FileNotFoundError: there is no such file, or a part of it is missing.
        ValueError: it is damaged, holds something else, or its tensors differ from its header or
            from those of its family; every differing path is named with both shapes. Or numbers are
            infinite or NaN.
    """
    source = _source(path, part, overrides)
    result = _denoiser(source.module)
    net = in_int8(result.net) if int8 else result.net
    return dataclasses.replace(result, net=_filled(source, net, shardings))


def load(
    path: str | PathLike, dtype: Any = None, *, part: str | None = None, shardings: Any = None
) -> nnx.Module:
    """The network at `path`, of this library or of another program.

    Args:
        path: a file, a folder, or a name on the Hugging Face hub (`parts.locate`).
        dtype: of the weights; None for the stored one of each.
        part: of a model of several parts: "transformer", "transformer_2", "vae" or
            "text_encoder"; None is the only part, or the transformer.
        shardings: a tree like `abstract_part` of jax.sharding.Sharding; None for one device.

    Returns:
        A module: `models.wan.Wan`, or the network of another entry of `foreign.PARTS`.

    Raises:
        FileNotFoundError, ValueError: as `denoiser`.
    """
    source = _source(path, part, {})
    return _filled(source, _in_dtype(_net(source.module), dtype), shardings)


def abstract_part(
    path: str | PathLike, dtype: Any = None, *, part: str | None = None
) -> nnx.Module:
    """What `load` returns, with jax.ShapeDtypeStructs for weights; reads headers only."""
    return _in_dtype(_net(_source(path, part, {}).module), dtype)


def locate(path: str | PathLike, part: str | None) -> Path:
    """The file or folder of a part of the model at `path`, or the shipped file of that name.

    Raises:
        FileNotFoundError: there is no such file, folder or name.
    """
    known = local_path(path).exists() or parts.hub_name(path)
    return parts.locate(path, part) if known else ours.find(path)


class _Source(NamedTuple):
    """A checkpoint whose headers were read and agree with its network."""

    module: Any  # abstract: a Denoiser from our own files, a network from other programs'
    rows: list[Row]
    tensors: files.Tensors  # by the names of the rows


def _source(path, part, overrides):
    tensors = files.open_tensors(locate(path, part))
    header = ours.read_header(tensors)
    if header is None:
        module, rows, tensors = foreign.resolve(tensors, part, overrides)
    else:
        parts.require_part(tensors.path, "transformer", part)
        module = ours.abstract_denoiser(tensors.path, header, overrides)
        wanted = shapes(module.net)
        rows = [Row(name, name) for name in wanted]
        if overrides.get("spans"):
            grown = {name: shape for name, shape in wanted.items() if name.startswith("span/")}
            tensors = tensors.with_zeros(grown)
    if lines := differing(their_shapes(_net(module), rows), tensors.shapes):
        reason = files.stranger(tensors.shapes) or "damaged, or of another version"
        raise ValueError(
            f"{tensors.path} does not hold the network of its header and names; it may be "
            f"{reason}:\n{lines}"
        )
    return _Source(module, rows, tensors)


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
        net = jax.tree.map(_placed, net, _net(shardings))
    try:
        return fill(net, source.rows, source.tensors.read)
    except ValueError as error:
        raise ValueError(f"{source.tensors.path}: {error}") from error


def _placed(x, place):
    """The abstract array `x` where `place` says, a Sharding or an abstract array of that dtype."""
    if isinstance(place, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, place.dtype, sharding=place.sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
