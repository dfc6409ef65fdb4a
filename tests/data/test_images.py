import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dmd_jax import data
from dmd_jax.data import images as source_file
from dmd_jax.data import mnist5k

REPOSITORY = Path(__file__).parents[2]


class OddBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of data sets that `load` must refuse, before it prepares them."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(__file__).parent
    FEATURES: ClassVar[dict]

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        raise AssertionError("prepared before the features were checked")

    def _generate_examples(self):
        yield from ()


class WithoutLabels(OddBuilder):
    FEATURES: ClassVar = {"image": tfds.features.Image(shape=(8, 8, 3))}


class OfManySizes(OddBuilder):
    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }


class OfSixteenBits(OddBuilder):
    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=2),
    }


class Unreachable(OddBuilder):
    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }

    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to host")


def test_examples_are_bytes_with_an_integer_label(data_dir):
    train = data.load("mnist5k", "train", data_dir)
    assert len(train) == 4000
    example = train[13]
    assert example["image"].dtype == np.uint8 and example["image"].shape == (28, 28, 1)
    assert example["label"] == 3 and isinstance(example["label"], int)


def test_rows_come_in_the_order_asked_for_and_belong_to_the_caller(data_dir):
    train = data.load("mnist5k", "train", data_dir)
    images, labels = train.take([7, 2, 7])
    assert labels.tolist() == [7, 2, 7] and labels.dtype == np.int32
    expected = images.copy()
    images[:] = 0
    np.testing.assert_array_equal(train.take([7, 2, 7])[0], expected)


@pytest.mark.parametrize("row", [-1, 4000])
def test_rows_outside_are_refused(data_dir, row):
    with pytest.raises(IndexError, match=f"no row {row} in 4000"):
        data.load("mnist5k", "train", data_dir).take([0, row])


def test_a_source_too_large_for_memory_reads_the_same(data_dir, monkeypatch):
    rows = [5, 999, 5]
    kept = data.load("mnist5k", "test", data_dir).take(rows)
    monkeypatch.setattr(source_file, "IN_MEMORY_BYTES", 0)
    for expected, read in zip(kept, data.load("mnist5k", "test", data_dir).take(rows), strict=True):
        np.testing.assert_array_equal(read, expected)


def test_a_name_of_the_catalogue_takes_the_same_path(tmp_path, monkeypatch):
    """Only the download is replaced: three images of one colour each."""
    builder = tfds.builder_cls("cifar10")
    colours = {0: (255, 0, 0), 3: (0, 255, 0), 9: (0, 0, 255)}

    def examples():
        for label, colour in colours.items():
            image = Image.new("RGB", (32, 32), colour)
            yield label, {"id": str(label), "image": image, "label": label}

    monkeypatch.setattr(builder, "_split_generators", lambda self, _: {"train": examples()})
    cifar = data.load("cifar10", "train", str(tmp_path))
    assert cifar.image_shape == (32, 32, 3) and cifar.num_classes == 10
    images, labels = data.arrays(cifar)
    read = {int(label): tuple(image[0, 0]) for image, label in zip(images, labels, strict=True)}
    assert read == colours


