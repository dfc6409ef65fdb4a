"""Decoupled DMD: its two parts, their times, and the fixed point in closed form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import FLOW, normal

from dmd_jax.diffusion.denoiser import X0, Denoiser
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.decoupled_dmd import DecoupledDMD
from dmd_jax.methods.dmd import DMD
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.backward_simulation import Rollout

COND, UNCOND, VARIANCE, W = 1.0, -0.5, 0.4, 4.0
KEYS, OTHERS = (tuple(jax.random.split(jax.random.key(n))) for n in (1, 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The exact denoiser of N(cond + away, VARIANCE)."""

    away: Any

    def __call__(self, x_t, t, cond):
        a, s = FLOW.alpha(t)[:, None], FLOW.sigma(t)[:, None]
        mean = cond + self.away
        return mean + a * VARIANCE / (a**2 * VARIANCE + s**2) * (x_t - a * mean)


def gain(t):
    """(fake - real) / (difference of their means) at time t: sigma^2 / var(x_t)."""
    return t**2 / ((1 - t) ** 2 * VARIANCE + t**2)


def setting(mean, n, t_from=1.0):
    """(rollout, nets, batch) of a student N(mean, VARIANCE) with its exact fake score."""

    def denoiser(away):
        return Denoiser(Gaussian(jnp.float32(away)), FLOW, X0(time_scale=1.0))

    cond = jnp.full((n, 1), COND)
    x0 = mean + np.sqrt(VARIANCE) * normal(0, n, 1)
    rollout = Rollout(x0, None, jnp.float32(t_from), jnp.float32(0), cond)
    nets = {"teacher": denoiser(0.0), "fake_score": denoiser(mean - COND)}
    return rollout, nets, {"uncond": jnp.full((n, 1), UNCOND), "index": jnp.arange(n)}


def times(n, keys, high=1.0):
    """The times that a method draws with these keys."""
    rollout = setting(0.0, n, high)[0]
    method = DMD((1,), below_exit=True)
    return method.diffuse(rollout, FLOW, jnp.arange(n), *keys)[1]


def parts(method, mean, n, t_from=1.0, others=OTHERS):
    return method.gradient(*setting(mean, n, t_from), KEYS, others)[0]


