"""Trains the classifier in whose features quality is measured, and writes it with its card.

Imports optax and the rooms below.
"""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates

from dmd_jax.data import Images, arrays, to_float
from dmd_jax.devices.paths import path_name
from dmd_jax.quality import metrics
from dmd_jax.quality.classifier import Classifier, ClassifierConfig
from dmd_jax.quality.features import extract, load_features, save_classifier

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
# Largest augmentation of an image: radians, share of its size, shear, share of its side.
ROTATION, SCALE, SHEAR, SHIFT = 0.2, 0.1, 0.15, 0.07

CARD = """# {stem}: the network behind {name}

A {parameters:,}-parameter convolutional classifier (`dmd_jax/quality/classifier.py`). Distances in
its {features} features are called **{name}**; they are not comparable with Inception FID.

| | |
|---|---|
| command | `{command}` |
| learned from | `{data}`, split `train`, {train_size:,} images; nothing else |
| classes | {classes} |
| accuracy | {accuracy:.2%} of {test_size:,} images of split `test` |
| steps, batch, seed | {steps:,}, {batch}, {seed} |
| time | {seconds:.0f} s on {machine}, jax {jax} |
| SHA-256 of the weights | `{fingerprint}` |

Training images are rotated, scaled, sheared and shifted a little. The features are scaled so that
their variance over the train split is 1, averaged over dimensions. The command gives the same
weights with the same versions and number of cores, and weights of the same quality elsewhere.
"""


def write(
    path: Path,
    source: Images,
    test: Images,
    *,
    name: str | None,
    command: str,
    steps: int,
    batch: int,
    seed: int,
) -> str:
    """Trains a classifier and writes it to `path`, and its card to the same name with .md.

    Args:
        path: ends in .safetensors.
        source: training images.
        test: images for the accuracy in the card.
        name: of the metric; FD-DATA-FEATURES if None.
        command: for the card.
        steps, batch, seed: as for `train`.

    Returns:
        The card.
    """
    images, labels = arrays(source)
    start = time.monotonic()
    classifier = train(images, labels, source.num_classes, steps=steps, batch=batch, seed=seed)
    seconds = time.monotonic() - start
    dim = classifier.config.features
    name = name or f"FD-{source.name}-{dim}"
    save_classifier(path, name, classifier, data=source.name, classes=source.classes)
    features = load_features(path)
    test_images, test_labels = arrays(test)
    card = CARD.format(
        stem=path.stem,
        name=name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(classifier)),
        features=dim,
        command=command,
        data=source.name,
        classes=", ".join(source.classes),
        train_size=len(images),
        test_size=len(test_images),
        accuracy=metrics.accuracy(features.extract(test_images)[1], test_labels),
        steps=steps,
        batch=batch,
        seed=seed,
        seconds=seconds,
        machine=f"{os.cpu_count()} {jax.default_backend()} cores",
        jax=jax.__version__,
        fingerprint=features.fingerprint,
    )
    path.with_suffix(".md").write_text(card)
    return card


def train(
    images: np.ndarray, labels: np.ndarray, num_classes: int, *, steps: int, batch: int, seed: int
) -> Classifier:
    """Trains a classifier.

    Args:
        images: uint8 [N, H, W, C].
        labels: int32 [N] in [0, num_classes).
        num_classes: K.
        steps: of the optimizer (AdamW, one cycle of the learning rate).
        batch: images per step, drawn at random in each step.
        seed: of the initial weights, the batches and the augmentation.

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
    """Applies a small random affine map to each image [B, H, W, C], interpolated linearly."""
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
    """The classifier with features of variance 1 on `images` (the mean over dimensions).

    The scale after training is arbitrary, and distances are proportional to its square. ReLU
    commutes with a positive factor: the last convolution is multiplied by it, the head divided.
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
