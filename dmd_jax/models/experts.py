"""Several networks as one, each for an interval of noise levels, such as Wan 2.2's pair.

Imports jax, flax and diffusion.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import ArrayLike, Int

from dmd_jax.diffusion.denoiser import Denoiser


class Experts(nnx.Module):
    """Networks of one configuration, one of which is called.

    Attributes:
        nets: the networks, from high noise to low.
        boundaries: the times that divide them, descending, in the networks' own units: `nets[i]` is
            for times from `boundaries[i]` up.
    """

    def __init__(self, nets: Sequence[nnx.Module], boundaries: Sequence[float]):
        self.nets = nnx.List(nets)
        self.boundaries = tuple(boundaries)

    @property
    def config(self):
        """Of all networks."""
        return self.nets[0].config

    def __call__(self, x, timestep, cond, *, expert: Int[ArrayLike, ""] | None = None):
        """As one of the networks.

        Args:
            expert: its number; None for that of the first sample's time: all samples of a batch
                must be of one interval, as in a sampler.
        """
        if expert is None:
            expert = jnp.sum(timestep.reshape(-1)[0] < jnp.asarray(self.boundaries))
        branches = [partial(net, x, timestep, cond) for net in self.nets]
        return jax.lax.switch(expert, branches)


def combine(denoisers: Sequence[Denoiser], boundaries: Sequence[float]) -> Denoiser:
    """The Denoiser of several, with their weights.

    Args:
        denoisers: from high noise to low, of one configuration, schedule and prediction.
        boundaries: the times in [0, 1] that divide them, descending.

    Raises:
        ValueError: the boundaries do not descend within (0, 1), or are not one fewer than the
            networks; or these differ in configuration, schedule or prediction.
    """
    ends = (1.0, *boundaries, 0.0)
    if len(boundaries) != len(denoisers) - 1 or any(np.diff(ends) >= 0.0):
        raise ValueError(
            f"boundaries={tuple(boundaries)} must be {len(denoisers) - 1} times, descending within "
            f"(0, 1), to divide {len(denoisers)} networks"
        )
    first, *others = denoisers
    for number, other in enumerate(others, 1):
        for a, b in zip(_described(first), _described(other), strict=True):
            if a != b:
                raise ValueError(f"expert {number} is of {b}, but expert 0 of {a}: all must agree")
    net = Experts([one.net for one in denoisers], network_times(first, boundaries))
    return dataclasses.replace(first, net=net)


def _described(denoiser):
    """What experts share. A network of no family may have no config."""
    return getattr(denoiser.net, "config", None), denoiser.schedule, denoiser.prediction


def network_times(denoiser: Denoiser, times: Sequence[float]) -> tuple[float, ...]:
    """Times in [0, 1] in the units of a Denoiser's network, in which experts are divided."""
    times = np.asarray(times, np.float64)
    units = denoiser.prediction.inputs(times, times, denoiser.schedule)[1]
    return tuple(float(t) for t in units)


def expert_of(denoiser: Any, number: Int[ArrayLike, ""]) -> Any:
    """The Denoiser of one expert, whatever the time; without experts, `denoiser` itself.

    Its gradient is that of all experts, zero for the others.
    """
    if not isinstance(getattr(denoiser, "net", None), Experts):
        return denoiser
    return dataclasses.replace(denoiser, net=partial(denoiser.net, expert=number))
