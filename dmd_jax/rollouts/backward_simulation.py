"""How a generator makes a sample: one call, or a few calls with fresh noise between them.

This file imports jax, jaxtyping, diffusion/ and `devices.randomness`. The schedule is the
generator's own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Key, PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import DenoiserFn
from dmd_jax.diffusion.schedule import Samples, Schedule, align, check_step_times, shift_time


class Phase(NamedTuple):
    """Where a rollout in phases has stopped (`phased`).

    Attributes:
        number: of the phase, 0 for the noisiest.
        x_s: the samples at the end of the phase, differentiable as `Rollout.x0`.
        s: the time of that end, after the shift; 0 of the last phase, whose x_s is x0.
    """

    number: Int[Array, ""]
    x_s: Float32[Array, " B *data"]
    s: Float32[Array, ""]


class Rollout(NamedTuple):
    """A generator's samples, and what a loss needs to know about them.

    Attributes:
        x0: the samples, differentiable through the generator's last call.
        mask: the elements that a loss counts; None for all.
        t_from: time of the last call, before the shift.
        t_to: time that the next call would have had, before the shift; 0 if there is none.
        cond: the condition of the samples.
        cache: the network's cache after the last call, where it has one.
        stream: what the next step goes on from, where videos go on from step to step.
        phase: of a rollout in phases; None for others.
    """

    x0: Float[Array, " B *data"]
    mask: Bool[Array, "B ..."] | None
    t_from: Float32[Array, ""]
    t_to: Float32[Array, ""]
    cond: PyTree
    cache: Any = None
    stream: Any = None
    phase: Phase | None = None


def constant(tree: PyTree) -> PyTree:
    """stop_gradient on the arrays of a pytree, which may have functions as leaves too."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)


def one_step(generator: DenoiserFn, noise: Samples, cond: PyTree, *, schedule: Schedule) -> Rollout:
    """One call at t = 1: x0 = G(sigma(1) noise, 1), from standard normal noise."""
    t = jnp.ones(noise.shape[0])
    x0 = generator(align(schedule.sigma(t), noise) * noise, t, cond)
    return Rollout(x0, None, jnp.float32(1.0), jnp.float32(0.0), cond)


def backward_simulation(
    generator: DenoiserFn,
    noise: Samples,
    cond: PyTree,
    key: Key[Array, ""],
    *,
    times: Sequence[float] | Float32[Array, " n"],
    schedule: Schedule,
    shift: float = 1.0,
    stride: Int[ArrayLike, ""] = 1,
    last_step_share: float = 0.0,
    index: Int[ArrayLike, " B"] | None = None,
    exit_step: Int[ArrayLike, ""] | None = None,
) -> Rollout:
    """Runs the generator as in inference and stops at a random step (DMD2, section 4.5).

    After each call, its x0 is mixed with fresh noise for the next time. The gradient passes through
    the last call only; the input of that call is a constant. The calls before it are a loop whose
    length is a traced value: one compilation serves every exit step.

    Args:
        generator: callable pytree, such as a Denoiser.
        noise: standard normal.
        cond: the condition of every call, with leading axis B.
        key: key of the exit step, which the whole batch shares, and of the noise between steps.
        times: the times of the calls before the shift, descending, such as (1, .75, .5, .25). An
            array may end in zeros, which are no calls (`schedule.draw_step_times`).
        schedule: the generator's schedule.
        shift: see `schedule.shift_time`.
        stride: use every stride-th of `times` only: a generator with fewer steps. It must divide
            the number of times.
        last_step_share: probability of forcing the last step; otherwise the exit step is uniform.
            1 is Self-Forcing's `last_step_only`.
        index: positions of the samples in the global batch; 0 ... B-1 if None.
        exit_step: number of calls before the last one; random if None.

    Returns:
        Rollout.

    Raises:
        ValueError: `times` do not descend from 1 at most to above 0, or the exit step is not one of
            the calls (checked where it is an int).
    """
    batch = noise.shape[0]
    index = jnp.arange(batch) if index is None else index
    if isinstance(times, jax.Array):
        calls = jnp.count_nonzero(times)
    else:
        check_step_times(times)
        calls = len(times)
    steps = calls // stride
    if isinstance(exit_step, int) and isinstance(steps, int) and not 0 <= exit_step < steps:
        raise ValueError(f"exit_step={exit_step} must be in [0, {steps}): there are {steps} calls")
    ends = jnp.asarray((*times, 0.0), jnp.float32)
    shifted = shift_time(ends, shift)
    if exit_step is None:
        # Step i draws its noise from fold_in(key, i) with i < len(times): len(times) is free.
        exit_key, last_key = jax.random.split(jax.random.fold_in(key, len(times)))
        exit_step = jax.random.randint(exit_key, (), 0, steps)
        last = jax.random.bernoulli(last_key, last_step_share)
        exit_step = jnp.where(last, steps - 1, exit_step)

    def call(net, x, step):
        return net(x, jnp.full(batch, shifted[step * stride]), cond)

    # The calls before the last have no gradient: a loop of traced length cannot be differentiated.
    frozen = constant(generator)

    def call_and_renoise(step, x):
        eps = randomness.normal(jax.random.fold_in(key, step), index, noise.shape[1:])
        x0 = call(frozen, x, step).astype(jnp.float32)
        return schedule.add_noise(x0, eps, jnp.full(batch, shifted[(step + 1) * stride]))

    x = jax.lax.stop_gradient(schedule.sigma(shifted[0]) * noise.astype(jnp.float32))
    x = jax.lax.fori_loop(0, exit_step, call_and_renoise, x)
    x0 = call(generator, x, exit_step)
    t_from, t_to = ends[exit_step * stride], ends[(exit_step + 1) * stride]
    return Rollout(x0, None, t_from, t_to, cond)
