"""Causal ODE regression: blur by a teacher that sees the future, none by a causal one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import FLOW, exact, gaussian_video

from dmd_jax.diffusion.denoiser import X0, Denoiser
from dmd_jax.diffusion.schedule import shift_time, step_times
from dmd_jax.methods.causal_ode import CausalODE
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.ode import ode, trajectory
from dmd_jax.rollouts.teacher_forcing import After, TeacherForced

KEY = jax.random.key(8)
RHO, SHAPE = 0.9, (2, 1, 1, 1)
ONE = Causal(frames_per_block=1)
TIMES = (1.0, 0.75, 0.5, 0.25)
# The 2-frame Gaussian: unit variances, correlation RHO. Its square root is symmetric.
COVARIANCE = np.array([[1.0, RHO], [RHO, 1.0]])
ROOT = np.sqrt(1 + RHO) / 2 * np.ones((2, 2)) + np.sqrt(1 - RHO) / 2 * np.array([[1, -1], [-1, 1]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """E[x0 | x_t] of the 2-frame Gaussian: it sees both frames."""

    covariance: object

    def __call__(self, x_t, t, cond):
        alpha, sigma = FLOW.alpha(t)[:, None, None], FLOW.sigma(t)[:, None, None]
        total = alpha**2 * self.covariance + sigma**2 * jnp.eye(2)
        flat = x_t.reshape(len(x_t), 2, 1)
        return (alpha * self.covariance @ jnp.linalg.solve(total, flat)).reshape(x_t.shape)


def bidirectional():
    return Denoiser(Bidirectional(jnp.float32(COVARIANCE)), FLOW, X0(1.0))


def causal_teacher(denoiser, context):
    """(x_t, t, cond) -> x0 of all blocks, after the blocks of `context`."""
    forced = TeacherForced(denoiser, ONE)
    return lambda x_t, t, cond: forced(x_t, t, After(cond, context))


def solved(teacher, steps):
    """x at TIMES and at the end, as matrices [5, frames, noises] of unit noises."""
    noise = jnp.eye(2).reshape(2, *SHAPE)
    kwargs = dict(times=step_times(steps), kept=TIMES, schedule=FLOW, shift=5.0)
    points = jax.jit(lambda x: trajectory(teacher, x, None, **kwargs))(noise)
    return np.asarray(points, np.float64).reshape(2, 5, 2).transpose(1, 2, 0)


def residual(points, frame):
    """Variance of a frame's end that its own x_t does not explain, at each of TIMES."""
    end, x_t = points[-1, frame], points[:-1, frame]
    return end @ end - (x_t @ end) ** 2 / np.sum(x_t**2, axis=1)


def test_a_thousand_steps_of_the_bidirectional_teacher_reach_the_square_root():
    np.testing.assert_allclose(ROOT @ ROOT, COVARIANCE, atol=1e-12)
    assert np.abs(solved(bidirectional(), 1000)[-1] - ROOT).max() < 0.011


def test_the_first_frame_of_a_bidirectional_teacher_depends_on_noise_it_never_sees():
    """The regression's mean is blurred: variance .718 in place of 1 in one step."""
    points = solved(bidirectional(), 1000)
    wanted = [(1 - np.sqrt(1 - RHO**2)) / 2, 0.2803, 0.2666, 0.1811]
    np.testing.assert_allclose(residual(points, 0), wanted, atol=4e-3)
    assert wanted[0] == pytest.approx(0.2821, abs=1e-4)


def test_the_end_of_a_causal_teacher_is_a_function_of_its_own_noise_and_the_past():
    points = solved(causal_teacher(gaussian_video(rho=RHO), jnp.zeros((2, *SHAPE))), 1000)
    for frame in (0, 1):
        assert residual(points, frame).max() < 1e-9
    np.testing.assert_allclose(points[-1], np.diag([1, np.sqrt(1 - RHO**2)]), atol=0.011)


