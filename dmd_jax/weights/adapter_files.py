"""Files of low-rank adapters: those of this library, of diffusers (PEFT's names) and of ComfyUI.

Ours has the names of `adapters`, and a header with rank, alpha and the digest of the base. Those of
other programs are of Wan transformers and hold the factors of each layer, transposed. Imports the
trees, the formats and Wan's table of names.
"""

import json
import re
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmd_jax.weights import files, ours, wan
from dmd_jax.weights.adapters import Adapter, factor, kernels, rank_of
from dmd_jax.weights.families import family_of
from dmd_jax.weights.table import differing

HEADER = "dmd_jax_adapter"  # its key in the metadata of our files


class Names(NamedTuple):
    """How another program names the factors of a module."""

    layout: str  # of `wan.table`
    prefix: str
    A: str
    B: str


OTHERS = {
    "diffusers_lora": Names("diffusers", "transformer.", "lora_A", "lora_B"),
    "comfyui_lora": Names("original", "diffusion_model.", "lora_down", "lora_up"),
}


def save(
    path: str | PathLike,
    adapter: Adapter,
    net: nnx.Module,
    *,
    alpha: float,
    base: str,
    **notes: Any,
) -> None:
    """Writes an adapter as safetensors. A failure leaves the file that was there before.

    Args:
        path: the file.
        adapter: arrays.
        net: the network that it changes, or its jax.ShapeDtypeStructs.
        alpha: the numerator of the scale.
        base: `weights.fingerprint` of the base.
        **notes: JSON values kept in the header.
    """
    about = {"family": family_of(net.config), "base": base, "notes": notes}
    about |= {"rank": rank_of(adapter), "alpha": alpha}
    arrays = {name: np.asarray(jax.device_get(x)) for name, x in adapter.items()}
    ours.write(path, arrays, {HEADER: json.dumps(about)})


def header(path: str | PathLike) -> dict[str, Any] | None:
    """The header of our adapter file at `path`; None in files of other programs."""
    return _header(files.open_tensors(path))


def _header(tensors):
    return json.loads(tensors.metadata.get(HEADER, "null"))


def check(path: str | PathLike, shapes: Adapter) -> None:
    """Reads headers only, and refuses what `load` would.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no adapter, or one of other shapes than `shapes`.
    """
    _check(path, _opened(path, shapes), shapes)


def load(path: str | PathLike, shapes: Adapter, scale: float) -> Adapter:
    """The adapter at `path`, with B so that it means the same at `scale`.

    Args:
        path: a file of `save`, of diffusers or of ComfyUI.
        shapes: from `adapters.abstract`, with shardings.
        scale: alpha / rank with which the adapter will be used.

    Raises:
        FileNotFoundError, ValueError: as `check`.
    """
    file = _opened(path, shapes)
    _check(path, file, shapes)

    def read(name, x):
        array = file.read(name).astype(np.float32)
        if name.endswith("/B/kernel"):
            array = array * np.asarray(file.scale(name) / scale, np.float32)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: array[index])

    return {name: read(name, x) for name, x in shapes.items()}


def convert(path: str | PathLike, to: str, out: str | PathLike, dtype: str | None = None) -> None:
    """Writes our adapter file at `path` for another program.

    diffusers reads no alpha from tensors and takes it to be the rank: B is multiplied by the scale.

    Args:
        path: a file of `save`.
        to: a key of OTHERS.
        out: the safetensors file.
        dtype: of the factors; None for float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no adapter of this library, or not of a Wan transformer.
    """
    tensors = files.open_tensors(path)
    about = _header(tensors)
    if about is None:
        raise ValueError(f"{path} is no adapter that dmd_jax wrote")
    if about["family"] != "wan":
        raise ValueError(f"{path} is of a {about['family']} network; {to} is for Wan transformers")
    scale = about["alpha"] / about["rank"] if to == "diffusers_lora" else 1.0
    alpha = {} if to == "diffusers_lora" else {"alpha": np.float32(about["alpha"])}
    arrays = {}
    for kernel, shape in _kernel_stacks(tensors.shapes).items():
        A, B = (tensors.read(factor(kernel, which)) for which in "AB")
        for i, module in enumerate(_modules(kernel, shape, OTHERS[to])):
            layer = (slice(None), slice(None)) if not shape else i
            pair = {OTHERS[to].A: A[layer], OTHERS[to].B: np.float32(scale) * B[layer]}
            for name, x in pair.items():
                arrays[f"{module}.{name}.weight"] = _contiguous(x.T, dtype)
            arrays |= {f"{module}.{name}": np.asarray(x) for name, x in alpha.items()}
    ours.write(out, arrays, {"format": "pt"})


