"""UMT5's tables: every tensor of the published checkpoints, in both layouts, and their settings."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dmd_jax import weights
from dmd_jax.models import umt5
from dmd_jax.models.umt5 import UMT5
from dmd_jax.weights import umt5 as names
from dmd_jax.weights.table import fill, their_shapes, theirs

PRESETS = {"xxl": umt5.XXL, "tiny": umt5.TINY}
ALIAS, NAME = "encoder.embed_tokens.weight", "shared.weight"


@functools.cache
def network(config):
    return jax.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))


def shapes(config, layout):
    return their_shapes(network(config), names.table(config, layout))


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_every_tensor_of_the_published_file_has_its_place(layout):
    """Ten in each of 24 layers, the tokens and the last norm."""
    assert len(shapes(umt5.XXL, layout)) == 242


@pytest.mark.torch
@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_transformers(preset):
    import torch

    transformers = pytest.importorskip("transformers")
    settings = transformers.UMT5Config(**names.to_settings(PRESETS[preset], "diffusers"))
    with torch.device("meta"):
        theirs = transformers.UMT5EncoderModel(settings).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert found.pop(ALIAS, found[NAME]) == found[NAME]
    assert shapes(PRESETS[preset], "diffusers") == found


def test_the_original_names():
    found = shapes(umt5.XXL, "original")
    assert found["token_embedding.weight"] == (256384, 4096)
    assert found["blocks.23.pos_embedding.embedding.weight"] == (32, 64)
    assert found["blocks.0.ffn.gate.0.weight"] == found["blocks.0.ffn.fc1.weight"] == (10240, 4096)
    assert found["blocks.0.ffn.fc2.weight"] == (4096, 10240)
    ends = {name.removeprefix("blocks.0.") for name in found if name.startswith("blocks.0.")}
    assert ends == {
        *(f"{name}.weight" for name in ("norm1", "norm2", "pos_embedding.embedding")),
        *(f"{name}.weight" for name in ("attn.q", "attn.k", "attn.v", "attn.o")),
        *(f"{name}.weight" for name in ("ffn.gate.0", "ffn.fc1", "ffn.fc2")),
    }


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_and_settings_tell_the_configuration(preset, layout):
    config = PRESETS[preset]
    settings = names.to_settings(config, layout)
    assert names.config_of(shapes(config, layout), layout, settings) == config
    assert names.config_of(shapes(config, layout), layout) == config


def test_the_largest_distance_is_in_the_settings():
    config = dataclasses.replace(umt5.TINY, max_distance=64)
    found = names.config_of(
        shapes(config, "diffusers"), "diffusers", names.to_settings(config, "diffusers")
    )
    assert found == config


def test_the_tokens_may_have_either_name_or_both():
    wanted = shapes(umt5.TINY, "diffusers")
    both = wanted | {ALIAS: wanted[NAME]}
    other = {name: shape for name, shape in both.items() if name != NAME}
    for found in (both, other):
        assert names.config_of(found, "diffusers") == umt5.TINY
    assert names.ALIASES[ALIAS] in {row.theirs for row in names.table(umt5.TINY, "diffusers")}


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
@pytest.mark.parametrize("stored", [(NAME,), (ALIAS,), (NAME, ALIAS)], ids=len)
def test_a_file_with_either_name_or_both_is_loaded(tmp_path, stored, prefix):
    """transformers ties the two, and writes both where its caller does not share tensors."""
    given = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name)
        for name, shape in shapes(umt5.TINY, "diffusers").items()
    }
    tokens = given.pop(NAME)
    given |= {name: tokens.copy() for name in stored}
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in given.items()}, path)
    net = weights.load(path, part="text_encoder")
    np.testing.assert_array_equal(net.tokens[...], tokens)
    rows = names.table(umt5.TINY, "diffusers")
    np.testing.assert_array_equal(dict(theirs(net, rows))[names.NORM[0]], given[names.NORM[0]])


def test_two_names_with_tensors_that_differ_are_refused(tmp_path):
    given = {
        name: np.zeros(shape, np.float32) for name, shape in shapes(umt5.TINY, "diffusers").items()
    }
    given[ALIAS] = given[NAME] + 1
    save_file(given, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"{ALIAS} and {NAME}, which must be equal"):
        weights.load(tmp_path / "a.safetensors")


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="no UMT5 encoder"):
        names.config_of({"conv.weight": (3, 3)}, "diffusers")
    settings = names.to_settings(umt5.TINY, "diffusers") | {"model_type": "t5"}
    with pytest.raises(ValueError, match="model_type is 't5'"):
        names.config_of(shapes(umt5.TINY, "diffusers"), "diffusers", settings)


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_both_layouts_fill_one_network(layout):
    """Every tensor is found, and rows turn round: what is written is what was read."""
    config = umt5.TINY
    wanted = shapes(config, layout)
    given = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + len(name)
        for name, shape in wanted.items()
    }
    rows = names.table(config, layout)
    net = fill(network(config), rows, given.__getitem__)
    np.testing.assert_array_equal(net.tokens[...], given[names.TOKENS[names.LAYOUTS.index(layout)]])
    for row in rows:
        tensor = given[row.theirs.format(1)]
        np.testing.assert_array_equal(row.to_theirs(row.to_ours(tensor)), tensor)
