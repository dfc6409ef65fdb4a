"""Consistency models and flow maps: what makes a network jump along a teacher's ODE.

The map f(x_t, t) of a perfect student is the end of the ODE through x_t, so that it is the same
number everywhere on one path: df/dt = 0. Discrete losses compare two points of the path;
continuous ones take the derivative, by `jax.jvp`. Every target and tangent here is a constant, and
is exactly what the exact map leaves at zero.

Times are those of flow matching, x_t = (1 - t) x0 + t eps. Networks are functions of (x_t, t), with
their conditions bound. Attention kernels have no jvp: see `models.attention.forward_mode`.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Real

from dmd_jax.diffusion.schedule import Samples, align, expand
from dmd_jax.losses.distribution_matching import dmd_loss, finite_samples, square_norms

Time: TypeAlias = Float[ArrayLike, " B"]
# (x_t, t) -> v, the velocity at x_t; and (z, angle) -> F, the same network as TrigFlow sees it.
VelocityFn: TypeAlias = Callable[[Samples, Time], Samples]
# (x_t, t, r) -> u, the mean velocity of the path from t to r.
AverageVelocityFn: TypeAlias = Callable[[Samples, Time, Time], Samples]


# --- Discrete: consistency distillation, ECT ------------------------------------------------------


def ect_time(t: Time, gap: Real[ArrayLike, "..."]) -> Float32[Array, " B"]:
    """The time r < t with which a discrete loss compares t (ECT, Geng et al. 2024, section 4).

        r = t (1 - gap (1 + 8 sigmoid(-s))), at least 0, with s = t / (1 - t), the noise over the
        data

    ECT's times are s; here its ratio r / t is that of the times of flow matching, so that r stays
    away from t = 1. A gap of 1/2 compares times up to t = 0.66 with data, r = 0: denoising. A gap
    near 0 is the continuous loss.

    Args:
        t: times.
        gap: in (0, 1], a number or [B]; ECT's 1 / q^a.
    """
    t = jnp.asarray(t, jnp.float32)
    slope = 1.0 + 8.0 * jax.nn.sigmoid(-t / jnp.maximum(1.0 - t, 1e-6))
    return t * jnp.maximum(1.0 - gap * slope, 0.0)


def consistency_loss(
    x0: Samples, target: Samples, t: Time, r: Time, *, huber: float = 1e-8
) -> Float32[Array, ""]:
    """mean (sqrt(|x0 - target|^2 + c^2) - c) / (t - r), with the L2 norm over a sample's elements.

    (Song and Dhariwal 2023, iCT: the pseudo-Huber metric and this weight; ECT.) A large c makes it
    the squared error of Song et al. 2023, divided by 2 c.

    Args:
        x0: the student's map of x_t.
        target: its map of x_r, the point of the same path at r < t; x_r itself at r = 0. It is a
            constant here, and a sample in which it is not finite counts zero.
        t, r: these times.
        huber: c, above 0.
    """
    square, usable = _square_error(x0, target)
    weight = usable / (jnp.asarray(t, jnp.float32) - r)
    # Not sqrt(square + c^2) - c, which loses all digits where c is large.
    return jnp.mean(weight * square / (jnp.sqrt(square + huber**2) + huber))


# --- Continuous, as TrigFlow: sCM -----------------------------------------------------------------


def trigflow_angle(t: Time) -> Float32[Array, " B"]:
    """TrigFlow's time of a time t of flow matching, from 0 (data) to pi/2: tan = t / (1 - t)."""
    t = jnp.asarray(t, jnp.float32)
    return jnp.arctan2(t, 1.0 - t)


def trigflow_point(x_t: Samples, angle: Time) -> Float32[Array, " B *data"]:
    """TrigFlow's z = cos(a) x0 + sin(a) eps at x_t: x_t times cos(a) + sin(a)."""
    return align(jnp.cos(angle) + jnp.sin(angle), x_t) * x_t


