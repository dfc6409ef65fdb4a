"""One network as the denoiser D(x_t, t) of EDM: the function that estimates x0.

A `Denoiser` combines a network, the schedule that it was trained with, and the meaning of its
output. Losses see x0 and never a parametrisation. This file imports jax, einops, jaxtyping and
`schedule`; the network may be any callable pytree, such as an nnx.Module.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, Float32, PyTree, Real

from dmd_jax.diffusion.schedule import EDM, FlowMatching, Samples, Schedule, Times, align

# What losses, solvers and rollouts call: (x_t [B, ...], t [B] or [B, F], cond) -> x0 [B, ...]. A
# `Denoiser` is one; so are a guided teacher and, in a test, a formula.
DenoiserFn: TypeAlias = Callable[[Samples, Times, PyTree], Float[Array, " B *data"]]


class Prediction:
    """The meaning of a network's output. All methods compute in float32; t is [B] or [B, F].

    Subclasses define, next to `inputs` and `check`:
        x0(raw, x_t, t, schedule): x0 from the network's output `raw` at x_t.
        target(x0, eps, t, schedule): the output of a perfect network, which regressions use.
        x0_scale(t, schedule): |d x0 / d output|, of the shape of t. A squared error of the output
            times x0_scale^2 is a squared error of x0. The squared ratio of two predictions' scales
            therefore turns the regression of one into the regression of the other.
    """

    def inputs(self, x_t: Samples, t: Times, schedule: Schedule) -> tuple[Samples, Times]:
        """The network's inputs: x_t, scaled as in its training, and t in its own units."""
        return x_t, t * self.time_scale

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError if this prediction is undefined for `schedule`."""


@dataclasses.dataclass(frozen=True)
class Velocity(Prediction):
    """v = eps - x0, the direction of the straight path; x0 = x_t - t v."""

    time_scale: float = 1000.0

    def check(self, schedule: Schedule) -> None:
        if not isinstance(schedule, FlowMatching):
            raise ValueError(
                f"Velocity is the derivative of the straight path, and {schedule} is another one: "
                "use FlowMatching(), or Epsilon() or X0() with this schedule"
            )

    def x0(self, raw: Samples, x_t: Samples, t: Times, schedule: Schedule) -> Samples:
        return x_t - align(t, x_t) * raw

    def target(self, x0: Samples, eps: Samples, t: Times, schedule: Schedule) -> Samples:
        return eps - x0

    def x0_scale(self, t: Times, schedule: Schedule) -> Times:
        return schedule.sigma(t)


@dataclasses.dataclass(frozen=True)
class Epsilon(Prediction):
    """The noise: x0 = (x_t - sigma eps) / alpha."""

    time_scale: float = 1000.0

    def x0(self, raw: Samples, x_t: Samples, t: Times, schedule: Schedule) -> Samples:
        return (x_t - align(schedule.sigma(t), x_t) * raw) / align(schedule.alpha(t), x_t)

    def target(self, x0: Samples, eps: Samples, t: Times, schedule: Schedule) -> Samples:
        return eps

    def x0_scale(self, t: Times, schedule: Schedule) -> Times:
        return schedule.sigma(t) / schedule.alpha(t)


@dataclasses.dataclass(frozen=True)
class X0(Prediction):
    """The data itself."""

    time_scale: float = 1000.0

    def x0(self, raw: Samples, x_t: Samples, t: Times, schedule: Schedule) -> Samples:
        return raw

    def target(self, x0: Samples, eps: Samples, t: Times, schedule: Schedule) -> Samples:
        return x0

    def x0_scale(self, t: Times, schedule: Schedule) -> Times:
        return jnp.ones_like(schedule.sigma(t))


@dataclasses.dataclass(frozen=True)
class EDMPreconditioned(Prediction):
    """Karras et al. 2022, equation 7 and table 1: x0 = c_skip x + c_out F(c_in x, ln(sigma) / 4).

    An unweighted regression of F is EDM's loss (equation 8): the preconditioning contains the
    weight.
    """

    sigma_data: float = 0.5

    def check(self, schedule: Schedule) -> None:
        # By type and not by value: jax reconstructs Denoisers while it traces, and there alpha(1)
        # is a tracer.
        if not isinstance(schedule, EDM):
            raise ValueError(f"EDMPreconditioned needs the schedule EDM(), got {schedule}")

    def inputs(self, x_t: Samples, t: Times, schedule: Schedule) -> tuple[Samples, Times]:
        sigma = schedule.sigma(t)
        return x_t / align(jnp.hypot(sigma, self.sigma_data), x_t), jnp.log(sigma) / 4.0

    def _c_skip(self, t, schedule):
        return self.sigma_data**2 / (schedule.sigma(t) ** 2 + self.sigma_data**2)

    def x0_scale(self, t: Times, schedule: Schedule) -> Times:
        sigma = schedule.sigma(t)
        return sigma * self.sigma_data / jnp.hypot(sigma, self.sigma_data)

    def x0(self, raw: Samples, x_t: Samples, t: Times, schedule: Schedule) -> Samples:
        return (
            align(self._c_skip(t, schedule), x_t) * x_t
            + align(self.x0_scale(t, schedule), x_t) * raw
        )

    def target(self, x0: Samples, eps: Samples, t: Times, schedule: Schedule) -> Samples:
        x_t = schedule.add_noise(x0, eps, t)
        c_skip, c_out = align(self._c_skip(t, schedule), x0), align(self.x0_scale(t, schedule), x0)
        return (x0 - c_skip * x_t) / c_out


class Output(NamedTuple):
    """The result of one network call.

    Attributes:
        x0: the estimate of the data.
        raw: the network's own output. Regressions use it, so that nothing is divided by sigma.
        aux: a cache or features, if the call requested them.
    """

    x0: Float32[Array, " B *data"]
    raw: Float32[Array, " B *data"]
    aux: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network as a function from (x_t, t, cond) to x0.

    A pytree whose leaves are the network's: gradients, optimizers and weight averages work on a
    Denoiser directly.

    Attributes:
        net: callable pytree (x [B, ...], t [B] or [B, F] in its own units, cond) -> output [B,
            ...], or (output, aux).
        schedule: the path that `net` was trained on.
        prediction: the meaning of the output.

    Raises:
        ValueError: the prediction is undefined for the schedule.
    """

    net: Any
    schedule: Schedule = dataclasses.field(default=FlowMatching(), metadata={"static": True})
    prediction: Prediction = dataclasses.field(default=Velocity(), metadata={"static": True})

    def __post_init__(self):
        self.prediction.check(self.schedule)

    def predict(self, x_t: Samples, t: Times, cond: PyTree, **kwargs: Any) -> Output:
        """Calls the network once; `kwargs` are passed to the network.

        Raises:
            ValueError: the network's output does not have the shape of its input.
        """
        t = jnp.asarray(t, jnp.float32)
        out = self.net(*self.prediction.inputs(x_t, t, self.schedule), cond, **kwargs)
        raw, aux = out if isinstance(out, tuple) else (out, None)
        if raw.shape != x_t.shape:  # it could broadcast: one channel of data, two of output
            raise ValueError(
                f"the network returned {raw.shape} for x_t of {x_t.shape}: select the channels of "
                f"its {type(self.prediction).__name__} prediction"
            )
        # From here on everything is float32, whatever the dtype inside the network is.
        raw, x_t = raw.astype(jnp.float32), x_t.astype(jnp.float32)
        return Output(self.prediction.x0(raw, x_t, t, self.schedule), raw, aux)

    def __call__(
        self, x_t: Samples, t: Times, cond: PyTree, **kwargs: Any
    ) -> Float32[Array, " B *data"]:
        """x0 alone; see `predict`."""
        return self.predict(x_t, t, cond, **kwargs).x0

    def empty_cache(self, batch, slots, height, width):
        """The network's KV cache without frames: room for `slots` frames of [height, width]."""
        return self.net.empty_cache(batch, slots, height, width)


