"""Our own files: safetensors with one tensor for each weight, named by its path in the network.

A header in the metadata holds the family's name, the network's config, schedule and prediction as
plain numbers, the boundaries of experts, and notes. Imports the tables that resolve these names.
"""

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from dmd_jax.devices.disk import local_path
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.experts import Experts
from dmd_jax.weights.families import (
    FAMILIES,
    PREDICTIONS,
    SCHEDULES,
    abstract_net,
    family_of,
    from_plain,
    to_plain,
    with_fields,
)
from dmd_jax.weights.files import Tensors

ASSETS = Path(__file__).parent.parent / "assets"
HEADER = "dmd_jax"  # its key in the metadata of the file


def find(path: str | PathLike) -> Path:
    """The file at `path`, or the shipped file of that name ("mnist_teacher").

    Raises:
        FileNotFoundError: there is neither.
    """
    for candidate in (local_path(path), ASSETS / f"{path}.safetensors"):
        if candidate.is_file():
            return candidate
    shipped = sorted(file.stem for file in ASSETS.glob("*.safetensors"))
    raise FileNotFoundError(f"no checkpoint file at {str(path)!r}; shipped are {shipped}")


def save(path: str | PathLike, denoiser: Denoiser, **notes: Any) -> None:
    """Writes a denoiser as safetensors. A failure leaves the file that was there before.

    Args:
        path: the file.
        denoiser: a Denoiser whose network is of a family in FAMILIES, or experts of one.
        **notes: JSON values kept in the header, such as the `times` and `shift` of a student.

    Raises:
        ValueError: the network, schedule or prediction is in no table.
    """
    config = denoiser.net.config
    header = {
        "family": family_of(config),
        "model": dataclasses.asdict(config),
        "schedule": to_plain(SCHEDULES, denoiser.schedule),
        "prediction": to_plain(PREDICTIONS, denoiser.prediction),
        "notes": notes,
    }
    if isinstance(denoiser.net, Experts):
        header["boundaries"] = denoiser.net.boundaries
    tensors = {name: jax.device_get(leaf) for name, leaf in named_leaves(denoiser.net).items()}
    write(path, tensors, {HEADER: json.dumps(header)})


def write(path: str | PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file. A failure leaves the file that was there before."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_header(tensors: Tensors) -> dict[str, Any] | None:
    """The header that `save` wrote; None in files of other programs."""
    header = tensors.metadata.get(HEADER)
    return None if header is None else json.loads(header)


def abstract_denoiser(path: Path, header: dict[str, Any], overrides: dict[str, Any]) -> Denoiser:
    """The Denoiser of a header, with jax.ShapeDtypeStructs for weights.

    Args:
        path: the file, for errors.
        overrides: fields of the network's config that replace those of the header.

    Raises:
        ValueError: the header names what the tables do not have, or the family has no such field.
    """
    try:
        family_config, network, _ = FAMILIES[header["family"]]
        config = family_config(**header["model"])
        schedule = from_plain(SCHEDULES, header["schedule"])
        prediction = from_plain(PREDICTIONS, header["prediction"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its header is not of this version of dmd_jax: {error}"
        ) from error
    net = abstract_net(network, with_fields(config, overrides, path))
    if boundaries := header.get("boundaries"):
        net = Experts([net] * (len(boundaries) + 1), boundaries)
    return Denoiser(net, schedule, prediction)
