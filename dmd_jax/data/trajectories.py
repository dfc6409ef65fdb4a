"""Trajectories of a teacher's ODE along real videos, as `python -m dmd_jax.ode_pairs` writes them.

A row is the ODE at chosen times, its end, and the real video that the teacher saw blocks of. The
files are those of `latents`. Imports the latents and the prompts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, ClassVar

import numpy as np

from dmd_jax.data import latents
from dmd_jax.data.prompts import Prompts

SHARD = 16  # trajectories per file: some 400 MB of Wan's


def write(
    path: str | PathLike,
    videos: Iterable[tuple[Any, int]],
    solve: Callable[[Any], Any],
    sample_shape: Sequence[int],
    *,
    levels: Sequence[float],
    source: dict[str, Any],
) -> None:
    """Writes the trajectories of videos into a folder; after a stop, the same call resumes.

    Args:
        path, videos: as for `latents.write`.
        solve: a video of `videos` -> float [len(levels) + 2, F, H, W, C]: the ODE at each level,
            its end, the real video.
        sample_shape: (F, H, W, C).
        levels: the times of the stored points, as a network sees them (after the shift).
        source: how the trajectories were made, of JSON values.

    Raises:
        ValueError: as `latents.write`.
    """
    shape = (len(levels) + 2, *sample_shape)
    source = source | {"levels": list(levels)}
    latents.write(path, videos, solve, shape, shard=SHARD, source=source)


class Trajectories(latents.Latents):
    """A folder that `write` completed. `rows` gives float32 [n, T, F, H, W, C].

    Attributes:
        levels: times of the stored points, after the shift; the end and the real video follow them.
    """

    command = "dmd_jax.ode_pairs"

    def __init__(self, path: str | PathLike):
        super().__init__(path)
        if len(self.shape) != 5:
            raise ValueError(
                f"{path} holds latents {list(self.shape)} and no trajectories: make these from it "
                f"with `python -m {self.command} --latents={path} ...`"
            )
        self.sample_shape = self.shape[1:]
        levels = self.source.get("levels") if isinstance(self.source, dict) else None
        if not isinstance(levels, list) or len(levels) != self.shape[0] - 2:
            raise ValueError(
                f"{path} holds {self.shape[0] - 2} points of each trajectory, and their times are "
                f"{levels}: delete it and make it again"
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
