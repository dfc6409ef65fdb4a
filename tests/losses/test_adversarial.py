"""The losses and penalties of a GAN, against exact Gaussians and linear discriminators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.diffusion.schedule import FlowMatching
from dmd_jax.losses.adversarial import (
    discriminator_loss,
    equal_norms,
    finite_penalty,
    generator_adversarial_loss,
    gradient_penalty,
)

FLOW = FlowMatching()
REAL, FAKE = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
# Quadrature for means over N(0, 1): exact to float32 for the smooth functions here.
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def test_values_by_hand():
    def softplus(x):
        return np.log1p(np.exp(x))

    loss = discriminator_loss(FAKE, REAL)
    assert loss == pytest.approx(softplus(FAKE).mean() + softplus(-REAL).mean(), rel=1e-5)
    assert generator_adversarial_loss(FAKE) == pytest.approx(softplus(-FAKE).mean(), rel=1e-5)
    pairs = discriminator_loss(FAKE, REAL, relativistic=True)
    assert pairs == pytest.approx(softplus(FAKE - REAL).mean(), rel=1e-5)
    pairs = generator_adversarial_loss(FAKE, REAL)
    assert pairs == pytest.approx(softplus(REAL - FAKE).mean(), rel=1e-5)


def test_a_discriminator_that_knows_nothing_has_the_losses_of_a_coin():
    none = jnp.zeros(3)
    assert discriminator_loss(none, none) == pytest.approx(2 * np.log(2), rel=1e-6)
    assert discriminator_loss(none, none, relativistic=True) == pytest.approx(np.log(2), rel=1e-6)
    assert generator_adversarial_loss(none) == pytest.approx(np.log(2), rel=1e-6)


def log_ratio(x, m_p, m_q, variance, t):
    """log p_t - log q_t of N(m_p, variance) and N(m_q, variance), noised to time t."""
    a = 1.0 - t
    total = a**2 * variance + t**2
    return a * (m_p - m_q) / total * (x - a * (m_p + m_q) / 2)


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_log_density_ratio_minimises_the_discriminators_loss(relativistic):
    """Along any direction: the derivative at it is zero, by quadrature over exact Gaussians."""
    t, a, variance = 0.3, 0.7, 0.5
    std = np.sqrt(a**2 * variance + t**2)
    if relativistic:  # a mean over all pairs
        x_p, x_q = np.meshgrid(a * 1.0 + std * NODES, a * 0.2 + std * NODES, indexing="ij")
        weight = np.outer(WEIGHTS, WEIGHTS).ravel()
        x_p, x_q = x_p.ravel(), x_q.ravel()
    else:
        x_p, x_q, weight = a * 1.0 + std * NODES, a * 0.2 + std * NODES, WEIGHTS
    x_p, x_q = jnp.asarray(x_p, jnp.float32), jnp.asarray(x_q, jnp.float32)

    def loss(step, direction):
        def logit(x):
            return log_ratio(x, 1.0, 0.2, variance, t) + step * direction(x)

        each = jax.vmap(lambda f, r: discriminator_loss(f, r, relativistic=relativistic))
        return jnp.sum(weight * each(logit(x_q)[:, None], logit(x_p)[:, None]))

    for direction in (lambda x: x, jnp.square, jnp.sin):
        slope = jax.grad(loss)(0.0, direction)
        assert abs(slope) < 1e-5
        assert loss(0.3, direction) > loss(0.0, direction)


def test_the_generators_gradient_of_an_exact_discriminator():
    """p = N(0, 1), q = N(0.7, 1): the mean of sigmoid(-D) times the scores' difference."""

    each = jax.vmap(lambda logit: generator_adversarial_loss(logit[None]))

    def loss(mean):
        x = jnp.asarray(NODES, jnp.float32) + mean
        return jnp.sum(WEIGHTS * each(log_ratio(x, 0.0, 0.7, 1.0, 0.0)))

    assert jax.grad(loss)(0.7) == pytest.approx(0.38845, abs=2e-5)


