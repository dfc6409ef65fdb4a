"""Rewards that a config names: `config.reward = dict(cls=LabelProbability)`.

A reward is a frozen dataclass with `load(source)`: a pytree that is a callable (x0, cond) -> [B],
whose arrays the train step gets as those of any frozen network. Imports the feature networks and
the data.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dmd_jax.data import Images, Source
from dmd_jax.quality.classifier import Classifier
from dmd_jax.quality.features import SHIPPED, load_classifier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbability:
    """The log-probability that a classifier gives to the label of an image."""

    classifier: Classifier

    def __call__(self, x0: Float[Array, "B H W C"], cond: Int[Array, " B"]) -> Float32[Array, " B"]:
        """x0 in [-1, 1]; what lies outside is seen as its nearest colour, as in a file."""
        logits, _ = self.classifier(jnp.clip(x0.astype(jnp.float32), -1.0, 1.0))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), cond[:, None], axis=1)
        return chosen[:, 0]


@dataclasses.dataclass(frozen=True)
class LabelProbability:
    """`LogProbability` by a classifier of `python -m dmd_jax.metric_network`.

    Attributes:
        network: its file, or the name of the shipped one. Numbers that the same network measures
            (`config.evaluate.features`) no longer judge the run: it has learned to please it.
    """

    network: str = SHIPPED

    def load(self, source: Source) -> Any:
        """The callable, for the conditions of this data.

        Raises:
            ValueError, FileNotFoundError: there is no such classifier, or it is one of other
                images or classes.
        """
        images = getattr(source, "images", source)
        if not isinstance(images, Images):
            raise ValueError(f"LabelProbability is of images of a class, not of {source.name!r}")
        return LogProbability(load_classifier(self.network, images))
