"""Training of the metric network, on data that a few steps can learn."""

import jax
import numpy as np
import pytest
from flax import nnx

from dmd_jax import metric_network as program
from dmd_jax.quality import metric_network, metrics
from dmd_jax.quality.classifier import Classifier, ClassifierConfig
from dmd_jax.quality.features import extract, load_features


def bars(count, seed):
    """Horizontal (0) and vertical (1) bars on noise."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 60, (count, 12, 12, 1)), rng.integers(0, 2, count)
    for image, label in zip(images, labels, strict=True):
        where = rng.integers(3, 9)
        (image if label == 0 else image.swapaxes(0, 1))[where] = 255
    return images.astype(np.uint8), labels.astype(np.int32)


def test_a_few_steps_learn_and_the_seed_decides_every_bit():
    first, again = (
        metric_network.train(*bars(300, 0), 2, steps=40, batch=30, seed=0) for _ in range(2)
    )
    images, labels = bars(200, 1)
    assert metrics.accuracy(extract(first, images)[1], labels) > 0.95
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_scaling_gives_features_of_variance_one_and_keeps_the_logits():
    config = ClassifierConfig(1, 10)
    classifier = jax.jit(lambda: Classifier(config, rngs=nnx.Rngs(0)))()
    images, _ = bars(200, 0)
    features, logits = extract(metric_network.scaled(classifier, images), images)
    before, logits_before = extract(classifier, images)
    assert features.var(0).mean() == pytest.approx(1, rel=1e-4)
    assert before.var(0).mean() != pytest.approx(1, rel=0.1)
    np.testing.assert_allclose(logits, logits_before, rtol=1e-3, atol=1e-4)


def test_jitter_of_no_size_is_the_identity(monkeypatch):
    for amount in ("ROTATION", "SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr(metric_network, amount, 0)
    images = jax.random.normal(jax.random.key(0), (3, 10, 7, 2))
    moved = metric_network.jitter(images, jax.random.key(1))
    np.testing.assert_allclose(moved, images, atol=1e-5)


def test_jitter_moves_every_image_its_own_way_and_invents_no_value():
    images = np.repeat(jax.random.uniform(jax.random.key(0), (1, 10, 7, 2)), 3, axis=0)
    moved = np.asarray(metric_network.jitter(images, jax.random.key(1)))
    assert moved.shape == images.shape
    assert images.min() - 1e-6 <= moved.min() <= moved.max() <= images.max() + 1e-6
    assert len({image.tobytes() for image in [images[0], *moved]}) == 4


class Bars:
    """Source of `bars`; takes the place of a data set."""

    name, num_classes, classes = "bars", 2, ("horizontal", "vertical")

    def __len__(self):
        return 100


def test_the_program_writes_the_network_and_a_card_that_says_how(
    tmp_path, monkeypatch, capsys, call
):
    monkeypatch.setattr(program, "load", lambda *_: Bars())
    monkeypatch.setattr(metric_network, "arrays", lambda _: bars(100, 0))
    out = tmp_path / "bars.safetensors"
    assert call(program, f"--out={out}", "--data=bars", "--steps=2", "--batch=8") is None
    card = (tmp_path / "bars.md").read_text()
    assert f"python -m dmd_jax.metric_network --out={out} --data=bars --steps=2 --batch=8" in card
    assert "**FD-bars-64**" in card and "| classes | horizontal, vertical |" in card
    assert card in capsys.readouterr().out
    features = load_features(out)
    assert features.fingerprint in card
    assert (features.data, features.classes) == ("bars", ("horizontal", "vertical"))


def test_what_cannot_be_read_or_written_is_refused_before_training(tmp_path, monkeypatch, call):
    (tmp_path / "file").touch()
    monkeypatch.setattr(metric_network, "train", None)
    for arguments, message in (
        ([f"--out={tmp_path}/file/a.safetensors"], "file cannot be written to"),
        ([f"--out={tmp_path}/a.npz"], "a.npz: the ending must be .safetensors"),
        ([f"--out={tmp_path}/a.safetensors", "--data=mnist5l"], "no data set 'mnist5l'"),
        ([f"--out={tmp_path}/a.safetensors", "bars"], "error: unknown argument 'bars'"),
    ):
        assert message in call(program, *arguments)
    monkeypatch.setattr(program, "load", lambda *_: Bars())
    message = "--batch=101: there are 100 images"
    assert message in call(program, f"--out={tmp_path}/a.safetensors", "--batch=101")
