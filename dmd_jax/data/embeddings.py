"""Embedded prompts on disk, read as memory maps: training needs no text encoder.

    <path>/meta.json                 the prompts, and the encoder that embedded them
    <path>/00000.npy                 bfloat16 (as uint16) [T, D]: the tokens of the first prompts
    <path>/00000.lengths.npy         int32: the number of tokens of each of those prompts

Padding is not stored. The negative prompt is the last one. A shard is complete or absent; a second
`write` adds the missing ones.
This file may import numpy and ml_dtypes.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import ArrayLike

log = logging.getLogger(__name__)

FORMAT = 1
META = "meta.json"
EXPONENT = 0x7F80  # the bits of a bfloat16 that are all set where it is infinite or NaN
REMEDY = "make it with `python -m dmd_jax.embed --prompts=... --checkpoint=... --out={path}`"


def write(
    path: str | Path,
    prompts: Sequence[str],
    negative: str,
    encode_fn: Callable[[list[str]], Sequence[np.ndarray]],
    length: int,
    dim: int,
    *,
    shard: int = 64,
    source: str = "",
) -> None:
    """Embeds prompts into a folder; complete shards of an earlier call are kept.

    Args:
        path: the folder; it is created.
        prompts: N strings.
        negative: the negative prompt.
        encode_fn: n prompts -> n float arrays [tokens, dim], 1 to `length` tokens each.
        length, dim: L and D of the embeddings.
        shard: prompts per file, embedded by one call of `encode_fn`.
        source: description or digest of the encoder; another one cannot continue the set.

    Raises:
        ValueError: the folder holds other prompts, embeddings of another encoder or other files;
            there is no prompt; an embedding has another shape or is not finite.
    """
    if not prompts:
        raise ValueError("there are no prompts")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    meta = {
        "format": FORMAT,
        "source": source,
        "length": length,
        "dim": dim,
        "shard": shard,
        "negative": negative,
        "prompts": list(prompts),
    }
    if (path / META).exists():
        _require_same(path, _read_meta(path), meta)
    elif any(path.glob("*.npy")):
        raise ValueError(f"{path} holds arrays that are no embeddings: give another folder")
    else:
        _replace(path / META, lambda file: file.write(json.dumps(meta).encode()))
    texts, starts = [*prompts, negative], range(0, len(prompts) + 1, shard)
    for number, start in enumerate(starts):
        if not _is_whole(path, number, meta):
            part = texts[start : start + shard]
            _write_shard(path, number, encode_fn(part), part, meta)
            log.info("%d of %d prompts are embedded", start + len(part), len(texts))


class Embeddings:
    """A set that `write` wrote. `len(embeddings)` is N, the number of prompts.

    Attributes:
        prompts: N strings.
        shape: (L, D).
    """

    def __init__(self, path: str | Path):
        """Maps the files.

        Raises:
            FileNotFoundError: there is no such set, or it is incomplete.
            ValueError: the folder holds other files, or a file is damaged.
        """
        self.path = Path(path)
        meta = _read_meta(self.path)
        self.prompts, self._shard = meta["prompts"], meta["shard"]
        self.shape = meta["length"], meta["dim"]
        self._shards = [_open_shard(self.path, number, meta) for number in range(_num_shards(meta))]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: ArrayLike) -> np.ndarray:
        """Embeddings of n prompts, in the order of `index`.

        Args:
            index: n integers in [0, N); repeats are allowed.

        Returns:
            bfloat16 [n, L, D], zero after each prompt's last token.

        Raises:
            IndexError: an index is out of range.
            ValueError: an embedding has numbers that are not finite.
        """
        index = np.asarray(index, np.intp)
        outside = index[(index < 0) | (index >= len(self))]
        if outside.size:
            raise IndexError(f"{self.path} has no prompt {outside[0]} in {len(self)}")
        return self._read(index)

    @property
    def negative(self) -> np.ndarray:
        """The embedding of the negative prompt: bfloat16 [L, D]."""
        return self._read([len(self)])[0]

    def _read(self, index):
        rows = np.zeros((len(index), *self.shape), np.uint16)
        for row, i in zip(rows, index, strict=True):
            tokens, ends = self._shards[i // self._shard]
            start, end = ends[i % self._shard], ends[i % self._shard + 1]
            own = row[: end - start]
            own[:] = tokens[start:end]
            if np.any(own & EXPONENT == EXPONENT):
                tokens_file, _ = _files(self.path, i // self._shard)
                raise ValueError(
                    f"{tokens_file} is damaged: prompt {i % self._shard} in it has numbers that "
                    f"are infinite or NaN; remove it and {REMEDY.format(path=self.path)}"
                )
        return rows.view(bfloat16)


def _num_shards(meta):
    return -(-(len(meta["prompts"]) + 1) // meta["shard"])


def _files(path, number):
    """The files of a shard: (tokens, lengths)."""
    return path / f"{number:05d}.npy", path / f"{number:05d}.lengths.npy"


def _read_meta(path):
    """meta.json of the set at `path`."""
    remedy = REMEDY.format(path=path)
    try:
        meta = json.loads((path / META).read_text())
        if _is_meta(meta):
            return meta
    except OSError:
        raise FileNotFoundError(f"there are no embeddings at {str(path)!r}: {remedy}") from None
    except ValueError:
        pass
    raise ValueError(
        f"{path / META} is not of embeddings of this version of dmd_jax: give another folder, or "
        f"remove it and {remedy}"
    )


def _is_meta(meta):
    """Whether this is what `write` writes."""
    kinds = dict(length=int, dim=int, shard=int, source=str, negative=str, prompts=list)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return False
    if any(type(meta.get(name)) is not kind for name, kind in kinds.items()):
        return False
    texts = all(isinstance(prompt, str) for prompt in meta["prompts"])
    return texts and min(meta["length"], meta["dim"], meta["shard"], len(meta["prompts"])) > 0


def _require_same(path, found, wanted):
    """Raises ValueError where the set on disk has other prompts or another encoder."""
    for name, value in wanted.items():
        if found.get(name) == value:
            continue
        if name == "prompts":
            what = f"other prompts ({len(found[name])}, not {len(value)} or not the same)"
        else:
            what = f"{name} {found.get(name)!r}, not {value!r}"
        raise ValueError(
            f"{path} holds embeddings with {what}: give another folder, or remove this one"
        )


def _open_shard(path, number, meta):
    """(memory map uint16 [T, D], ends int [n + 1]) of one shard.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is truncated, or its two files do not fit together.
    """
    tokens_file, lengths_file = _files(path, number)
    remedy = REMEDY.format(path=path)
    try:
        tokens, lengths = np.load(tokens_file, mmap_mode="r"), np.load(lengths_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is not complete: {Path(error.filename).name} is missing. What is there is "
            f"kept; {remedy}"
        ) from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{tokens_file} or its lengths are damaged ({error}): {remedy}") from None
    count = min(meta["shard"], len(meta["prompts"]) + 1 - number * meta["shard"])
    if lengths.shape != (count,) or lengths.dtype != np.int32:
        raise ValueError(
            f"{lengths_file} is damaged: {lengths.dtype} {lengths.shape}, expected int32 "
            f"{(count,)}; remove it and {remedy}"
        )
    if lengths.min() < 1 or lengths.max() > meta["length"]:
        raise ValueError(
            f"{lengths_file} is damaged: prompts of {lengths.min()} to {lengths.max()} tokens, and "
            f"1 to {meta['length']} can be; remove it and {remedy}"
        )
    wanted = (int(lengths.sum()), meta["dim"])
    if tokens.shape != wanted or tokens.dtype != np.uint16:
        raise ValueError(
            f"{tokens_file} is damaged: {tokens.dtype} {tokens.shape} of {lengths.shape} prompts, "
            f"expected uint16 {wanted} of {(count,)}; remove it and {remedy}"
        )
    return tokens, np.concatenate([[0], np.cumsum(lengths)])


def _is_whole(path, number, meta):
    """Whether a shard is complete."""
    try:
        _open_shard(path, number, meta)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _write_shard(path, number, embedded, prompts, meta):
    """Writes one shard, its tokens last: with them it is complete."""
    for prompt, tokens in zip(prompts, embedded, strict=True):
        if not 1 <= len(tokens) <= meta["length"] or tokens.shape[1:] != (meta["dim"],):
            raise ValueError(
                f"the embedding of {prompt[:60]!r} is {tokens.shape}, which is not [1 to "
                f"{meta['length']}, {meta['dim']}]"
            )
        if not np.isfinite(tokens.astype(np.float32)).all():
            raise ValueError(
                f"the embedding of {prompt[:60]!r} has numbers that are not finite: is the "
                "checkpoint damaged?"
            )
    tokens_file, lengths_file = _files(path, number)
    lengths = np.array([len(tokens) for tokens in embedded], np.int32)
    tokens = np.concatenate(embedded).astype(bfloat16).view(np.uint16)
    _replace(lengths_file, lambda file: np.save(file, lengths))
    _replace(tokens_file, lambda file: np.save(file, tokens))


def _replace(path, write_to):
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write_to(file)
    partial.replace(path)
