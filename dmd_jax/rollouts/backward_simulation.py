"""How a generator makes a sample: one call, or a few calls with fresh noise between them.

Imports jax, schedule and randomness. A generator is any callable pytree (x_t, t, cond) -> x0; the
schedule is the generator's own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.devices import randomness
from dmd_jax.diffusion.schedule import align, shift_time


class Rollout(NamedTuple):
    """A generator's samples and what a loss has to know of how they were made."""

    x0: jax.Array  # [B, ...]: differentiable through the last call
    mask: jax.Array | None  # what a loss may count, None for everything
    t_from: jax.Array  # float32 []: time of the last call, before the shift
    t_to: jax.Array  # float32 []: time that the call after it would have had, 0 for none
    cond: Any  # the condition under which x0 was made
    cache: Any = None


def _freeze(tree):
    """stop_gradient on the arrays of a tree that may hold plain functions too."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x, tree)


def one_step(generator, noise, cond, *, schedule):
    """One call at t = 1: x0 = G(sigma(1) noise, 1); noise [B, ...]."""
    t = jnp.ones(noise.shape[0])
    x0 = generator(align(schedule.sigma(t), noise) * noise, t, cond)
    return Rollout(x0, None, jnp.float32(1.0), jnp.float32(0.0), cond)


def backward_simulation(
    generator,
    noise,
    cond,
    key,
    *,
    times,
    schedule,
    shift=1.0,
    stride=1,
    last_step_share=0.0,
    index=None,
    exit_step=None,
):
    """Runs the generator as inference will, and stops at a random step (DMD2, section 4.5).

    Each call's x0 is noised again, with fresh noise, to the next time. The gradient passes through
    the last call alone; its input is a constant. One compilation serves every exit step: the calls
    before it are a loop whose length is a traced value.

    Args:
        generator: callable pytree (x_t, t, cond) -> x0.
        noise: standard normal, [B, ...].
        cond: conditions with leading axis B.
        key: the key of the exit step, which all samples share, and of the noise between steps.
        times: the times of the calls before the shift, descending, such as (1, .75, .5, .25).
        schedule: the generator's schedule.
        shift: see `schedule.shift_time`.
        stride: call at every stride-th of `times` only, an int or a traced int32 that divides their
            number: a student of fewer steps.
        last_step_share: how often the rollout runs to its end for sure; otherwise, the exit step is
            uniform. 1 is the `last_step_only` of Self-Forcing.
        index: int32 [B], the samples' positions in the global batch; 0 ... B-1 if None.
        exit_step: which call to stop after, an int or a traced int32; random if None.

    Returns:
        Rollout.
    """
    batch = noise.shape[0]
    index = jnp.arange(batch) if index is None else index
    steps = len(times) // stride
    ends = jnp.asarray((*times, 0.0), jnp.float32)
    shifted = shift_time(ends, shift)
    if exit_step is None:
        exit_key, last_key = jax.random.split(jax.random.fold_in(key, len(times)))
        exit_step = jax.random.randint(exit_key, (), 0, steps)
        last = jax.random.bernoulli(last_key, last_step_share)
        exit_step = jnp.where(last, steps - 1, exit_step)

    def call(net, x, step):
        return net(x, jnp.full(batch, shifted[step * stride]), cond)

    frozen = _freeze(generator)

    def again(step, x):
        eps = randomness.normal(jax.random.fold_in(key, step), index, noise.shape[1:])
        x0 = call(frozen, x, step).astype(jnp.float32)
        return schedule.add_noise(x0, eps, jnp.full(batch, shifted[(step + 1) * stride]))

    x = jax.lax.stop_gradient(schedule.sigma(shifted[0]) * noise.astype(jnp.float32))
    x = jax.lax.fori_loop(0, exit_step, again, x)
    x0 = call(generator, x, exit_step)
    t_from, t_to = ends[exit_step * stride], ends[(exit_step + 1) * stride]
    return Rollout(x0, None, t_from, t_to, cond)
