"""Causal consistency: the exact map has no loss, the grid reaches data, steps are exact."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import FLOW, affine, gaussian_video

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import X0, Denoiser, Velocity
from dmd_jax.diffusion.schedule import align, shift_time
from dmd_jax.methods.causal_consistency import CausalConsistency
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.ode import euler_step
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step

KEY = jax.random.key(6)
MEAN, STD, SHAPE = 0.5, 0.6, (3, 4, 4, 1)
METHOD = CausalConsistency(SHAPE, causal=Causal(frames_per_block=1), guidance=1.0)


def batch(n, rho=0.0, shape=SHAPE):
    """Videos of the distribution of `gaussian_video(MEAN, STD, rho)`."""
    eps = np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)
    video = [eps[:, 0]]
    for frame in range(1, shape[0]):
        video.append(rho * video[-1] + np.sqrt(1 - rho**2) * eps[:, frame])
    none = jnp.zeros((n, 1))
    data = MEAN + STD * np.stack(video, axis=1).astype(np.float32)
    return {"data": data, "cond": none, "uncond": none, "index": jnp.arange(n)}


def losses(student, rho=0.0, method=METHOD, n=64):
    """The loss of a student on each interval of the grid, [steps]."""
    teacher, given = gaussian_video(MEAN, STD, rho), batch(n, rho)

    @jax.jit
    def loss(interval):
        return method.difference(student, teacher, given, jnp.full(n, interval), KEY)

    return np.array([loss(interval) for interval in range(method.steps)])


def test_the_grid_goes_from_noise_to_data():
    grid = np.asarray(METHOD.grid)
    assert grid.shape == (49,) and grid.dtype == np.float32
    np.testing.assert_allclose(grid, shift_time(1 - np.arange(49) / 48, 5.0), atol=1e-6)
    assert grid[0] == 1.0 and grid[-1] == 0.0
    assert grid[-2] == pytest.approx(0.0962, abs=1e-4)  # where the published grid ends


def euler_factor(t, t_next, std):
    """By what one exact Euler step multiplies x_t - (1 - t) mean, for N(mean, std^2) data."""
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return (1 - t_next) * gain + t_next * (1 - (1 - t) * gain) / t


def step_error(std):
    """The exact map's loss on each interval, which is that of the teacher's step."""
    grid = shift_time(1 - np.arange(49) / 48, 5.0)
    t, t_next, scale = grid[:-1], grid[1:], np.hypot((1 - grid) * std, grid)
    return std**2 * (euler_factor(t, t_next, std) * scale[:-1] / scale[1:] - 1) ** 2


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_the_exact_map_of_gaussian_videos_has_the_loss_of_an_euler_step_alone(rho):
    exact = losses(gaussian_video(MEAN, STD, rho, solves=True), rho)
    first, other = step_error(STD), step_error(STD * np.sqrt(1 - rho**2))
    # 3,072 samples know a variance to 2.6%; 1e-10 is float32.
    np.testing.assert_allclose(exact, (first + 2 * other) / 3, rtol=0.1, atol=1e-10)
    if rho == 0.0:
        assert exact.max() < 1e-4 and exact.mean() < 1e-5
    # The teacher's own estimate is no solution: its x0 changes along the path.
    assert losses(gaussian_video(MEAN, STD, rho), rho).max() > 1e-3


class Constant:
    def __call__(self, x, t, cond, **how):
        return jnp.zeros_like(x)


def test_the_last_interval_ties_the_student_to_data():
    """A constant agrees with itself everywhere; only the end of the grid tells it from the map."""
    found = losses(Denoiser(Constant(), FLOW, X0(1.0)))
    np.testing.assert_array_equal(found[:-1], 0.0)
    assert found[-1] == pytest.approx(MEAN**2 + STD**2, rel=0.1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deaf:
    """A network that needs no context."""

    net: object

    def __call__(self, x, t, cond, **how):
        return self.net(x, t, None)


def test_the_gradient_passes_through_the_noisier_call_alone():
    """With respect to x0 = scale x_t + shift: that of the loss with the target as a number."""
    student, teacher, given = affine(0.7, 0.1), gaussian_video(MEAN, STD), batch(8)
    interval = jnp.full(8, 40)
    student = dataclasses.replace(student, net=Deaf(student.net))
    loss, grad = jax.value_and_grad(METHOD.difference)(student, teacher, given, interval, KEY)
    # By hand: x_t from the same keys.
    eps_key, _ = jax.random.split(KEY)
    eps = randomness.normal(eps_key, given["index"], SHAPE)
    t, t_next = METHOD.grid[40], METHOD.grid[41]
    x_t = (1 - t) * given["data"] + t * eps
    x0 = MEAN + (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2) * (x_t - (1 - t) * MEAN)
    x_next = x_t - (t - t_next) * (x_t - x0) / t
    error = 0.7 * x_t + 0.1 - (0.7 * x_next + 0.1)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-3)
    np.testing.assert_allclose(grad.net.net.scale, 2 * np.mean(error * x_t), rtol=1e-3)
    np.testing.assert_allclose(grad.net.net.shift, 2 * np.mean(error), rtol=1e-3)


def test_a_step_in_float32_is_that_in_float64_and_bfloat16_times_are_not_enough():
    rng = np.random.default_rng(1)
    x, x0 = rng.standard_normal((2, 48, 50)).astype(np.float32)
    t, t_next = np.asarray(METHOD.grid[:-1]), np.asarray(METHOD.grid[1:])

    def error(t, t_next):
        exact = [np.float64(a)[:, None] for a in (METHOD.grid[:-1], METHOD.grid[1:])]
        wanted = x - (exact[0] - exact[1]) * (x.astype(np.float64) - x0) / exact[0]
        return np.abs(euler_step(x, x0, t, t_next, FLOW) - wanted).max()

    assert error(t, t_next) < 1e-6
    short = [np.asarray(jnp.bfloat16(a), np.float32) for a in (t, t_next)]
    assert error(*short) > 1e-3


class Spy:
    """A velocity of zeros that stores its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond, **how):
        self.calls.append((x, t, cond, how))
        return jnp.zeros_like(x)