def test_preparing_is_said_in_one_line_and_reading_in_none(tmp_path, capfd):
    data.load("mnist5k", "train", str(tmp_path))
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == f"preparing data set 'mnist5k' in {tmp_path}/mnist5k/1.0.0\n"
    data.load("mnist5k", "train", str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_of_a_large_split_a_limited_number_is_read_at_even_distances(data_dir):
    test = data.load("mnist5k", "test", data_dir)
    images, labels = data.arrays(test, limit=300)
    expected = test.take(np.arange(300) * 1000 // 300)
    np.testing.assert_array_equal(images, expected[0])
    np.testing.assert_array_equal(labels, expected[1])
    assert len(data.arrays(test, limit=2000)[0]) == 1000


def test_the_classes_are_named_as_the_data_set_names_them(data_dir):
    test = data.load("mnist5k", "test", data_dir)
    assert test.classes == tuple("0123456789") and test.num_classes == 10


def test_a_prepared_data_set_is_only_read(data_dir, monkeypatch):
    def fail(*_):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(mnist5k.Mnist5k, "_split_generators", fail)
    assert len(data.load("mnist5k", "test", data_dir)) == 1000


def test_of_two_that_prepare_at_once_both_read_what_the_first_wrote(tmp_path, monkeypatch):
    generators = mnist5k.Mnist5k._split_generators

    def overtaken(builder, dl_manager):
        monkeypatch.undo()  # The rival below generates as usual.
        mnist5k.Mnist5k(data_dir=tmp_path).download_and_prepare(file_format="array_record")
        return generators(builder, dl_manager)

    monkeypatch.setattr(mnist5k.Mnist5k, "_split_generators", overtaken)
    assert len(data.load("mnist5k", "test", str(tmp_path))) == 1000
    assert [path.name for path in (tmp_path / "mnist5k").iterdir()] == ["1.0.0"]


def test_tensorflow_is_never_imported(tmp_path):
    script = f"""
import sys
from dmd_jax import data
assert "tensorflow_datasets" not in sys.modules, "paid for by those who load nothing"
train = data.load("mnist5k", "train", {str(tmp_path)!r})
next(data.Batches(train, 8, seed=0).iterate())
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


def test_an_unknown_name_is_answered_with_its_neighbours(data_dir):
    with pytest.raises(
        ValueError, match=r"no data set 'mnist_5k'\. Did you mean 'mnist5k'"
    ) as caught:
        data.load("mnist_5k", "train", data_dir)
    assert len(str(caught.value)) < 300  # and not with the whole catalogue


def test_an_unknown_configuration_or_version_names_the_data_set(data_dir):
    with pytest.raises(ValueError, match=r"cannot open data set 'mnist5k/big'"):
        data.load("mnist5k/big", "train", data_dir)
    with pytest.raises(ValueError, match=r"cannot open data set 'mnist5k:9\.9\.9'.*1\.0\.0"):
        data.load("mnist5k:9.9.9", "train", data_dir)


@pytest.mark.parametrize("split", ["validation", "train[:x]", ""])
def test_an_unknown_split_is_answered_with_those_there_are(data_dir, split):
    with pytest.raises(ValueError, match=r"of 'mnist5k', which has \['train', 'test'\]"):
        data.load("mnist5k", split, data_dir)


def test_what_is_not_labelled_images_is_refused_before_the_download(tmp_path):
    with pytest.raises(
        ValueError, match=r"'without_labels' must have .* it has {'image': 'Image'}"
    ):
        data.load("without_labels", "train", str(tmp_path))


def test_images_of_many_sizes_are_refused_before_the_download(tmp_path):
    with pytest.raises(ValueError, match=r"'of_many_sizes' must be .* uint8 \(None, None, 3\)"):
        data.load("of_many_sizes", "train", str(tmp_path))


def test_images_that_are_not_bytes_are_refused_before_the_download(tmp_path):
    with pytest.raises(ValueError, match=r"'of_sixteen_bits' must be .* uint16 \(8, 8, 1\)"):
        data.load("of_sixteen_bits", "train", str(tmp_path))


def test_a_failed_download_says_what_failed_and_what_to_do(tmp_path):
    message = r"cannot prepare 'unreachable' in .*: ConnectionError: no route to host\n.*data_dir"
    with pytest.raises(ValueError, match=message):
        data.load("unreachable", "train", str(tmp_path))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot prepare 'mnist5k' in .*/file/mnist5k"):
        data.load("mnist5k", "train", str(tmp_path / "file"))


def test_a_format_without_random_access_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "mnist5k" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"as tfrecord, which has no random access"):
        data.load("mnist5k", "test", str(tmp_path))
