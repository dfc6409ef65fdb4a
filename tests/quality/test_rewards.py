"""The reward by a classifier: its number, its gradient, and data that it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import data
from dmd_jax.data import Prompts
from dmd_jax.quality.features import load_features
from dmd_jax.quality.rewards import LabelProbability
from dmd_jax.weights import find


@pytest.fixture(scope="module")
def digits(data_dir):
    return data.load("mnist5k", "test", data_dir)


def test_the_reward_is_the_log_probability_that_the_judge_gives_to_the_label(digits):
    """Against the logits of `load_features`, by numpy."""
    images, labels = digits.take(range(40))
    _, logits = load_features().extract(images)
    logits = np.float64(logits)
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    reward = LabelProbability().load(digits)
    given = data.to_float(images), jnp.asarray(labels)
    found = jax.jit(lambda reward, *given: reward(*given))(reward, *given)
    np.testing.assert_allclose(found, wanted[np.arange(40), labels], rtol=1e-3, atol=1e-4)
    assert np.median(found) > -0.05 > -1 > np.median(reward(given[0], (given[1] + 1) % 10))


def test_its_gradient_raises_it_and_stops_where_a_file_would_clip(digits):
    images, labels = digits.take(range(8))
    reward, wrong = LabelProbability().load(digits), (jnp.asarray(labels) + 3) % 10
    x0 = 0.9 * jnp.asarray(data.to_float(images)).at[:, 0, 0].set(1.5 / 0.9)

    def total(x0):
        return jnp.sum(reward(x0, wrong))

    grad = jax.grad(total)(x0)
    assert (grad[:, 0, 0] == 0).all() and np.abs(grad[:, 10:20, 10:20]).max() > 0.01
    assert total(x0 + 0.01 * grad / np.abs(grad).max()) > total(x0)


def test_a_network_that_does_not_fit_the_data_is_refused(digits, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is of images of a class, not of 'texts'"):
        LabelProbability().load(Prompts("texts", (2, 4, 4, 3)))
    with pytest.raises(
        ValueError, match=r"holds no classifier of python -m dmd_jax\.metric_network"
    ):
        LabelProbability(str(find("mnist_teacher"))).load(digits)
    monkeypatch.setattr(digits, "classes", ("cat", "dog"))
    with pytest.raises(ValueError, match=r"has the classes 'cat', 'dog'"):
        LabelProbability().load(digits)
