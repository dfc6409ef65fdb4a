"""DMD2's adversarial term: gradients in closed form, who learns from it, penalties, refusals."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_gan import BATCH, KEY, SLOPE, Featured, Linear, gradient, networks, noisy
from toys import FLOW, affine, assert_close, normal, video_networks, weights

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import X0, Denoiser
from dmd_jax.losses.adversarial import discriminator_loss
from dmd_jax.losses.distribution_matching import dmd_gradient
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.dmd2 import DMD2
from dmd_jax.models.discriminator import Discriminator, DiscriminatorConfig
from dmd_jax.models.wan import Causal
from dmd_jax.rollouts.backward_simulation import Rollout
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step

ROLES = ("generator", "fake_score", "discriminator")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic(Linear):
    """A discriminator <slope, feature> + |feature|^2 / 2."""

    def __call__(self, features):
        return super().__call__(features) + 0.5 * jnp.sum(jnp.square(features[0, :, 0]), axis=-1)


def noisy_data(method, rollout):
    """The real samples of the generator's loss: of the same times, with noise of their own."""
    *_, eps_key = jax.random.split(KEY, 3)
    eps = randomness.normal(jax.random.fold_in(eps_key, 1), BATCH["index"], (2,))
    return FLOW.add_noise(BATCH["data"], eps, noisy(method, rollout)[1])


def push(x_t, t, against=0.0):
    """The gradient of mean softplus(against - D(x_t)) at the samples, for the linear D."""
    sigmoid = jax.nn.sigmoid(against - x_t @ SLOPE)
    return -((1 - t) * sigmoid)[:, None] * SLOPE / len(x_t)


def test_the_gradient_is_distribution_matching_plus_the_weighted_adversarial_one():
    method = DMD2((2,), times=(1.0,), gan_weight=0.3)
    nets = networks()
    grad, observed, rollout = gradient(method)
    x_t, t = noisy(method, rollout)
    pull = dmd_gradient(rollout.x0, nets["teacher"](x_t, t, None), nets["fake_score"](x_t, t, None))
    wanted = pull / 12 + 0.3 * push(x_t, t)
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6)
    plain, *_ = gradient(DMD((2,), times=(1.0,)))
    np.testing.assert_allclose(gradient(dataclasses.replace(method, gan_weight=0.0))[0], plain)
    assert np.abs(grad - plain).max() > 0.01
    observed |= {"real_logit": jnp.ones(6), "fake_logit": jnp.array([-1.0] * 5 + [1.0])}
    metrics = method.metrics(observed)
    ratio = np.linalg.norm(push(x_t, t)) / np.linalg.norm(pull / 12)
    assert metrics["gan/ratio"] == pytest.approx(ratio, rel=1e-4)
    assert metrics["discriminator/gap"] == pytest.approx(1 + 4 / 6)
    assert metrics["discriminator/accuracy"] == pytest.approx((6 + 5) / 12)


def test_balanced_gradients_have_equal_norms_at_every_sample():
    plain, *_ = gradient(DMD((2,), times=(1.0,)))
    method = DMD2((2,), times=(1.0,), gan_weight=0.5, balance=True)
    grad, _, rollout = gradient(method)
    away = grad - plain
    norms = partial(np.linalg.norm, axis=1)
    np.testing.assert_allclose(norms(away), 0.5 * norms(plain), rtol=1e-3)
    direction = push(*noisy(method, rollout))
    cosine = np.sum(away * direction, 1) / norms(away) / norms(direction)
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-3)


def test_the_relativistic_loss_is_against_real_samples_of_the_same_times():
    method = DMD2((2,), times=(1.0,), gan_weight=1.0, relativistic=True)
    grad, _, rollout = gradient(method)
    plain, *_ = gradient(DMD((2,), times=(1.0,)))
    x_t, t = noisy(method, rollout)
    against = noisy_data(method, rollout) @ SLOPE
    np.testing.assert_allclose(grad - plain, push(x_t, t, against), rtol=1e-4, atol=1e-6)
    # Neither without real samples nor with those of others is it this gradient.
    for other in (0.0, jnp.roll(against, 1)):
        assert np.abs(push(x_t, t, other) - push(x_t, t, against)).max() > 0.01


def test_a_broken_real_sample_leaves_its_partner_the_loss_without_a_pair():
    method = DMD2((2,), times=(1.0,), gan_weight=1.0, relativistic=True)
    data = BATCH["data"].at[2].set(jnp.nan)
    nets, keys = networks(), jax.random.split(jax.random.key(1))

    def loss(x0, data, relativistic=True):
        rollout = Rollout(x0, None, jnp.float32(1), jnp.float32(0), BATCH["cond"])
        own = dataclasses.replace(method, relativistic=relativistic)
        return own.compare(rollout, nets, BATCH | {"data": data}, *keys)[0]

    x0 = normal(5, 6, 2)
    value, grad = jax.value_and_grad(loss)(x0, data)
    assert jnp.isfinite(value)
    wanted = jax.grad(loss)(x0, BATCH["data"])
    wanted = wanted.at[2].set(jax.grad(loss)(x0, BATCH["data"], False)[2])
    np.testing.assert_allclose(grad, wanted, rtol=1e-5)


