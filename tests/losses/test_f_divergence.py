"""The seven divergences of f-distill, against second derivatives and exact Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.losses.f_divergence import (
    Divergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    Neyman,
    ReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
    calibrated_ratio,
    density_ratio,
    divergence_weight,
)

# The gradients of D_f(N(0, 1) || N(m, 1)) by m, at m = 0.7.
GRADIENTS = {
    ReverseKL(): 0.7,
    ForwardKL(): 0.7,
    JensenShannon(): 0.31155,
    SoftenedReverseKL(): 0.38845,
    SquaredHellinger(): 0.1646,
    Neyman(): 2.28524,
    Jeffreys(): 1.4,
}
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def test_these_are_all_divergences():
    assert {type(d) for d in GRADIENTS} == set(Divergence.__subclasses__())


@pytest.mark.parametrize("divergence", GRADIENTS, ids=lambda d: type(d).__name__)
def test_the_weight_is_the_second_derivative(divergence):
    r = jnp.linspace(0.1, 20.0, 50)
    second = jax.vmap(jax.grad(jax.grad(divergence.f)))(r)
    np.testing.assert_allclose(divergence.weight(r), r**2 * second, rtol=2e-3)
    assert divergence.f(1.0) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("divergence, wanted", GRADIENTS.items(), ids=lambda d: type(d).__name__)
def test_the_weighted_difference_of_scores_is_the_divergences_gradient(divergence, wanted):
    """Both sides of theorem 1 by quadrature: E_q[h(r) (s_q - s_p)], and d/dm of E_q[f(r)]."""

    def ratio(x, m):
        return jnp.exp(m * m / 2 - m * x)

    def value(m):
        return jnp.sum(WEIGHTS * divergence.f(ratio(NODES + m, m)))

    x = jnp.asarray(NODES + 0.7, jnp.float32)
    mine = jnp.sum(WEIGHTS * divergence.weight(ratio(x, 0.7)) * 0.7)  # s_q - s_p = m
    assert mine == pytest.approx(wanted, abs=2e-4)
    assert jax.grad(value)(0.7) == pytest.approx(wanted, abs=2e-4)


def test_the_ratio_of_a_logit_is_clipped_and_one_where_it_is_unknown():
    got = density_ratio(jnp.array([0.0, 1.0, 50.0, -50.0, jnp.nan, jnp.inf]))
    np.testing.assert_allclose(got, [1.0, np.e, 20.0, 0.1, 1.0, 1.0], rtol=1e-6)


def test_ratios_are_divided_by_their_bins_mean_and_the_prior_stands_for_ones():
    ratio, u = jnp.array([2.0, 4.0, 9.0]), jnp.array([0.05, 0.09, 1.0])
    got = calibrated_ratio(ratio, u, bins=10, prior=0.0)
    np.testing.assert_allclose(got, [2 / 3, 4 / 3, 1.0], rtol=1e-6)
    got = calibrated_ratio(ratio, u, bins=10, prior=2.0)
    np.testing.assert_allclose(got, [2 / 2, 4 / 2, 9 / (11 / 3)], rtol=1e-6)


def test_weights_have_the_mean_one_and_are_one_for_the_reverse_kl():
    ratio = jnp.array([0.2, 1.0, 5.0])
    for divergence in GRADIENTS:
        assert jnp.mean(divergence_weight(divergence, ratio)) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_array_equal(divergence_weight(ReverseKL(), ratio), 1.0)
    np.testing.assert_allclose(divergence_weight(ForwardKL(), ratio), ratio / 6.2 * 3, rtol=1e-6)
