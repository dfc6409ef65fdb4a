"""Feature networks from files: the shipped one, one of the user's own, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dmd_jax.data import Images, arrays, load
from dmd_jax.quality import metrics
from dmd_jax.quality.classifier import Classifier, ClassifierConfig
from dmd_jax.quality.features import BATCH, HEADER, SHIPPED, load_features, save_classifier
from dmd_jax.weights.ours import ASSETS

OWN = {"data": "own", "classes": list("abcde")}


@pytest.fixture
def saved(tmp_path):
    """(path, classifier) of a small network for colour images."""
    config = ClassifierConfig(3, 5, features=8)
    classifier = jax.jit(lambda: Classifier(config, rngs=nnx.Rngs(0)))()
    save_classifier(tmp_path / "own.safetensors", "FD-OWN8", classifier, **OWN)
    return tmp_path / "own.safetensors", classifier


def test_a_saved_classifier_comes_back_with_its_name_and_the_same_outputs(saved):
    path, classifier = saved
    features = load_features(path)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 12, 10, 3), np.uint8)
    expected_logits, expected = jax.jit(lambda c, x: c(x))(
        classifier, images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    )
    found, logits = features.extract(images)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(logits, expected_logits)
    assert features.name == "FD-OWN8"
    assert (features.data, features.classes) == ("own", ("a", "b", "c", "d", "e"))


def test_the_fingerprint_is_of_the_weights_and_not_of_the_header(saved):
    path, classifier = saved
    first = load_features(path).fingerprint
    save_classifier(path, "FD-OTHER8", classifier, data="other", classes=[])
    assert load_features(path).fingerprint == first
    classifier = jax.tree.map(lambda x: x + 1, classifier)
    save_classifier(path, "FD-OWN8", classifier, **OWN)
    assert load_features(path).fingerprint != first


def images_of(name, shape, classes):
    return Images([], name=name, split="test", data_dir=None, image_shape=shape, classes=classes)


def test_a_classifier_of_digits_does_not_judge_other_things_of_the_same_size():
    features = load_features()
    features.require_fit(images_of("mnist", (28, 28, 1), [str(i) for i in range(10)]))
    fashion = images_of("fashion_mnist", (28, 28, 1), ["T-shirt", "Trouser", *"abcdefgh"])
    with pytest.raises(ValueError, match=r"classifier of '0', '1', '2', ... \(10\).*'T-shirt'"):
        features.require_fit(fashion)
    with pytest.raises(ValueError, match=r"takes images of 1 channels, but .*'cifar10' has 3"):
        features.require_fit(images_of("cifar10", (32, 32, 3), list("abcdefghij")))


def test_the_last_incomplete_batch_is_like_any_other(saved):
    features = load_features(saved[0])
    images = np.random.default_rng(0).integers(0, 256, (2 * BATCH, 8, 8, 3), np.uint8)
    whole, whole_logits = features.extract(images)
    part, part_logits = features.extract(images[: BATCH + 3])
    np.testing.assert_array_equal(part, whole[: BATCH + 3])
    np.testing.assert_array_equal(part_logits, whole_logits[: BATCH + 3])


def test_images_of_other_channels_are_refused_with_what_to_do(saved):
    with pytest.raises(ValueError, match=r"takes \[N, H, W, 3\].*metric_network"):
        load_features(saved[0]).extract(np.zeros((2, 8, 8, 1), np.uint8))


def test_files_that_hold_no_metric_network_are_refused(saved, tmp_path):
    path, _ = saved
    tensors = load_file(path)
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="holds neither"):
        load_features(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_features(tmp_path / "cut.safetensors")
    for header, message in ({}, "KeyError"), ({"name": "x", "model": {"wide": 3}}, "TypeError"):
        metadata = {HEADER: json.dumps(header | {"data": "digits"})}
        save_file(tensors, tmp_path / "header.safetensors", metadata)
        with pytest.raises(ValueError, match=f"its header is of no metric network: {message}"):
            load_features(tmp_path / "header.safetensors")
    save_file(tensors | {"head/bias": np.full(5, np.nan, "f")}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="'head/bias': numbers are infinite or NaN"):
        load_features(tmp_path / "nan.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_features("nowhere")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved):
    path, classifier = saved
    object.__setattr__(classifier, "config", ClassifierConfig(3, 6, features=8))
    save_classifier(path, "FD-OWN8", classifier, **OWN)
    with pytest.raises(ValueError, match=r"head/kernel: expected \(8, 6\), found \(8, 5\)"):
        load_features(path)


@pytest.fixture(scope="module")
def test_split(tmp_path_factory):
    return arrays(load("mnist5k", "test", data_dir=str(tmp_path_factory.mktemp("data"))))


def test_the_shipped_network_knows_unseen_digits_as_well_as_its_card_says(test_split):
    images, labels = test_split
    features, logits = load_features().extract(images)
    card = (ASSETS / f"{SHIPPED}.md").read_text()
    claimed = float(re.search(r"\| accuracy \| ([\d.]+)%", card)[1]) / 100
    accuracy = metrics.accuracy(logits, labels)
    assert features.shape == (1000, 64)
    assert accuracy >= 0.985
    assert accuracy == pytest.approx(claimed, abs=0.002)  # Two images: rounding elsewhere.


def test_the_shipped_card_names_the_shipped_file_and_metric():
    card, features = (ASSETS / f"{SHIPPED}.md").read_text(), load_features()
    assert features.name == "FD-MNIST64"
    assert features.fingerprint in card
    assert f"**{features.name}**" in card


def test_the_shipped_metric_sees_noise_blur_and_lost_contrast(test_split):
    images, _ = test_split
    extract = load_features().extract
    reference, _ = extract(images[:500])

    def distance(changed):
        return metrics.frechet_distance(reference, extract(changed)[0])

    real = images[500:].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 40, real.shape)
    blurred = (real + np.roll(real, 1, 1) + np.roll(real, 1, 2)) / 3
    floor = distance(images[500:])
    for changed in (real + noise, blurred, 0.8 * real):
        assert distance(np.clip(changed, 0, 255).astype(np.uint8)) > 3 * floor
