"""DMD and SiD as methods: shapes, times, where gradients go, what the critic regresses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import affine, exact, tiny_mlp

from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon, Velocity
from dmd_jax.diffusion.schedule import EDM, VP, FlowMatching, shift_time
from dmd_jax.losses.distribution_matching import dmd_gradient
from dmd_jax.losses.score_identity import sid_loss
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.sid import SiD
from dmd_jax.rollouts.backward_simulation import Rollout

KEY = jax.random.key(3)
BATCH = {"cond": jnp.zeros((6, 1)), "uncond": jnp.zeros((6, 1)), "index": jnp.arange(6)}
ZERO = Rollout(jnp.zeros((6, 2)), None, jnp.float32(1), jnp.float32(0), BATCH["cond"])


def networks():
    """A generator and a fake score that are MLPs, and an exact teacher."""
    nets = {"generator": Denoiser(tiny_mlp(0)), "fake_score": Denoiser(tiny_mlp(1))}
    return nets | {"teacher": exact([[0.5, 0.0]], 0.7)}


diffuse = jax.jit(DMD.diffuse, static_argnums=(0, 2))


def generator_gradient(method, generator, nets, batch):
    """(gradient of the generator's loss, its rollout)."""

    @jax.jit
    def run(generator):
        loss = jax.value_and_grad(method.generator_loss, has_aux=True)
        (_, (_, rollout)), grad = loss(generator, nets, batch, KEY)
        return grad, rollout

    return run(generator)


@pytest.mark.parametrize(
    "method, levels",
    [(DMD((2,), times=(1.0, 0.5), guidance=2.0), {1.0, 0.5}), (SiD((2,), times=(1.0,)), {1.0})],
)
def test_losses_are_scalars_and_the_rollout_has_the_samples_shape(method, levels):
    nets = networks()
    generator_loss, critic_loss = jax.jit(method.generator_loss), jax.jit(method.critic_loss)
    loss, (observed, rollout) = generator_loss(nets["generator"], nets, BATCH, KEY)
    assert loss.shape == () and loss.dtype == jnp.float32 and jnp.isfinite(loss)
    assert rollout.x0.shape == (6, 2) and float(rollout.t_from) in levels
    assert {value.shape[0] for value in observed.values()} == {6}
    assert {value.shape for value in method.metrics(observed).values()} == {()}
    loss, observed = critic_loss({"fake_score": nets["fake_score"]}, nets, rollout, BATCH, KEY)
    assert loss.shape == () and loss.dtype == jnp.float32 and loss > 0


@pytest.mark.parametrize(
    "method",
    [
        DMD((2,), times=(1.0,)),
        DMD((2,), times=(1.0,), guidance=2.0, fake_guidance=1.5),
        SiD((2,), times=(1.0,)),
    ],
)
def test_the_generators_loss_has_no_gradient_for_the_weights_of_the_scores(method):
    def loss(nets):
        return method.generator_loss(nets["generator"], nets, BATCH, KEY)[0]

    grads = jax.jit(jax.grad(loss))(networks())
    moved = {
        role: any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grad))
        for role, grad in grads.items()
    }
    assert moved == {"generator": True, "teacher": False, "fake_score": False}


@pytest.mark.parametrize(
    "times", [(), (1.5, 0.5), (0.5, 0.75), (1.0, 0.5, 0.5), (1.0, 0.0), (1.0, -0.5)]
)
def test_times_that_do_not_descend_are_refused(times):
    with pytest.raises(ValueError, match="must descend, from 1 at most"):
        DMD((2,), times=times)


@pytest.mark.parametrize("strides", [(1, 3), (0,), (-2,), ()])
def test_strides_that_do_not_divide_the_times_are_refused(strides):
    with pytest.raises(ValueError, match=r"strides=\(.*\) must divide the number of times"):
        DMD((2,), strides=strides)


