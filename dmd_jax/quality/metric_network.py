"""Trains the classifier in whose features quality is measured.

Imports optax and the rooms below.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates

from dmd_jax.data import to_float
from dmd_jax.devices.paths import path_name
from dmd_jax.quality.classifier import Classifier, ClassifierConfig
from dmd_jax.quality.features import extract

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
# Largest change of a training image: radians, share of its size, shear, share of its side.
ROTATION, SCALE, SHEAR, SHIFT = 0.2, 0.1, 0.15, 0.07


def train(
    images: np.ndarray, labels: np.ndarray, num_classes: int, *, steps: int, batch: int, seed: int
) -> Classifier:
    """Trains a classifier.

    Args:
        images: uint8 [N, H, W, C].
        labels: int32 [N] in [0, num_classes).
        num_classes: K.
        steps: of the optimiser (AdamW, one cycle of the learning rate).
        batch: images a step, drawn anew each step.
        seed: of the initial weights, the batches and the changes of the images.

    Returns:
        The network, its features scaled (see `scaled`).
    """
    config = ClassifierConfig(channels=images.shape[-1], num_classes=num_classes)
    classifier = jax.jit(lambda: Classifier(config, rngs=nnx.Rngs(seed)))()
    rate = optax.cosine_onecycle_schedule(steps, LEARNING_RATE, pct_start=0.1)
    tx = optax.adamw(rate, weight_decay=WEIGHT_DECAY)

    def loss(classifier, x, y):
        logits, _ = classifier(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def update(classifier, opt_state, x, y, key):
        value, gradient = jax.value_and_grad(loss)(classifier, jitter(x, key), y)
        updates, opt_state = tx.update(gradient, opt_state, classifier)
        return optax.apply_updates(classifier, updates), opt_state, value

    opt_state, key, order = tx.init(classifier), jax.random.key(seed), np.random.default_rng(seed)
    for step in range(steps):
        rows = order.choice(len(images), batch, replace=False)
        x, y, key_of_step = to_float(images[rows]), labels[rows], jax.random.fold_in(key, step)
        classifier, opt_state, value = update(classifier, opt_state, x, y, key_of_step)
        if step % 500 == 0:
            print(f"step {step} of {steps}: loss {value:.3f}", flush=True)
    return scaled(classifier, images)


def jitter(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image [B, H, W, C] by a small random affine map, interpolating linearly."""
    count, height, width, _ = images.shape
    angle, scale, shear, down, right = jax.random.uniform(key, (5, count), minval=-1, maxval=1)
    cos, sin, scale = jnp.cos(ROTATION * angle), jnp.sin(ROTATION * angle), 1 + SCALE * scale
    matrix = scale * jnp.array([[cos, SHEAR * shear - sin], [sin, cos]])  # [2, 2, B]
    middle = jnp.array([height - 1, width - 1])[:, None, None] / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")) - middle
    moved = jnp.einsum("ijb,jhw->bihw", matrix, grid) + middle
    moved += SHIFT * jnp.stack([height * down, width * right], 1)[:, :, None, None]

    def channel(plane, where):  # [H, W], [2, H, W]
        return map_coordinates(plane, where, order=1, mode="nearest")

    every_channel = jax.vmap(channel, in_axes=(-1, None), out_axes=-1)
    return jax.vmap(every_channel)(images, moved)


def scaled(classifier: Classifier, images: np.ndarray) -> Classifier:
    """The same classifier, its features on `images` of variance 1 (the mean over dimensions).

    Where training happens to leave the scale is an accident, and distances are proportional to its
    square. ReLU passes a factor through: the last convolution takes it, the head takes it back.
    """
    features, _ = extract(classifier, images)
    factor = 1 / np.sqrt(np.var(features, axis=0).mean())
    last = len(classifier.convolutions) - 1

    def scale(path, leaf):
        name = path_name(path)
        if name.startswith(f"convolutions/{last}/"):
            return leaf * factor
        return leaf / factor if name == "head/kernel" else leaf

    return jax.tree_util.tree_map_with_path(scale, classifier)
