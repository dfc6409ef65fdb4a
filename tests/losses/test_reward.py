"""Weights of rewards, and the share of a batch that they leave."""

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.losses.reward import effective_share, reward_weights


def test_weights_are_exponentials_without_a_gradient():
    reward = jnp.float32([-1.0, 0.0, 2.0])
    weights, usable = reward_weights(reward, 2.0)
    np.testing.assert_allclose(weights, np.exp([-2.0, 0.0, 4.0]), rtol=1e-6)
    assert usable.all()
    grad = jax.grad(lambda r: jnp.sum(reward_weights(r, 2.0)[0]))(reward)
    np.testing.assert_array_equal(grad, 0.0)
    np.testing.assert_array_equal(reward_weights(reward, 0.0)[0], 1.0)


def test_what_is_not_finite_weighs_nothing():
    """Too large a reward too; one so low that its weight is 0 counts as any."""
    reward = jnp.float32([jnp.nan, jnp.inf, -jnp.inf, 100.0, -1000.0, 1.0])
    weights, usable = reward_weights(reward, 1.0)
    np.testing.assert_array_equal(usable, [False, False, False, False, True, True])
    np.testing.assert_allclose(weights, [0.0] * 5 + [np.e], rtol=1e-6)


def test_the_share_of_equal_weights_is_one_and_that_of_a_single_one_its_part():
    np.testing.assert_allclose(effective_share(jnp.full(8, 0.3)), 1.0, rtol=1e-6)
    assert effective_share(jnp.float32([0, 0, 5.0, 0])) == 0.25
    np.testing.assert_allclose(effective_share(jnp.float32([1, 3])), 16 / 20, rtol=1e-6)
    np.testing.assert_allclose(effective_share(jnp.float32([1e30, 3e30])), 16 / 20, rtol=1e-6)


def test_weights_of_samples_turn_their_mean_into_that_of_the_tilted_gaussian():
    """N(m, v) times exp(beta r) with r = a x is N(m + beta a v, v), to four standard errors."""
    m, v, a, beta = 0.3, 0.25, 0.8, 1.5
    x = m + np.sqrt(v) * jax.random.normal(jax.random.key(0), (200_000,))
    weights, _ = reward_weights(a * x, beta)
    mean = jnp.sum(weights * x) / jnp.sum(weights)
    share = np.exp(-((beta * a) ** 2) * v)
    np.testing.assert_allclose(mean, m + beta * a * v, atol=4 * np.sqrt(v / (200_000 * share)))
    np.testing.assert_allclose(effective_share(weights), share, rtol=0.02)
