"""Files of torch, read and written without torch, and without executing code in them.

Such a file is a zip archive with a pickle (the tree of names) and an uncompressed entry for the
bytes of each tensor. A pickle is a program; this reader permits containers and tensors only.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Stored(NamedTuple):
    """Position, dtype and shape of a tensor in the file."""

    offset: int  # in bytes, from the start of the file
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class _Storage(NamedTuple):
    offset: int
    dtype: np.dtype
    elements: int


def _tensor(storage, start, shape, strides, *_):
    """Replaces torch._utils._rebuild_tensor_v2."""
    last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min((start, *shape, *strides)) < 0 or (0 not in shape and last >= storage.elements):
        raise ValueError(f"a tensor {shape} reaches beyond its {storage.elements} elements")
    offset = storage.offset + start * storage.dtype.itemsize
    return Stored(offset, storage.dtype, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data, archive, file, folder):
        super().__init__(data)
        self.archive, self.file, self.folder = archive, file, folder

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise ValueError(
            f"it wants to call {module}.{name}, and only tensors and plain containers are read; if "
            "you trust it, open it in torch and save its state_dict alone"
        )

    def persistent_load(self, pid):
        kind, dtype, key, _, elements = pid
        entry = self.archive.getinfo(f"{self.folder}/data/{key}")
        if (
            kind != "storage"
            or entry.compress_type != zipfile.ZIP_STORED
            or elements * dtype.itemsize > entry.file_size
        ):
            raise ValueError(f"entry {entry.filename} is not the {elements} numbers it should be")
        self.file.seek(entry.header_offset)
        name, extra = struct.unpack("<26x2H", self.file.read(30))
        return _Storage(entry.header_offset + 30 + name + extra, dtype, elements)


def read(path):
    """The tree that torch.save wrote to `path`, with a `Stored` in place of each tensor.

    Raises:
        ValueError: it is damaged, of a torch before 1.6, big-endian, or its pickle holds more than
            containers and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive, Path(path).open("rb") as file:
            [tree] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = tree.removesuffix("/data.pkl")
            order = f"{folder}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
            with archive.open(tree) as data:
                return _Unpickler(data, archive, file, folder).load()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is damaged, cut short or of a torch before 1.6 ({error}): fetch it again, or "
            "save it again with a newer torch"
        ) from None
    except OSError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{path} is not read as a file of torch: {error}") from None


def write(path, tree, arrays):
    """Writes a file for torch.load(path, weights_only=True).

    Args:
        path: the file.
        tree: nested dicts by str, with (name, shape, dtype) in place of each tensor.
        arrays: an iterable of (name, numpy array), each name of `tree` once, in any order.
    """
    keys = {}
    program = b"\x80\x02" + _pickled(tree, keys) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name, data):
            with archive.open(zipfile.ZipInfo(f"archive/{name}"), "w", force_zip64=True) as entry:
                entry.write(data)

        put("data.pkl", program)
        put("byteorder", b"little")
        for name, array in arrays:
            put(f"data/{keys.pop(name)}", np.ascontiguousarray(array).view(np.uint8).data)
        put("version", b"3\n")
    if keys:
        raise ValueError(f"{path} lacks the tensors {sorted(keys)}")


def _pickled(tree, keys):
    """The opcodes that build `tree`; adds {name: number of its entry} to `keys`."""
    if isinstance(tree, dict):
        items = b"".join(_plain(name) + _pickled(value, keys) for name, value in tree.items())
        return b"}(" + items + b"u"
    name, shape, dtype = tree
    keys[name] = key = str(len(keys))
    [storage] = [kind for kind, known in STORAGES.items() if known == dtype]
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    place = b"(" + _plain("storage") + _global("torch", storage) + _plain(key) + _plain("cpu")
    place += _plain(math.prod(shape)) + b"tQ"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = (
        b"(" + place + _plain(0) + _plain(tuple(shape)) + _plain(strides) + b"\x89" + hooks + b"t"
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _plain(value):
    """The opcodes of a str, an int or a tuple of ints."""
    return pickle.dumps(value, 2)[2:-1]  # without the protocol and the stop


def _global(module, name):
    return f"c{module}\n{name}\n".encode()