def test_masked_elements_and_broken_samples_get_no_adversarial_gradient():
    method = DMD2((2,), times=(1.0,), gan_weight=1.0)
    nets = networks()
    keys = jax.random.split(jax.random.key(1))
    x0 = normal(5, 6, 2)

    def loss(x0, slope, mask=None):
        rollout = Rollout(x0, mask, jnp.float32(1), jnp.float32(0), BATCH["cond"])
        given = nets | {"discriminator": Linear(slope)}
        return method.compare(rollout, given, BATCH, *keys)[0]

    mask = jnp.array([[True, False]] * 6)
    grad = jax.grad(loss)(x0, SLOPE, mask)
    assert (grad[:, 1] == 0).all() and (grad[:, 0] != 0).all()
    plain = jax.grad(loss)(x0, 0.0 * SLOPE)
    value, grad = jax.value_and_grad(loss)(x0, jnp.array([jnp.nan, 1.0]))
    np.testing.assert_allclose(grad, plain, rtol=1e-5)
    assert jnp.isfinite(value)


def test_a_videos_mask_hides_frames_from_the_gradient_and_not_from_the_discriminator():
    """Of three frames of two numbers the last two count; D is linear and sees all of them."""
    slope, method = normal(2, 6), DMD2((3, 1, 1, 2), times=(1.0,), gan_weight=0.7)
    score = Denoiser(Featured(affine(0.4, 0.2).net, jnp.float32(1.0)), FLOW, X0(time_scale=1.0))
    nets = {"teacher": score, "fake_score": affine(0.3, 0.1), "discriminator": Linear(slope)}
    batch = BATCH | {"cond": None, "uncond": None, "data": normal(8, 6, 3, 1, 1, 2)}
    mask = jnp.array([[False, True, True]] * 6)
    keys = jax.random.split(jax.random.key(1))

    def rollout(x0, mask=mask):
        return Rollout(x0, mask, jnp.float32(1), jnp.float32(0), None)

    x0 = normal(5, 6, 3, 1, 1, 2)
    grad = jax.grad(lambda x0: method.compare(rollout(x0), nets, batch, *keys)[0])(x0)
    x_t, t, _ = method.diffuse(rollout(x0), FLOW, batch["index"], *keys)
    pull = dmd_gradient(x0, score(x_t, t, None), nets["fake_score"](x_t, t, None), mask=mask)
    sigmoid = jax.nn.sigmoid(-x_t.reshape(6, 6) @ slope)
    pushed = -((1 - t) * sigmoid / 6)[:, None] * slope
    wanted = pull / (6 * 2 * 2) + 0.7 * pushed.reshape(x0.shape)
    wanted *= mask[:, :, None, None, None]
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6)
    critics = {role: nets[role] for role in ROLES[1:]}
    masked, free = (
        method.critic_loss(critics, nets, rollout(x0, kept), batch, KEY)[0] for kept in (mask, None)
    )
    assert masked["discriminator"] == free["discriminator"]
    assert masked["fake_score"] != free["fake_score"]


def critic_gradient(method, nets, batch=BATCH, x0=None):
    """({role: gradient}, {role: loss}) of the sum of the critics' losses."""
    x0 = normal(5, 6, 2) if x0 is None else x0
    rollout = Rollout(x0, None, jnp.float32(1), jnp.float32(0), batch["cond"])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(critics):
        losses, _ = method.critic_loss(critics, {**nets, **critics}, rollout, batch, KEY)
        return sum(losses.values()), losses

    return run({role: nets[role] for role in ROLES[1:]})


def test_the_fake_score_learns_its_features_with_a_weight_of_their_own():
    nets = networks()

    def grads(**fields):
        return critic_gradient(DMD2((2,), **fields), nets)[0]

    teacher, heads = grads(), grads(features="fake_score", backbone_weight=0.0)
    tenth, full = (grads(features="fake_score", backbone_weight=w) for w in (0.1, 1.0))
    alone = jax.grad(
        lambda net: DMD((2,)).critic_loss(
            {"fake_score": net},
            nets,
            Rollout(normal(5, 6, 2), None, jnp.float32(1), jnp.float32(0), BATCH["cond"]),
            BATCH,
            KEY,
        )[0]
    )(nets["fake_score"])
    for other in (teacher, heads, tenth, full):
        assert_close(other["fake_score"].net.net, alone.net.net)
        assert_close(other["discriminator"], full["discriminator"])
    scales = [float(g["fake_score"].net.scale) for g in (teacher, heads, tenth, full)]
    assert scales[0] == scales[1] == 0.0 and abs(scales[3]) > 0.01
    assert scales[2] == pytest.approx(0.1 * scales[3], rel=1e-4)
    assert jnp.abs(full["discriminator"].slope).max() > 0.01