DIRECTION = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)


def linear(x):
    """D(x) = <w, x>."""
    return jnp.einsum("bij,ij->b", x, DIRECTION)


def quadratic(x):
    """D(x) = |x|^2 / 2, whose gradient is x."""
    return 0.5 * jnp.sum(jnp.square(x), axis=(1, 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_exact_penalty_is_the_squared_gradient():
    x = normal(2, 5, 2, 3)
    assert gradient_penalty(linear, x) == pytest.approx(np.sum(DIRECTION**2), rel=1e-5)
    wanted = np.square(x).sum((1, 2)).mean()
    assert gradient_penalty(quadratic, x) == pytest.approx(wanted, rel=1e-5)


def test_the_finite_penalty_of_given_directions_by_hand():
    """D(x + size n) - D(x) = size <dD, n> + size^2 |n|^2 / 2 for the quadratic D, exactly."""
    x, direction, size = normal(3, 5, 2, 3), normal(4, 5, 2, 3), 0.3
    squared = np.square(direction).sum((1, 2))
    along = (x * direction).sum((1, 2)) + 0.5 * size * squared
    got = finite_penalty(quadratic, x, direction, size)
    assert got == pytest.approx(np.square(along).mean(), rel=1e-4)
    got = finite_penalty(linear, x, direction, size)
    assert got == pytest.approx(np.square(linear(direction)).mean(), rel=1e-4)


def test_the_finite_penalty_has_the_exact_one_as_its_mean():
    n, size = 20_000, 0.2
    x, direction = np.broadcast_to(normal(3, 2, 3), (n, 2, 3)), normal(4, n, 2, 3)
    # The mean of (size |n|^2 / 2)^2, of d = 6 numbers: size^2 d (d + 2) / 4.
    for discriminate, more in ((linear, 0.0), (quadratic, size**2 * 6 * 8 / 4)):
        wanted = gradient_penalty(discriminate, x) + more
        got = finite_penalty(discriminate, x, direction, size)
        # The square of a normal number has the standard deviation sqrt(2) times its mean.
        assert got == pytest.approx(wanted, rel=4 * np.sqrt(2 / n))


def test_the_finite_penalty_vanishes_with_the_perturbation_and_the_published_one_does_not():
    """Published: D of a noisy sample against D of the clean one plus a perturbation."""
    n, t = 4_000, 0.7
    x0, eps, direction = normal(5, n, 2, 3), normal(6, n, 2, 3), normal(7, n, 2, 3)
    x_t = FLOW.add_noise(x0, eps, jnp.full(n, t))
    assert finite_penalty(linear, x_t, 0.0 * direction, 1.0) == 0.0
    size = 0.1
    mended = size**2 * finite_penalty(linear, x_t, direction, size)
    norm = np.sum(DIRECTION**2)
    assert mended == pytest.approx(size**2 * norm, rel=4 * np.sqrt(2 / n) + 1e-3)
    published = np.mean(np.square(linear(x_t) - linear(x0 + 0.0 * direction)))
    # (1 - a)^2 <w, x0>^2 + t^2 |w|^2, where x0 is standard normal
    assert published == pytest.approx((0.7**2 + 0.7**2) * norm, rel=4 * np.sqrt(2 / n))


def test_equal_norms_are_those_of_each_sample_and_zero_stays_zero():
    grad, like = normal(8, 3, 2, 3), normal(9, 3, 2, 3)
    grad[1] = 0.0
    got = equal_norms(grad, like)

    def norms(x):
        return np.linalg.norm(np.reshape(x, (3, -1)), axis=1)

    np.testing.assert_allclose(norms(got), norms(like) * [1, 0, 1], rtol=1e-5)
    np.testing.assert_allclose(got[0] / norms(like)[0], grad[0] / norms(grad)[0], rtol=1e-5)
