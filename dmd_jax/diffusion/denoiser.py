"""One network, seen as EDM's D(x; t): the x0 it believes in. Losses see no parametrisation.

A `Denoiser` joins a network, the schedule that it was trained on and what its output means. Imports
schedule alone; the network may be any callable pytree (an nnx.Module is one).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from dmd_jax.diffusion.schedule import EDM, FlowMatching, Schedule, align


class Prediction:
    """What a network's output means. All methods work in float32 and broadcast t as `align` does.

    `x0_scale(t)` is |d x0 / d output|. A squared error of the output times x0_scale^2 is a squared
    error of x0, so that the ratio of two predictions' scales turns one regression into the other.
    """

    def inputs(self, x_t, t, schedule):
        """The network's own input and its own time: (x_t scaled [B, ...], t in its units)."""
        return x_t, t * self.time_scale

    def check(self, schedule):
        """Raises ValueError where this prediction has no meaning under `schedule`."""


@dataclasses.dataclass(frozen=True)
class Velocity(Prediction):
    """v = eps - x0, the direction of the straight path; x0 = x_t - t v."""

    time_scale: float = 1000.0

    def check(self, schedule):
        if not isinstance(schedule, FlowMatching):
            raise ValueError(
                f"Velocity is the derivative of the straight path, and {schedule} is another one: "
                "use FlowMatching(), or Epsilon() or X0() with this schedule"
            )

    def x0(self, raw, x_t, t, schedule):
        return x_t - align(t, x_t) * raw

    def target(self, x0, eps, t, schedule):
        return eps - x0

    def x0_scale(self, t, schedule):
        return schedule.sigma(t)


@dataclasses.dataclass(frozen=True)
class Epsilon(Prediction):
    """The noise: x0 = (x_t - sigma eps) / alpha."""

    time_scale: float = 1000.0

    def x0(self, raw, x_t, t, schedule):
        return (x_t - align(schedule.sigma(t), x_t) * raw) / align(schedule.alpha(t), x_t)

    def target(self, x0, eps, t, schedule):
        return eps

    def x0_scale(self, t, schedule):
        return schedule.sigma(t) / schedule.alpha(t)


@dataclasses.dataclass(frozen=True)
class X0(Prediction):
    """The data itself."""

    time_scale: float = 1000.0

    def x0(self, raw, x_t, t, schedule):
        return raw

    def target(self, x0, eps, t, schedule):
        return x0

    def x0_scale(self, t, schedule):
        return jnp.ones_like(schedule.sigma(t))


@dataclasses.dataclass(frozen=True)
class EDMPreconditioned(Prediction):
    """Karras et al. 2022, equation 7 and table 1: x0 = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    An unweighted regression of F is EDM's loss, equation 8: the weight is in the preconditioning.
    """

    sigma_data: float = 0.5

    def check(self, schedule):
        # By type: every transformation rebuilds its Denoisers, and under tracing alpha(1) has no
        # value.
        if not isinstance(schedule, EDM):
            raise ValueError(f"EDMPreconditioned needs the schedule EDM(), got {schedule}")

    def inputs(self, x_t, t, schedule):
        sigma = schedule.sigma(t)
        return x_t / align(jnp.hypot(sigma, self.sigma_data), x_t), jnp.log(sigma) / 4.0

    def _c_skip(self, t, schedule):
        return self.sigma_data**2 / (schedule.sigma(t) ** 2 + self.sigma_data**2)

    def x0_scale(self, t, schedule):
        sigma = schedule.sigma(t)
        return sigma * self.sigma_data / jnp.hypot(sigma, self.sigma_data)

    def x0(self, raw, x_t, t, schedule):
        return (
            align(self._c_skip(t, schedule), x_t) * x_t
            + align(self.x0_scale(t, schedule), x_t) * raw
        )

    def target(self, x0, eps, t, schedule):
        x_t = schedule.add_noise(x0, eps, t)
        c_skip, c_out = align(self._c_skip(t, schedule), x0), align(self.x0_scale(t, schedule), x0)
        return (x0 - c_skip * x_t) / c_out


class Output(NamedTuple):
    """What one call of a network gave."""

    x0: jax.Array  # float32 [B, ...]
    raw: jax.Array  # float32 [B, ...]: the output itself; regressions use it and divide by no sigma
    aux: Any = None  # a cache or features, where the call asked for them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network as a function from (x_t, t, cond) to x0.

    A pytree whose leaves are the network's: gradients, optimizers and averages take a Denoiser
    whole.

    Attributes:
        net: callable pytree (x [B, ...], t [B] or [B, F] in its own units, cond) -> output [B,
            ...], or (output, aux).
        schedule: the path that `net` was trained on.
        prediction: what the output means.

    Raises:
        ValueError: the prediction has no meaning under the schedule.
    """

    net: Any
    schedule: Schedule = dataclasses.field(default=FlowMatching(), metadata={"static": True})
    prediction: Prediction = dataclasses.field(default=Velocity(), metadata={"static": True})

    def __post_init__(self):
        self.prediction.check(self.schedule)

    def predict(self, x_t, t, cond, **kwargs) -> Output:
        """Calls the network once: x_t [B, ...], t [B] or [B, F]; `kwargs` go to the network."""
        t = jnp.asarray(t, jnp.float32)
        out = self.net(*self.prediction.inputs(x_t, t, self.schedule), cond, **kwargs)
        raw, aux = out if isinstance(out, tuple) else (out, None)
        # From here on everything is float32, whatever the network runs in.
        raw, x_t = raw.astype(jnp.float32), x_t.astype(jnp.float32)
        return Output(self.prediction.x0(raw, x_t, t, self.schedule), raw, aux)

    def __call__(self, x_t, t, cond, **kwargs):
        """x0, float32 [B, ...]."""
        return self.predict(x_t, t, cond, **kwargs).x0

    def empty_cache(self, batch, slots, height, width):
        """The network's KV cache without frames: room for `slots` frames of [height, width]."""
        return self.net.empty_cache(batch, slots, height, width)


def guided(denoiser, x_t, t, cond, uncond, w, *, batched=True):
    """Classifier-free guidance (Ho and Salimans 2022) in x0: uncond + w (cond - uncond).

    The one convention of this library: w = 1 is no guidance and costs one pass. Others count
    differently; docs/guidance.md converts their numbers.

    Args:
        denoiser: any callable (x_t, t, cond) -> x0.
        x_t: [B, ...]; t: [B] or [B, F].
        cond, uncond: conditions, pytrees with leading axis B.
        w: the guidance weight.
        batched: one pass over a doubled batch, or two passes one after the other (half the memory).

    Returns:
        x0 [B, ...].
    """
    if isinstance(w, int | float) and w == 1:
        return denoiser(x_t, t, cond)
    if batched:
        # Interleaved, not concatenated: each sample's pair stays on the device that holds the
        # sample.
        def pair(a, b):
            return rearrange(jnp.stack([a, b], axis=1), "b two ... -> (b two) ...")

        both = denoiser(pair(x_t, x_t), pair(t, t), jax.tree.map(pair, cond, uncond))
        x0_cond, x0_uncond = jnp.moveaxis(rearrange(both, "(b two) ... -> b two ...", two=2), 1, 0)
    else:
        x0_cond = denoiser(x_t, t, cond)
        # The barrier keeps the compiler from running both passes, and holding both, at once.
        x_t, x0_cond = jax.lax.optimization_barrier((x_t, x0_cond))
        x0_uncond = denoiser(x_t, t, uncond)
    return x0_uncond + w * (x0_cond - x0_uncond)
