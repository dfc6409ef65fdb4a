"""The autoencoders' tables: every tensor of the published files, both layouts, their settings."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from dmd_jax.models import wan_vae
from dmd_jax.models.wan_vae import WanVAE
from dmd_jax.weights import wan_vae as names
from dmd_jax.weights.table import their_shapes

PRESETS = {
    name.lower(): getattr(wan_vae, name) for name in ("WAN_2_1", "WAN_2_2", "TINY", "TINY_2_2")
}


@functools.cache
def shapes(config, layout):
    vae = jax.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    return their_shapes(vae, names.table(config, layout))


@pytest.mark.torch
@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_diffusers(preset):
    import torch

    diffusers = pytest.importorskip("diffusers")
    settings = names.to_settings(PRESETS[preset], "diffusers")
    del settings["_class_name"]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**settings).state_dict()
    assert shapes(PRESETS[preset], "diffusers") == {k: tuple(v.shape) for k, v in theirs.items()}


@pytest.mark.torch
def test_the_settings_of_wan_2_1_are_the_defaults_of_diffusers():
    import torch

    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan().config
    ours = names.to_settings(wan_vae.WAN_2_1, "diffusers") | {"decoder_base_dim": None}
    assert {name: theirs[name] for name in ours if name != "_class_name"} == {
        name: value for name, value in ours.items() if name != "_class_name"
    }


@pytest.mark.torch
def test_the_original_names_are_what_diffusers_converts_from():
    import torch

    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    original = {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes(wan_vae.WAN_2_1, "original").items()
    }
    converted = single_file.convert_wan_vae_to_diffusers(original)
    wanted = shapes(wan_vae.WAN_2_1, "diffusers")
    assert {name: tuple(value.shape) for name, value in converted.items()} == wanted


# What diffusers' converter of Wan2.2_VAE.pth, which is not in its package, does with the stages.
STAGES_2_2 = [
    (r"downsamples\.(\d)\.downsamples\.2\.(resample|time)", r"down_blocks.\1.downsampler.\2"),
    (r"upsamples\.(\d)\.upsamples\.3\.(resample|time)", r"up_blocks.\1.upsampler.\2"),
    (r"downsamples\.(\d)\.downsamples", r"down_blocks.\1.resnets"),
    (r"upsamples\.(\d)\.upsamples", r"up_blocks.\1.resnets"),
    (r"residual\.0", "norm1"),
    (r"residual\.2", "conv1"),
    (r"residual\.3", "norm2"),
    (r"residual\.6", "conv2"),
    (r"shortcut", "conv_shortcut"),
]


def test_the_stages_of_wan_2_2_are_nested():
    def stages(layout):
        found = shapes(wan_vae.WAN_2_2, layout).items()
        return {name: shape for name, shape in found if re.search(r"(up|down)(samples|_)", name)}

    converted = {}
    for name, shape in stages("original").items():
        for pattern, replacement in STAGES_2_2:
            name = re.sub(pattern, replacement, name)
        converted[name] = shape
    assert converted == stages("diffusers") and len(converted) > 100


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_and_settings_tell_the_configuration(preset, layout):
    config = PRESETS[preset]
    settings = names.to_settings(config, layout)
    assert names.config_of(shapes(config, layout), layout, settings) == config
    assert names.config_of(shapes(config, layout), layout) == config


def test_settings_tell_the_statistics_of_other_latents():
    config = dataclasses.replace(wan_vae.TINY, mean=(0.5, 0.25), std=(2.0, 3.0), blocks=3)
    theirs, settings = shapes(config, "diffusers"), names.to_settings(config, "diffusers")
    assert names.config_of(theirs, "diffusers", settings) == config
    with pytest.raises(ValueError, match="2 latent channels are not known"):
        names.config_of(theirs, "diffusers")


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="no Wan autoencoder"):
        names.config_of({"conv.weight": (3, 3)}, "diffusers")
    settings = names.to_settings(wan_vae.TINY, "diffusers") | {"attn_scales": [0.5]}
    with pytest.raises(ValueError, match=r"attn_scales is \[0.5\]"):
        names.config_of(shapes(wan_vae.TINY, "diffusers"), "diffusers", settings)


@pytest.mark.parametrize("layout", names.LAYOUTS)
@pytest.mark.parametrize("preset", ["tiny", "tiny_2_2"])
def test_every_row_turns_round(preset, layout):
    theirs = shapes(PRESETS[preset], layout)
    for row in names.table(PRESETS[preset], layout):
        tensor = np.arange(np.prod(theirs[row.theirs])).reshape(theirs[row.theirs])
        np.testing.assert_array_equal(row.to_theirs(row.to_ours(tensor)), tensor)