@pytest.mark.parametrize("batched", [True, False])
def test_every_call_sees_the_real_blocks_before_and_the_teacher_is_guided(batched):
    method = dataclasses.replace(METHOD, guidance=3.0, batched_guidance=batched, context_time=0.625)
    student, teacher, given = Spy(), Spy(), batch(4)
    given |= {"cond": jnp.ones((4, 1))}
    nets = {"teacher": Denoiser(teacher, FLOW, Velocity())}
    method.generator_loss(Denoiser(student, FLOW, Velocity()), nets, given, KEY)
    assert [len(call[0]) for call in teacher.calls] == ([8] if batched else [4, 4])
    conds = np.concatenate([call[2] for call in teacher.calls])
    assert conds.mean() == 0.5
    for x, t, _, how in student.calls + teacher.calls:
        repeats = len(x) // 4
        assert how["causal"] == method.causal
        np.testing.assert_array_equal(how["context_time"], np.full(len(x), 625.0))
        context = how["context"].reshape(4, repeats, *SHAPE)[:, 0]
        np.testing.assert_array_equal(context, student.calls[0][3]["context"])
        assert t.shape == (len(x),)  # one time for all frames
    target, prediction = student.calls
    assert (target[1] < prediction[1]).all()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """x0 = gain(t) x + shift(t), with a free gain and shift at each point of the grid."""

    gain: object
    shift: object

    def __call__(self, x, t, cond, **how):
        at = jnp.round(8 * t).astype(int)
        return align(self.gain[at], x) * x + align(self.shift[at], x)


def test_training_turns_the_teacher_into_the_map():
    """From noise alone, a student with a free gain and shift at each time makes the ODE's end."""
    method = dataclasses.replace(METHOD, sample_shape=(1, 4, 4, 1), steps=8, shift=1.0)
    teacher = gaussian_video(MEAN, STD)
    student = Denoiser(Table(jnp.ones(9), jnp.zeros(9)), FLOW, X0(1.0))
    tx = per_role({"generator": AdamW(learning_rate=0.01, b1=0.0).transform(1500)})
    step = jax.jit(partial(train_step, method=method, tx=tx, update_generator=True))
    state, given = init_state({"generator": student}, tx), batch(64, shape=(1, 4, 4, 1))
    for _ in range(1500):
        state, _ = step(state, {"teacher": teacher}, given, KEY)
    net = state.ema.net
    t = np.arange(8, -1, -1) / 8
    solved = np.prod(euler_factor(t[:-1], t[1:], STD))  # by the teacher in the grid's eight steps
    assert float(net.gain[8]) == pytest.approx(solved, abs=0.03)
    assert float(net.shift[8]) == pytest.approx(MEAN, abs=0.03)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(sample_shape=(28, 28, 1)), "only videos have blocks"),
        (dict(causal=Causal(frames_per_block=2)), "3 frames do not divide into blocks of 2"),
        (dict(steps=0), "steps=0 must be"),
        (dict(shift=-1.0), "shift=-1.0 must be"),
        (dict(times=(0.5, 1.0)), "must descend"),
        (dict(context_time=1.0), "context_time=1.0 must be"),
    ],
)
def test_numbers_without_a_meaning_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(METHOD, **fields)
