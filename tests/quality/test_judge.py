"""The judge on synthetic images: every number moves when, and only when, it should."""

import re
from pathlib import Path

import numpy as np
import pytest

from dmd_jax.quality import metrics
from dmd_jax.quality.features import Features
from dmd_jax.quality.judge import Judge, first_of_each_class

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"
CLASSES = 3


def draw(count, seed):
    """Images of `CLASSES` bright squares that move and fade, as a real data set would."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % CLASSES
    images = rng.integers(0, 40, (count, 9, 9, 1))
    for image, label in zip(images, labels, strict=True):
        row, column = 3 * label, rng.integers(1, 6)
        image[row : row + 3, column : column + 3] += rng.integers(120, 200)
    return images.astype(np.uint8), labels


def look(images):
    """Features: mean brightness of each of nine squares. Logits: of each band of rows."""
    squares = images.reshape(-1, 3, 3, 3, 3).mean((2, 4))
    return squares.reshape(-1, 9), squares.sum(2)


FEATURES = Features("FD-SQUARES9", "a fingerprint", 9, look)
TEST, TRAIN = draw(300, seed=1), draw(900, seed=2)


@pytest.fixture(scope="module")
def judge():
    return Judge(FEATURES, test=TEST, train=TRAIN)


def test_unseen_real_images_get_the_numbers_of_the_floor(judge):
    floor, numbers = judge.floor(600), judge(*draw(600, seed=3))
    assert numbers.keys() == floor.keys()
    for key in ("precision", "recall", "accuracy", "diversity", "diversity_min"):
        assert numbers[key] == pytest.approx(floor[key], abs=0.1), key
    for key in ("nearest_train", "nearest_train_low"):
        assert numbers[key] == pytest.approx(floor[key], rel=0.05), key
    spread = np.trace(np.cov(look(TEST[0])[0].T))
    assert max(numbers["fd"], floor["fd"]) < 0.02 * spread


def test_distances_are_those_of_the_metrics_room_against_test_images(judge):
    images, labels = draw(600, seed=3)
    real, fake = look(TEST[0])[0], look(images)[0]
    numbers = judge(images, labels)
    assert numbers["fd"] == metrics.frechet_distance(real, fake)
    assert numbers["kid"] == metrics.kernel_distance(real, fake)
    ratio = metrics.class_diversity(fake, labels) / metrics.class_diversity(real, TEST[1])
    assert numbers["diversity"] == pytest.approx(ratio.mean())
    assert numbers["diversity_min"] == pytest.approx(ratio.min())


def test_precision_and_recall_are_the_mean_over_blocks_of_as_many_samples_as_real_ones(judge):
    images, labels = draw(600, seed=3)
    fake = look(images)[0][np.argsort(labels, kind="stable")]
    real = look(TEST[0])[0]
    pairs = [metrics.precision_recall(real, fake[start::2]) for start in (0, 1)]
    numbers = judge(images, labels)
    assert (numbers["precision"], numbers["recall"]) == tuple(np.mean(pairs, axis=0))


def test_the_order_of_samples_changes_nothing_but_the_blocks(judge):
    images, labels = draw(300, seed=3)
    order = np.random.default_rng(0).permutation(300)
    assert judge(images[order], labels[order]) == pytest.approx(judge(images, labels))


def test_copies_of_train_images_show_in_nearest_train_and_nowhere_else(judge):
    copied, fresh = judge(TRAIN[0][:600], TRAIN[1][:600]), judge(*draw(600, seed=3))
    assert copied["nearest_train"] == copied["nearest_train_low"] == 0
    assert fresh["nearest_train_low"] > 0
    assert copied["recall"] == pytest.approx(fresh["recall"], abs=0.05)


def test_a_collapsed_class_shows_in_the_least_diversity(judge):
    images, labels = draw(600, seed=3)
    images[labels == 1] = images[1]
    numbers, whole = judge(images, labels), judge(*draw(600, seed=3))
    assert numbers["diversity_min"] == 0
    assert numbers["diversity"] == pytest.approx(2 / 3 * whole["diversity"], abs=0.05)
    assert numbers["recall"] < whole["recall"] - 0.2
    assert numbers["fd"] > 5 * whole["fd"]


def test_labels_that_were_not_obeyed_show_in_accuracy_alone(judge):
    images, labels = draw(600, seed=3)
    wrong, right = judge(images, np.roll(labels, 1)), judge(images, labels)
    assert right["accuracy"] > 0.95
    assert wrong["accuracy"] < 0.05
    assert wrong["fd"] == right["fd"]


def test_the_floor_does_not_count_train_images_as_their_own_neighbours(judge):
    expected = np.median(metrics.nearest_distance(TEST[0], TRAIN[0]))
    assert judge.floor(600)["nearest_train"] == expected > 0
    assert judge.floor(600)["accuracy"] == metrics.accuracy(look(TEST[0])[1], TEST[1])


def test_a_network_without_logits_gives_no_accuracy():
    features = Features("FD", "", 9, lambda images: (look(images)[0], None))
    judge = Judge(features, test=TEST, train=TRAIN)
    assert "accuracy" not in judge(*draw(300, seed=3))
    assert "accuracy" not in judge.floor(300)


def test_a_classifier_of_other_data_gives_no_accuracy():
    features = Features("FD", "", 9, look, data="squares")
    same, other = (Judge(features, test=TEST, train=TRAIN, data=n) for n in ("squares", "circles"))
    assert "accuracy" in same.floor(300) and "accuracy" not in other.floor(300)
    assert "accuracy" not in other(*draw(300, seed=3))


def test_examples_are_the_first_test_images_of_their_classes(judge):
    labels = np.array([2, 0, 2, 1])
    rows = [2, 0, 5, 1]  # the classes take turns
    np.testing.assert_array_equal(judge.examples(labels), TEST[0][rows])


def test_the_fingerprint_changes_with_the_network_and_with_either_split(judge):
    other = Features(FEATURES.name, "another fingerprint", 9, look)
    labels = TRAIN[1].copy()
    labels[0] += 1
    assert judge.fingerprint == Judge(FEATURES, test=TEST, train=TRAIN).fingerprint
    others = [
        Judge(other, test=TEST, train=TRAIN),
        Judge(FEATURES, test=draw(300, seed=4), train=TRAIN),
        Judge(FEATURES, test=TEST, train=(TRAIN[0], labels)),
    ]
    assert len({judge.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_first_of_each_class_is_balanced_and_in_order():
    labels = np.array([5, 7, 5, 5, 7, 7, 5])
    assert first_of_each_class(labels, 4).tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="smallest class has 3"):
        first_of_each_class(labels, 8)
    with pytest.raises(ValueError, match="2 classes"):
        first_of_each_class(labels, 3)


def test_what_cannot_be_judged_is_refused_with_both_shapes(judge):
    images, labels = draw(300, seed=3)
    with pytest.raises(ValueError, match=r"\(300, 9, 8, 1\).*\(300, 9, 9, 1\)"):
        judge(images[:, :, 1:], labels)
    with pytest.raises(ValueError, match="299 labels"):
        judge(images, labels[1:])
    with pytest.raises(ValueError, match=r"classes \[2\]"):
        judge(images[labels < 2], labels[labels < 2])
    with pytest.raises(ValueError, match="9 dimensions"):
        Judge(FEATURES, test=draw(9, seed=0), train=TRAIN)


def test_the_feature_network_in_the_docs_works_as_it_stands(tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    exec(re.sub(r'(load\("mnist5k", "\w+")', rf"\1, {str(tmp_path)!r}", example), names := {})
    assert names["judge"].name in capsys.readouterr().out
    assert "accuracy" not in names["numbers"]
    assert names["numbers"]["fd"] == pytest.approx(names["judge"].floor(2000)["fd"])
