"""Networks in files of other programs: which part and layout a file holds, and its tables.

Imports the network families and their tables of names.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
from flax import nnx

from dmd_jax.devices.paths import path_name
from dmd_jax.models.umt5 import UMT5
from dmd_jax.models.wan import Wan
from dmd_jax.models.wan_vae import WanVAE
from dmd_jax.weights import files, parts, umt5, wan, wan_vae
from dmd_jax.weights.families import abstract_net, with_fields
from dmd_jax.weights.table import Row


class Part(NamedTuple):
    """One kind of network that files of other programs hold."""

    name: str  # of the part of a model, as `parts.locate` takes it
    network: type[nnx.Module]
    tables: ModuleType  # `config_of`, `table` and, where tensors have several names, ALIASES
    layouts: dict[str, str]  # {layout: the name of a tensor that no other file has}


PARTS = (
    Part(
        "transformer",
        Wan,
        wan,
        {
            "diffusers": "condition_embedder.time_proj.weight",
            "original": "time_projection.1.weight",
        },
    ),
    Part(
        "vae",
        WanVAE,
        wan_vae,
        {"diffusers": "encoder.conv_in.weight", "original": "encoder.conv1.weight"},
    ),
    Part(
        "text_encoder",
        UMT5,
        umt5,
        {
            "diffusers": "encoder.block.0.layer.0.SelfAttention.q.weight",
            "original": "blocks.0.attn.q.weight",
        },
    ),
)


def resolve(
    tensors: files.Tensors, wanted: str | None, overrides: dict[str, Any]
) -> tuple[nnx.Module, list[Row], files.Tensors]:
    """Recognises a network by the names and shapes of its tensors.

    Args:
        tensors: of a file or folder.
        wanted: the part that it must be, as `parts.locate` takes it; None for any.
        overrides: fields of the network's config that the file does not determine.

    Returns:
        (network with jax.ShapeDtypeStructs in the dtypes of the file, a row for each of its
        weights, the tensors by the names of the rows).

    Raises:
        ValueError: no part of PARTS, not the wanted part, an unsupported variant, or a field that
            the network's config does not have.
    """
    part, layout = _recognised(tensors)
    parts.require_part(tensors.path, part.name, wanted and wanted.removesuffix("_2"))
    tensors = tensors.renamed(getattr(part.tables, "ALIASES", {}))
    try:
        config = part.tables.config_of(tensors.shapes, layout, tensors.settings)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{tensors.path}: the shapes of its tensors or its config.json are of no {part.name} "
            f"that is known: {error}"
        ) from error
    net = abstract_net(part.network, with_fields(config, overrides, tensors.path))
    rows = part.tables.table(config, layout)
    stored = {row.ours: tensors.dtypes.get(row.theirs.format(0)) for row in rows}
    net = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, stored[path_name(path)] or x.dtype), net
    )
    return net, rows, tensors


def _recognised(tensors):
    """(Part, layout) of the tensors of a file."""
    for part in PARTS:
        for layout, name in part.layouts.items():
            if name in tensors.shapes:
                return part, layout
    some, kind = ", ".join(sorted(tensors.shapes)[:3]), files.stranger(tensors.shapes)
    looks = f"looks like {kind}" if kind else "is none that dmd_jax wrote, nor of a known family"
    known = sorted(part.name for part in PARTS)
    raise ValueError(f"{tensors.path} {looks} (it holds {some}, ...); read are Wan's {known}")
