"""Latents of videos in a folder: computed once, then read at random positions.

    latents.json        shape, count (null until `write` is done), latents per shard, source
    00000.prompts.npy   int32 [n]: for each latent of a shard, the row of its text embedding
    00000.npy           float16 [n, F, H, W, C], memory-mapped by the reader; of trajectories
                        (`data.trajectories`), [n, T, F, H, W, C], or [n, T, H, W, C] of images

A file gets its name when it is complete, and a shard's latents are written last: `write` resumes
after the complete shards. This file imports only numpy.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "latents.json"
FORMAT = "dmd_jax latents 1"
REMEDY = "Copy the folder whole, or delete it and make it again."


def write(
    path: str | PathLike,
    videos: Iterable[tuple[Any, int]],
    encode: Callable[[Any], Any],
    shape: Sequence[int],
    *,
    shard: int = 64,
    source: Any = None,
) -> None:
    """Encodes videos into a folder; after a stop, the same call resumes.

    Args:
        path: a local folder, created if missing. One process writes.
        videos: pairs of a video, in any form that `encode` accepts, and the row of its prompt in
            the text embeddings; the same pairs in the same order in every call.
        encode: a video -> its latents [F, H, W, C], normalised for the network.
        shape: (F, H, W, C), or (T, F, H, W, C) of trajectories.
        shard: latents per file; so many are in memory at once.
        source: origin of the latents (names of videos and encoder, a seed), a JSON value.

    Raises:
        ValueError: the folder has latents of another shape, shard or source, or other files;
            `encode` returns another shape or values beyond float16; there are fewer videos than
            latents on disk.
    """
    path = Path(path)
    wanted = _manifest(shape, shard, source)
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST).exists():
        found = _read_manifest(path)
        for key, value in wanted.items():
            if key != "count" and found[key] != value:
                there, here = _differing(found[key], value)
                raise ValueError(
                    f"{path} has latents with {key} = {there}, not {here}. "
                    "Name another folder, or delete this one."
                )
        if found["count"] is not None:
            return
    elif any(path.glob("*.npy")):
        raise ValueError(f"{path} holds arrays that are no latents: name another folder")
    else:
        _save_manifest(path, wanted)
    pairs, count = iter(videos), 0
    for number in itertools.count():
        taken = itertools.islice(pairs, shard)
        if whole := _is_whole(path, number, (shard, *shape)):
            size = sum(1 for _ in taken)
        else:
            size = _save_shard(path, number, [(_encoded(encode, v, shape), p) for v, p in taken])
        count += size
        if size < shard:
            break
    if whole or not count:
        raise ValueError(f"{path}: {count} videos came: none, or fewer than are written")
    _save_manifest(path, wanted | {"count": count})


class Latents:
    """A folder that `write` completed; `len(latents)` is N. Rows are read from disk by `rows`.

    Args:
        path: the folder.

    Attributes:
        shape: (F, H, W, C) of one latent.
        sample_shape: the same; of trajectories, the shape of one of their points.
        prompt: int32 [N], the row of each latent's prompt in the text embeddings.
        source: the argument of `write`.

    Raises:
        FileNotFoundError: there are no latents at `path`, or a shard is missing.
        ValueError: they are incomplete, damaged, or not latents.
    """

    what, command = "latents", "dmd_jax.encode"  # of such a folder, and what writes it

    def __init__(self, path: str | PathLike):
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{path} has no {MANIFEST}: there are no {self.what}. Make them with "
                f"`python -m {self.command} --out={path} ...`, or name the folder that has them."
            )
        manifest = _read_manifest(path)
        count, shard = manifest["count"], manifest["shard"]
        self._path = path
        self.shape: tuple[int, ...] = tuple(manifest["shape"])
        self.sample_shape = self.shape
        self.source = manifest["source"]
        if count is None:
            raise ValueError(
                f"{path}: `python -m {self.command}` was stopped. Run it again, and it goes on."
            )
        sizes = [min(shard, count - first) for first in range(0, count, shard)]
        self._shard = shard
        self._shards = [
            _load(_latents(path, i), (n, *self.shape), np.float16) for i, n in enumerate(sizes)
        ]
        prompts = [_load(_prompts(path, i), (n,), np.int32) for i, n in enumerate(sizes)]
        self.prompt = np.concatenate(prompts)

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, index: Sequence[int]) -> np.ndarray:
        """Latents by number, in the order of `index`; repeats are allowed.

        Args:
            index: n integers in [0, N).

        Returns:
            float32 [n, F, H, W, C].

        Raises:
            IndexError: a number is out of range.
            ValueError: a latent has numbers that are not finite.
        """
        index = np.asarray(index, np.intp)
        outside = index[(index < 0) | (index >= len(self))]
        if outside.size:
            raise IndexError(f"there is no latent {outside[0]} among {len(self)}")
        read = np.empty((len(index), *self.shape), np.float32)
        for place, row in zip(read, index, strict=True):
            number, at = divmod(row, self._shard)
            place[:] = self._shards[number][at]
            if not np.isfinite(place).all():
                raise ValueError(
                    f"{_latents(self._path, number)} is damaged: latent {at} in it has numbers "
                    f"that are infinite or NaN. {REMEDY}"
                )
        return read


def _manifest(shape: Sequence[int], shard: int, source: Any) -> dict[str, Any]:
    if len(shape) not in (4, 5) or min(*shape, shard) < 1:
        raise ValueError(
            f"shape={shape} must be [F, H, W, C], or [T, F, H, W, C] of trajectories, and "
            f"shard={shard}, all positive"
        )
    # JSON turns tuples into lists: compare the values that reading gives.
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "shape": [int(size) for size in shape],
                "shard": shard,
                "source": source,
                "count": None,
            }
        )
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error}): delete {path}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST} is not of the format {FORMAT!r}: name another folder")
    try:
        count = manifest["count"]
        if count is not None and not (isinstance(count, int) and count > 0):
            raise ValueError(f"count is {count!r}")
        return _manifest(manifest["shape"], manifest["shard"], manifest["source"]) | {
            "count": count
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error!r}): delete {path}") from error


def _save_manifest(path: Path, manifest: dict[str, Any]) -> None:
    partial = path / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(path / MANIFEST)


def _latents(path: Path, number: int) -> Path:
    return path / f"{number:05d}.npy"


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Both values; of dicts, the entries in which they differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other

    def without(a, b):
        return {key: value for key, value in a.items() if key not in b or b[key] != value}

    return without(one, other), without(other, one)


def _prompts(path: Path, number: int) -> Path:
    return path / f"{number:05d}.prompts.npy"


def _is_whole(path: Path, number: int, shape: tuple[int, ...]) -> bool:
    try:
        _load(_latents(path, number), shape, np.float16)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _encoded(encode: Callable[[Any], Any], video: Any, shape: Sequence[int]) -> np.ndarray:
    latent = np.asarray(encode(video), np.float32)
    if latent.shape != tuple(shape):
        raise ValueError(f"a video was encoded to {list(latent.shape)}, not {list(shape)}")
    if not np.abs(latent).max() <= np.finfo(np.float16).max:
        raise ValueError("a video was encoded to latents that are not finite or beyond float16")
    return latent.astype(np.float16)


def _save_shard(path: Path, number: int, rows: list[tuple[np.ndarray, int]]) -> int:
    if rows:
        _save(_prompts(path, number), np.array([prompt for _, prompt in rows], np.int32))
        _save(_latents(path, number), np.stack([latent for latent, _ in rows]))
    return len(rows)


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


def _load(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {REMEDY}")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}). {REMEDY}") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {list(shape)}: "
            f"it belongs to other latents. {REMEDY}"
        )
    return array