@pytest.mark.parametrize(
    "shape, fields, message",
    [
        ((2,), {"last_step_share": 1.5}, r"last_step_share=1\.5 must be in \[0, 1\]"),
        ((2,), {"score_shift": 0.0}, r"score_shift=0\.0 must be above 0"),
        ((2,), {"step_range": (0, 4)}, r"step_range=\(0, 4\) must be \(fewest, most\)"),
        ((2,), {"step_range": (1, 4), "strides": (2,)}, r"strides=\(2,\) must be \(1,\)"),
        ((2,), {"clip": (0.9, 0.1)}, r"clip=\(0\.9, 0\.1\) must ascend within \[0, 1\]"),
        ((28, 28, 1), {"frames_per_block": 2}, r"images \(28, 28, 1\) have no frames"),
        ((5, 8, 8, 1), {"frames_per_block": 2}, "frames_per_block=2 must divide the frames"),
    ],
)
def test_numbers_without_a_meaning_are_refused(shape, fields, message):
    with pytest.raises(ValueError, match=message):
        DMD(shape, **fields)


def test_one_step_from_an_early_time_starts_there():
    # DMD2's one-step SDXL is conditioned on 399 of 1000, whatever its input.
    method = DMD((2,), times=(0.4,))
    rollout = method.rollout(affine(1.0, 0.0), {}, BATCH, KEY)
    assert (rollout.t_from, rollout.t_to) == (pytest.approx(0.4), 0.0)
    full = DMD((2,), times=(1.0,)).rollout(affine(1.0, 0.0), {}, BATCH, KEY)
    np.testing.assert_allclose(rollout.x0, 0.4 * full.x0, rtol=1e-5)


def test_the_expected_exit_step_is_the_mean_of_what_rollouts_draw():
    assert DMD((2,), times=(1.0,)).expected_exit_step == 0
    assert DMD((2,)).expected_exit_step == pytest.approx((0 + 1 + 2 + 3) / 4)
    assert DMD((2,), last_step_share=1.0).expected_exit_step == 3
    every = DMD((2,), strides=(1, 2, 4), last_step_share=0.3).expected_exit_step
    by_stride = [0.3 * last + 0.7 * last / 2 for last in (3, 1, 0)]
    assert every == pytest.approx(sum(by_stride) / 3)


def test_a_step_range_draws_the_number_of_calls_and_their_times():
    method = DMD((2,), step_range=(1, 4))
    keys = jax.random.split(KEY, 4000)
    run = jax.jit(jax.vmap(lambda key: method.rollout(affine(1.0, 0.0), {}, BATCH, key)))
    rollout = run(keys)
    # Of n calls, one in n exits is at time 1, and one in n is the last.
    for exits in (rollout.t_from == 1.0, rollout.t_to == 0.0):
        share = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
        assert np.mean(exits) == pytest.approx(share, abs=4 * np.sqrt(share / 4000))
    assert len(np.unique(rollout.t_from)) > 1000
    assert method.expected_exit_step == pytest.approx((0 + 0.5 + 1 + 1.5) / 4)


def test_strides_train_one_generator_for_several_numbers_of_calls():
    method = DMD((2,), strides=(1, 2, 4))
    keys = jax.random.split(KEY, 2000)
    run = jax.vmap(lambda key: method.rollout(affine(1.0, 0.0), {}, BATCH, key))
    rollout = jax.jit(run)(keys)
    intervals, counts = np.unique(
        np.stack([rollout.t_from, rollout.t_to], 1), axis=0, return_counts=True
    )
    wanted = {
        (0.25, 0.0): 1 / 12,
        (0.5, 0.0): 1 / 6,
        (0.5, 0.25): 1 / 12,
        (0.75, 0.5): 1 / 12,
        (1.0, 0.0): 1 / 3,
        (1.0, 0.5): 1 / 6,
        (1.0, 0.75): 1 / 12,
    }
    assert [tuple(pair) for pair in intervals.tolist()] == list(wanted)
    np.testing.assert_allclose(counts / 2000, list(wanted.values()), atol=4 * 0.47 / np.sqrt(2000))


