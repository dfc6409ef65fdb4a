"""Inception against torch-fidelity's, and its parts against closed forms.

`inception_reference.json` is from torch-fidelity 0.4.0: the shapes of all convolutions, and
features 0, 64, 128, ... of two images at INPUT_IMAGE_SIZE = 75, with the weights of `tensors`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmd_jax.quality import inception
from dmd_jax.quality.features import load_features

REFERENCE = json.loads(Path(__file__).with_name("inception_reference.json").read_text())


def tensors():
    """A state dict of random numbers under which activations keep their size."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in sorted(REFERENCE["shapes"].items()):
        out = shape[0]
        for part, value in (
            ("conv.weight", rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))),
            ("bn.weight", rng.uniform(0.5, 1.5, out)),
            ("bn.bias", rng.normal(0, 0.1, out)),
            ("bn.running_mean", rng.normal(0, 0.1, out)),
            ("bn.running_var", rng.uniform(0.5, 1.5, out)),
        ):
            found[f"{name}.{part}"] = value.astype(np.float32)
    return found


def test_features_are_those_of_torch_fidelity_and_take_grey_images_too(tmp_path, monkeypatch):
    save_file(tensors(), tmp_path / "inception.safetensors")
    monkeypatch.setattr(inception, "SIZE", 75)
    monkeypatch.setattr("dmd_jax.quality.features.INCEPTION_BATCH", 2)
    features = load_features(tmp_path / "inception.safetensors")
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 40, 3), np.uint8)[:2]
    found, logits = features.extract(images)
    assert (features.name, logits, found.shape) == ("FID", None, (2, 2048))
    np.testing.assert_allclose(found[:, ::64], REFERENCE["features"], rtol=1e-4, atol=2e-5)
    grey, _ = features.extract(images[..., :1])
    threefold, _ = features.extract(images[..., [0, 0, 0]])
    np.testing.assert_array_equal(grey, threefold)


def test_folding_gives_the_convolution_and_its_batch_norm():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(4, 3, 1, 1)), rng.normal(size=(5, 3))
    gain, bias, mean, variance = rng.uniform(0.5, 2, (4, 4))
    parts = {"weight": gain, "bias": bias, "running_mean": mean, "running_var": variance}
    state = {"a.conv.weight": kernel} | {f"a.bn.{key}": value for key, value in parts.items()}
    folded_kernel, folded_bias = inception.fold(state | {"fc.weight": kernel})["a"]
    expected = (x @ kernel[:, :, 0, 0].T - mean) / np.sqrt(variance + 0.001) * gain + bias
    np.testing.assert_allclose(x @ folded_kernel[0, 0] + folded_bias, expected, rtol=1e-5)


def test_resizing_reads_pixel_i_at_i_over_the_scale_and_repeats_the_last():
    ramp = jnp.arange(8.0)[:, None] + 100 * jnp.arange(5.0)
    resized = inception.resize(ramp[None, :, :, None])[0, ..., 0]
    down, right = (np.minimum(np.arange(299) * n / 299, n - 1) for n in (8, 5))
    np.testing.assert_allclose(resized, down[:, None] + 100 * right, rtol=1e-5, atol=1e-4)


def test_average_pools_leave_out_the_padding():
    constant = jnp.full((1, 4, 5, 2), 3.0)
    np.testing.assert_allclose(inception._average_pool(constant), constant, rtol=1e-6)
    corner = inception._average_pool(jax.random.normal(jax.random.key(0), (1, 1, 3, 1)))
    assert corner.shape == (1, 1, 3, 1)


def test_a_file_that_lacks_a_layer_is_refused_by_its_name(tmp_path):
    state = {
        key: np.zeros((1, 1, 1, 1) if "conv" in key else 1, np.float32)
        for key in tensors_of("Mixed_5b.branch1x1")
    }
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="Conv2d_1a_3x3"):
        load_features(tmp_path / "part.safetensors")


def tensors_of(name):
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return [f"{name}.{part}" for part in parts]
