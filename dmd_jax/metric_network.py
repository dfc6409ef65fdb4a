"""Trains the classifier in whose features quality is measured, and writes its card.

    python -m dmd_jax.metric_network --name=FD-MNIST64 --out=dmd_jax/assets/mnist_metric.safetensors

It sees the train split and nothing else; the test split is read once, after the last step, for the
accuracy in the card. `--data` makes the metric of a data set of your own. Imports the data room,
the classifier, `features.py` and the check of a directory.
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates

from dmd_jax import metrics
from dmd_jax.checkpoint import check_writable
from dmd_jax.data import arrays, load, to_float
from dmd_jax.features import extract, load_features, save_classifier
from dmd_jax.models.classifier import Classifier, ClassifierConfig
from dmd_jax.paths import path_name

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
# Largest change of a training image: radians, share of its size, shear, share of its side.
ROTATION, SCALE, SHEAR, SHIFT = 0.2, 0.1, 0.15, 0.07

CARD = """# {stem}: the network behind {name}

A {parameters:,}-parameter convolutional classifier (`dmd_jax/models/classifier.py`). Distances in
its {features} features are called **{name}**; they are not comparable with Inception FID.

| | |
|---|---|
| command | `{command}` |
| saw | `{data}`, split `train`, {train_size:,} images; nothing else |
| accuracy | {accuracy:.2%} of {test_size:,} images of split `test` |
| steps, batch, seed | {steps:,}, {batch}, {seed} |
| time | {seconds:.0f} s on {machine}, jax {jax} |
| SHA-256 | `{sha256}` |

Training images are rotated, scaled, sheared and shifted a little. The features are scaled so that
their variance over the train split is 1, averaged over dimensions. The command gives the same file
with the same versions and number of cores, and one of the same quality elsewhere.
"""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="*.safetensors; the card is beside")
    parser.add_argument("--data", default="mnist5k", help="as for dmd_jax.data.load")
    parser.add_argument("--name", help="what to call the distance (FD-DATA-FEATURES)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    try:  # what would otherwise end a training that is done
        check_writable(args.out.parent)
        source, test = (load(args.data, split) for split in ("train", "test"))
    except ValueError as error:
        parser.error(str(error))
    images, labels = arrays(source)
    start = time.monotonic()
    classifier = train(
        images, labels, source.num_classes, steps=args.steps, batch=args.batch, seed=args.seed
    )
    seconds = time.monotonic() - start
    features = classifier.config.features
    name = args.name or f"FD-{args.data}-{features}"
    save_classifier(args.out, name, classifier)

    test_images, test_labels = arrays(test)
    _, logits = load_features(args.out).extract(test_images)
    card = CARD.format(
        stem=args.out.stem,
        name=name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(classifier)),
        features=features,
        command=shlex.join(["python", "-m", "dmd_jax.metric_network", *sys.argv[1:]]),
        data=args.data,
        train_size=len(images),
        test_size=len(test_images),
        accuracy=metrics.accuracy(logits, test_labels),
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        seconds=seconds,
        machine=f"{os.cpu_count()} {jax.default_backend()} cores",
        jax=jax.__version__,
        sha256=hashlib.sha256(args.out.read_bytes()).hexdigest(),
    )
    args.out.with_suffix(".md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
