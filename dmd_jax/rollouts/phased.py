"""A generator whose calls are divided into phases: Euler steps from noise to data.

This file imports jax, jaxtyping, diffusion/, `models.experts` and the two rollouts that it joins.
"""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Int, PyTree

from dmd_jax.diffusion.denoiser import DenoiserFn
from dmd_jax.diffusion.schedule import Samples, Schedule, check_step_times, shift_time
from dmd_jax.models.experts import expert_of
from dmd_jax.rollouts.backward_simulation import Phase, Rollout, constant
from dmd_jax.rollouts.ode import euler_step


def check_phases(times: Sequence[float], phases: Sequence[int]) -> None:
    """Raises ValueError where phases of so many calls are not the calls at `times`."""
    check_step_times(times)
    if not phases or min(phases) < 1 or sum(phases) != len(times):
        raise ValueError(
            f"phases={tuple(phases)} must be numbers of calls, 1 or more, that add up to the "
            f"{len(times)} of times={tuple(times)}"
        )


def phase_ends(times: Sequence[float], phases: Sequence[int]) -> tuple[float, ...]:
    """The time before the shift at which each phase ends: that of the next one's first call."""
    return tuple((*times, 0.0)[calls] for calls in accumulate(phases))


def phased(
    generator: DenoiserFn,
    noise: Samples,
    cond: PyTree,
    exit_step: Int[ArrayLike, ""],
    *,
    times: Sequence[float],
    phases: Sequence[int],
    schedule: Schedule,
    shift: float = 1.0,
) -> Rollout:
    """Runs the generator as in inference, up to one of its calls (Phased DMD).

    The calls before it are Euler steps along the path, each to the time of the next, through the
    experts of the earlier phases and of its own. The last call goes to the end of its phase. The
    gradient passes through this call only, as in `backward_simulation`.

    Args:
        generator: a Denoiser; expert k of `models.experts.Experts` makes the calls of phase k.
        noise: standard normal.
        cond: the condition of every call.
        exit_step: number of calls before the last one.
        times: the times of all calls before the shift, descending from 1.
        phases: the number of calls of each phase.
        schedule: the generator's schedule.
        shift: see `schedule.shift_time`.

    Returns:
        Rollout with its `phase`. Its x0 is the last call's estimate: a sample in the last phase
        only.

    Raises:
        ValueError: of `check_phases`.
    """
    check_phases(times, phases)
    batch = noise.shape[0]
    starts = jnp.asarray((*times, 0.0), jnp.float32)
    shifted = shift_time(starts, shift)
    ends = shift_time(jnp.asarray(phase_ends(times, phases), jnp.float32), shift)
    numbers = jnp.asarray([phase for phase, calls in enumerate(phases) for _ in range(calls)])

    def call(net, x, step, t_next):
        t = jnp.full(batch, shifted[step])
        x0 = expert_of(net, numbers[step])(x, t, cond)
        return x0, euler_step(x, x0, t, jnp.full(batch, t_next), schedule)

    # The calls before the last have no gradient: a loop of traced length cannot be differentiated.
    frozen = constant(generator)
    x = jax.lax.stop_gradient(schedule.sigma(shifted[0]) * noise.astype(jnp.float32))
    x = jax.lax.fori_loop(0, exit_step, lambda i, x: call(frozen, x, i, shifted[i + 1])[1], x)
    number = numbers[exit_step]
    x0, x_s = call(generator, x, exit_step, ends[number])
    phase = Phase(number, x_s, ends[number])
    return Rollout(x0, None, starts[exit_step], starts[exit_step + 1], cond, phase=phase)