def _contiguous(x, dtype):
    return np.ascontiguousarray(x.astype(jnp.dtype(dtype or "float32")))


def _kernel_stacks(shapes):
    """{path of a kernel: () or (layers,)} of an adapter's {path: shape}."""
    return {kernel: tuple(shapes[factor(kernel, "A")][:-2]) for kernel in kernels(shapes)}


def _modules(kernel, stack, names):
    """Another program's name of the module of a kernel, for each layer of its stack.

    Raises:
        ValueError: the kernel is not one of a Wan transformer.
    """
    # With image features, so that all names are there.
    config = wan.WanConfig(2, 1, 1, 1, image_dim=1)
    theirs = {row.ours: row.theirs for row in wan.table(config, names.layout)}
    if kernel not in theirs:
        raise ValueError(f"{kernel} is no weight of a Wan: other programs have no name for it")
    module = names.prefix + theirs[kernel].removesuffix(".weight")
    return [module.format(i) for i in range(*stack or (1,))]


def _check(path, file, shapes):
    if lines := differing({name: x.shape for name, x in shapes.items()}, file.shapes()):
        raise ValueError(
            f"{path} is an adapter of another rank, of other matrices or of another network:\n"
            + lines
        )


def _opened(path, shapes):
    tensors = files.open_tensors(path)
    if _header(tensors) is not None:
        return _Own(tensors)
    if any("lora_" in name for name in tensors.shapes):
        return _Other(tensors, {name: x.shape for name, x in shapes.items()})
    raise ValueError(f"{path} is no adapter: no tensor in it is a factor of a LoRA")


class _Own:
    """One of our files."""

    def __init__(self, tensors):
        self._about, self.read = _header(tensors), tensors.read
        self._shapes = tensors.shapes

    def shapes(self):
        return self._shapes

    def scale(self, name):
        return self._about["alpha"] / self._about["rank"]


class _Other:
    """A file of another program: its factors by our names, stacked over layers.

    Which program is read from the names: A is lora_A or lora_down in files of both layouts.
    """

    def __init__(self, tensors, shapes):
        self._tensors = tensors
        self._peft = json.loads(tensors.metadata.get("lora_adapter_metadata", "{}"))
        for key in ("transformer.alpha_pattern", "transformer.use_rslora"):
            if self._peft.get(key):
                raise ValueError(f"an adapter with {key}={self._peft[key]!r} cannot be read")
        diffusers = any(name.startswith("transformer.") for name in tensors.shapes)
        names = OTHERS["diffusers_lora" if diffusers else "comfyui_lora"]
        # `files.open_tensors` removes ComfyUI's prefix.
        names = names._replace(prefix=names.prefix if diffusers else "")
        peft = any(".lora_A." in name for name in tensors.shapes)
        suffixes = ("lora_A", "lora_B") if peft else ("lora_down", "lora_up")
        self._stacks = _kernel_stacks(shapes)
        self._theirs = {}
        for kernel, stack in self._stacks.items():
            modules = _modules(kernel, stack, names)
            for which, suffix in zip("AB", suffixes, strict=True):
                own = factor(kernel, which)
                self._theirs[own] = [f"{module}.{suffix}.weight" for module in modules]

    def shapes(self):
        """{our name: shape}; what has no name of ours, by its own."""
        held, shapes = dict(self._tensors.shapes), {}
        for name, theirs in self._theirs.items():
            found = {held.pop(layer, ())[::-1] for layer in theirs}
            stack = (len(theirs),) if self._stacked(name) else ()
            if len(found) == 1 and () not in found:
                shapes[name] = (*stack, *found.pop())
        return shapes | {name: x for name, x in held.items() if not name.endswith(".alpha")}

    def _stacked(self, name):
        return self._stacks[re.sub(r"[AB]/kernel$", "kernel", name)] != ()

    def read(self, name):
        layers = [self._tensors.read(layer).T for layer in self._theirs[name]]
        return np.stack(layers) if self._stacked(name) else layers[0]

    def scale(self, name):
        """alpha / rank of a factor B: [], or [layers, 1, 1]."""
        rank = self._tensors.shapes[self._theirs[name][0]][1]
        alphas = [self._alpha(layer, rank) for layer in self._theirs[name]]
        shape = (-1, 1, 1) if self._stacked(name) else ()
        return np.reshape(alphas, shape) / rank

    def _alpha(self, layer, rank):
        """A tensor beside the factors, an entry of PEFT's in the header, or the rank."""
        name = re.sub(r"\.lora_\w+\.weight$", ".alpha", layer)
        if name in self._tensors.shapes:
            return float(self._tensors.read(name))
        return float(self._peft.get("transformer.lora_alpha", rank))
