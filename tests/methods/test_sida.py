"""SiDA: SiD's gradient and the adversarial one, together; its roles and critic are DMD2's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from small_gan import BATCH, KEY, SLOPE, Featured, Linear, gradient, networks, noisy
from toys import FLOW, normal

from dmd_jax.diffusion.denoiser import X0, Denoiser
from dmd_jax.methods.dmd2 import DMD2
from dmd_jax.methods.sid import SiD
from dmd_jax.methods.sida import SiDA
from dmd_jax.rollouts.backward_simulation import Rollout

FIELDS = dict(times=(1.0,), alpha=1.2)


def push(x_t, t):
    """The gradient of mean softplus(-D(x_t)) at the samples, for the linear D."""
    return -((1 - t) * jax.nn.sigmoid(-x_t @ SLOPE))[:, None] * SLOPE / len(x_t)


def test_the_gradient_is_that_of_sid_plus_the_weighted_adversarial_one():
    method = SiDA((2,), gan_weight=0.3, **FIELDS)
    grad, observed, rollout = gradient(method)
    plain, *_ = gradient(SiD((2,), **FIELDS))
    adversarial = push(*noisy(method, rollout))
    np.testing.assert_allclose(grad, plain + 0.3 * adversarial, rtol=1e-4, atol=1e-6)
    assert np.abs(grad - plain).max() > 0.01
    np.testing.assert_allclose(observed["pull"], np.sum(np.square(plain), 1), rtol=1e-4)
    np.testing.assert_allclose(observed["push"], np.sum(np.square(adversarial), 1), rtol=1e-4)


def test_balanced_gradients_have_equal_norms_at_every_sample():
    plain, *_ = gradient(SiD((2,), **FIELDS))
    grad, *_ = gradient(SiDA((2,), gan_weight=0.5, balance=True, **FIELDS))
    norms = [np.linalg.norm(x, axis=1) for x in (grad - plain, plain)]
    np.testing.assert_allclose(norms[0], 0.5 * norms[1], rtol=1e-3)


def test_masked_elements_get_no_gradient_and_count_in_no_norm():
    """Through a teacher that mixes a sample's elements, SiD's gradient would reach them."""

    def mixed(x_t, t, cond):
        return x_t[:, ::-1]

    nets, mask = networks(), jnp.array([[True, False]] * 6)
    nets["teacher"] = Denoiser(Featured(mixed, 1.0), FLOW, X0(time_scale=1.0))

    def compared(method):
        def loss(x0):
            rollout = Rollout(x0, mask, jnp.float32(1), jnp.float32(0), BATCH["cond"])
            return method.compare(rollout, nets, BATCH, *jax.random.split(KEY))

        return jax.grad(loss, has_aux=True)(normal(5, 6, 2))

    plain, _ = compared(SiD((2,), **FIELDS))
    grad, observed = compared(SiDA((2,), gan_weight=0.5, balance=True, **FIELDS))
    assert (plain[:, 1] == 0).all() and (plain[:, 0] != 0).all() and (grad[:, 1] == 0).all()
    np.testing.assert_allclose(observed["pull"], np.square(plain[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(np.abs(grad - plain)[:, 0], 0.5 * np.abs(plain[:, 0]), rtol=1e-3)


def test_without_the_adversarial_term_it_is_sid_and_a_broken_discriminator_changes_nothing():
    plain, *_ = gradient(SiD((2,), **FIELDS))
    broken = networks() | {"discriminator": Linear(jnp.full(2, jnp.nan))}
    for method, nets in (
        (SiDA((2,), gan_weight=0.0, **FIELDS), networks()),
        (SiDA((2,), gan_weight=0.3, **FIELDS), broken),
    ):
        np.testing.assert_array_equal(gradient(method, nets)[0], plain)


def test_the_critics_learn_as_those_of_dmd2():
    method, nets = SiDA((2,), r1=0.1, **FIELDS), networks()
    other = DMD2((2,), times=(1.0,), r1=0.1)
    assert (method.trainable, method.uses_data) == (other.trainable, other.uses_data)
    _, _, rollout = gradient(method)
    critics = {role: nets[role] for role in ("fake_score", "discriminator")}
    losses = [m.critic_loss(critics, nets, rollout, BATCH, KEY)[0] for m in (method, other)]
    assert losses[0] == losses[1] and losses[0].keys() == critics.keys()


def test_one_class_has_the_fields_of_both():
    names = {f.name for f in dataclasses.fields(SiDA)}
    assert names == {f.name for kind in (SiD, DMD2) for f in dataclasses.fields(kind)}