def test_the_discriminator_learns_from_both_at_the_same_times():
    nets = networks(slope=[0.0, 0.0])
    grads, losses = critic_gradient(DMD2((2,)), nets)
    assert losses["discriminator"] == pytest.approx(2 * np.log(2), rel=1e-6)
    # The slope's gradient at zero is half the difference of the noisy means. All noise is zero in
    # the mean, and a large difference of the data shows: each side is scaled by 1 - t.
    data = BATCH["data"] + 1e4
    far = critic_gradient(DMD2((2,)), nets, BATCH | {"data": data})[0]
    both = critic_gradient(DMD2((2,)), nets, BATCH | {"data": data}, normal(5, 6, 2) + 1e4)[0]
    change = far["discriminator"].slope - grads["discriminator"].slope
    assert (change < -1e3).all()
    np.testing.assert_allclose(both["discriminator"].slope, grads["discriminator"].slope, atol=2e-3)


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_the_penalties_are_halves_of_gamma_times_the_squared_gradient(features):
    method, nets = DMD2((2,), features=features), networks()
    plain, without = critic_gradient(method, nets)
    for field in ("r1", "r2"):
        grads, losses = critic_gradient(dataclasses.replace(method, **{field: 3.0}), nets)
        more = losses["discriminator"] - without["discriminator"]
        assert more == pytest.approx(1.5 * np.sum(np.square(SLOPE)), rel=1e-4)
        assert losses["fake_score"] == without["fake_score"]
        pull = grads["discriminator"].slope - plain["discriminator"].slope
        np.testing.assert_allclose(pull, 3.0 * SLOPE, rtol=1e-4)


@pytest.mark.parametrize("field", ["r1", "r2"])
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_penalties_by_finite_differences_are_the_exact_ones_and_the_square_of_their_size(
    field, size
):
    """For D = <slope, x> + |x|^2 / 2 of two numbers, E (<dD, n> + size |n|^2 / 2)^2 / size^2."""
    n = 20_000
    batch = {"cond": jnp.zeros((n, 1)), "index": jnp.arange(n), "data": normal(7, n, 2)}
    nets = networks() | {"discriminator": Quadratic(SLOPE)}

    def loss(**fields):
        _, losses = critic_gradient(DMD2((2,), **fields), nets, batch, normal(5, n, 2))
        return losses["discriminator"]

    exact, finite = (loss(**{field: 2.0}, perturbation=p) - loss() for p in (None, size))
    # E |n|^4 = 8. Four standard errors: the squares' deviation is at most twice their mean.
    assert finite == pytest.approx(exact + 2.0 * size**2, rel=4 * 2 / np.sqrt(n))


def test_the_generators_loss_has_no_gradient_for_other_weights():
    method = DMD2((2,), times=(1.0,), relativistic=True, balance=True)
    grads = jax.jit(
        jax.grad(lambda nets: method.generator_loss(nets["generator"], nets, BATCH, KEY)[0])
    )(networks())
    moved = {role: any(bool(g.any()) for g in jax.tree.leaves(g)) for role, g in grads.items()}
    wanted = dict.fromkeys(moved, False) | {"generator": True}
    assert moved == wanted


@pytest.mark.parametrize("update", [True, False])
def test_a_step_of_three_roles_is_the_same_in_parts(update):
    method = DMD2((2,), times=(1.0,), r1=1.0, r2=0.5, balance=True)
    nets = networks()
    nets["generator"] = affine(0.5, [0.0, 0.1])
    frozen = {"teacher": nets.pop("teacher")}
    tx = per_role({role: AdamW(1e-2).transform(10) for role in ROLES})
    batch = {name: BATCH[name] for name in ("cond", "uncond", "data")}

    def after(parts):
        run = jax.jit(
            partial(train_step, method=method, tx=tx, update_generator=update, accumulate=parts)
        )
        return run(init_state(nets, tx), frozen, batch, KEY)

    (state, metrics), (parted, parted_metrics) = after(1), after(3)
    assert_close(parted.nets, state.nets, rtol=1e-4)
    assert_close(parted_metrics, metrics, rtol=2e-3)
    assert metrics["discriminator/loss"] != metrics["fake_score/loss"]
    assert ("gan/ratio" in metrics) == update and "discriminator/gap" in metrics
    assert not bool(jnp.all(state.nets["discriminator"].slope == nets["discriminator"].slope))


