"""Phased DMD: its times, its fixed point in closed form, and DMD as the case of one phase."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import FLOW, exact, normal

from dmd_jax.diffusion.denoiser import X0, Denoiser
from dmd_jax.diffusion.schedule import VP, align, shift_time
from dmd_jax.losses import subintervals
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.phased_dmd import PhasedDMD
from dmd_jax.models.attention import Causal
from dmd_jax.models.experts import combine
from dmd_jax.rollouts.backward_simulation import Phase, Rollout

MEAN, STD, S = 0.8, 0.5, 0.5  # of the teacher; the time at which the first of two phases ends
# Mean and standard deviation of the teacher's samples at S.
MEAN_S, STD_S = (1 - S) * MEAN, float(np.hypot((1 - S) * STD, S))
TWO = PhasedDMD((1,), times=(1.0, 0.5), phases=(1, 1), normalize=False)
KEYS = tuple(jax.random.split(jax.random.key(1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diffused:
    """The exact denoiser of what N(mean, std^2) at time s becomes, by Tweedie's formula."""

    mean: Any
    std: Any
    s: Any

    def __call__(self, x_t, t, cond):
        scale, fresh = (align(x, x_t) for x in subintervals.step(self.s, t, FLOW))
        alpha, sigma = align(FLOW.alpha(t), x_t), align(FLOW.sigma(t), x_t)
        variance = jnp.square(scale * self.std) + jnp.square(fresh)
        return (x_t - jnp.square(sigma) * (x_t - scale * self.mean) / variance) / alpha


def diffused(mean, std, s=S):
    net = Diffused(*(jnp.asarray(x, jnp.float32) for x in (mean, std, s)))
    return Denoiser(net, FLOW, X0(time_scale=1.0))


def setting(mean, std, number=0, n=2000):
    """(rollout, nets, batch) of samples N(mean, std^2) at the end of a phase, scores exact."""
    s = (S, 0.0)[number]
    x_s = mean + std * normal(0, n, 1)
    phase = Phase(jnp.int32(number), x_s, jnp.float32(s))
    rollout = Rollout(x_s, None, jnp.float32(1), jnp.float32(S), jnp.zeros((n, 1)), phase=phase)
    nets = {"teacher": exact([[MEAN]], STD), "fake_score": diffused(mean, std, s)}
    return rollout, nets, {"uncond": jnp.zeros((n, 1)), "index": jnp.arange(n)}


