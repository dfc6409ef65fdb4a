"""Consistency models and flow maps: every loss on the exact map of Gaussian data, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import GaussianFlow, normal

from dmd_jax.losses.consistency import (
    consistency_loss,
    ect_time,
    mean_flow_loss,
    mean_flow_target,
    normalized_tangent,
    scm_loss,
    scm_tangent,
    trigflow,
    trigflow_angle,
    trigflow_point,
    trigflow_velocity,
)

MEAN, STD, N = 0.8, 0.55, 200
FLOW, MAP = GaussianFlow(MEAN, STD), GaussianFlow(MEAN, STD, jumps=True)
T = jnp.linspace(0.01, 1.0, N)
# Points of the noised data at times from 0.01 to 1.
X_T = (1 - T[:, None]) * (MEAN + STD * normal(0, N, 3)) + T[:, None] * normal(1, N, 3)
ANGLE = trigflow_angle(T)
DIRECTION = trigflow_velocity(X_T, FLOW(X_T, T), ANGLE)
# Float32: some operations on numbers of a few units.
ROUNDING = 3e-6


def smooth(x, t):
    """A network that is no solution: nonlinear in x and t."""
    return jnp.sin(2.0 * x) * jnp.cos(3.0 * t)[:, None] + 0.3 * x


def x0(velocity, x_t, t):
    return x_t - t[:, None] * velocity(x_t, t)


def along(x_t, t, r):
    """The point at r of the exact path through x_t."""
    return x_t - (t - r)[:, None] * FLOW(x_t, t, span=t - r)


# --- Discrete -------------------------------------------------------------------------------------


def test_the_times_of_ect_by_hand():
    t = jnp.array([0.5, 0.9, 1.0, 0.66, 0.67])
    slope = 1 + 8 / (1 + np.exp([1.0, 9.0, np.inf, 0.66 / 0.34, 0.67 / 0.33]))
    for gap in (0.5, 1 / 64):
        np.testing.assert_allclose(
            ect_time(t, gap), t * np.maximum(1 - gap * slope, 0), rtol=1e-5, atol=1e-6
        )
    early = ect_time(t, 0.5)
    assert early[0] == early[3] == 0.0 < early[4] < 0.05  # data up to 0.66, as the docstring says
    per_sample = ect_time(t, jnp.array([0.5, 0.5, 0.25, 0.1, 0.1]))
    np.testing.assert_allclose(per_sample[2], 0.75)


@pytest.mark.parametrize("gap", [0.5, 0.1, 1e-3])
def test_the_exact_map_agrees_with_itself_along_its_path(gap):
    r = ect_time(T, gap)
    x_r = along(X_T, T, r)
    exact = consistency_loss(x0(MAP, X_T, T), x0(MAP, x_r, r), T, r)
    # The rounding of x0, over t - r: the smallest is a thousandth of t.
    assert exact < 5 * ROUNDING / gap
    other = consistency_loss(x0(FLOW, X_T, T), x0(FLOW, x_r, r), T, r)
    assert other > 0.1 and other > 20 * exact


def test_the_consistency_loss_by_hand():
    a, b = normal(2, 3, 2, 4), normal(3, 3, 2, 4)
    t, r = jnp.array([0.9, 0.5, 0.2]), jnp.array([0.4, 0.3, 0.0])
    square = np.sum((a - b) ** 2, (1, 2))
    for c in (1e-8, 0.3):
        wanted = np.mean((np.sqrt(square + c**2) - c) / (t - r))
        assert consistency_loss(a, b, t, r, huber=c) == pytest.approx(float(wanted), rel=1e-5)
    # A large c is the squared error over 2 c.
    large = consistency_loss(a, b, t, r, huber=1e3)
    assert large == pytest.approx(float(np.mean(square / (t - r))) / 2e3, rel=1e-5)
    at_a, at_b = jax.grad(consistency_loss, (0, 1))(a, b, t, r)
    wanted = (a - b) / (np.sqrt(square) * (t - r) * 3)[:, None, None]
    np.testing.assert_allclose(at_a, wanted, rtol=1e-4)
    assert (at_b == 0).all()
    assert jnp.isfinite(jax.grad(consistency_loss)(a, a, t, r)).all()


# --- TrigFlow -------------------------------------------------------------------------------------


def test_a_flow_matching_network_seen_as_trigflow_has_the_same_x0():
    z = trigflow_point(X_T, ANGLE)
    np.testing.assert_allclose(z, X_T / np.hypot(1 - T, T)[:, None], rtol=1e-5)
    F = trigflow(smooth)(z, ANGLE)
    seen = jnp.cos(ANGLE)[:, None] * z - jnp.sin(ANGLE)[:, None] * F
    np.testing.assert_allclose(seen, x0(smooth, X_T, T), rtol=1e-4, atol=1e-5)


def test_trigflows_velocity_is_the_derivative_of_its_path():
    """The exact path scales with the width of the mixed Gaussians at each angle."""

    def path(angle):
        width = jnp.hypot(jnp.cos(angle) * STD, jnp.sin(angle))[:, None]
        return jnp.cos(angle)[:, None] * MEAN + width * away

    z, width = trigflow_point(X_T, ANGLE), np.hypot(np.cos(ANGLE) * STD, np.sin(ANGLE))
    away = (z - jnp.cos(ANGLE)[:, None] * MEAN) / width[:, None]
    _, derivative = jax.jvp(path, (ANGLE,), (jnp.ones(N),))
    np.testing.assert_allclose(DIRECTION, derivative, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trigflow(FLOW)(z, ANGLE), derivative, rtol=1e-4, atol=1e-5)


def tangent(velocity, **how):
    return scm_tangent(trigflow(velocity), trigflow_point(X_T, ANGLE), ANGLE, DIRECTION, **how)


def test_the_exact_map_has_no_tangent_and_the_teacher_has():
    assert jnp.abs(tangent(MAP)).max() < 10 * ROUNDING
    assert jnp.abs(tangent(FLOW)).mean() > 0.1


def test_the_tangent_is_the_derivative_of_the_map_along_the_path():
    """Against the composition of a network and the exact path, differentiated as a whole."""

    def on_path(angle):
        t = jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))
        return x0(smooth, along(X_T, T, t), t)

    _, derivative = jax.jvp(on_path, (ANGLE,), (jnp.ones(N),))
    wanted = jnp.cos(ANGLE)[:, None] * derivative
    np.testing.assert_allclose(tangent(smooth), wanted, rtol=1e-3, atol=2e-5)
    # The warm-up leaves F - dz/da alone, which is that of two velocities.
    cos, sin = jnp.cos(ANGLE)[:, None], jnp.sin(ANGLE)[:, None]
    first = -(cos**2) * (smooth(X_T, T) - FLOW(X_T, T)) / (cos + sin)
    np.testing.assert_allclose(tangent(smooth, warmup=0.0), first, rtol=1e-3, atol=1e-5)
    half = tangent(smooth, warmup=jnp.full(N, 0.5))
    np.testing.assert_allclose(half, (wanted + first) / 2, rtol=1e-3, atol=2e-5)


def test_normalised_tangents_have_one_size_and_bad_ones_none():
    g = normal(4, 4, 2, 3) * jnp.array([1e3, 1.0, 1e-3, 1.0])[:, None, None]
    g = g.at[3, 0, 0].set(jnp.nan)
    size = np.sqrt(np.mean(np.square(g), (1, 2)))[:3]
    out = normalized_tangent(g, 0.1)
    np.testing.assert_allclose(out[:3], g[:3] / (size + 0.1)[:, None, None], rtol=1e-5)
    np.testing.assert_array_equal(out[3], 0.0)


def test_the_gradient_of_scms_loss_is_minus_the_tangent():
    F, g = normal(5, 4, 3), normal(6, 4, 3)
    value, grad = jax.value_and_grad(scm_loss)(F, g)
    np.testing.assert_allclose(grad, -g / 12, rtol=1e-6)
    assert value == pytest.approx(float(0.5 * np.mean(np.square(g))), rel=1e-6)


# --- MeanFlow -------------------------------------------------------------------------------------


def average(x_t, t, r):
    return FLOW(x_t, t, span=t - r)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_the_exact_mean_velocity_is_its_own_target(share):
    r, v = share * T, FLOW(X_T, T)
    target = mean_flow_target(average, X_T, T, r, v)
    np.testing.assert_allclose(target, average(X_T, T, r), rtol=1e-4, atol=10 * ROUNDING)
    # The velocity itself is none, except at r = t, where the target is nothing else.
    wrong = mean_flow_target(lambda x, t, r: FLOW(x, t), X_T, T, r, v) - v
    assert (jnp.abs(wrong).max() == 0.0) if share == 1.0 else (jnp.abs(wrong).mean() > 1e-3)
    np.testing.assert_array_equal(mean_flow_target(average, X_T, T, r, v, warmup=0.0), v)


def test_mean_flow_to_data_and_scm_are_one_loss_in_two_times():
    """Their residuals differ by a factor of time, for any network."""
    target = mean_flow_target(lambda x, t, r: smooth(x, t), X_T, T, 0.0 * T, FLOW(X_T, T))
    residual = smooth(X_T, T) - target
    factor = jnp.cos(ANGLE) / (jnp.cos(ANGLE) + jnp.sin(ANGLE)) ** 2
    np.testing.assert_allclose(tangent(smooth), -factor[:, None] * residual, rtol=1e-3, atol=2e-5)


def test_the_mean_flow_loss_by_hand():
    u, target = normal(7, 3, 2, 4), normal(8, 3, 2, 4)
    error = np.sum((u - target) ** 2, (1, 2))
    for power in (0.0, 0.5, 1.0):
        weight = (error + 0.01) ** -power
        value, grad = jax.value_and_grad(mean_flow_loss)(u, target, power=power, c=0.01)
        assert value == pytest.approx(float(np.mean(weight * error)), rel=1e-5)
        wanted = 2 * weight[:, None, None] * (u - target) / 3  # the weight has no gradient
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["consistency", "mean_flow"])
def test_a_sample_with_a_bad_target_counts_zero(loss):
    x, target = normal(9, 3, 2, 4), normal(10, 3, 2, 4)
    t, r = jnp.full(3, 0.9), jnp.full(3, 0.5)
    f = {"consistency": lambda x, y: consistency_loss(x, y, t[: len(x)], r[: len(x)])}
    f = f.get(loss, mean_flow_loss)
    value, grad = jax.value_and_grad(f)(x, target.at[0, 0, 0].set(jnp.nan))
    good, wanted = jax.value_and_grad(f)(x[1:], target[1:])
    np.testing.assert_allclose(value, good * 2 / 3, rtol=1e-5)
    np.testing.assert_array_equal(grad[0], 0.0)
    np.testing.assert_allclose(grad[1:], wanted * 2 / 3, rtol=1e-5)
