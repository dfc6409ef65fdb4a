"""A small convolutional classifier, the feature network of the quality numbers (`features.py`).

Five 3x3 convolutions with ReLU, the mean over all positions, one linear layer. The mean is the
feature vector: as in Inception, it depends on which strokes or textures an image has and little on
their positions. There are no normalisation layers: with them the network is more accurate, but
hardly reacts to contrast and blur, which a metric must measure. Imports jax, flax and models.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models.layers import check_sizes


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A classifier in plain values.

    Attributes:
        channels: of the images; any height and width fits.
        num_classes: K.
        features: D, the length of the feature vector and the width of the widest layer.

    Raises:
        ValueError: a number is below 1, or `features` is no multiple of 4.
    """

    channels: int
    num_classes: int
    features: int = 64

    def __post_init__(self):
        check_sizes(self, "channels", "num_classes", "features")
        if self.features % 4:
            raise ValueError(f"features={self.features} must be a multiple of 4")


class Classifier(nnx.Module):
    """The network of a `ClassifierConfig`."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        d = config.features
        outputs, strides = (d // 4, d // 2, d // 2, d, d), (2, 1, 2, 1, 1)
        inputs = (config.channels, *outputs[:-1])
        init = nnx.initializers.he_normal()
        # Full float32 on every device: a metric must not depend on the device.
        self.convolutions = nnx.List(
            nnx.Conv(i, o, (3, 3), s, kernel_init=init, precision="highest", rngs=rngs)
            for i, o, s in zip(inputs, outputs, strides, strict=True)
        )
        self.head = nnx.Linear(d, config.num_classes, precision="highest", rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images float32 [B, H, W, C] in [-1, 1] -> (logits [B, K], features [B, D], D >= 0)."""
        x = images
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        features = jnp.mean(x, axis=(1, 2))
        return self.head(features), features