def test_the_kept_points_lie_on_the_path():
    """After the steps before it, a kept point is what `ode` from there would start with."""
    teacher = exact([[0.3, -0.2]], 0.5)
    noise = jax.random.normal(KEY, (3, 2))
    points = trajectory(
        teacher, noise, None, times=step_times(48), kept=TIMES, schedule=FLOW, shift=5.0
    )
    assert points.shape == (3, 5, 2)
    np.testing.assert_array_equal(points[:, 0], noise)
    end = ode(teacher, noise, None, times=step_times(48), schedule=FLOW, shift=5.0)
    np.testing.assert_array_equal(points[:, -1], end)
    # The exact solution at each level: alpha m + scale(t) eps, to Euler's error.
    for i, t in enumerate(TIMES):
        t = shift_time(t, 5.0)
        wanted = (1 - t) * jnp.float32([0.3, -0.2]) + np.hypot((1 - t) * 0.5, t) * noise
        np.testing.assert_allclose(points[:, i], wanted, atol=0.01)


def test_a_point_between_two_steps_cannot_be_kept():
    with pytest.raises(ValueError, match=r"0.75 lies between two of the 10 steps"):
        trajectory(
            exact([[0.0]], 1.0),
            jnp.ones((1, 1)),
            None,
            times=step_times(10),
            kept=(1.0, 0.75),
            schedule=FLOW,
        )


def batch(n, steps=48, rho=RHO):
    """Pairs of the exact causal teacher along real videos."""
    eps, noise = np.random.default_rng(0).standard_normal((2, n, *SHAPE)).astype(np.float32)
    video = np.stack([eps[:, 0], rho * eps[:, 0] + np.sqrt(1 - rho**2) * eps[:, 1]], axis=1)
    teacher = causal_teacher(gaussian_video(rho=rho), video)
    points = trajectory(
        teacher,
        noise,
        jnp.zeros((n, 1)),
        times=step_times(steps),
        kept=TIMES,
        schedule=FLOW,
        shift=5.0,
    )
    times = [float(shift_time(t, 5.0)) for t in TIMES]
    path = dict(zip((*times, 0.0), jnp.moveaxis(points, 1, 0), strict=True))
    return {"data": video, "trajectory": path, "cond": jnp.zeros((n, 1)), "index": jnp.arange(n)}


def loss(student, given, **fields):
    return CausalODE(SHAPE, ONE, **fields).generator_loss(student, {}, given, KEY)[0]


def test_the_exact_map_has_the_loss_of_euler_steps_alone():
    given = batch(256, steps=384)
    assert loss(gaussian_video(rho=RHO, solves=True), given) < 1e-4
    assert loss(gaussian_video(rho=RHO), given) > 1e-2  # the posterior mean
    assert loss(gaussian_video(rho=0.0, solves=True), given) > 1e-2  # a student without memory


def test_the_target_is_the_end_of_the_trajectory_and_the_context_the_real_video():
    calls = []

    class Spy:
        def __call__(self, x, t, cond, **how):
            calls.append((x, t, cond, how))
            return jnp.zeros_like(x)

    given = batch(400)
    found = loss(Denoiser(Spy(), FLOW, X0(1.0)), given)
    np.testing.assert_allclose(found, np.mean(np.square(given["trajectory"][0.0])), rtol=1e-5)
    [(x, t, _, how)] = calls
    np.testing.assert_array_equal(how["context"], given["data"])
    assert how["causal"] == ONE and not np.any(how["context_time"])
    levels = [1.0, 0.9375, 5 / 6, 0.625]
    for level, stored in zip(levels, sorted(given["trajectory"], reverse=True)[:4], strict=True):
        mine = np.isclose(t, level)
        assert mine.sum() > 60  # of 400 among four
        np.testing.assert_array_equal(x[mine], given["trajectory"][stored][mine])


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(shift=8.0), r"at the times \[1.0, 0.9375, 0.8333, 0.625\], but times=.* 0.96"),
        (dict(times=(1.0, 0.5)), r"with shift=5.0 are \[1.0, 0.8333\]: give the method"),
    ],
)
def test_trajectories_of_other_times_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        loss(gaussian_video(), batch(2), **fields)


def test_a_batch_without_trajectories_is_refused():
    given = batch(2)
    del given["trajectory"]
    with pytest.raises(ValueError, match=r"make them with `python -m dmd_jax.ode_pairs`"):
        loss(gaussian_video(), given)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(sample_shape=(28, 28, 1)), "only videos have blocks"),
        (dict(causal=Causal(frames_per_block=3)), "2 frames do not divide into blocks of 3"),
        (dict(shift=0.0), "shift=0.0 must be"),
        (dict(times=(0.5, 1.0)), "must descend"),
    ],
)
def test_numbers_without_a_meaning_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        CausalODE(**(dict(sample_shape=SHAPE, causal=ONE) | fields))
