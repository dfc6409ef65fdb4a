"""Pretrain: the regression of what the network predicts, and the dropout of conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import exact

from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon, Velocity
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching
from dmd_jax.methods.pretrain import Pretrain

KEY = jax.random.key(4)


class Spy:
    """A network that returns 0.3 everywhere and stores its arguments."""

    def __call__(self, x, t, cond):
        self.x, self.t, self.cond = x, t, cond
        return jnp.full_like(x, 0.3)


def batch(n):
    data = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    cond = {"label": jnp.arange(n) + 1, "text": jnp.ones((n, 3, 2))}
    uncond = {"label": jnp.zeros(n, jnp.int32), "text": jnp.zeros((n, 3, 2))}
    return {"data": data, "cond": cond, "uncond": uncond, "index": jnp.arange(n)}


@pytest.mark.parametrize(
    "prediction, schedule",
    [
        (Velocity(1.0), FlowMatching()),
        (X0(1.0), VP()),
        (Epsilon(1.0), VP()),
        (EDMPreconditioned(), EDM()),
    ],
)
def test_loss_is_the_mean_squared_error_of_what_the_network_predicts(prediction, schedule):
    spy, data = Spy(), batch(8)
    method = Pretrain((2,), dropout=0.0, clip=(0.1, 0.9))
    loss, (metrics, rollout) = method.generator_loss(
        Denoiser(spy, schedule, prediction), {}, data, KEY
    )
    assert metrics == {} and rollout is None
    # The noise, and with it the target, follow from the network's input and time.
    t, x_t = spy.t, spy.x
    if isinstance(prediction, EDMPreconditioned):
        sigma = jnp.exp(4 * t)
        x_t = x_t * jnp.hypot(sigma, 0.5)[:, None]
        t = (sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    eps = (x_t - schedule.alpha(t)[:, None] * data["data"]) / schedule.sigma(t)[:, None]
    target = prediction.target(data["data"], eps, t, schedule)
    np.testing.assert_allclose(loss, jnp.mean((0.3 - target) ** 2), rtol=1e-3)


def test_dropout_replaces_its_share_of_whole_conditions():
    spy = Spy()
    Pretrain((2,), dropout=0.2).generator_loss(Denoiser(spy), {}, batch(4000), KEY)
    dropped = np.asarray(spy.cond["label"] == 0)
    assert dropped.mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / 4000))
    # A condition is kept or dropped as one: the label and the text agree, and no other is mixed in.
    np.testing.assert_array_equal(
        spy.cond["text"], np.broadcast_to(~dropped[:, None, None], (4000, 3, 2))
    )
    np.testing.assert_array_equal(spy.cond["label"][~dropped], np.arange(1, 4001)[~dropped])


def test_times_follow_the_shift_and_reach_both_ends():
    spy = Spy()
    method = Pretrain((2,), shift=3.0)
    method.generator_loss(Denoiser(spy, prediction=Velocity(1.0)), {}, batch(4000), KEY)
    u = np.sort(spy.t / (3 - 2 * spy.t))
    assert np.abs(u - np.linspace(0, 1, 4000)).max() < 1.63 / np.sqrt(4000)


@pytest.mark.parametrize(
    "fields", [{"dropout": 1.1}, {"shift": -1.0}, {"clip": (0.0, 2.0)}], ids=str
)
def test_numbers_without_a_meaning_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}.*must"):
        Pretrain((2,), **fields)


def test_the_exact_denoiser_has_the_least_loss():
    """Data N(0, I): E[x0 | x_t] leaves the posterior variance, and any other scale leaves more."""
    data = batch(20_000)
    method = Pretrain((2,), dropout=0.0)

    def loss(std):
        return method.generator_loss(exact([[0.0, 0.0]], std), {}, data, KEY)[0]

    best, *others = (float(loss(std)) for std in (1.0, 0.8, 1.25))
    assert best < min(others)
    # E over t of t^2 / ((1 - t)^2 + t^2), the variance that is left, is one half.
    assert best == pytest.approx(0.5, abs=0.02)
