"""DMD1: the regression's minimiser and gradient in closed form, beside DMD's loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import affine, exact, normal

from dmd_jax.losses.regression import PseudoHuber
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.causal_ode import trajectory_points
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.dmd1 import DMD1
from dmd_jax.models.attention import Causal

KEY, MEAN, STD = jax.random.key(3), 0.7, 0.4
TEACHER = exact([[MEAN, MEAN]], STD)
NETS = {"teacher": TEACHER, "fake_score": affine(0.3, 0.1)}
METHOD, PLAIN = DMD1((2,), regression_weight=0.3), DMD((2,), times=(1.0,))


def batch(n=64, times=(1.0,)):
    """Pairs of the teacher's exact ODE: alpha mean + hypot(alpha std, sigma) eps at each time."""
    noise = normal(0, n, 2)
    path = {t: (1 - t) * MEAN + np.hypot((1 - t) * STD, t) * noise for t in (*times, 0.0)}
    zeros = jnp.zeros((n, 1))
    return {"trajectory": path, "cond": zeros, "uncond": zeros, "index": jnp.arange(n)}


@functools.partial(jax.jit, static_argnames="method")
def run(student, given, method=METHOD):
    """(loss, its gradient with respect to the student's scale and shift, observed)."""
    loss = jax.value_and_grad(method.generator_loss, has_aux=True)
    (value, (observed, _)), grad = loss(student, NETS, given, KEY)
    return value, jnp.stack([grad.net.scale, grad.net.shift]), observed


def regression(student, given, distance=METHOD.regression_distance):
    """The regression's part of loss and gradient, at weight 1."""
    method = dataclasses.replace(METHOD, regression_weight=1.0, regression_distance=distance)
    both, plain = run(student, given, method), run(student, given, PLAIN)
    return both[0] - plain[0], both[1] - plain[1]


def test_the_minimiser_is_the_exact_map_of_noise_to_data():
    """x0 = mean + std eps; its mirror image, mean - std eps, has the same samples, and is not."""
    given = batch()
    loss, grad = regression(affine(STD, MEAN), given)
    assert abs(loss) < 1e-5 and np.abs(grad).max() < 1e-5
    for scale, shift in ((STD + 0.1, MEAN), (STD, MEAN + 0.1), (-STD, MEAN)):
        assert regression(affine(scale, shift), given)[0] > 5e-3


def test_the_gradient_is_that_of_the_distance_and_of_dmd_by_their_weights():
    given, student = batch(), affine(0.9, -0.2)
    noise, end = given["trajectory"][1.0], given["trajectory"][0.0]
    away = np.float64(0.9 * noise - 0.2 - end)
    loss, grad = regression(student, given)
    np.testing.assert_allclose(loss, np.mean(away**2), rtol=1e-4)
    wanted = [2 * np.mean(away * noise), 2 * np.mean(away)]
    np.testing.assert_allclose(grad, wanted, rtol=1e-4)
    plain, both = (run(student, given, method) for method in (PLAIN, METHOD))
    np.testing.assert_allclose(both[0], plain[0] + 0.3 * loss, rtol=1e-5)
    np.testing.assert_allclose(both[1], plain[1] + 0.3 * np.array(wanted), rtol=1e-4)
    metrics = METHOD.metrics(both[2])
    np.testing.assert_allclose(metrics["regression/error"], np.sqrt(np.mean(away**2)), rtol=1e-5)
    huber = regression(student, given, PseudoHuber(0.5))[0]
    norms = np.mean(away**2, axis=1)
    np.testing.assert_allclose(huber, np.mean(np.sqrt(norms + 0.25) - 0.5), rtol=1e-4)


def test_weight_zero_is_dmd_bit_for_bit():
    given, student = batch(), affine(0.9, -0.2)
    none = run(student, given, dataclasses.replace(METHOD, regression_weight=0.0))
    plain = run(student, given, PLAIN)
    assert none[0] == plain[0]
    np.testing.assert_array_equal(none[1], plain[1])


def test_several_calls_are_regressed_each_from_its_point_of_the_trajectory():
    times = (1.0, 0.5)
    given, student = batch(400, times), affine(0.5, 0.1)
    both, plain = (
        run(student, given, dataclasses.replace(METHOD, times=times, regression_weight=weight))[0]
        for weight in (1.0, 0.0)
    )
    x_t, t = trajectory_points(given, times, 1.0, jax.random.fold_in(KEY, 3))
    for time in times:
        mine = np.asarray(t) == time
        assert 150 < mine.sum() < 250
        np.testing.assert_array_equal(x_t[mine], given["trajectory"][time][mine])
    wanted = np.mean(np.square(0.5 * x_t + 0.1 - given["trajectory"][0.0]))
    np.testing.assert_allclose(both - plain, wanted, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"regression_weight=-1 must be 0 or more"):
        DMD1((2,), regression_weight=-1)
    with pytest.raises(ValueError, match="for a causal student there is CausalODE"):
        DMD1((6, 4, 4, 3), video=SelfForcing(Causal(2)))
    with pytest.raises(ValueError, match=r"at the times \[1.0\], but times=\(1.0, 0.5\)"):
        run(affine(1.0, 0.0), batch(), dataclasses.replace(METHOD, times=(1.0, 0.5)))
    with pytest.raises(ValueError, match="this method learns from trajectories: make them with"):
        run(affine(1.0, 0.0), {k: v for k, v in batch().items() if k != "trajectory"})
