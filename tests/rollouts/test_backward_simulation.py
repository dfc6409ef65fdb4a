"""Backward simulation (exit steps, fresh noise, one gradient, one compilation) and the ODE."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import affine, assert_close, exact, tiny_mlp

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching, shift_time, step_times
from dmd_jax.rollouts.backward_simulation import backward_simulation, one_step
from dmd_jax.rollouts.ode import ode

KEY = jax.random.key(7)
TIMES = (1.0, 0.75, 0.5, 0.25)
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)
SCHEDULES = [FlowMatching(), EDM(), VP()]
FLOW = FlowMatching()


def simulate(generator, noise=NOISE, key=KEY, *, schedule=FLOW, **settings):
    return backward_simulation(
        generator, noise, None, key, times=TIMES, schedule=schedule, **settings
    )


def by_hand(generator, exit_step, *, schedule, shift):
    """The rollout as a plain loop: (the input of the last call, its time)."""
    times = [float(shift_time(t, shift)) for t in TIMES]
    x = schedule.sigma(times[0]) * NOISE
    for step in range(exit_step):
        x0 = generator(x, jnp.full(6, times[step]), None)
        eps = randomness.normal(jax.random.fold_in(KEY, step), jnp.arange(6), (2,))
        x = schedule.add_noise(x0, eps, jnp.full(6, times[step + 1]))
    return x, jnp.full(6, times[exit_step])


@pytest.fixture(scope="module")
def counted():
    """(jitted rollout of an MLP with its gradient, how often it was traced)."""
    traced = []

    @jax.jit
    def run(generator, exit_step):
        traced.append(exit_step)

        def loss(generator):
            rollout = simulate(generator, shift=5.0, exit_step=exit_step)
            return jnp.sum(jnp.sin(rollout.x0)), rollout

        (_, rollout), grad = jax.value_and_grad(loss, has_aux=True)(generator)
        return rollout, grad

    return run, traced


@pytest.mark.parametrize("exit_step", range(4))
def test_rollout_is_the_plain_loop_and_its_gradient_that_of_the_last_call(exit_step, counted):
    generator = Denoiser(tiny_mlp(0))
    rollout, grad = counted[0](generator, exit_step)
    x, t = by_hand(generator, exit_step, schedule=FLOW, shift=5.0)
    np.testing.assert_allclose(rollout.x0, generator(x, t, None), rtol=1e-4, atol=1e-5)
    wanted = jax.grad(lambda g: jnp.sum(jnp.sin(g(x, t, None))))(generator)
    assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_every_exit_step(counted):
    run, traced = counted
    for exit_step in range(4):
        run(Denoiser(tiny_mlp(0)), exit_step)
    assert len(traced) == run._cache_size() == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_renoises_to_its_own_levels(schedule):
    generator = affine(0.3, 0.1, schedule)
    x, t = by_hand(generator, 2, schedule=schedule, shift=1.0)
    rollout = jax.jit(lambda g: simulate(g, schedule=schedule, exit_step=2))(generator)
    np.testing.assert_allclose(rollout.x0, generator(x, t, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_each_exit_step_reports_its_interval_before_the_shift(shift):
    # Self-Forcing's (1000, 750), (750, 500), (500, 250), (250, 0), which it does not warp either.
    run = jax.jit(lambda step: simulate(affine(1.0, 0.0), shift=shift, exit_step=step))
    rollout = [run(step) for step in range(4)]
    assert [(float(m.t_from), float(m.t_to)) for m in rollout] == [
        (1.0, 0.75),
        (0.75, 0.5),
        (0.5, 0.25),
        (0.25, 0.0),
    ]


def test_exit_steps_are_uniform_and_shared_by_the_batch():
    keys = jax.random.split(KEY, 4000)
    run = jax.jit(jax.vmap(lambda key: simulate(lambda x, t, c: jnp.stack([t, t], 1), key=key)))
    rollout = run(keys)
    np.testing.assert_array_equal(
        rollout.x0, np.broadcast_to(rollout.t_from[:, None, None], (4000, 6, 2))
    )
    counts = np.array([np.sum(rollout.t_from == t) for t in TIMES])
    assert counts.sum() == 4000
    assert np.sum((counts - 1000) ** 2 / 1000) < 16.3  # chi-squared, 3 degrees, one in a thousand


def test_a_share_of_rollouts_runs_to_the_last_step():
    keys = jax.random.split(KEY, 4000)

    def last(share):
        run = jax.vmap(lambda key: simulate(affine(1.0, 0.0), key=key, last_step_share=share).t_to)
        return np.mean(np.asarray(jax.jit(run)(keys)) == 0.0)

    # Forced with probability 0.6; otherwise one of four.
    assert last(0.6) == pytest.approx(0.7, abs=4 * np.sqrt(0.21 / 4000))
    assert last(1.0) == 1.0  # the last_step_only of Self-Forcing


@pytest.mark.parametrize("stride, times", [(1, TIMES), (2, (1.0, 0.5)), (4, (1.0,))])
def test_a_stride_makes_a_student_of_fewer_steps(stride, times):
    """Thinned by a traced stride, the rollout is that of the shorter list of times."""
    generator = affine(0.3, 0.1)
    run = jax.jit(lambda stride, step: simulate(generator, stride=stride, exit_step=step))
    short = jax.jit(
        lambda step: backward_simulation(
            generator, NOISE, None, KEY, times=times, schedule=FLOW, exit_step=step
        )
    )
    for exit_step in range(len(times)):
        assert_close(run(stride, exit_step), short(exit_step), rtol=1e-5)
    drawn = jax.jit(jax.vmap(lambda key: simulate(generator, key=key, stride=stride).t_from))
    assert set(np.asarray(drawn(jax.random.split(KEY, 100))).tolist()) == set(times)


@pytest.mark.parametrize("times", [TIMES, (1.0, 0.4), (1.0,)])
def test_traced_times_that_end_in_zeros_are_the_shorter_list(times):
    generator = affine(0.3, 0.1)
    padded = jnp.asarray(times + (0.0,) * (6 - len(times)))

    @jax.jit
    def run(times, exit_step):
        how = dict(schedule=FLOW, exit_step=exit_step)
        return backward_simulation(generator, NOISE, None, KEY, times=times, **how)

    for exit_step in range(len(times)):
        wanted = backward_simulation(
            generator, NOISE, None, KEY, times=times, schedule=FLOW, exit_step=exit_step
        )
        assert_close(run(padded, exit_step), wanted, rtol=1e-5)
    drawn = jax.jit(
        jax.vmap(
            lambda key: (
                backward_simulation(generator, NOISE, None, key, times=padded, schedule=FLOW).t_from
            )
        )
    )
    found = np.unique(np.asarray(drawn(jax.random.split(KEY, 100))))
    np.testing.assert_allclose(found, sorted(times))


def test_noise_between_steps_is_fresh_and_of_the_right_level():
    # A generator that returns 2, and in its last call its input, which is 2 alpha + sigma eps.
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((4096, 2)), jnp.float32)

    @jax.jit
    def run(step):
        last = jnp.asarray(TIMES)[step]
        generator = lambda x, t, _: jnp.where(t[:, None] == last, x, 2.0)  # noqa: E731
        rollout = simulate(generator, noise, exit_step=step)
        return (rollout.x0 - 2.0 * (1 - last)) / last

    eps = [noise, *(run(step) for step in (1, 2, 3))]
    eps = np.stack([np.ravel(e) for e in eps])
    assert np.abs(eps.mean(1)).max() < 4 / np.sqrt(8192)
    np.testing.assert_allclose(np.cov(eps), np.eye(4), atol=5 / np.sqrt(8192))


@pytest.mark.parametrize("stride, exit_step", [(1, 4), (1, -1), (2, 2)])
def test_an_exit_step_that_is_not_a_call_is_refused(stride, exit_step):
    with pytest.raises(ValueError, match=rf"exit_step={exit_step} must be in \[0, {4 // stride}\)"):
        simulate(affine(1.0, 0.0), stride=stride, exit_step=exit_step)


def test_no_gradient_reaches_the_noise_or_the_earlier_calls():
    def loss(noise, scale, exit_step):
        return jnp.sum(simulate(affine(scale, 0.5), noise, exit_step=exit_step).x0)

    run = jax.jit(jax.grad(loss, (0, 1)))
    for exit_step in range(4):
        to_noise, to_scale = run(NOISE, 0.3, exit_step)
        np.testing.assert_array_equal(to_noise, 0.0)
        x, _ = by_hand(affine(0.3, 0.5), exit_step, schedule=FLOW, shift=1.0)
        # d (scale x + shift) / d scale = x; the earlier calls used scale as well.
        np.testing.assert_allclose(to_scale, jnp.sum(x), rtol=1e-4)


def test_samples_do_not_depend_on_how_the_batch_is_split():
    generator = Denoiser(tiny_mlp(0))
    run = jax.jit(lambda noise, index: simulate(generator, noise, index=index, exit_step=3))
    whole = run(NOISE, jnp.arange(6)).x0
    for part in (jnp.array([0, 2, 4]), jnp.array([5])):
        rollout = run(NOISE[part], part)
        np.testing.assert_allclose(rollout.x0, whole[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule, scale", [(FlowMatching(), 1.0), (EDM(), 80.0)])
def test_one_step_scales_the_noise_to_the_schedules_end(schedule, scale):
    found = {}

    def generator(x, t, cond):
        found.update(x=x, t=t, cond=cond)
        return x

    rollout = one_step(generator, NOISE, "cond", schedule=schedule)
    np.testing.assert_allclose(found["x"], scale * NOISE, rtol=1e-5)
    np.testing.assert_array_equal(found["t"], 1.0)
    assert (rollout.t_from, rollout.t_to, rollout.cond, rollout.mask) == (1.0, 0.0, "cond", None)


def test_backward_simulation_of_one_step_is_one_step():
    generator = affine(0.3, 0.1, EDM())
    settings = dict(schedule=EDM())
    one = one_step(generator, NOISE, None, **settings)
    many = backward_simulation(generator, NOISE, None, KEY, times=(1.0,), **settings)
    np.testing.assert_allclose(many.x0, one.x0, rtol=1e-6)
    assert (many.t_from, many.t_to) == (one.t_from, one.t_to)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_ode_is_eulers_method_on_the_velocity(shift):
    net = tiny_mlp(2)
    times = [*(shift_time(t, shift) for t in TIMES), 0.0]
    x = NOISE
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * net(x, jnp.full(6, 1000.0 * t), None)
    run = jax.jit(lambda d: ode(d, NOISE, None, times=TIMES, schedule=d.schedule, shift=shift))
    np.testing.assert_allclose(run(Denoiser(net)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ode_of_a_gaussian_converges_to_its_exact_map(schedule):
    """(x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is constant along the probability flow."""
    mean, std = 0.7, 0.5

    def width(t):
        return np.hypot(schedule.alpha(t) * std, schedule.sigma(t))

    start = schedule.sigma(1.0) * NOISE - schedule.alpha(1.0) * mean
    wanted = mean + std / width(1.0) * start
    teacher = exact([[mean, mean]], std, schedule)

    def error(steps):
        run = jax.jit(
            lambda noise: ode(teacher, noise, None, times=step_times(steps), schedule=schedule)
        )
        return np.abs(run(NOISE) - wanted).max()

    coarse, fine = error(128), error(512)
    assert fine < 0.02
    assert coarse / fine == pytest.approx(4.0, rel=0.2)  # first order
