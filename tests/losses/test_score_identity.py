"""SiD's loss, against arithmetic, finite differences and exact Gaussian scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import exact

from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching
from dmd_jax.losses.score_identity import sid_loss

RNG = np.random.default_rng(1)
X0, REAL, FAKE = RNG.standard_normal((3, 2, 4, 3)).astype(np.float32)
FRAMES = np.array([[True, True, False, True], [False, False, True, True]])
ERROR = np.abs(X0 - REAL).mean((1, 2), keepdims=True)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_value_by_hand(alpha):
    wanted = (REAL - FAKE) * ((REAL - X0) - alpha * (REAL - FAKE))
    loss = sid_loss(X0, REAL, FAKE, alpha=alpha)
    assert loss == pytest.approx((wanted / ERROR).mean(), rel=1e-5)
    loss = sid_loss(X0, REAL, FAKE, alpha=alpha, normalize=False)
    assert loss == pytest.approx(wanted.mean(), rel=1e-4)


def test_alpha_of_one_is_self_forcings_product():
    wanted = np.mean((REAL - FAKE) * (FAKE - X0) / ERROR)
    assert sid_loss(X0, REAL, FAKE) == pytest.approx(wanted, rel=1e-4)


def test_samples_are_weighted_before_the_mean():
    alone = [float(sid_loss(X0[i : i + 1], REAL[i : i + 1], FAKE[i : i + 1])) for i in range(2)]
    loss = sid_loss(X0, REAL, FAKE, weight=np.float32([3.0, 0.5]))
    assert loss == pytest.approx((3.0 * alone[0] + 0.5 * alone[1]) / 2, rel=1e-5)


def test_mask_and_blocks_choose_the_normaliser_as_in_dmd():
    product = (REAL - FAKE) * (FAKE - X0)
    error = np.abs(X0 - REAL)
    n = np.stack([np.full((4, 1), error[b][FRAMES[b]].mean()) for b in range(2)])
    wanted = (product / n)[FRAMES].mean()
    assert sid_loss(X0, REAL, FAKE, mask=FRAMES) == pytest.approx(wanted, rel=1e-4)
    n = error.reshape(2, 2, 2, 3).mean((2, 3)).repeat(2, axis=1)[..., None]
    wanted = (product / n).mean()
    assert sid_loss(X0, REAL, FAKE, frames_per_block=2) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("argument", range(3))
def test_gradient_is_that_of_finite_differences(argument):
    """Nothing is detached but the normaliser; central differences of a quadratic are exact."""
    arrays = [X0, REAL, FAKE]

    def loss(a):
        return sid_loss(*arrays[:argument], a, *arrays[argument + 1 :], alpha=1.2, normalize=False)

    h = 0.5
    directions = h * np.eye(X0.size, dtype=np.float32).reshape(-1, *X0.shape)
    at = jax.jit(jax.vmap(loss))
    difference = (at(arrays[argument] + directions) - at(arrays[argument] - directions)) / (2 * h)
    grad = jax.grad(loss)(arrays[argument])
    np.testing.assert_allclose(grad.ravel(), difference, atol=1e-5)
    # The normaliser is a constant: it divides the gradient as it divides the value.
    normalised = jax.grad(sid_loss, argument)(*arrays, alpha=1.2)
    np.testing.assert_allclose(normalised, grad / ERROR, rtol=1e-4, atol=1e-6)
    assert np.abs(grad).max() > 0.01


@pytest.mark.parametrize(
    "real, fake",
    [
        (np.full_like(REAL[0], np.nan), FAKE[0]),
        (REAL[0], np.full_like(FAKE[0], np.inf)),
        (X0[0], FAKE[0]),  # a teacher error of zero
    ],
)
def test_a_bad_sample_counts_zero_and_has_no_gradient(real, fake):
    real, fake = np.stack([real, REAL[1]]), np.stack([fake, FAKE[1]])
    value, grads = jax.value_and_grad(sid_loss, (0, 1, 2))(X0, real, fake)
    good, wanted = jax.value_and_grad(sid_loss, (0, 1, 2))(X0[1:], REAL[1:], FAKE[1:])
    np.testing.assert_allclose(value, good / 2, rtol=1e-5)
    for grad, other in zip(grads, wanted, strict=True):
        np.testing.assert_array_equal(grad[0], 0.0)
        np.testing.assert_allclose(grad[1], other[0] / 2, rtol=1e-5)


def test_a_generator_that_is_not_finite_makes_a_loss_that_is_not():
    x0 = X0.copy()
    x0[0, 0, 0] = np.nan
    assert not jnp.isfinite(sid_loss(x0, REAL, FAKE))


def test_everything_from_the_predictions_on_is_float32():
    low = [jnp.asarray(a, jnp.bfloat16) for a in (X0, REAL, FAKE)]
    assert sid_loss(*low).dtype == jnp.float32
    assert sid_loss(*low) == sid_loss(*(a.astype(jnp.float32) for a in low))


@pytest.mark.parametrize("schedule", [FlowMatching(), EDM(), VP()])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_expectation_with_exact_scores(schedule, alpha):
    """With the generator's own score as fake, f = E[x0 | x_t], so that E[(r - f)(f - x0)] = 0.

    The loss is then (1 - alpha) E (r - f)^2: the Fisher divergence, which alpha = 1 cancels.
    """
    mean, std, scale, shift = 0.7, 0.5, 1.3, -0.4
    # Quadratic in z and eps: the points (±1, ±1) integrate it exactly.
    z = np.array([[1.0], [1.0], [-1.0], [-1.0]], np.float32)
    eps = np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32)
    t = jnp.full(4, 0.4)
    x0 = scale * z + shift
    x_t = schedule.add_noise(x0, eps, t)
    real, fake = exact([[mean]], std, schedule), exact([[shift]], scale, schedule)
    real, fake = real(x_t, t, None), fake(x_t, t, None)
    gap = np.mean(np.square(real - fake))
    loss = sid_loss(x0, real, fake, alpha=alpha, normalize=False)
    np.testing.assert_allclose(loss, (1 - alpha) * gap, rtol=1e-4, atol=1e-5 * max(gap, 1))
    assert gap > 0.01
