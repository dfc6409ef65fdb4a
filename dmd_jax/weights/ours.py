"""Our own files: safetensors with one tensor for each weight, named by its path in the network.

A header in the metadata holds the family's name, the network's config, schedule and prediction as
plain numbers, the boundaries of experts, and notes. Imports the tables that resolve these names.
"""

import dataclasses
import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from dmd_jax.devices.disk import local_path
from dmd_jax.devices.paths import named_leaves
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.attention import Causal
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
    run = local_path(path).parent
    if (run / "config.json").is_file() and (run / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"no checkpoint file at {str(path)!r}: a run writes its networks at its end; if it was "
            "stopped before, its command goes on"
        )
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
    """The header that `save` wrote; None in files of other programs.

    Raises:
        ValueError: it has no notes, or notes that do not say how the network is sampled.
    """
    text = tensors.metadata.get(HEADER)
    if text is None:
        return None
    try:
        header = json.loads(text)
        _check_notes(header["notes"])
    except (ValueError, KeyError, TypeError) as error:
        raise _of_another_version(tensors.path, error) from error
    return header


def _check_notes(notes):
    """Raises ValueError or TypeError for notes with which no sampler can be made."""
    for name, fits in NOTES.items():
        if name in notes and not fits(notes[name]):
            raise ValueError(f"{name} is {notes[name]!r}")
    if "causal" in notes:
        Causal(**notes["causal"])


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(value):
    return isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))


# The notes that decide how a network is sampled, and what they can be.
NOTES = {
    "data": lambda value: isinstance(value, str),
    "times": _are_numbers,
    "first_times": lambda value: value is None or _are_numbers(value),
    "shift": _is_number,
    "phases": _are_numbers,
    "context_time": lambda value: value is None or _is_number(value),
    "sample_shape": _are_numbers,
}


def _of_another_version(path, error):
    return ValueError(f"{path}: its header is not of this version of dmd_jax: {error!r}")


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
        boundaries = tuple(map(float, header.get("boundaries", ())))
    except (ValueError, KeyError, TypeError) as error:
        raise _of_another_version(path, error) from error
    net = abstract_net(network, with_fields(config, overrides, path))
    if boundaries:
        net = Experts([net] * (len(boundaries) + 1), boundaries)
    return Denoiser(net, schedule, prediction)
