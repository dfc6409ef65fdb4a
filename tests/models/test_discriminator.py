"""The heads of a discriminator: what they return, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toys import normal, weights

from dmd_jax.models.discriminator import Discriminator, DiscriminatorConfig

CONFIG = DiscriminatorConfig(dim=6, blocks=(0, 2), hidden=8, heads=2)
FEATURES = normal(0, 2, 3, 5, 6)


def test_a_new_one_knows_nothing_and_can_learn():
    net = Discriminator(CONFIG, rngs=nnx.Rngs(0))

    def loss(net):
        logits = net(FEATURES)
        return jnp.sum(jax.nn.softplus(-logits)), logits

    grad, logits = jax.jit(jax.grad(loss, has_aux=True))(net)
    np.testing.assert_array_equal(logits, jnp.zeros(3))
    assert (jnp.abs(grad.heads.logit.kernel[...]).max((1, 2)) > 0).all()  # every head of them


def test_the_logit_is_the_mean_of_the_heads_by_hand():
    net = weights(lambda rngs: Discriminator(CONFIG, rngs=rngs), 1)

    def head(p, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * p.norm.scale + p.norm.bias
        weight = x @ p.attend.kernel + p.attend.bias
        weight = np.exp(weight) / np.exp(weight).sum(1, keepdims=True)  # over tokens
        values = np.asarray(jax.nn.silu(x @ p.project.kernel + p.project.bias))
        values = values.reshape(3, 5, 2, 4)
        pooled = (weight[..., None] * values).sum(1).reshape(3, 8)
        hidden = jax.nn.silu(pooled @ p.combine.kernel + p.combine.bias)
        return (hidden @ p.logit.kernel + p.logit.bias)[:, 0]

    each = [
        head(jax.tree.map(lambda x: np.asarray(x[i]), net.heads), np.asarray(FEATURES[i]))  # noqa: B023
        for i in range(2)
    ]
    got = jax.jit(lambda net: net(FEATURES))(net)
    np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [(), (2, 1), (1, 1), (-1,)])
def test_blocks_that_do_not_ascend_are_refused(blocks):
    with pytest.raises(ValueError, match="must ascend, from 0 or more"):
        DiscriminatorConfig(dim=6, blocks=blocks)


def test_a_discriminator_without_heads_is_refused():
    with pytest.raises(ValueError, match="heads=0 must be an int, 1 or more"):
        DiscriminatorConfig(dim=6, blocks=(0,), heads=0)


def test_means_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=3 does not divide hidden=8"):
        DiscriminatorConfig(dim=6, blocks=(0,), hidden=8, heads=3)
