"""Checkpoint files of any format, opened without reading tensors.

A safetensors file, a folder of shards and a file of torch all become `Tensors`: the file, offset,
dtype and shape of each tensor by its name. A tensor is memory-mapped when it is read, in its stored
dtype. Nothing in a file is executed. Imports the parser of torch's files.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dmd_jax.weights import pickles

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
TORCH = (".pth", ".pt", ".ckpt")
INDEX = ".safetensors.index.json"
# Prefixes that wrappers of training programs leave in the names of tensors.
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
PREFIXES = re.compile(r"^((model|module|diffusion_model)\.)+")

# {a pattern of the tensors' names: the kind of file}, of files that are not read.
STRANGERS = {
    r"lora_|/A/kernel$": "a LoRA, the change of a network: merge it into its network first",
    r"^double_blocks\.": "a Flux or Hunyuan transformer",
    r"^single_transformer_blocks\.": "a Flux transformer",
    r"^joint_blocks\.": "a Stable Diffusion 3 transformer",
    r"^down_blocks\.": "a UNet",
    r"^vace_blocks\.": "a Wan VACE transformer, which has layers of its own",
    r"^face_adapter\.": "a Wan Animate transformer, which has layers of its own",
    r"^vision_model\.|^visual\.": "a CLIP image encoder",
    r"^text_model\.": "a CLIP text encoder",
    r"^lm_head\.": "a language model",
}


class Place(NamedTuple):
    """Position, dtype and shape of one tensor in a file."""

    file: Path
    offset: int  # in bytes
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # in elements; None if contiguous


class Tensors:
    """The tensors of a checkpoint, read one at a time.

    Attributes:
        path: the file or folder.
        shapes: {name: shape}.
        dtypes: {name: numpy dtype}.
        settings: the parsed config.json of its folder; None if the folder has no such file.
        metadata: the strings in the header of a single safetensors file; {} otherwise.

    No file stays open.
    """

    def __init__(self, path, places, settings=None, metadata=None):
        self.path, self.settings, self.metadata = path, settings, metadata or {}
        self._places = _plain_names(path, places)
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.dtypes = {name: place.dtype for name, place in self._places.items()}
        self._zeros = {}

    def with_zeros(self, shapes):
        """The same tensors, and zeros for each name of {name: shape} that is not among them."""
        result = Tensors(self.path, self._places, self.settings, self.metadata)
        zeros = {name: shape for name, shape in shapes.items() if name not in self.shapes}
        result.shapes |= zeros
        result.dtypes |= dict.fromkeys(zeros, np.dtype(np.float32))
        result._zeros = {name: np.broadcast_to(np.float32(0), s) for name, s in zeros.items()}
        return result

    def renamed(self, aliases):
        """The same tensors by other names, {old: new}.

        Raises:
            ValueError: the file holds a tensor by both names, and the two differ.
        """
        for old, new in aliases.items():
            if {old, new} <= self.shapes.keys() and not self._same(old, new):
                raise ValueError(
                    f"{self.path} holds {old} and {new}, which must be equal, and differ"
                )
        places = {aliases.get(name, name): place for name, place in self._places.items()}
        return Tensors(self.path, places, self.settings, self.metadata)

    def _same(self, a, b):
        """Whether two tensors are equal; of large ones, their shapes and last rows."""
        a, b = self.read(a), self.read(b)
        return a.shape == b.shape and np.array_equal(a[-1:], b[-1:])

    def read(self, name):
        """The tensor of this name in its stored dtype: a read-only view of the file."""
        if name in self._zeros:
            return self._zeros[name]
        place = self._places[name]
        if 0 in place.shape:
            return np.empty(place.shape, place.dtype)
        strides = place.strides or _contiguous(place.shape)
        last = sum((n - 1) * stride for n, stride in zip(place.shape, strides, strict=True))
        size = (last + 1) * place.dtype.itemsize
        data = np.memmap(place.file, np.uint8, "r", place.offset, (size,)).view(place.dtype)
        strides = [place.dtype.itemsize * stride for stride in strides]
        return np.lib.stride_tricks.as_strided(data, place.shape, strides, writeable=False)


def open_tensors(path):
    """Opens the checkpoint at `path`; reads headers only.

    Args:
        path: a .safetensors file; a .pth, .pt or .ckpt file of torch; or a folder with one of
            these or with shards.

    Returns:
        Tensors, their names without the prefixes of wrappers ("model.", "module.", ...).

    Raises:
        FileNotFoundError: the path does not exist, or the folder lacks a shard.
        ValueError: a file is damaged, truncated, or holds more than tensors; it is named.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    files = in_folder(path)
    if len(files) == 1:
        return _open_file(files[0])
    places = {}
    for file in files:
        places |= _safetensors(file)[0]
    if absent := sorted(_indexed(path).keys() - places.keys()):
        raise ValueError(
            f"{path} lacks {len(absent)} tensors that its index names, {absent[0]} for one: its "
            "shards are not of one download; fetch them again"
        )
    return Tensors(path, places, _settings(path))


