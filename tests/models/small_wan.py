"""Small Wan networks and their inputs, all values from names alone."""

import dataclasses
import functools

import foreign
import jax
import numpy as np
from flax import nnx

from dmd_jax.models.wan import Conditions, Wan, WanConfig
from dmd_jax.weights import wan as names
from dmd_jax.weights.table import fill, their_shapes

SMALL = WanConfig(dim=48, ffn=64, heads=2, depth=2, in_channels=4, out_channels=4, text_dim=10)
IMAGE = dataclasses.replace(SMALL, in_channels=6, image_dim=14)
# The rounding of float32 (6e-8) through some hundred operations, in the norm.
ROUNDING = 2e-5


@functools.cache
def network(config):
    """A Wan whose weights are those that `foreign.give_weights` gives to diffusers' network."""
    shape = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    rows = names.table(config, "diffusers")
    theirs = their_shapes(shape, rows)
    return fill(shape, rows, lambda name: foreign.weight(name, theirs[name]))


def inputs(config, frames=3, height=4, width=6, batch=2, text=7, per_frame=False):
    """(x, timestep, conditions) of these sizes."""
    x = foreign.tensor("x", (batch, frames, height, width, config.out_channels))
    shape = (batch, frames) if per_frame else (batch,)
    timestep = 1000 * np.abs(np.sin(foreign.tensor("t", shape)))
    cond = foreign.tensor("text", (batch, text, config.text_dim))
    if config.in_channels > config.out_channels:
        extra = config.in_channels - config.out_channels
        frames = foreign.tensor("frames", (*x.shape[:-1], extra))
        image = foreign.tensor("image", (batch, 5, config.image_dim)) if config.image_dim else None
        cond = Conditions(cond, frames, image)
    return x, timestep, cond
