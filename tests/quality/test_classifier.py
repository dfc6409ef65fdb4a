"""The classifier: shapes, and the house rules for modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmd_jax.quality.classifier import Classifier, ClassifierConfig


def make(channels=1, num_classes=10, features=64, seed=0):
    config = ClassifierConfig(channels, num_classes, features)
    return jax.jit(lambda: Classifier(config, rngs=nnx.Rngs(seed)))()


apply = jax.jit(lambda network, images: network(images))


@pytest.mark.parametrize(
    ("shape", "num_classes", "features"), [((5, 28, 28, 1), 10, 64), ((2, 24, 33, 3), 7, 16)]
)
def test_any_image_shape_gives_logits_and_features_in_float32(shape, num_classes, features):
    network = make(shape[-1], num_classes, features)
    logits, found = apply(network, jnp.zeros(shape))
    assert logits.shape == (shape[0], num_classes)
    assert found.shape == (shape[0], features)
    assert logits.dtype == found.dtype == jnp.float32


def test_logits_are_the_head_of_the_features_and_features_are_not_negative():
    network = make(seed=1)
    logits, features = apply(network, jax.random.uniform(jax.random.key(0), (4, 28, 28, 1)))
    np.testing.assert_allclose(logits, network.head(features), rtol=1e-5, atol=1e-6)
    assert features.min() >= 0
    assert features.max() > 0


def test_all_leaves_are_weights_and_the_tree_does_not_depend_on_the_seed():
    first, second = make(seed=0), make(seed=1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    gradient = jax.jit(jax.grad(lambda c: c(jnp.ones((1, 8, 8, 1)))[0].sum()))(first)
    assert jax.tree.structure(gradient) == jax.tree.structure(first)


def test_an_image_is_seen_alone_whatever_the_batch():
    images = jax.random.uniform(jax.random.key(0), (6, 28, 28, 1))
    network = make()
    together, _ = apply(network, images)
    alone, _ = apply(network, images[3:4])
    np.testing.assert_allclose(together[3:4], alone, rtol=1e-5, atol=1e-5)


def test_a_width_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="features=30"):
        ClassifierConfig(1, 10, features=30)