def times_of(method, rollout, n=4000):
    method = dataclasses.replace(method, clip=(0.0, 1.0))
    x0 = jnp.zeros((n, 1))
    rollout = rollout._replace(x0=x0)
    keys = jax.random.split(KEY)
    return diffuse(method, rollout, FlowMatching(), jnp.arange(n), *keys)[1]


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize(
    "above, below", [(False, False), (True, False), (False, True), (True, True)]
)
def test_scores_are_compared_at_the_times_that_the_exit_step_allows(shift, above, below):
    # ts_schedule and ts_schedule_max of Self-Forcing: an interval of times before the shift.
    rollout = ZERO._replace(t_from=jnp.float32(0.75), t_to=jnp.float32(0.5))
    method = DMD((1,), score_shift=shift, above_exit=above, below_exit=below)
    t = np.asarray(times_of(method, rollout))
    low, high = 0.5 if above else 0.0, 0.75 if below else 1.0
    np.testing.assert_allclose(
        [t.min(), t.max()], shift_time(np.array([low, high]), shift), atol=5e-3
    )


def test_scores_are_compared_at_clipped_times_and_at_noise_of_their_own():
    method = DMD((2,), score_shift=5.0)
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((4000, 2)), jnp.float32)
    rollout = ZERO._replace(x0=x0)
    x_t, t, eps = diffuse(method, rollout, EDM(), jnp.arange(4000), *jax.random.split(KEY))
    assert np.mean(t == np.float32(0.98)) == pytest.approx(0.0926, abs=0.02)
    assert t.min() >= np.float32(0.02)
    np.testing.assert_allclose(x_t, x0 + EDM().sigma(t)[:, None] * eps, rtol=1e-5, atol=1e-5)
    assert abs(np.corrcoef(np.ravel(x0), np.ravel(eps))[0, 1]) < 4 / np.sqrt(8000)


def test_generator_loss_uses_the_teachers_guidance_and_not_the_fake_scores():
    """The gradient at x0 is dmd_gradient of u + w (c - u) and the plain fake score, over N."""
    method = DMD((2,), times=(1.0,), guidance=4.0)
    nets = networks()
    # The teacher's condition shifts its prediction: c - u = 0.3 everywhere.
    plain = nets["teacher"].net
    nets["teacher"] = Denoiser(
        lambda x, t, cond: plain(x, t, None) + cond, FlowMatching(), X0(time_scale=1.0)
    )
    batch = BATCH | {"cond": jnp.full((6, 1), 0.3)}
    generator = affine(0.5, jnp.zeros((6, 2)))  # a shift of each sample is its x0
    grad, rollout = generator_gradient(method, generator, nets, batch)
    _, time_key, eps_key = jax.random.split(KEY, 3)
    x_t, t, _ = diffuse(method, rollout, FlowMatching(), BATCH["index"], time_key, eps_key)
    real = plain(x_t, t, None) + 4.0 * 0.3
    fake = nets["fake_score"](x_t, t, None)
    wanted = dmd_gradient(rollout.x0, real, fake) / rollout.x0.size
    np.testing.assert_allclose(grad.net.shift, wanted, rtol=1e-4, atol=1e-6)


def test_sids_gradient_is_that_of_the_whole_composition():
    method = SiD((2,), times=(1.0,), alpha=1.2)
    nets = networks()
    generator = affine(0.5, jnp.full((6, 2), 0.1))
    grad, rollout = generator_gradient(method, generator, nets, BATCH)
    _, time_key, eps_key = jax.random.split(KEY, 3)
    _, t, eps = diffuse(method, rollout, FlowMatching(), BATCH["index"], time_key, eps_key)

    def by_hand(x0, through):
        x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
        predictions = nets["teacher"](x_t, t, None), nets["fake_score"](x_t, t, None)
        if not through:
            predictions = jax.lax.stop_gradient(predictions)
        return sid_loss(x0, *predictions, alpha=1.2)

    np.testing.assert_allclose(
        grad.net.shift, jax.grad(by_hand)(rollout.x0, True), rtol=1e-4, atol=1e-6
    )
    assert np.abs(jax.grad(by_hand)(rollout.x0, False) - grad.net.shift).max() > 1e-3


