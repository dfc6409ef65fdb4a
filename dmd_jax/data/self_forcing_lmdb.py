"""The LMDB files in which Self-Forcing and Causal-Forcing store trajectories of a teacher's ODE.

    latents_shape       "N T F C H W", decimal
    latents_<i>_data    float16 [T, F, C, H, W]: points from noise to the end of the ODE, and in
                        Causal-Forcing's files the real video after them
    prompts_<i>_data    the prompt, UTF-8

A folder of such databases is read as one, in the order of their names. Imports numpy and, when a
database is opened, the package lmdb.
"""

from pathlib import Path

import numpy as np


class Trajectories:
    """The trajectories of a database; `len` is their number.

    Args:
        path: the folder with data.mdb, or a folder of such folders.

    Attributes:
        name: of the folder.
        prompts: a string for each trajectory, in one line.
        shape: (F, H, W, C) of a video.

    Raises:
        FileNotFoundError: there is no database.
        ValueError: it is damaged, or of another layout.
        ImportError: the package lmdb is missing.
    """

    def __init__(self, path: Path):
        folders = sorted(
            file.parent for pattern in ("data.mdb", "*/data.mdb") for file in path.glob(pattern)
        )
        if not folders:
            raise FileNotFoundError(f"there is no LMDB database (data.mdb) in {path}")
        self.name = path.name
        self._parts = [_Database(folder) for folder in folders]
        if len(shapes := {part.shape for part in self._parts}) > 1:
            raise ValueError(f"the databases in {path} have several shapes: {sorted(shapes)}")
        self._stored, frames, channels, *size = self._parts[0].shape
        self.shape = (frames, *size, channels)
        self.prompts = [part.prompt(i) for part in self._parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.prompts)

    def points(self, number: int, levels: int) -> np.ndarray:
        """A trajectory as `data.trajectories` stores it: float16 [levels + 2, F, H, W, C].

        Without a real video in the database, the end of the ODE stands in for it.

        Args:
            number: of the trajectory.
            levels: how many points there are before the end.

        Raises:
            ValueError: the database has another number of points, or the row is damaged.
        """
        if self._stored not in (levels + 1, levels + 2):
            raise ValueError(
                f"{self.name} has {self._stored} points a trajectory, and {levels} times need "
                f"{levels + 1}, with the end, or {levels + 2}, with the real video: name its times"
            )
        for part in self._parts:
            if number < len(part):
                break
            number -= len(part)
        points = np.moveaxis(part.latents(number), 2, -1)
        return points if len(points) == levels + 2 else np.concatenate([points, points[-1:]])


class _Database:
    """One LMDB environment: `shape` is [T, F, C, H, W] of a row, `len` the number of rows."""

    def __init__(self, path):
        try:
            import lmdb
        except ImportError:
            raise ImportError("LMDB files need the package lmdb: pip install lmdb") from None
        self._path = path
        try:
            self._file = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise ValueError(f"{path} cannot be read as an LMDB database ({error})") from error
        count, *shape = self._shape()
        self._count, self.shape = count, tuple(shape)

    def __len__(self):
        return self._count

    def _shape(self):
        text = self._read("latents_shape")
        try:
            shape = [int(size) for size in text.split()]
        except ValueError:
            shape = []
        if len(shape) != 6 or min(shape) < 1:
            raise ValueError(
                f"{self._path} has latents of the shape {text[:60]!r}, not of trajectories, "
                "N T F C H W"
            )
        return shape

    def _read(self, key):
        with self._file.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise ValueError(
                f"{self._path} has no entry {key!r}: it is incomplete, or not of Self-Forcing's "
                "layout"
            )
        return value

    def prompt(self, row):
        return " ".join(self._read(f"prompts_{row}_data").decode().split())

    def latents(self, row):
        data = self._read(f"latents_{row}_data")
        if len(data) != 2 * np.prod(self.shape):
            raise ValueError(
                f"{self._path}: latents_{row}_data has {len(data)} bytes, which are not float16 "
                f"{list(self.shape)}"
            )
        return np.frombuffer(data, np.float16).reshape(self.shape)
