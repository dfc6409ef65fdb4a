"""Score matching within a subinterval: the exact targets, against densities in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import normal

from dmd_jax.diffusion.denoiser import X0, EDMPreconditioned, Epsilon, Velocity
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching
from dmd_jax.losses import subintervals

FLOW = FlowMatching()
SCHEDULES = [FLOW, EDM(), VP()]
S, T = jnp.float32(0.4), jnp.asarray([0.45, 0.7, 0.95], jnp.float32)
X_S, EPS = normal(0, 3, 5), normal(1, 3, 5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_diffusion_from_s_continues_that_from_clean_data(schedule):
    scale, fresh = subintervals.step(S, T, schedule)
    np.testing.assert_allclose(scale * schedule.alpha(S), schedule.alpha(T), rtol=1e-5)
    variance = jnp.square(scale * schedule.sigma(S)) + jnp.square(fresh)
    np.testing.assert_allclose(variance, jnp.square(schedule.sigma(T)), rtol=1e-5)


@partial(jax.jit, static_argnames="schedule")
def means(x_t, t, points, schedule):
    """(mean targets x0 and eps given x_t [], score of x_t) where x_s is one of K points alike."""
    t = jnp.full(len(points), t)
    scale, fresh = subintervals.step(S, t, schedule)
    eps = (x_t - scale * points) / fresh  # the noise that leads from each point to x_t

    def log_density(x):
        return jax.nn.logsumexp(-0.5 * jnp.square((x - scale * points) / fresh))

    weight = jax.nn.softmax(-0.5 * jnp.square(eps))
    x0, noise = subintervals.targets(points[:, None], eps[:, None], S, t, schedule)
    mean = [jnp.sum(weight * target[:, 0]) for target in (x0, noise)]
    return *mean, jax.grad(log_density)(x_t)


@pytest.mark.parametrize("t", [0.43, 0.6, 0.95])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("points", [[0.7], [-1.0, 0.3, 2.0]])
def test_the_minimiser_of_the_regression_is_the_true_score_for_any_samples(points, schedule, t):
    """It is the mean of the targets given x_t, here a sum over the points that x_s may be."""
    t, points = jnp.float32(t), jnp.asarray(points, jnp.float32)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    for x_t in (-1.5, 0.0, 0.8):
        x_t = jnp.float32(x_t)
        x0, noise, score = means(x_t, t, points, schedule)
        np.testing.assert_allclose(noise, -sigma * score, rtol=1e-3, atol=1e-4)
        tweedie = (x_t + sigma**2 * score) / alpha
        np.testing.assert_allclose(x0, tweedie, rtol=1e-3, atol=1e-3 * sigma / alpha)


def test_of_gaussian_samples_it_is_the_line_of_their_score_and_the_naive_target_is_another():
    mean, std, t = 0.8, 0.6, 0.7
    scale, fresh = (float(x[0]) for x in subintervals.step(S, jnp.full(1, t), FLOW))

    def at(x_s, eps):  # the target is linear in both
        x_s, eps = (jnp.full((1, 1), value, jnp.float32) for value in (x_s, eps))
        return float(subintervals.targets(x_s, eps, S, jnp.full(1, t), FLOW)[0][0, 0])

    def slope(of_x_s, of_eps):
        covariance = of_x_s * scale * std**2 + of_eps * fresh
        return covariance / (scale**2 * std**2 + fresh**2)

    variance = scale**2 * std**2 + fresh**2
    wanted = (1.0 - t**2 / variance) / (1.0 - t)  # d/dx_t of (x_t + sigma^2 score) / alpha
    assert slope(at(1, 0), at(0, 1)) == pytest.approx(wanted, rel=1e-4)
    naive = slope(1.0 / float(FLOW.alpha(S)), 0.0)  # x_s, scaled to a size of clean data
    assert abs(naive - wanted) > 0.2
    intercept = at(mean, 0) - wanted * scale * mean
    assert intercept == pytest.approx(t**2 * scale * mean / variance / (1.0 - t), rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_clean_data_on_everything_is_ordinary_denoising(schedule):
    zero = jnp.float32(0.0)
    x_t = subintervals.add_noise(X_S, EPS, zero, T, schedule)
    np.testing.assert_allclose(x_t, schedule.add_noise(X_S, EPS, T), rtol=1e-6)
    x0, eps = subintervals.targets(X_S, EPS, zero, T, schedule)
    np.testing.assert_array_equal(x0, X_S)
    np.testing.assert_allclose(eps, EPS, rtol=1e-6)
    np.testing.assert_array_equal(subintervals.weight(zero, T, schedule), 1.0)


@pytest.mark.parametrize(
    "prediction, schedule",
    [(Velocity(), FLOW), (Epsilon(), VP()), (X0(), FLOW), (EDMPreconditioned(), EDM())],
)
def test_the_two_targets_fit_x_t_so_that_every_parametrisation_has_its_own(prediction, schedule):
    x_t = subintervals.add_noise(X_S, EPS, S, T, schedule)
    x0, eps = subintervals.targets(X_S, EPS, S, T, schedule)
    size = float(schedule.sigma(T).max())
    np.testing.assert_allclose(schedule.add_noise(x0, eps, T), x_t, rtol=1e-4, atol=1e-5 * size)
    raw = prediction.target(x0, eps, T, schedule)
    got = prediction.x0(raw, x_t, T, schedule)
    np.testing.assert_allclose(got, x0, rtol=1e-3, atol=1e-4 * size)


def test_the_velocitys_target_is_the_published_one():
    """Phased DMD's flow target: (a_s^2 s_t + a_t s_s^2) / (a_s^2 B) eps - x_s / a_s."""
    a_s, a_t, s_t = 1 - S, (1 - T)[:, None], T[:, None]
    fresh = subintervals.step(S, T, FLOW)[1][:, None]
    wanted = (a_s**2 * s_t + a_t * S**2) / (a_s**2 * fresh) * EPS - X_S / a_s
    x0, eps = subintervals.targets(X_S, EPS, S, T, FLOW)
    np.testing.assert_allclose(eps - x0, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_the_weight_the_loss_that_is_left_is_that_of_ordinary_denoising(schedule):
    """For data of variance 1, of which the variance of the target eps given x_t is left."""
    t = jnp.asarray([0.401, 0.42, 0.7, 0.95], jnp.float32)
    scale, fresh = subintervals.step(S, t, schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    at_s = schedule.alpha(S) ** 2 + schedule.sigma(S) ** 2
    left = sigma**2 / fresh**2 * scale**2 * at_s / (scale**2 * at_s + fresh**2)
    wanted = alpha**2 / (alpha**2 + sigma**2)
    np.testing.assert_allclose(subintervals.weight(S, t, schedule) * left, wanted, rtol=1e-4)


@pytest.mark.parametrize("gap", [1e-3, 0.02, 0.3])
def test_the_fresh_noise_is_exact_also_just_above_s(gap):
    s, t = np.float32(0.5), np.float32(0.5) + np.float32(gap)
    s64, t64 = np.float64(s), np.float64(t)
    wanted = np.sqrt(t64**2 - ((1 - t64) / (1 - s64) * s64) ** 2)
    fresh = subintervals.step(jnp.float32(s), jnp.asarray([t]), FLOW)[1]
    assert float(fresh[0]) == pytest.approx(wanted, rel=2e-4)