@pytest.mark.parametrize("role", ["teacher", "fake_score"])
@pytest.mark.parametrize("method", [DMD((2,), times=(1.0,)), SiD((2,), times=(1.0,), alpha=1.2)])
def test_a_prediction_that_is_not_finite_costs_its_own_sample_only(method, role):
    """A network whose backward pass turns a gradient of zero into NaN, for one sample of six."""
    nets, generator = networks(), affine(0.5, jnp.full((6, 2), 0.1))
    wanted, _ = generator_gradient(method, generator, nets, BATCH)
    plain = nets[role]
    factor = jnp.ones((6, 1)).at[2].set(jnp.inf)
    nets[role] = lambda x_t, t, cond: factor * plain(x_t, t, cond)
    nets[role].schedule = FlowMatching()
    grad, _ = generator_gradient(method, generator, nets, BATCH)
    shift = np.array(wanted.net.shift)
    shift[2] = 0.0
    np.testing.assert_allclose(grad.net.shift, shift, rtol=1e-6, atol=1e-9)
    loss = jax.jit(lambda generator: method.generator_loss(generator, nets, BATCH, KEY))
    value, (observed, _) = loss(generator)
    nonfinite = method.metrics(observed)["samples/nonfinite"]
    assert jnp.isfinite(value) and nonfinite == pytest.approx(1 / 6)


def test_a_backward_pass_that_is_not_finite_is_not_hidden():
    """Finite predictions with a gradient of NaN: the train step has to skip such an update."""
    nets, generator = networks(), affine(0.5, jnp.full((6, 2), 0.1))
    nets["fake_score"] = lambda x_t, t, cond: jnp.sqrt(jnp.abs(x_t - x_t))  # 0, of slope inf - inf
    grad, _ = generator_gradient(SiD((2,), times=(1.0,)), generator, nets, BATCH)
    assert not jnp.all(jnp.isfinite(grad.net.shift))


def test_sid_takes_dmds_normaliser_settings_and_weights():
    x0, real, fake = np.random.default_rng(0).standard_normal((3, 2, 4, 1)).astype(np.float32)
    rollout = ZERO._replace(x0=x0)
    plain = SiD((4, 1), normalize=False).distance(rollout, real, fake)
    np.testing.assert_allclose(plain, sid_loss(x0, real, fake, normalize=False), rtol=1e-6)
    blocks = SiD((4, 1), frames_per_block=2).distance(rollout, real, fake)
    np.testing.assert_allclose(blocks, sid_loss(x0, real, fake, frames_per_block=2), rtol=1e-6)
    weight = np.float32([2.0, 0.0])
    weighted = SiD((4, 1)).distance(rollout, real, fake, weight)
    np.testing.assert_allclose(weighted, sid_loss(x0[:1], real[:1], fake[:1]), rtol=1e-6)


@pytest.mark.parametrize(
    "prediction, schedule, regression",
    [
        (Velocity(1.0), FlowMatching(), None),
        (Velocity(1.0), FlowMatching(), X0()),
        (X0(1.0), FlowMatching(), Velocity()),
        (X0(1.0), VP(), Epsilon()),
        (Epsilon(1.0), VP(), X0()),
        (EDMPreconditioned(), EDM(), X0()),
    ],
)
def test_the_critic_regresses_in_the_form_asked_for(prediction, schedule, regression):
    """The loss is the mean squared error of the named quantity, computed from the critic's x0."""
    method = DMD((2,), regression=regression, clip=(0.2, 0.8))
    critic = Denoiser(tiny_mlp(1), schedule, prediction)
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)), jnp.float32)
    rollout = ZERO._replace(x0=x0)
    loss, _ = method.critic_loss({"fake_score": critic}, {}, rollout, BATCH, KEY)
    x_t, t, _ = diffuse(method, rollout, schedule, BATCH["index"], *jax.random.split(KEY))
    predicted = critic(x_t, t, None)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]

    def quantity(x0):
        eps = (x_t - alpha * x0) / sigma
        match regression or prediction:
            case Velocity():
                return eps - x0
            case Epsilon():
                return eps
            case X0():
                return x0
            case EDMPreconditioned():
                return x0 * jnp.hypot(sigma, 0.5) / (sigma * 0.5)

    wanted = jnp.mean((quantity(predicted) - quantity(x0)) ** 2)
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


