"""Wan transformers written for other programs: diffusers, the Wan repository, Self-Forcing.

Tensors are written one at a time. A failure leaves no file and no folder. Imports this room's
tables and formats.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.weights import files, pickles, wan
from dmd_jax.weights.table import their_shapes, theirs

SHARD = 5 * 10**9  # bytes; larger networks are written in several files
STEM = "diffusion_pytorch_model"
# The parts of a pipeline that are never copied from its base.
OWN = ("transformer", "transformer_2", "scheduler")


def diffusers(path, net, *, scheduler, dtype=None, base=None):
    """Writes a folder from which diffusers loads a pipeline.

    Args:
        path: the folder; it must not exist, or be empty.
        net: a Wan.
        scheduler: the settings of its scheduler, with "_class_name" (`few_step`, `many_step`).
        dtype: of the tensors; None for that of the weights, the widest if they differ.
        base: the folder of such a pipeline, from which VAE, text encoder and other parts are
            copied. None writes transformer and scheduler only; `from_pretrained` must then be given
            the others.

    Raises:
        ValueError: the folder is not empty, or `base` is no complete pipeline.
    """
    base_index = {} if base is None else index_of(base)
    with _whole(path) as folder:
        _network(folder / "transformer", net, "diffusers", dtype)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        image = net.config.in_channels > net.config.out_channels
        index = {
            "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
            **dict.fromkeys(("vae", "text_encoder", "tokenizer"), (None, None)),
            **base_index,
            "transformer": ("diffusers", "WanTransformer3DModel"),
            "transformer_2": (None, None),
            "scheduler": ("diffusers", scheduler["_class_name"]),
            "boundary_ratio": None,
        }
        _write_json(folder / "model_index.json", index)
        for part in base_index.keys() - set(OWN):
            if (Path(base) / part).is_dir():
                shutil.copytree(Path(base) / part, folder / part)


def original(path, net, *, dtype=None):
    """Writes a folder in the layout of the Wan repository, safetensors and config.json, which
    ComfyUI and LightX2V read too. Arguments and errors are those of `diffusers`."""
    with _whole(path) as folder:
        _network(folder, net, "original", dtype)


def self_forcing(path, net, *, dtype=None):
    """Writes a file of torch as of Self-Forcing: {"generator_ema": {"model.<name>": ...}}.

    Arguments are those of `diffusers`; an existing file is replaced.
    """
    plan, arrays = _plan(net, "original", dtype)
    tree = {f"model.{name}": (name, *place) for name, place in plan.items()}
    with _whole(path, to_file=True) as file:
        pickles.write(file, {"generator_ema": tree}, arrays)


def few_step(shift, *, fresh_noise=True):
    """Settings of the scheduler for few-step students: predict x0, add fresh noise, repeat.

    Pass the times to `scheduler.set_timesteps(sigmas=times)`; it applies the shift. Without
    `fresh_noise`, Euler steps: of students in phases.
    """
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "stochastic_sampling": fresh_noise,
    }


def many_step(shift):
    """Settings of the scheduler of the published Wans: UniPC (Zhao et al. 2023)."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }


def index_of(base):
    """The parsed model_index.json of the folder of a pipeline.

    Raises:
        ValueError: it is missing, or a part that it names is, other than OWN.
    """
    base = Path(base)
    try:
        index = json.loads((base / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{base} is no folder of a diffusers pipeline: {error}") from error
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    if absent := sorted(part for part in parts - set(OWN) if not (base / part).is_dir()):
        raise ValueError(f"{base} lacks {', '.join(absent)}: finish the download")
    return index


def require_place(path, *, to_file=False):
    """Raises ValueError if a folder, or a file of torch, cannot be written at `path`."""
    path = Path(path)
    if to_file and path.suffix not in files.TORCH:
        raise ValueError(f"{path} must end in {' or '.join(files.TORCH)}, to be read again")
    if to_file and path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.is_file() and not to_file:
        raise ValueError(f"{path} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is there and holds files: choose another folder")


def _network(folder, net, layout, dtype):
    """Writes config.json and the tensors; above SHARD bytes in shards with an index."""
    _write_json(folder / "config.json", wan.to_settings(net.config, layout))
    plan, arrays = _plan(net, layout, dtype)
    shards = _shards(plan)
    if len(shards) == 1:
        files.write_safetensors(folder / f"{STEM}.safetensors", plan, arrays)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"{STEM}-{i + 1:05}-of-{len(shards):05}.safetensors"
        files.write_safetensors(folder / name, shard, arrays)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(_bytes(place) for place in plan.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"{STEM}{files.INDEX}", index)


def _plan(net, layout, dtype):
    """({name: (shape, dtype)}, iterator of (name, array) in its order) of the file of a network."""
    rows = wan.table(net.config, layout)
    dtype = np.dtype(dtype or jnp.result_type(*jax.tree.leaves(net)))
    plan = {name: (shape, dtype) for name, shape in their_shapes(net, rows).items()}
    return plan, ((name, array.astype(dtype)) for name, array in theirs(net, rows))


def _shards(plan):
    """`plan` split into parts of at most SHARD bytes, or one tensor."""
    shards, room = [], 0
    for name, place in plan.items():
        if not shards or _bytes(place) > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = place
        room -= _bytes(place)
    return shards


def _bytes(place):
    shape, dtype = place
    return math.prod(shape) * dtype.itemsize


def _write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _whole(path, **kind):
    """A temporary path next to `path`; renamed to it at the end, or removed after an error."""
    path = Path(path)
    require_place(path, **kind)
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    try:
        yield partial
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
