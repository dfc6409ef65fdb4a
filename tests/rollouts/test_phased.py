"""Rollouts in phases: Euler steps through the experts, the exit to the phase's end, the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import shift_time
from dmd_jax.models.experts import combine
from dmd_jax.rollouts.backward_simulation import one_step
from dmd_jax.rollouts.ode import euler_step, ode
from dmd_jax.rollouts.phased import phase_ends, phased
from dmd_jax.rollouts.samplers import FewStep, sampler_for

TIMES, SHIFT, FLOW = (1.0, 0.75, 0.5, 0.25), 3.0, toys.FLOW
NOISE = toys.normal(0, 6, 2)
NETS = [Denoiser(toys.tiny_mlp(seed)) for seed in range(2)]
PAIR = combine(NETS, (0.75,))  # 0.5, shifted by 3


@jax.jit
def run(generator, exit_step):
    def loss(generator):
        rollout = phased(
            generator,
            NOISE,
            None,
            exit_step,
            times=TIMES,
            phases=(2, 2),
            schedule=FLOW,
            shift=SHIFT,
        )
        return jnp.sum(jnp.sin(rollout.phase.x_s)), rollout

    (_, rollout), grad = jax.value_and_grad(loss, has_aux=True)(generator)
    return rollout, grad


def at(time):
    return jnp.full(6, float(shift_time(time, SHIFT)))


@pytest.mark.parametrize("exit_step, number, end", [(0, 0, 0.5), (1, 0, 0.5), (2, 1, 0), (3, 1, 0)])
def test_earlier_calls_are_euler_steps_of_their_experts_and_the_last_goes_to_the_phases_end(
    exit_step, number, end
):
    x = NOISE
    for step in range(exit_step):
        x0 = NETS[step // 2](x, at(TIMES[step]), None)
        x = euler_step(x, x0, at(TIMES[step]), at(TIMES[step + 1]), FLOW)
    x0 = NETS[number](x, at(TIMES[exit_step]), None)
    rollout, grad = run(PAIR, exit_step)
    toys.assert_close(rollout.x0, x0, atol=1e-5)
    x_s = euler_step(x, x0, at(TIMES[exit_step]), at(end), FLOW)
    toys.assert_close(rollout.phase.x_s, x_s, atol=1e-5)
    assert rollout.phase.number == number and rollout.phase.s == shift_time(end, SHIFT)
    assert rollout.t_from == TIMES[exit_step] and rollout.t_to == (*TIMES, 0.0)[exit_step + 1]

    def last(net):
        x0 = net(x, at(TIMES[exit_step]), None)
        return jnp.sum(jnp.sin(euler_step(x, x0, at(TIMES[exit_step]), at(end), FLOW)))

    toys.assert_close(grad.net.nets[number], jax.grad(last)(NETS[number]).net, 1e-4, 1e-4)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad.net.nets[1 - number]))


def test_one_phase_of_one_call_is_a_one_step_generator():
    rollout = phased(NETS[0], NOISE, None, 0, times=(1.0,), phases=(1,), schedule=FLOW)
    wanted = one_step(NETS[0], NOISE, None, schedule=FLOW)
    np.testing.assert_array_equal(rollout.x0, wanted.x0)
    np.testing.assert_array_equal(rollout.phase.x_s, wanted.x0)


def test_a_phase_ends_where_the_next_begins():
    assert phase_ends(TIMES, (2, 2)) == (0.5, 0.0)
    assert phase_ends(TIMES, (1, 2, 1)) == (0.75, 0.25, 0.0)


def test_the_sampler_is_the_ode_of_the_student_and_its_file_says_so(tmp_path):
    sampler = FewStep(TIMES, SHIFT, (2, 2))
    samples = sampler(NETS[0], NOISE, None, None, jax.random.key(0), jnp.arange(6))
    wanted = ode(NETS[0], NOISE, None, times=TIMES, schedule=FLOW, shift=SHIFT)
    toys.assert_close(samples, wanted)
    path = tmp_path / "student.safetensors"
    weights.save(path, Denoiser(toys.tiny_dit(0)), **sampler.notes())
    assert sampler_for(path) == sampler
    with pytest.raises(ValueError, match=r"steps=2, but each of this student's 4 calls belongs"):
        sampler_for(path, steps=2)


@pytest.mark.parametrize("phases", [(), (4, 0), (2, 1), (2, 2, 1)])
def test_phases_that_are_not_the_calls_are_refused(phases):
    with pytest.raises(ValueError, match=r"add up to the 4 of times"):
        FewStep(TIMES, SHIFT, phases)