def _open_file(file):
    if file.suffix in TORCH:
        found = _state_dict(pickles.read(file))
        if not found:
            raise ValueError(f"{file} holds no dict of tensors")
        # The folder's config.json is another part's: Wan's repository has all in one folder.
        return Tensors(file, {name: Place(file, *stored) for name, stored in found.items()})
    places, metadata = _safetensors(file)
    return Tensors(file, places, _settings(file.parent), metadata)


def _settings(folder):
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text()) if path.is_file() else None
        if not isinstance(settings, dict | None):
            raise ValueError("it holds no names and values")
        return settings
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from None


def _plain_names(path, places):
    plain = {PREFIXES.sub("", WRAPPERS.sub("", name)): place for name, place in places.items()}
    if len(plain) != len(places):
        raise ValueError(
            f"{path} holds tensors whose names differ only in the prefixes of wrappers: take out "
            "the network that is wanted"
        )
    return plain


def _contiguous(shape):
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


# Folders.


def in_folder(folder):
    """The files of a folder that hold its tensors; raises as `open_tensors`."""
    single = sorted(folder.glob("*.safetensors"))
    if indexed := _indexed(folder):
        return _shards(folder, sorted(set(indexed.values())))
    if match := single and re.search(r"-(\d+)-of-(\d+)\.safetensors$", single[0].name):
        stem, count = single[0].name[: match.start()], match[2]
        numbers = range(1, int(count) + 1)
        return _shards(
            folder, [f"{stem}-{i:0{len(match[1])}}-of-{count}.safetensors" for i in numbers]
        )
    found = single or sorted(p for p in folder.iterdir() if p.suffix in TORCH)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors, {' or '.join(TORCH)} file{_half(folder)}"
        )
    if len(found) > 1:
        raise ValueError(f"{folder} holds several checkpoints {_names(found)}: name one file")
    return found


def _indexed(folder):
    """{tensor: shard} of the index in a folder; {} if there is no index."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    if not indices:
        return {}
    if len(indices) > 1:
        raise ValueError(f"{folder} has several indices {_names(indices)}: name one file")
    try:
        return dict(json.loads(indices[0].read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{indices[0]} is damaged ({error!r}); fetch it again") from None


def _shards(folder, names):
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {len(absent)} of {len(names)} shards: {', '.join(absent)}"
            f"{_half(folder)}; finish the download"
        )
    return [folder / name for name in names]


def _half(folder):
    """Names unfinished downloads, for an error; '' if all are complete."""
    begun = sorted(p.name for p in folder.rglob("*.incomplete"))
    return f" (unfinished downloads: {', '.join(begun)})" if begun else ""


def _names(paths):
    return [path.name for path in paths]


# One file.


def _safetensors(path):
    """({name: Place}, metadata) of a safetensors file; every place is checked to lie in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        text = file.read(length) if start <= size else b""
    try:
        if not text:
            raise ValueError(_stranger_file(path, size))
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        places = {name: _place(path, start, entry) for name, entry in header.items()}
        ends = [start + entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not safetensors ({error})") from None
    if (end := max(ends, default=start)) != size:
        raise ValueError(
            f"{path} is damaged or not safetensors (it has {size} bytes, and its header says {end}"
            f"{': it was cut short' if size < end else ''}); fetch it again"
        )
    return places, metadata


def _place(path, start, entry):
    dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or min(shape, default=1) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} is no valid entry of a tensor")
    return Place(path, start + begin, dtype, shape)


def _stranger_file(path, size):
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs: run `git lfs pull`"
    return f"its {size} bytes begin with {head[:8]!r}, no header"


def write_safetensors(path, plan, arrays):
    """Writes a safetensors file, one tensor at a time.

    Args:
        path: the file.
        plan: {name: (shape, dtype)}, in the order of the file.
        arrays: an iterator of (name, array) in this order; it may go on after the last of `plan`.

    Raises:
        ValueError: an array differs from `plan` in name, shape or dtype.
    """
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in plan.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that all tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (wanted, place), (name, array) in zip(plan.items(), arrays, strict=False):
            if (wanted, *place) != (name, array.shape, array.dtype):
                raise ValueError(
                    f"{name} {array.shape} {array.dtype} in the place of {wanted} {place}"
                )
            file.write(np.ascontiguousarray(array).view(np.uint8).data)


# Files of torch.


def _state_dict(tree):
    """The dict of tensors in a tree of torch; of several networks, the averaged generator."""
    if not isinstance(tree, dict):
        return {}
    for name in ("generator_ema", "generator", "model", "state_dict", "module"):
        if found := _state_dict(tree.get(name)):
            return found
    return {name: leaf for name, leaf in tree.items() if isinstance(leaf, pickles.Stored)}


def stranger(names):
    """The kind of file that has tensors of these names, in words; None if not in STRANGERS."""
    for pattern, words in STRANGERS.items():
        if any(re.search(pattern, name) for name in names):
            return words
    return None
