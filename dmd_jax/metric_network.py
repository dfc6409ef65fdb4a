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

from dmd_jax.data import arrays, load
from dmd_jax.devices.disk import check_writable
from dmd_jax.quality import metrics
from dmd_jax.quality.features import load_features, save_classifier
from dmd_jax.quality.metric_network import train

CARD = """# {stem}: the network behind {name}

A {parameters:,}-parameter convolutional classifier (`dmd_jax/quality/classifier.py`). Distances in
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