def trigflow_velocity(x_t: Samples, velocity: Samples, angle: Time) -> Float32[Array, " B *data"]:
    """TrigFlow's velocity dz/da, where flow matching's is `velocity` at x_t: with cos and sin of a,

        dz/da = (cos - sin) x_t + velocity / (cos + sin)

    (sCM, Lu and Song 2024, with sigma_d = 1; SANA-Sprint, Chen et al. 2025, proposition 3.1.) Both
    paths have the same x0 there, cos z - sin dz/da = x_t - t v. No divisor is small.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return align(cos - sin, x_t) * x_t + velocity / align(cos + sin, x_t)


def trigflow(velocity: VelocityFn) -> VelocityFn:
    """A network of flow matching, seen as TrigFlow's F(z, a); exact, nothing is trained.

    Returns:
        F, a function of z [B, ...] and the angle [B], whose values are velocities dz/da.
    """

    def seen(z, angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        x_t = z / align(cos + sin, z)
        return trigflow_velocity(x_t, velocity(x_t, sin / (cos + sin)), angle)

    return seen


def scm_tangent(
    network: VelocityFn,
    z: Samples,
    angle: Time,
    velocity: Samples,
    *,
    warmup: Real[ArrayLike, "..."] = 1.0,
) -> Float32[Array, " B *data"]:
    """g = cos(a) df/da along the path, of the map f = cos(a) z - sin(a) F(z, a) (sCM, algorithm 1).

        g = -cos^2 (F - dz/da) - w cos sin (z + dF/da)

    It is zero for the exact map. One call of `jax.jvp`, whose tangents have the factor cos sin
    already: near pi/2, where dF/da may be large, nothing is large.

    Args:
        network: F, such as `trigflow(...)`.
        z, angle: points of TrigFlow's path.
        velocity: dz/da there, of a teacher (or cos eps - sin x0, to learn from data alone).
        warmup: w, from 0 to 1 in the first steps of a run: the derivative of F is noisy there.

    Returns:
        A constant.
    """
    z, velocity, angle = (jnp.asarray(a, jnp.float32) for a in (z, velocity, angle))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    factor = cos * sin
    scaled = align(factor, z) * velocity
    F, dF = jax.jvp(network, (z, angle), (scaled, factor))
    warm = jnp.broadcast_to(jnp.asarray(warmup, jnp.float32), angle.shape)
    g = align(-jnp.square(cos), z) * (F - velocity) - align(warm, z) * (align(factor, z) * z + dF)
    return jax.lax.stop_gradient(g)


def normalized_tangent(g: Samples, c: float = 0.1) -> Float32[Array, " B *data"]:
    """g / (|g| + c), and zero for a sample in which g is not finite (sCM, section 4.2).

    |g| is the root mean square of a sample's elements, as in NVIDIA's FastGen: c then means the
    same for images of any size. rCM's is the norm, beside which its c is nothing.
    """
    g = g.astype(jnp.float32)
    g = jnp.where(expand(finite_samples(g), g), g, 0.0)
    return g / (expand(root_mean_square(g), g) + c)


def scm_loss(F: Samples, g: Samples) -> Float32[Array, ""]:
    """0.5 mean (F - sg(F + g))^2 without its cancellation: its gradient is -g / N (sCM, eq. 8).

    Args:
        F: the network's output as TrigFlow sees it, with its gradient.
        g: from `normalized_tangent`.
    """
    return dmd_loss(F, -g)


# --- Continuous, of two times: MeanFlow -----------------------------------------------------------


def mean_flow_target(
    average: AverageVelocityFn,
    x_t: Samples,
    t: Time,
    r: Time,
    velocity: Samples,
    *,
    warmup: Real[ArrayLike, "..."] = 1.0,
) -> Float32[Array, " B *data"]:
    """v - w (t - r) du/dt, equal to the mean velocity u (MeanFlow, Geng et al. 2025, equation 6).

    The derivative is along the path at fixed r: tangents (v, 1, 0). At r = t the target is v, flow
    matching. At r = 0, u minus it is -df/dt of the map f = x_t - t u: sCM in other times.

    Args:
        average: u, a function of (x_t, t, r).
        velocity: v at x_t, of a teacher (or eps - x0, to learn from data alone).
        warmup: w, from 0 to 1 in the first steps of a run.

    Returns:
        A constant.
    """
    x_t, t, r, velocity = (jnp.asarray(a, jnp.float32) for a in (x_t, t, r, velocity))
    tangents = velocity, jnp.ones_like(t), jnp.zeros_like(r)
    _, du = jax.jvp(average, (x_t, t, r), tangents)
    return jax.lax.stop_gradient(velocity - align(warmup * (t - r), x_t) * du)


def mean_flow_loss(
    u: Samples, target: Samples, *, power: float = 1.0, c: float = 1e-3
) -> Float32[Array, ""]:
    """mean e / sg(e + c)^p, with e = |u - target|^2 summed over a sample (MeanFlow, section 4.3).

    A sample whose target is not finite counts zero.

    Args:
        power: p; 0 is the squared error, 1/2 one whose gradients all have one norm, as sCM's.
    """
    error, usable = _square_error(u, target)
    weight = jax.lax.stop_gradient(usable * jnp.power(error + c, -power))
    return jnp.mean(weight * error)


def _square_error(x, target):
    """(|x - sg(target)|^2, whether the target is finite) of each sample; 0 where it is not."""
    x, usable = x.astype(jnp.float32), finite_samples(target)
    target = jnp.where(expand(usable, x), jax.lax.stop_gradient(target), 0.0)
    x = jnp.where(expand(usable, x), x, 0.0)
    return square_norms(x - target), usable


def root_mean_square(x: Samples) -> Float32[Array, " B"]:
    """The root mean square of each sample's elements."""
    square = jnp.square(x.astype(jnp.float32))
    return jnp.sqrt(jnp.mean(square, axis=tuple(range(1, square.ndim))))
