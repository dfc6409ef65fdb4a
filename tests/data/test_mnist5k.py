import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmd_jax import data
from dmd_jax.data import mnist5k

REPOSITORY = Path(__file__).parents[2]
SPLITS = {"train": 4000, "test": 1000}


@pytest.fixture(scope="module")
def packed():
    with np.load(mnist5k.FILE) as file:
        return dict(file)


def together(packed):
    images = np.concatenate([packed["train_images"], packed["test_images"]])
    return images, np.concatenate([packed["train_labels"], packed["test_labels"]])


def test_content_is_what_the_provenance_file_states(packed):
    stated = mnist5k.FILE.with_name("MNIST5K.md").read_text()
    assert mnist5k.content_hash(packed) in stated


@pytest.mark.parametrize("split", SPLITS)
def test_splits_have_their_sizes_and_equal_classes(packed, split):
    images, labels = packed[f"{split}_images"], packed[f"{split}_labels"]
    assert images.shape == (SPLITS[split], 28, 28, 1) and images.dtype == np.uint8
    assert labels.shape == (SPLITS[split],) and labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [SPLITS[split] // 10] * 10


def test_no_image_occurs_twice(packed):
    images, _ = together(packed)
    assert len({hashlib.sha256(image.tobytes()).digest() for image in images}) == 5000


def test_split_follows_from_the_images_in_whatever_order_they_come(packed):
    images, labels = together(packed)
    order = np.random.default_rng(0).permutation(5000)
    train, test = mnist5k.split_rows(images[order], labels[order])
    np.testing.assert_array_equal(images[order][train], packed["train_images"])
    np.testing.assert_array_equal(images[order][test], packed["test_images"])


def test_split_refuses_unequal_classes():
    with pytest.raises(ValueError, match=r"classes of one size, got \[2, 1"):
        labels = np.array([0, *range(10)])
        mnist5k.split_rows(np.zeros((11, 28, 28, 1), np.uint8), labels)


def test_command_makes_the_same_content_from_the_csv(packed, tmp_path):
    images, labels = together(packed)
    rows = np.concatenate([images.reshape(5000, -1), labels[:, None]], axis=1)
    csv, result = tmp_path / "mnist_5k.csv.gz", tmp_path / "made.npz"
    with gzip.open(csv, "wt", compresslevel=1) as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows[::-1].tolist())
    command = [sys.executable, "-m", "dmd_jax.data.mnist5k", str(csv), "--out", str(result)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert mnist5k.content_hash(packed) in done.stdout
    with np.load(result) as again:
        assert mnist5k.content_hash(again) == mnist5k.content_hash(packed)


def test_csv_of_another_shape_is_refused(tmp_path):
    (tmp_path / "digits.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match=r"digits\.csv: expected 784 pixels .* got 3"):
        mnist5k.pack(tmp_path / "digits.csv")


@pytest.mark.parametrize("split", SPLITS)
def test_builder_gives_back_the_file_exactly(packed, data_dir, split):
    source = data.load("mnist5k", split, data_dir)
    images, labels = data.arrays(source)
    np.testing.assert_array_equal(images, packed[f"{split}_images"])
    np.testing.assert_array_equal(labels, packed[f"{split}_labels"])
    assert source.image_shape == (28, 28, 1) and source.num_classes == 10


def test_slices_are_balanced(data_dir):
    _, labels = data.arrays(data.load("mnist5k", "test[:500]", data_dir))
    assert np.bincount(labels).tolist() == [50] * 10