def guided(
    denoiser: DenoiserFn,
    x_t: Samples,
    t: Times,
    cond: PyTree,
    uncond: PyTree,
    w: Real[ArrayLike, ""],
    *,
    batched: bool = True,
) -> Float[Array, " B *data"]:
    """Classifier-free guidance (Ho and Salimans 2022) in x0: uncond + w (cond - uncond).

    This is the only convention in this library: w = 1 is no guidance and costs one pass.
    docs/guidance.md converts the numbers of other conventions.

    Args:
        denoiser: a Denoiser or any other `DenoiserFn`.
        x_t: noisy samples.
        t: their times, [B] or [B, F].
        cond, uncond: conditional and unconditional input, pytrees of arrays with leading axis B.
        w: the guidance weight.
        batched: one pass over a doubled batch; otherwise two passes in sequence, in half the
            memory.

    Returns:
        The guided x0.
    """
    if isinstance(w, int | float) and w == 1:
        return denoiser(x_t, t, cond)
    x0_cond, x0_uncond = conditional_and_unconditional(
        denoiser, x_t, t, cond, uncond, batched=batched
    )
    return x0_uncond + w * (x0_cond - x0_uncond)


def conditional_and_unconditional(
    denoiser: DenoiserFn, x_t: Samples, t: Times, cond: PyTree, uncond: PyTree, *, batched: bool
) -> tuple[Float[Array, " B *data"], Float[Array, " B *data"]]:
    """The two x0 of guidance, (conditional, unconditional); arguments as for `guided`."""
    if batched:
        # Interleaved and not concatenated: both halves of a pair stay on the device of the sample.
        def pair(a, b):
            return rearrange(jnp.stack([a, b], axis=1), "b two ... -> (b two) ...")

        both = denoiser(pair(x_t, x_t), pair(t, t), jax.tree.map(pair, cond, uncond))
        x0_cond, x0_uncond = jnp.moveaxis(rearrange(both, "(b two) ... -> b two ...", two=2), 1, 0)
    else:
        x0_cond = denoiser(x_t, t, cond)
        # Without the barrier, the compiler may run both passes at once, with twice the memory.
        x_t, x0_cond = jax.lax.optimization_barrier((x_t, x0_cond))
        x0_uncond = denoiser(x_t, t, uncond)
    return x0_cond, x0_uncond
