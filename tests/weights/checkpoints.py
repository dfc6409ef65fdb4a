"""Tiny checkpoints of Wan in the layouts of others, of numbers that are functions of names."""

import functools
import json

import foreign
import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.weights import wan as names
from dmd_jax.weights.table import their_shapes, theirs

# Heads have 128 channels, as in all that is published: files without settings count on it.
CONFIG = WanConfig(
    dim=256, ffn=48, heads=2, depth=3, in_channels=4, out_channels=4, text_dim=10, freq_dim=16
)


@functools.cache
def shapes(layout, config=CONFIG):
    """{name: shape} of the file of a Wan."""
    net = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    return their_shapes(net, names.table(config, layout))


def tensors(layout, dtype=ml_dtypes.bfloat16, config=CONFIG):
    """{name: array} of the file of a Wan."""
    found = shapes(layout, config)
    return {name: foreign.weight(name, shape).astype(dtype) for name, shape in found.items()}


def write_folder(folder, layout="diffusers", dtype=ml_dtypes.bfloat16, shards=1, config=CONFIG):
    """A folder as the hub has it: config.json, one file or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(names.to_settings(config, layout)))
    arrays = tensors(layout, dtype, config)
    if shards == 1:
        save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: arrays[name] for name in sorted(arrays)[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def held_by(net, layout):
    """{name: array} of the file of `net`."""
    return dict(theirs(net, names.table(net.config, layout)))


def assert_same(found, wanted):
    """The same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
