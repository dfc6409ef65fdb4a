"""Distances of a regression: values by hand, gradients, both ends of the pseudo-Huber."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import normal

from dmd_jax.losses.regression import PseudoHuber, SquaredError


def test_the_squared_error_is_the_mean_over_a_samples_elements():
    x0, target = jnp.float32([[[1.0, 2.0]], [[0.0, -4.0]]]), jnp.zeros((2, 1, 2))
    np.testing.assert_allclose(SquaredError()(x0, target), [2.5, 8.0])
    halves = SquaredError()(x0.astype(jnp.bfloat16), target)
    assert halves.dtype == jnp.float32


def test_the_pseudo_huber_is_square_near_zero_and_a_norm_far_away():
    x0, target = normal(0, 5, 3, 2), normal(1, 5, 3, 2)
    square = SquaredError()(x0, target)
    exact = np.sqrt(np.float64(square) + 0.09) - 0.3
    np.testing.assert_allclose(PseudoHuber(0.3)(x0, target), exact, rtol=1e-5)
    np.testing.assert_allclose(2e4 * PseudoHuber(1e4)(x0, target), square, rtol=1e-6)
    np.testing.assert_allclose(PseudoHuber(1e-6)(x0, target), np.sqrt(square), rtol=1e-5)


def test_the_pseudo_hubers_gradient_is_finite_at_zero_and_bounded():
    def total(x0):
        return jnp.sum(PseudoHuber(0.1)(x0, jnp.zeros((3, 4))))

    grad = jax.grad(total)(jnp.float32([0.0, 0.1, 1e6])[:, None] * jnp.ones((3, 4)))
    # x / (4 sqrt(x^2 + c^2)), for four equal elements.
    np.testing.assert_allclose(grad[:, 0], [0.0, 0.25 / np.sqrt(2), 0.25], rtol=1e-6)


def test_a_pseudo_huber_without_a_width_is_refused():
    with pytest.raises(ValueError, match=r"c=0\.0 must be above 0"):
        PseudoHuber(0.0)