@pytest.mark.parametrize("features, dim", [("teacher", 32), ("fake_score", 16)])
def test_the_features_may_be_those_of_a_network_of_videos(features, dim):
    method = DMD2((3, 4, 4, 3), guidance=2.0, features=features, r1=1.0, r2=1.0)
    heads = DiscriminatorConfig(dim=dim, blocks=(0,), hidden=8)
    batch = {"cond": normal(0, 2, 4, 5), "uncond": normal(1, 2, 4, 5), "index": jnp.arange(2)}
    batch["data"] = normal(2, 2, 3, 4, 4, 3)

    def both():
        nets = video_networks()
        nets["discriminator"] = weights(lambda rngs: Discriminator(heads, rngs=rngs), 3)
        grad, (_, rollout) = jax.grad(method.generator_loss, has_aux=True)(
            nets["generator"], nets, batch, KEY
        )
        critics = {role: nets[role] for role in ROLES[1:]}

        def critic_loss(critics):
            return sum(method.critic_loss(critics, nets, rollout, batch, KEY)[0].values())

        return nets, grad, jax.grad(critic_loss)(critics)

    nets, grad, grads = jax.eval_shape(both)
    for role, tree in (grads | {"generator": grad}).items():
        assert jax.tree.structure(tree) == jax.tree.structure(nets[role])


@pytest.mark.slow  # compilation
def test_on_a_students_own_videos_both_gradients_pass_through_its_graded_frames():
    """Composed by hand: the rollout, the scores, D on the teacher's tokens, and back."""
    video = SelfForcing(Causal(1), graded=1)
    method = DMD2((2, 4, 4, 3), times=(1.0,), video=video, gan_weight=2.0)
    heads = DiscriminatorConfig(dim=32, blocks=(0,), hidden=8)
    nets = video_networks()
    nets["generator"] = nets["fake_score"]  # one layer
    nets["discriminator"] = weights(lambda rngs: Discriminator(heads, rngs=rngs), 3)
    cond = normal(0, 2, 3, 5)
    batch = {"cond": cond, "uncond": cond, "index": jnp.arange(2), "data": normal(1, 2, 2, 4, 4, 3)}
    rollout_key, *keys = jax.random.split(KEY, 3)

    def drawn(generator):
        rollout = method.rollout(generator, nets, batch, rollout_key)
        return rollout.x0, rollout

    def by_hand(generator):
        x0, back, rollout = jax.vjp(drawn, generator, has_aux=True)

        def adversarial(x0):
            x_t, t, _ = method.diffuse(rollout._replace(x0=x0), FLOW, batch["index"], *keys)
            tokens = nets["teacher"].predict(x_t, t, cond, features=(0,)).aux
            return jnp.mean(jax.nn.softplus(-nets["discriminator"](tokens))), (x_t, t)

        pushed, (x_t, t) = jax.grad(adversarial, has_aux=True)(x0)
        scores = (nets[role](x_t, t, cond) for role in ("teacher", "fake_score"))
        pull = dmd_gradient(x0, *scores, mask=rollout.mask) / (x0.size / 2)
        return back(pull + 2.0 * pushed)[0], rollout.mask

    @jax.jit
    def both(generator):
        ours = jax.grad(lambda g: method.generator_loss(g, nets, batch, KEY)[0])(generator)
        return ours, *by_hand(generator)

    ours, wanted, mask = both(nets["generator"])
    np.testing.assert_array_equal(mask, [[False, True]] * 2)
    assert_close(ours, wanted, rtol=2e-4, atol=1e-6)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(ours)) > 0.01


def test_without_a_discriminator_that_knows_something_it_is_dmd():
    nets = networks(slope=[0.0, 0.0])
    plain, *_ = gradient(DMD((2,), times=(1.0, 0.5)))
    np.testing.assert_allclose(gradient(DMD2((2,), times=(1.0, 0.5)), nets)[0], plain, rtol=1e-5)


def test_the_discriminators_value_is_that_of_its_loss():
    """The loss of given logits, for the samples that the method noises."""
    _, losses = critic_gradient(DMD2((2,), relativistic=True), networks(slope=[0.0, 0.0]))
    zero = jnp.zeros(6)
    wanted = discriminator_loss(zero, zero, relativistic=True)
    assert losses["discriminator"] == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"features": "generator"}, "features='generator' must be 'teacher' or 'fake_score'"),
        ({"gan_weight": -1.0}, r"gan_weight=-1\.0 must be 0 or more"),
        ({"r1": -1.0}, r"r1=-1\.0 must be 0 or more"),
        ({"perturbation": 0.0}, r"perturbation=0\.0 must be above 0, or None"),
        ({"strides": (3,)}, "must divide the number of times"),
    ],
)
def test_numbers_without_a_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DMD2((2,), **fields)
