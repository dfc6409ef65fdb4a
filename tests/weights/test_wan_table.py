"""Wan's tables: every tensor of the published checkpoints, in both layouts, and their settings."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dmd_jax.models import wan
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.weights import wan as names
from dmd_jax.weights.table import their_shapes

PRESETS = {
    name.lower(): getattr(wan, name)
    for name in ("T2V_1_3B", "T2V_14B", "I2V_14B", "TI2V_5B", "I2V_A14B", "TINY")
}


@functools.cache
def shapes(config, layout):
    net = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    return their_shapes(net, names.table(config, layout))


# Tensors in the index files of the published checkpoints.
@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("preset, count", [("t2v_1_3b", 825), ("t2v_14b", 1095), ("i2v_14b", 1303)])
def test_every_tensor_of_the_index_has_its_place(preset, count, layout):
    assert len(shapes(PRESETS[preset], layout)) == count


@pytest.mark.torch
@pytest.mark.parametrize("preset", ["t2v_1_3b", "t2v_14b", "i2v_14b", "ti2v_5b"])
def test_names_and_shapes_are_those_of_diffusers(preset):
    import torch

    diffusers = pytest.importorskip("diffusers")
    settings = names.to_settings(PRESETS[preset], "diffusers")
    del settings["_class_name"]
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**settings).state_dict()
    assert shapes(PRESETS[preset], "diffusers") == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.torch
@pytest.mark.parametrize("preset", ["t2v_1_3b", "i2v_14b"])
def test_the_original_names_are_what_diffusers_converts_from(preset):
    import torch

    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    original = {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes(PRESETS[preset], "original").items()
    }
    converted = single_file.convert_wan_transformer_to_diffusers(original)
    wanted = shapes(PRESETS[preset], "diffusers")
    assert {name: tuple(value.shape) for name, value in converted.items()} == wanted


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_and_settings_tell_the_configuration(preset, layout):
    config = PRESETS[preset]
    settings = names.to_settings(config, layout)
    assert names.config_of(shapes(config, layout), layout, settings) == config
    if config.head_dim == 128:
        assert names.config_of(shapes(config, layout), layout) == config


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="no Wan transformer"):
        names.config_of({"conv.weight": (3, 3)}, "diffusers")
    settings = names.to_settings(wan.TINY, "diffusers") | {"patch_size": [2, 2, 2]}
    with pytest.raises(ValueError, match=r"patch_size is \[2, 2, 2\]"):
        names.config_of(shapes(wan.TINY, "diffusers"), "diffusers", settings)


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_every_row_turns_round(layout):
    config = WanConfig(dim=8, ffn=6, heads=2, depth=2, image_dim=5)
    for row in names.table(config, layout):
        theirs = shapes(config, layout)[row.theirs.format(0)]
        tensor = np.arange(np.prod(theirs)).reshape(theirs)
        np.testing.assert_array_equal(row.to_theirs(row.to_ours(tensor)), tensor)