def test_the_critic_sends_no_gradient_into_the_rollout():
    critic = Denoiser(tiny_mlp(1))

    def loss(x0):
        rollout = ZERO._replace(x0=x0)
        return DMD((2,)).critic_loss({"fake_score": critic}, {}, rollout, BATCH, KEY)[0]

    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((6, 2))), 0.0)


MASK = jnp.array([False, False, True, True])  # as Self-Forcing's: a window's first block is out


def masked_rollout(seed, kept=0):
    """A rollout [6, 4, 2] and two predictions: `seed` determines the frames that the mask drops."""
    dropped, values = (
        np.random.default_rng(n).standard_normal((3, 6, 4, 2)).astype(np.float32)
        for n in (seed, kept)
    )
    x0, real, fake = np.where(MASK[:, None], values, 10 * dropped)
    mask = jnp.broadcast_to(MASK, (6, 4))
    return (
        ZERO._replace(x0=jnp.asarray(x0), mask=mask, cond=None),
        jnp.asarray(real),
        jnp.asarray(fake),
    )


def test_masked_frames_do_not_train_the_critic():
    method, critic = DMD((4, 2), clip=(0.3, 0.7)), affine(0.5, 0.1)

    def loss(seed, **changes):
        rollout = masked_rollout(seed)[0]._replace(**changes)
        return method.critic_loss({"fake_score": critic}, {}, rollout, BATCH, KEY)[0]

    assert loss(1) == loss(2) > 0.0
    assert loss(1, mask=None) != loss(2, mask=None)


def metrics(method, rollout, real, fake, t):
    """The metrics of a batch whose scores are known."""
    return method.metrics(method.observe(rollout, real, fake, t))


def test_masked_frames_do_not_count_in_the_metrics():
    t = jnp.array([0.1, 0.2, 0.3, 0.6, 0.9, 0.95])
    rollout, real, fake = masked_rollout(1)
    got = metrics(DMD((4, 2)), rollout, real, fake, t)
    window = rollout._replace(x0=rollout.x0[:, 2:], mask=None)
    wanted = metrics(DMD((2, 2)), window, real[:, 2:], fake[:, 2:], t)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    assert got["samples/contrast"] < 2 < jnp.std(rollout.x0)


def test_a_sample_that_one_blocks_normaliser_silences_is_counted():
    method = DMD((4, 1), frames_per_block=2)
    x0, real, fake = np.random.default_rng(0).standard_normal((3, 6, 4, 1)).astype(np.float32)
    real[1, :2] = x0[1, :2]  # a teacher error of zero
    rollout = ZERO._replace(x0=jnp.asarray(x0))
    silenced = jnp.all(dmd_gradient(x0, real, fake, frames_per_block=2) == 0, axis=(1, 2))
    got = metrics(method, rollout, jnp.asarray(real), jnp.asarray(fake), jnp.full(6, 0.5))
    assert got["samples/nonfinite"] == jnp.mean(silenced) == pytest.approx(1 / 6)


def test_metrics_by_hand():
    x0 = jnp.array([[0.0, 2.0], [1.0, 1.0], [0.5, -0.5], [0.0, 0.0]])
    real = x0 + jnp.array([[1.0], [2.0], [1.0], [jnp.nan]])
    fake = x0 + jnp.array([[0.5], [1.0], [3.0], [0.0]])
    rollout = ZERO._replace(x0=x0)
    got = metrics(DMD((2,)), rollout, real, fake, jnp.array([0.1, 0.2, 0.6, 0.9]))
    np.testing.assert_allclose(
        [got[f"gap/{i}"] for i in range(4)], [(0.5 + 1) / 2, np.nan, 2.0, np.nan], rtol=1e-6
    )
    tracking = (0.5**2 + 1**2 + 3**2) / (1 + 2**2 + 1)
    np.testing.assert_allclose(got["critic/tracking"], tracking, rtol=1e-6)
    assert got["samples/nonfinite"] == 0.25
    assert got["samples/saturation"] == 1 / 8
    np.testing.assert_allclose(got["samples/contrast"], np.std(x0), rtol=1e-6)
    np.testing.assert_allclose(got["samples/diversity"], np.std(x0, axis=0).mean(), rtol=1e-6)