@partial(jax.jit, static_argnums=0)
def gradient(method, rollout, nets, batch):
    """Of the generator's loss with respect to the samples, times their number."""

    def loss(x0):
        return method.compare(rollout._replace(x0=x0), nets, batch, *KEYS)[0]

    return rollout.x0.size * jax.grad(loss)(rollout.x0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("number, mean, std", [(0, MEAN_S, STD_S), (1, MEAN, STD)])
def test_a_phase_rests_where_its_samples_are_the_teachers_of_that_noise_level(
    number, mean, std, nested
):
    method = dataclasses.replace(TWO, nested=nested)
    np.testing.assert_allclose(gradient(method, *setting(mean, std, number)), 0.0, atol=2e-4)
    for shift in (-0.5, 0.5):  # the loss pulls the samples back
        grad = gradient(method, *setting(mean + shift, std, number))
        assert (jnp.sign(grad) == np.sign(shift)).all()
    wide = setting(mean, 2 * std, number)
    assert jnp.mean((wide[0].x0 - mean) * gradient(method, *wide)) > 0.01


def test_a_fake_score_of_x0_would_not_rest_there():
    """One that learns x_s / alpha(s) as if it were clean data: its samples are too wide."""
    rollout, nets, batch = setting(MEAN_S, STD_S)
    nets["fake_score"] = exact([[MEAN]], STD_S / (1 - S))
    assert jnp.abs(gradient(TWO, rollout, nets, batch)).max() > 0.1


@pytest.mark.parametrize("number", [0, 1])
def test_the_fake_scores_loss_is_lowest_at_the_score_of_the_diffused_samples(number):
    mean, std, s = 0.3, 0.9, (S, 0.0)[number]
    rollout, nets, batch = setting(mean, std, number, n=20_000)

    @jax.jit
    def loss(fake_score):
        return TWO.critic_loss({"fake_score": fake_score}, nets, rollout, batch, KEYS[0])[0]

    def at(offset):
        mean_of_sample, std_of_sample = jnp.mean(rollout.x0), jnp.std(rollout.x0)
        return diffused(mean_of_sample + offset, std_of_sample, s)

    losses = [float(loss(at(offset))) for offset in (-0.2, 0.0, 0.2)]
    lowest = 0.2 * (losses[0] - losses[2]) / (2 * (losses[0] - 2 * losses[1] + losses[2]))
    assert abs(lowest) < 0.02 and losses[1] < min(losses[0], losses[2])


def test_one_phase_is_dmd():
    fields = dict(times=(1.0,), guidance=2.0, shift=3.0, score_shift=3.0)
    ours, dmd = PhasedDMD((1,), phases=(1,), nested=False, **fields), DMD((1,), **fields)
    rollout, nets, batch = setting(0.3, 0.9, 1)
    rollout = rollout._replace(phase=rollout.phase._replace(number=jnp.int32(0)))
    toys.assert_close(gradient(ours, rollout, nets, batch), gradient(dmd, rollout, nets, batch))

    def critic(method):
        critics = {"fake_score": nets["fake_score"]}
        return method.critic_loss(critics, nets, rollout, batch, KEYS[0])[0]

    toys.assert_close(critic(ours), critic(dmd))


FOUR = PhasedDMD((1,), times=(1.0, 0.75, 0.5, 0.25), phases=(1, 1, 2), shift=3.0, score_shift=5.0)
ENDS = [float(shift_time(t, 3.0)) for t in (1.0, 0.75, 0.5, 0.0)]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_times_are_above_the_phases_end_and_a_batch_has_those_of_one_subinterval(number, nested):
    method = dataclasses.replace(FOUR, nested=nested)
    rollout = setting(0.0, 1.0, n=8)[0]
    phase = Phase(jnp.int32(number), rollout.x0, jnp.float32(ENDS[number + 1]))
    rollout = rollout._replace(phase=phase)

    @jax.vmap
    def times(key):
        return method.diffuse(rollout, FLOW, jnp.arange(8), key, KEYS[1])[1]

    t = np.asarray(jax.jit(times)(jax.random.split(KEYS[0], 2000)))
    assert t.min() >= ENDS[number + 1] + 0.02 - 1e-6 and t.max() <= 0.98 + 1e-6
    part = np.searchsorted(-np.asarray(ENDS[1:-1], np.float32), -t)  # 0 above the first end
    assert (part == part[:, :1]).all()
    shares = np.bincount(part[:, 0], minlength=3) / len(t)
    if not nested:
        assert shares[number] == 1.0
        return
    bounds = np.asarray([shift_time(end, 1 / 5) for end in ENDS])  # where the times are uniform
    wanted = -np.diff(bounds)[: number + 1] / (1 - bounds[number + 1])
    np.testing.assert_allclose(shares[: number + 1], wanted, atol=0.04)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AffinePair:
    """Two affine experts, the first for times above S: x0 = scale x + shift."""

    numbers: Any  # [2, 2]: (scale, shift) of each

    def __call__(self, x, t, cond):
        scale, shift = jnp.where(t[0] > S, self.numbers[0], self.numbers[1])
        return scale * x + shift

    def distributions(self):
        """(mean, std) of x_s, then of x0, from noise N(0, 1)."""
        (scale_s, shift_s), (scale_0, shift_0) = self.numbers
        mean, std = (1 - S) * shift_s, (1 - S) * scale_s + S
        return (mean, std), (scale_0 * mean + shift_0, scale_0 * std)


def test_training_brings_both_experts_to_the_teachers_samples():
    """With exact fake scores, from a start that is wrong in all numbers."""
    method = dataclasses.replace(TWO, nested=False)
    batch = {"cond": jnp.zeros((256, 1)), "uncond": jnp.zeros((256, 1)), "index": jnp.arange(256)}

    def step(generator, key):
        (mean_s, std_s), (mean, std) = generator.net.distributions()
        at_s, at_0 = diffused(mean_s, std_s), diffused(mean, std, 0.0)

        def fake_score(x_t, t, cond):
            return jnp.where(t[:, None] > S, at_s(x_t, t, cond), at_0(x_t, t, cond))

        nets = {"teacher": exact([[MEAN]], STD), "fake_score": fake_score}
        grad, _ = jax.grad(method.generator_loss, has_aux=True)(generator, nets, batch, key)
        return jax.tree.map(lambda x, g: x - 0.3 * g, generator, grad), None

    start = Denoiser(AffinePair(jnp.asarray([[0.2, -0.5], [1.5, 1.0]])), FLOW, X0(time_scale=1.0))
    keys = jax.random.split(KEYS[0], 400)
    end = jax.jit(lambda start: jax.lax.scan(step, start, keys)[0])(start)
    wanted = [(MEAN_S, STD_S), (MEAN, STD)]
    np.testing.assert_allclose(end.net.distributions(), wanted, atol=0.03)


def networks(generator=2, fake_score=2, teacher=None, schedule=FLOW, divided=S):
    """Networks of so many experts: the generator's pair `divided`, the teacher's at `teacher`."""

    def experts(count, boundaries=()):
        one = Denoiser(toys.tiny_mlp(0), schedule, X0())
        return one if count == 1 else combine([one] * count, boundaries or (S,))

    return {
        "generator": experts(generator, (divided,) if generator == 2 else (0.7, 0.3)),
        "fake_score": experts(fake_score),
        "teacher": Denoiser(toys.tiny_mlp(0), FLOW, X0())
        if teacher is None
        else combine([Denoiser(toys.tiny_mlp(0), FLOW, X0())] * 2, (teacher,)),
    }


def test_networks_of_the_phases_are_accepted():
    TWO.check_networks(networks())
    TWO.check_networks(networks(generator=1, teacher=S))
    dataclasses.replace(TWO, nested=False).check_networks(networks(fake_score=1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"generator": 3}, "the generator has 3 experts for the 2 phases"),
        ({"fake_score": 1}, "nested=True needs a fake_score of 2 experts"),
        ({"divided": 0.6}, r"the generator's experts are divided at \[600\.0\], where no phase"),
        ({"teacher": 0.6}, r"divided at \[600\.0\], where no phase ends: .* end at \(500\.0,\)"),
        ({"schedule": VP()}, r"the generator's VP\(.* to the teacher's FlowMatching\(\)"),
    ],
)
def test_networks_that_are_not_those_of_the_phases_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TWO.check_networks(networks(**changes))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"phases": (1, 1)}, r"phases=\(1, 1\) must be numbers of calls"),
        ({"strides": (1, 2)}, r"strides=\(1, 2\): rollouts in phases exit at each call alike"),
        ({"last_step_share": 0.3}, r"last_step_share=0\.3: rollouts in phases"),
        ({"below_exit": True}, "below_exit=True: rollouts in phases"),
        ({"clip": (0.3, 0.75)}, r"clip=\(0\.3, 0\.75\) leaves no times between 0\.5 and 1"),
    ],
)
def test_numbers_that_are_not_of_phases_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PhasedDMD((1,), **fields)


def test_videos_block_by_block_are_refused():
    with pytest.raises(ValueError, match="video=SelfForcing"):
        PhasedDMD((6, 4, 4, 3), video=SelfForcing(Causal(2)))
