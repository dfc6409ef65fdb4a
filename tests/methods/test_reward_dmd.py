"""A reward in DMD: its gradients by hand, where it comes to rest, broken rewards, refusals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import affine, exact, normal

from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.reward_dmd import RewardDMD
from dmd_jax.rollouts.backward_simulation import Rollout

KEYS = jax.random.key(1), jax.random.key(2)
N, MEAN, VAR, SLOPE = 16, 0.4, 0.3, jnp.array([0.8, -0.5])
BATCH = {"cond": jnp.zeros((N, 1)), "uncond": jnp.zeros((N, 1)), "index": jnp.arange(N)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """r = <slope, x0>."""

    slope: Any

    def __call__(self, x0, cond):
        return x0 @ self.slope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken:
    """The linear reward, of which some are what they should not be."""

    slope: Any
    values: Any

    def __call__(self, x0, cond):
        return jnp.where(jnp.isnan(self.values), x0 @ self.slope, self.values)


NETS = {"teacher": exact([[MEAN, MEAN]], VAR**0.5), "fake_score": affine(0.3, 0.1)}
NETS["reward"] = Linear(SLOPE)


@functools.partial(jax.jit, static_argnames="method")
def step(x0, method, nets=NETS, mask=None):
    """(the gradient at the samples, observed)."""

    def loss(x0):
        rollout = Rollout(x0, mask, jnp.float32(1), jnp.float32(0), BATCH["cond"])
        return method.compare(rollout, nets, BATCH, *KEYS)

    return jax.grad(loss, has_aux=True)(x0)


def method(**fields):
    return RewardDMD((2,), times=(1.0,), **fields)


def test_beta_weighs_each_samples_gradient_as_reward_forcing_does():
    x0 = normal(2, N, 2)
    plain, _ = step(x0, DMD((2,), times=(1.0,)))
    grad, observed = step(x0, method(beta=2.0, reward_weight=0.0))
    weights = np.exp(2.0 * np.float64(x0 @ SLOPE))
    np.testing.assert_allclose(grad, weights[:, None] * plain, rtol=1e-4)
    metrics = method(beta=2.0).metrics(observed)
    np.testing.assert_allclose(metrics["reward/mean"], np.mean(x0 @ SLOPE), rtol=1e-5)
    share = np.sum(weights) ** 2 / np.sum(weights**2) / N
    np.testing.assert_allclose(metrics["reward/effective"], share, rtol=1e-4)


def test_the_rewards_gradient_is_added_by_its_weight_and_without_either_it_is_dmd():
    x0 = normal(2, N, 2)
    plain, _ = step(x0, DMD((2,), times=(1.0,)))
    np.testing.assert_allclose(step(x0, method(reward_weight=0.0))[0], plain, rtol=1e-6)
    grad, observed = step(x0, method(reward_weight=0.3))
    np.testing.assert_allclose(grad, plain - 0.3 * SLOPE / N, rtol=1e-4, atol=1e-7)
    ratio = 0.3 * np.linalg.norm(SLOPE) / np.sqrt(N) / np.linalg.norm(plain)
    metrics = method(reward_weight=0.3).metrics(observed)
    np.testing.assert_allclose(metrics["reward/ratio"], ratio, rtol=1e-4)


def rest(fields, means):
    """The mean gradient of samples of N(b, VAR) with the exact fake score, for each b of means.

    Without the normaliser and at one time t, the matching gradient is c (b - MEAN), whatever the
    sample: c = sigma^2 / (alpha^2 VAR + sigma^2).
    """
    spec = method(normalize=False, clip=(0.49999, 0.50001), **fields)
    grads = []
    for mean in means:
        nets = NETS | {"fake_score": exact([mean], VAR**0.5)}
        x0 = jnp.asarray(mean) + VAR**0.5 * normal(4, N, 2)
        grads.append(step(x0, spec, nets)[0].sum(0))
    return np.array(grads)


def test_the_rewards_gradient_rests_at_the_mean_of_the_tilted_teacher():
    """The teacher times exp(lambda r), blurred: MEAN + lambda a (VAR + sigma^2 / alpha^2).

    DMD has (sigma / alpha)^2 times the gradient of the KL, so the reward's weight has it too; and
    an element's gradient is divided by the two elements of a sample. At t = 0.5 it is 1.
    """
    tilt = 0.7
    tilted = MEAN + tilt * SLOPE * (VAR + 1.0)
    at_rest, below = rest(dict(reward_weight=tilt / 2), [tilted, tilted - 0.2])
    np.testing.assert_allclose(at_rest, 0.0, atol=2e-5)
    assert (below < -0.01).all()  # descent goes up, back to it
    # Weights move no such student: where it rests without them, it rests with them.
    plain = jnp.full(2, MEAN)
    weighted, away = rest(dict(beta=2.0, reward_weight=0.0), [plain, tilted])
    np.testing.assert_allclose(weighted, 0.0, atol=2e-5)
    assert np.abs(away).min() > 0.01


def test_a_sample_whose_reward_is_not_finite_counts_zero_and_is_counted():
    values = jnp.full(N, jnp.nan).at[:3].set(jnp.float32([jnp.inf, -jnp.inf, 1e4]))
    broken = Broken(SLOPE, values)
    x0, spec = normal(2, N, 2), method(beta=0.5, reward_weight=0.3)
    grad, observed = step(x0, spec, NETS | {"reward": broken})
    whole, _ = step(x0, spec)
    np.testing.assert_array_equal(grad[:3], 0.0)
    np.testing.assert_allclose(grad[3:], whole[3:], rtol=1e-5)
    metrics = spec.metrics(observed)
    np.testing.assert_allclose(metrics["samples/nonfinite"], 3 / N)
    assert all(np.isfinite(metrics[f"reward/{name}"]) for name in ("mean", "effective", "ratio"))


def test_masked_elements_get_no_gradient_of_the_reward():
    mask = jnp.array([[True, False]] * N)
    grad, _ = step(normal(2, N, 2), method(reward_weight=0.3), mask=mask)
    assert (grad[:, 1] == 0).all() and (grad[:, 0] != 0).all()


def test_a_reward_without_a_derivative_serves_as_a_weight():
    class Counted:
        def __call__(self, x0, cond):
            shape = jax.ShapeDtypeStruct((len(x0),), jnp.float32)
            return jax.pure_callback(lambda x: np.float32(x.sum(1) > 0), shape, x0)

    jax.tree_util.register_static(Counted)
    nets = NETS | {"reward": Counted()}
    x0 = normal(2, N, 2)
    grad, _ = step(x0, method(beta=1.0, reward_weight=0.0), nets)
    plain, _ = step(x0, DMD((2,), times=(1.0,)))
    wanted = np.where(x0.sum(1) > 0, np.e, 1.0)[:, None] * plain
    np.testing.assert_allclose(grad, wanted, rtol=1e-4)


def test_numbers_without_a_meaning_are_refused():
    for field in ("beta", "reward_weight"):
        with pytest.raises(ValueError, match=rf"{field}=-1\.0 must be 0 or more"):
            method(**{field: -1.0})
