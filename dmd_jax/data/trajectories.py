"""Trajectories of a teacher's ODE, as `python -m dmd_jax.ode_pairs` writes them.

A row is the ODE at chosen times and its end; of videos, also the real video that the teacher saw
blocks of. The files are those of `latents`, in which the prompt of an image is its label. Imports
the latents, the prompts and the images.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dmd_jax.data import latents
from dmd_jax.data.images import Images, load
from dmd_jax.data.prompts import Prompts

SHARD = 16  # trajectories of videos per file: some 400 MB of Wan's
IMAGE_SHARD = 256  # of 512 x 512 pixels some 800 MB


def write(
    path: str | PathLike,
    videos: Iterable[tuple[Any, int]],
    solve: Callable[[Any], Any],
    sample_shape: Sequence[int],
    *,
    levels: Sequence[float],
    source: dict[str, Any],
) -> None:
    """Writes the trajectories of videos or images into a folder; after a stop, it resumes.

    Args:
        path, videos: as for `latents.write`; of images, numbers and labels.
        solve: a video of `videos` -> float [len(levels) + 2, F, H, W, C]: the ODE at each level,
            its end, the real video; of an image [len(levels) + 1, H, W, C], there is no real one.
        sample_shape: (F, H, W, C), or (H, W, C) of images.
        levels: the times of the stored points, as a network sees them (after the shift).
        source: how the trajectories were made, of JSON values.

    Raises:
        ValueError: as `latents.write`.
    """
    shape = (len(levels) + _rows_after(sample_shape), *sample_shape)
    shard = SHARD if len(sample_shape) == 4 else IMAGE_SHARD
    source = source | {"levels": list(levels)}
    latents.write(path, videos, solve, shape, shard=shard, source=source)


def _rows_after(sample_shape):
    """How many rows follow the points: the end and, of a video, the real one."""
    return 2 if len(sample_shape) == 4 else 1


class Trajectories(latents.Latents):
    """A folder that `write` completed. `rows` gives float32 [n, T, F, H, W, C] or [n, T, H, W, C].

    Attributes:
        levels: times of the stored points, after the shift; the end follows them and, of a video,
            the real one.
    """

    what, command = "trajectories", "dmd_jax.ode_pairs"

    def __init__(self, path: str | PathLike):
        super().__init__(path)
        levels = self.source.get("levels") if isinstance(self.source, dict) else None
        if len(self.shape) != 5 and levels is None:
            raise ValueError(
                f"{path} holds latents {list(self.shape)} and no trajectories: make these from it "
                f"with `python -m {self.command} --latents={path} ...`"
            )
        self.sample_shape = self.shape[1:]
        points = self.shape[0] - _rows_after(self.sample_shape)
        if not isinstance(levels, list) or len(levels) != points:
            raise ValueError(
                f"{path} holds {points} points of each trajectory, and their times are {levels}: "
                "delete it and make it again"
            )
        self.levels: tuple[float, ...] = tuple(levels)


@dataclasses.dataclass(frozen=True)
class OdePairs(Prompts):
    """Prompts with trajectories, for `methods.causal_ode`; a class that configs name.

    Attributes:
        latents: directory that `python -m dmd_jax.ode_pairs` wrote.
    """

    latents: str = dataclasses.field()

    _store: ClassVar = Trajectories

    def examples(self, rows: Sequence[int]) -> dict[str, Any]:
        """The part of a batch that n trajectories make.

        Returns:
            {"data": float32 [n, F, H, W, C], the real videos; "trajectory": {time: [n, F, H, W, C]}
            from noise to the end, whose time is 0; "cond", "uncond": [n, L, D]}.
        """
        *points, video = np.moveaxis(self._latents.rows(rows), 1, 0)
        trajectory = dict(zip((*self._latents.levels, 0.0), points, strict=True))
        return {"data": video, "trajectory": trajectory, **self.conditions(rows)}


@dataclasses.dataclass(frozen=True)
class ImagePairs:
    """A teacher's trajectories and their labels, for `methods.dmd1`; a class that configs name.

    Implements `Source`. The run is judged against the images of the data set that it names, as one
    that learns from them.

    Attributes:
        pairs: directory that `python -m dmd_jax.ode_pairs` wrote.
        name, split, data_dir: the data set whose images the teacher makes; see `images.load`.
    """

    pairs: str
    name: str = "mnist5k"
    split: str = "train"
    data_dir: str | None = None

    def open(self) -> None:
        """Opens the files.

        Raises:
            FileNotFoundError, ValueError: they are missing, damaged, or of other images.
        """
        stored, classes = self._stored, self.images.num_classes
        if stored.sample_shape != self.sample_shape:
            raise ValueError(
                f"{self.pairs} holds trajectories of {stored.sample_shape}, but the images of "
                f"{self.name!r} are {self.sample_shape}"
            )
        if wrong := sorted(set(stored.prompt.tolist()) - set(range(classes))):
            raise ValueError(
                f"{self.pairs} has the label {wrong[0]}, but {self.name!r} has {classes} classes"
            )

    @functools.cached_property
    def images(self) -> Images:
        """The data set."""
        return load(self.name, self.split, self.data_dir)

    @functools.cached_property
    def _stored(self) -> Trajectories:
        return Trajectories(Path(self.pairs).expanduser())

    @property
    def guidance(self) -> float | None:
        """That of the teacher on its way to the ends; None where the folder does not say."""
        return self._stored.source.get("guidance")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample of a generator."""
        return self.images.sample_shape

    @property
    def model_fields(self) -> dict[str, int]:
        """Fields of a new network's config that follow from the data."""
        return self.images.model_fields

    @property
    def notes(self) -> dict[str, Any]:
        """Entries for the header of an exported network: none."""
        return self.images.notes

    def require_fit(self, what: str, model: Any) -> None:
        """See `Images.require_fit`."""
        self.images.require_fit(what, model)

    def __len__(self) -> int:
        return len(self._stored)

    def examples(self, rows: Sequence[int]) -> dict[str, Any]:
        """The part of a batch that n trajectories make.

        Returns:
            {"trajectory": {time: float32 [n, H, W, C]} from noise to the end, whose time is 0;
            "cond", "uncond": int32 [n]}.
        """
        points = np.moveaxis(self._stored.rows(rows), 1, 0)
        trajectory = dict(zip((*self._stored.levels, 0.0), points, strict=True))
        return {"trajectory": trajectory, **self.conditions(rows)}

    def conditions(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """`examples` without the trajectories."""
        return self.images._conditions(self._stored.prompt[np.asarray(rows)])
