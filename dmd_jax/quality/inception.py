"""The InceptionV3 of Fréchet Inception Distances, with weights from a file of the user.

It is the TensorFlow graph of 2015-12-05 that published FIDs use (torch-fidelity, pytorch-fid), not
the network of torchvision: average pools exclude the padding, the last block has a maximum pool,
images are resized as in TensorFlow 1. Batch norms are folded into the convolutions.
The architecture is Szegedy et al. 2016. Imports only jax.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIZE = 299
EPSILON = 1e-3  # of the batch norms

Weights = dict[str, tuple[jax.Array, jax.Array]]  # name: (kernel [h, w, in, out], bias [out])


def fold(tensors: Mapping[str, np.ndarray]) -> Weights:
    """Folds each batch norm into its convolution.

    Args:
        tensors: torch-fidelity's state dict: `NAME.conv.weight` [out, in, h, w] and
            `NAME.bn.{weight,bias,running_mean,running_var}` [out]; others are ignored.
    """
    weights = {}
    for key in (key for key in tensors if key.endswith(".conv.weight")):
        name = key.removesuffix(".conv.weight")
        gain, bias, mean, variance = (
            tensors[f"{name}.bn.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(variance + EPSILON)
        kernel = np.transpose(tensors[key], (2, 3, 1, 0)) * scale
        weights[name] = jnp.asarray(kernel), jnp.asarray(bias - mean * scale)
    return weights


def inception(weights: Weights, images: jax.Array) -> jax.Array:
    """The features of the last pool.

    Args:
        weights: of `fold`.
        images: [B, H, W, 3] in [0, 255].

    Returns:
        float32 [B, 2048].
    """

    def stem(x, name, stride=1, padding="VALID"):
        return _convolve(x, weights[name], stride, padding)

    x = (resize(images.astype(jnp.float32)) - 128) / 128
    x = stem(stem(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
    x = _max_pool(stem(x, "Conv2d_2b_3x3", padding="SAME"))
    x = _max_pool(stem(stem(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"))
    for name, block in BLOCKS.items():
        x = jnp.concatenate(list(block(x, _Block(weights, name))), axis=-1)
    return jnp.mean(x, axis=(1, 2))


def resize(images: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 299, 299, C], bilinear as in TensorFlow 1: pixel i is read at i H / 299.

    Neither half-pixel centres nor aligned corners, and no antialiasing: FID depends on it.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        where = jnp.arange(SIZE, dtype=jnp.float32) * np.float32(length / SIZE)
        low = where.astype(jnp.int32)
        high = jnp.minimum(low + 1, length - 1)
        share = jnp.expand_dims(where - low, [a for a in range(4) if a != axis])
        below, above = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = below + (above - below) * share
    return images


class _Block:
    """Applies the convolutions of one block by name."""

    def __init__(self, weights: Weights, block: str):
        self._weights, self._block = weights, block

    def __call__(self, x: jax.Array, *names: str) -> jax.Array:
        """Applies them in order; a name that ends in '/2' means stride 2 and no padding."""
        for name in names:
            name, _, stride = name.partition("/")
            weights = self._weights[f"{self._block}.branch{name}"]
            x = _convolve(x, weights, *((2, "VALID") if stride else (1, "SAME")))
        return x


def _block_a(x, branch):
    yield branch(x, "1x1")
    yield branch(x, "5x5_1", "5x5_2")
    yield branch(x, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
    yield branch(_average_pool(x), "_pool")


def _block_b(x, branch):
    yield branch(x, "3x3/2")
    yield branch(x, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3/2")
    yield _max_pool(x)


def _block_c(x, branch):
    yield branch(x, "1x1")
    yield branch(x, "7x7_1", "7x7_2", "7x7_3")
    yield branch(x, "7x7dbl_1", "7x7dbl_2", "7x7dbl_3", "7x7dbl_4", "7x7dbl_5")
    yield branch(_average_pool(x), "_pool")


def _block_d(x, branch):
    yield branch(x, "3x3_1", "3x3_2/2")
    yield branch(x, "7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4/2")
    yield _max_pool(x)


def _block_e(x, branch, pool=None):
    yield branch(x, "1x1")
    small, double = branch(x, "3x3_1"), branch(x, "3x3dbl_1", "3x3dbl_2")
    yield branch(small, "3x3_2a")
    yield branch(small, "3x3_2b")
    yield branch(double, "3x3dbl_3a")
    yield branch(double, "3x3dbl_3b")
    yield branch((pool or _average_pool)(x), "_pool")


def _last_block(x, branch):
    return _block_e(x, branch, lambda x: _max_pool(x, stride=1, padding="SAME"))


BLOCKS = {
    "Mixed_5b": _block_a,
    "Mixed_5c": _block_a,
    "Mixed_5d": _block_a,
    "Mixed_6a": _block_b,
    "Mixed_6b": _block_c,
    "Mixed_6c": _block_c,
    "Mixed_6d": _block_c,
    "Mixed_6e": _block_c,
    "Mixed_7a": _block_d,
    "Mixed_7b": _block_e,
    "Mixed_7c": _last_block,
}


def _convolve(x, weights, stride, padding):
    kernel, bias = weights
    x = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",  # a metric must not depend on the device
    )
    return jax.nn.relu(x + bias)


def _max_pool(x, stride=2, padding="VALID"):
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def _average_pool(x):
    """Mean over 3x3, without the padding."""
    total = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    down, right = (
        np.minimum(np.arange(n) + 1, n - 1) - np.maximum(np.arange(n) - 1, 0) + 1
        for n in x.shape[1:3]
    )
    return total / np.outer(down, right)[..., None].astype(np.float32)
