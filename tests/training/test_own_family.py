"""A run whose networks are of a family of one's own: what it lacks is named."""

import dataclasses

import jax
import jax.numpy as jnp
import programs
import pytest
from flax import nnx

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.training.run import build


@dataclasses.dataclass(frozen=True)
class FlatConfig:
    size: int
    num_classes: int
    dtype: str = "float32"

    @property
    def sample_shape(self):
        return (self.size, self.size, 1)

    @property
    def uncond(self):
        return self.num_classes


class Flat(nnx.Module):
    """A network without layers."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x, t, label):
        return self.scale[...] * x


def test_what_a_network_has_no_field_for_is_refused(data_dir, monkeypatch, tmp_path):
    """Settings of `compute`, and a discriminator on features of no width and no depth."""
    monkeypatch.setitem(weights.FAMILIES, "flat", (FlatConfig, Flat, ((r"scale$", jax.P()),)))
    path = tmp_path / "flat.safetensors"
    weights.save(path, Denoiser(Flat(FlatConfig(28, 10), rngs=nnx.Rngs(0))))
    config = programs.config(path, data_dir, variant="dmd2")
    with pytest.raises(ValueError, match="remat, unroll cannot be set, because FlatConfig has no"):
        build(config, jax.devices()[:1])
    for role in ("teacher", "generator", "fake_score"):
        config[role].compute = dict(dtype="float32")
    with pytest.raises(ValueError, match="FlatConfig states neither their width, `dim`, nor"):
        build(config, jax.devices()[:1])
