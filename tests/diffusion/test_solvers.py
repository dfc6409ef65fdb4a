"""UniPC: diffusers' trajectories, the exact map of a Gaussian, one call a step, refusals."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import relative_error
from toys import exact, tiny_mlp

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching, Schedule, step_times
from dmd_jax.diffusion.solvers import unipc
from dmd_jax.rollouts.backward_simulation import backward_simulation
from dmd_jax.rollouts.ode import ode

STORED = Path(__file__).with_name("unipc_reference.npz")
FLOW = FlowMatching()
NOISE = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)
# diffusers computes its coefficients in float32 and starts at sigma = 1 - 1e-6 instead of 1.
ROUNDING = 1e-5

CASES = [(steps, shift) for steps in (1, 2, 3, 4, 7, 20, 50) for shift in (1.0, 3.0, 8.0)]
STORED_CASES = [(2, 8.0), (7, 1.0), (20, 5.0)]


def published_times(steps):
    """The times that diffusers takes before the shift if none are given."""
    return tuple(np.linspace(1, 1 / 1000, steps + 1)[:-1])


def wan_times(steps):
    """Those of Wan's own scheduler."""
    return tuple(0.999 * t for t in step_times(steps))


def unipc_sample(times, shift):
    denoiser = Denoiser(tiny_mlp(2))
    run = jax.jit(lambda x: unipc(denoiser, x, None, times=times, schedule=FLOW, shift=shift))
    return run(NOISE)


def diffusers_sample(times, shift):
    """The same trajectory by diffusers' UniPCMultistepScheduler, on the same network."""
    import torch

    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(sigmas=np.array(times))
    scheduler.set_begin_index(0)  # two of its integer timesteps may be equal
    network = jax.jit(tiny_mlp(2))
    x = torch.tensor(np.array(NOISE)) * (shift * times[0] / (1 + (shift - 1) * times[0]))
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        t = jnp.full(len(x), 1000 * jnp.float32(sigma.numpy()))
        velocity = torch.tensor(np.array(network(x.numpy(), t, None)))
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.torch
@pytest.mark.parametrize("steps, shift", CASES)
@pytest.mark.parametrize("times", [step_times, published_times, wan_times])
def test_equals_diffusers_over_whole_trajectories(times, steps, shift):
    times = times(steps)
    assert relative_error(unipc_sample(times, shift), diffusers_sample(times, shift)) < ROUNDING


def store():
    """Writes the stored numbers: PYTHONPATH=.:tests python -c "...test_solvers.store()"."""
    results = {f"{n}/{s}": diffusers_sample(published_times(n), s) for n, s in STORED_CASES}
    np.savez_compressed(STORED, **results)


@pytest.mark.parametrize("steps, shift", STORED_CASES)
def test_equals_the_stored_numbers_of_diffusers(steps, shift):
    with np.load(STORED) as stored:
        wanted = stored[f"{steps}/{shift}"]
    assert relative_error(unipc_sample(published_times(steps), shift), wanted) < ROUNDING


@pytest.mark.parametrize("schedule, order", [(FLOW, 2), (EDM(), 3)])
def test_converges_to_the_exact_map_of_a_gaussian_at_a_higher_order_than_euler(schedule, order):
    """UniPC-2 is of third order; where the log of alpha / sigma ends at infinity, of second."""
    mean, std = 0.7, 0.5

    def width(t):
        return np.hypot(schedule.alpha(t) * std, schedule.sigma(t))

    start = schedule.sigma(1.0) * NOISE - schedule.alpha(1.0) * mean
    wanted = mean + std / width(1.0) * start
    teacher = exact([[mean, mean]], std, schedule)

    def error(solver, steps):
        run = jax.jit(
            lambda noise: solver(teacher, noise, None, times=step_times(steps), schedule=schedule)
        )
        return np.abs(run(NOISE) - wanted).max()

    coarse, fine = error(unipc, 32), error(unipc, 128)
    assert np.log2(coarse / fine) / 2 == pytest.approx(order, abs=0.15)
    assert fine < error(ode, 128) / 50


@pytest.mark.parametrize("schedule", [FLOW, EDM(), VP()])
def test_one_step_is_the_prediction_at_the_first_time(schedule):
    teacher = exact([[0.7, 0.7]], 0.5, schedule)
    x0 = teacher(schedule.sigma(1.0) * NOISE, jnp.ones(6), None)
    one = unipc(teacher, NOISE, None, times=(1.0,), schedule=schedule)
    euler = ode(teacher, NOISE, None, times=(1.0,), schedule=schedule)
    np.testing.assert_allclose(one, euler, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(one, x0)


@pytest.mark.parametrize("schedule", [FLOW, EDM(), VP()])
@pytest.mark.parametrize("solver", [ode, unipc])
def test_samples_are_clean_under_every_schedule(solver, schedule):
    """EDM's sigma is not 0 at t = 0: a last step to t = 0 would leave noise in the sample."""

    def denoiser(x, t, cond):
        return jnp.full_like(x, 0.3)

    sample = solver(denoiser, NOISE, None, times=step_times(3), schedule=schedule)
    np.testing.assert_array_equal(sample, np.float32(0.3))


def test_each_step_calls_the_network_once_at_its_time_and_with_its_condition():
    found = []

    def denoiser(x, t, cond):
        jax.debug.callback(lambda t, cond: found.append((t.tolist(), cond.tolist())), t, cond)
        return 0.5 * x

    cond = jnp.arange(6)
    times = (1.0, 0.75, 0.5, 0.25)
    jax.block_until_ready(unipc(denoiser, NOISE, cond, times=times, schedule=FLOW, shift=3.0))
    jax.effects_barrier()
    shifted = [3 * t / (1 + 2 * t) for t in times]
    np.testing.assert_allclose(sorted(t[0] for t, _ in found), shifted[::-1], rtol=1e-6)
    assert all(len(set(t)) == 1 and c == cond.tolist() for t, c in found)


def test_a_schedule_may_return_jax_arrays_only():
    class Straight(Schedule):
        def alpha(self, t):
            return jnp.subtract(1, t)

        def sigma(self, t):
            return jnp.asarray(t)

    def run(schedule):
        return jax.jit(
            lambda x: unipc(lambda x, t, cond: x / 2, x, None, times=(1, 0.5), schedule=schedule)
        )(NOISE)

    np.testing.assert_array_equal(run(Straight()), run(FLOW))


def test_is_float32_whatever_the_network_runs_in():
    sample = unipc(
        lambda x, t, cond: x.astype(jnp.bfloat16) / 2,
        NOISE.astype(jnp.bfloat16),
        None,
        times=step_times(3),
        schedule=FLOW,
    )
    assert sample.dtype == jnp.float32 and sample.shape == NOISE.shape


@pytest.mark.parametrize("times", [(), (1.0, 1.0), (0.5, 0.75), (1.5, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize(
    "solver", [unipc, ode, partial(backward_simulation, key=jax.random.key(0))]
)
def test_times_that_do_not_descend_are_refused(solver, times):
    with pytest.raises(ValueError, match="must descend"):
        solver(lambda x, t, cond: x, NOISE, None, times=times, schedule=FLOW)