@pytest.mark.parametrize("hybrid", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_the_gradient_of_exact_scores_is_that_of_the_closed_form(hybrid, batched):
    method = DecoupledDMD(
        (1,), guidance=W, normalize=False, hybrid=hybrid, batched_guidance=batched
    )
    t, at = times(50, KEYS), times(50, OTHERS, 0.5 if hybrid else 1.0)
    grad = parts(method, 2.0, 50, t_from=0.5)[:, 0]
    wanted = gain(t) * (2.0 - COND) + (W - 1) * gain(at) * (UNCOND - COND)
    np.testing.assert_allclose(grad, wanted, rtol=1e-3, atol=2e-5)
    assert at.max() < 0.5 or not hybrid


@pytest.mark.parametrize("t_from", [0.75, 0.25])
def test_the_fixed_point_is_the_guided_mean_times_the_ratio_of_gains(t_from):
    """b = m_c + (w - 1) (m_c - m_u) E[gain(t_ca)] / E[gain(t_dm)]; its own is at any t: 5.5."""
    n = 20_000
    method = DecoupledDMD((1,), guidance=W, normalize=False)
    at_zero, at_one = (jnp.mean(parts(method, b, n, t_from)) for b in (0.0, 1.0))
    found = -at_zero / (at_one - at_zero)  # the mean gradient is affine in the student's mean

    def mean(high):
        t = np.clip(np.linspace(0.0, high, 100_001), 0.02, 0.98)
        return gain(t).mean()

    wanted = COND + (W - 1) * (COND - UNCOND) * mean(t_from) / mean(1.0)
    assert found == pytest.approx(wanted, rel=0.03)
    assert wanted < 5.4
    coupled = dataclasses.replace(method, hybrid=False)
    at_zero, at_one = (jnp.mean(parts(coupled, b, n, t_from)) for b in (0.0, 1.0))
    assert -at_zero / (at_one - at_zero) == pytest.approx(5.5, rel=0.03)


def test_distribution_matching_alone_goes_to_the_condition_and_augmentation_never_rests():
    def moved(w, mean):
        method = DecoupledDMD((1,), guidance=w, normalize=False)
        return parts(method, mean, 200)[:, 0]

    augmentation = moved(3.0, 0.3) - moved(2.0, 0.3)
    np.testing.assert_allclose(augmentation, moved(3.0, 9.0) - moved(2.0, 9.0), atol=1e-4)
    assert (augmentation < 0).all()  # the loss pushes the mean up, wherever it is
    np.testing.assert_allclose(moved(2.0, COND), augmentation, atol=1e-5)


def test_equal_times_and_noise_are_dmd_with_guidance():
    decoupled = DecoupledDMD((1,), guidance=W, normalize=False, hybrid=False)
    rollout, nets, batch = setting(2.0, 50)
    grad, _ = decoupled.gradient(rollout, nets, batch, KEYS, KEYS)
    method = DMD((1,), guidance=W, normalize=False)

    def loss(x0):
        return method.compare(rollout._replace(x0=x0), nets, batch, *KEYS)[0]

    np.testing.assert_allclose(50 * jax.grad(loss)(rollout.x0), grad, rtol=1e-4, atol=1e-5)


def test_each_part_has_a_normaliser_of_its_own():
    method = DecoupledDMD((1,), guidance=W)
    rollout, nets, batch = setting(2.0, 50, 0.5)
    teacher = nets["teacher"]
    grad, observed = method.gradient(rollout, nets, batch, KEYS, OTHERS)
    plain = dataclasses.replace(method, normalize=False)
    wanted = 0.0
    for keys, below in ((KEYS, False), (OTHERS, True)):
        x_t, t, _ = DMD((1,), below_exit=below).diffuse(rollout, FLOW, batch["index"], *keys)
        error = jnp.abs(rollout.x0 - teacher(x_t, t, rollout.cond))
        part = gain(t) * ((W - 1) * (UNCOND - COND) if below else 2.0 - COND)
        wanted = wanted + part[:, None] / error
    np.testing.assert_allclose(grad, wanted, rtol=5e-3, atol=1e-4)
    assert jnp.abs(grad - parts(plain, 2.0, 50, 0.5)).max() > 0.1
    metrics = method.metrics(observed)
    assert metrics["augmentation/ratio"] > 0 and jnp.isfinite(metrics["critic/tracking"])


def test_the_loss_has_the_gradient_for_the_samples_and_none_for_the_scores():
    method = DecoupledDMD((1,), guidance=W)
    rollout, nets, batch = setting(2.0, 6)

    def loss(x0, nets):
        return method.compare(rollout._replace(x0=x0), nets, batch, *KEYS)[0]

    at_x0, at_nets = jax.grad(loss, (0, 1))(rollout.x0, nets)
    assert jnp.abs(at_x0).min() > 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(at_nets))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, r"guidance=1\.0, fake_guidance=1\.0: the augmentation is the teacher's guidance"),
        ({"guidance": 2.0, "fake_guidance": 2.0}, "the fake score's must be 1"),
    ],
)
def test_what_cannot_be_decoupled_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoupledDMD((2,), **fields)


def test_the_hybrid_schedule_needs_one_exit_step():
    video = SelfForcing(Causal(2), per_block_exit=True)
    with pytest.raises(ValueError, match="hybrid=True needs one exit step"):
        DecoupledDMD((6, 4, 4, 3), guidance=2.0, video=video)
    DecoupledDMD((6, 4, 4, 3), guidance=2.0, video=video, hybrid=False)
