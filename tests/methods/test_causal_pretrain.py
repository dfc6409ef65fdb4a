"""Teacher forcing and diffusion forcing: times, weights, contexts, and what a block learns from."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from toys import assert_close, weights

from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.diffusion.schedule import FlowMatching, shift_time
from dmd_jax.methods.causal_pretrain import DiffusionForcing, TeacherForcing, bell_weight
from dmd_jax.methods.pretrain import Pretrain
from dmd_jax.models.attention import Causal
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.training.configuration import complete, construct
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step

KEY = jax.random.key(4)
SHAPE = (6, 1, 1, 2)
PAIRS = Causal(frames_per_block=2)
BOTH = pytest.mark.parametrize("kind", [DiffusionForcing, TeacherForcing])


class Spy:
    """A network that returns 0.3 everywhere and stores its arguments."""

    def __call__(self, x, t, cond, **how):
        self.x, self.t, self.cond, self.how = x, t, cond, how
        return jnp.full_like(x, 0.3)


def batch(n, shape=SHAPE):
    data = np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)
    cond = {"text": jnp.ones((n, 3, 10)), "uncond": jnp.zeros((n, 3, 10))}
    return {"data": data, "cond": cond["text"], "uncond": cond["uncond"], "index": jnp.arange(n)}


def spied(method, n=8):
    spy, given = Spy(), batch(n, method.sample_shape)
    denoiser = Denoiser(spy, FlowMatching(), Velocity())
    loss, (observed, rollout) = method.generator_loss(denoiser, {}, given, KEY)
    assert observed == {} and rollout is None
    return loss, spy, given["data"]


@BOTH
@pytest.mark.parametrize("causal", [PAIRS, Causal(frames_per_block=5, first_alone=True)], ids=str)
def test_a_block_has_one_time_and_blocks_have_their_own(kind, causal):
    _, spy, _ = spied(kind(SHAPE, causal=causal, shift=3.0), n=2000)
    t = np.asarray(spy.t) / 1000
    assert t.shape == (2000, 6) and spy.t.dtype == jnp.float32
    sizes = [1, 5] if causal.first_alone else [2, 2, 2]
    starts = np.cumsum([0, *sizes[:-1]])
    np.testing.assert_array_equal(t, np.repeat(t[:, starts], sizes, axis=1))
    assert np.abs(np.corrcoef(t[:, starts].T) - np.eye(len(sizes))).max() < 5 / np.sqrt(2000)
    for column in t[:, starts].T:  # each is uniform before the shift: Kolmogorov and Smirnov
        u = np.sort(column / (3 - 2 * column))
        assert np.abs(u - np.linspace(0, 1, 2000)).max() < 1.63 / np.sqrt(2000)


@BOTH
def test_one_time_for_the_whole_video(kind):
    _, spy, _ = spied(kind(SHAPE, causal=PAIRS, per_block=False))
    assert spy.t.shape == (8,) and len(set(spy.t.tolist())) == 8


@BOTH
@pytest.mark.parametrize("bell", [False, True])
def test_the_loss_is_the_weighted_error_of_the_velocity(kind, bell):
    loss, spy, data = spied(kind(SHAPE, causal=PAIRS, bell=bell, shift=5.0, clip=(0.1, 0.9)))
    t = (spy.t / 1000)[:, :, None, None, None]
    eps = (spy.x - (1 - t) * data) / t
    error = np.square(0.3 - (eps - data))
    weight = bell_weight(spy.t / 1000, 5.0)[:, :, None, None, None] if bell else 1.0
    np.testing.assert_allclose(loss, np.mean(weight * error), rtol=1e-4)


@pytest.mark.parametrize("shift, top, last", [(5.0, 2.0764, 0.0319), (8.0, 2.4726, 0.0606)])
def test_the_bell_is_that_of_self_forcings_table(shift, top, last):
    t = shift_time(1.0 - np.arange(1000) / 1000, shift)
    weight = np.asarray(bell_weight(t, shift))
    assert weight.mean() == pytest.approx(1.0, abs=1e-5)
    assert (weight[0], weight.max(), weight[-1]) == pytest.approx((0.0, top, last), abs=2e-4)


def test_the_context_is_the_clean_video_by_default_and_noised_where_a_time_is_given():
    _, spy, data = spied(TeacherForcing(SHAPE, causal=PAIRS))
    np.testing.assert_array_equal(spy.how["context"], data)
    np.testing.assert_array_equal(spy.how["context_time"], np.zeros(8))
    _, clean, _ = spied(DiffusionForcing(SHAPE, causal=PAIRS))
    assert clean.how == {"causal": PAIRS}
    np.testing.assert_array_equal(clean.x, spy.x)

    _, noisy, data = spied(TeacherForcing(SHAPE, causal=PAIRS, context_time=0.625), n=4000)
    assert noisy.how["causal"] == PAIRS
    np.testing.assert_allclose(noisy.how["context_time"], np.full(4000, 625.0))
    eps = (noisy.how["context"] - 0.375 * data) / 0.625
    assert eps.mean() == pytest.approx(0.0, abs=0.02) and eps.std() == pytest.approx(1, abs=0.02)
    # The noise of the context says nothing about that of the frames to be denoised.
    t = (noisy.t / 1000)[:, :, None, None, None]
    own = (noisy.x - (1 - t) * data) / t
    assert abs(np.corrcoef(np.ravel(own), np.ravel(eps))[0, 1]) < 0.02


def test_without_blocks_and_times_of_their_own_the_draws_are_pretrains():
    _, spy, _ = spied(DiffusionForcing(SHAPE, causal=PAIRS, per_block=False, shift=2.0))
    _, plain, _ = spied(Pretrain(SHAPE, shift=2.0))
    np.testing.assert_array_equal(spy.x, plain.x)
    np.testing.assert_array_equal(spy.cond, plain.cond)


@BOTH
@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(sample_shape=(28, 28, 1)), "only videos have blocks"),
        (dict(sample_shape=(7, 2, 2, 1)), "7 frames do not divide into blocks of 2"),
        (dict(dropout=2.0), "dropout=2.0 must be"),
        (dict(shift=0.0), "shift=0.0 must be"),
    ],
)
def test_what_has_no_meaning_is_refused(kind, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        kind(**(dict(sample_shape=SHAPE, causal=PAIRS) | fields))


@pytest.mark.parametrize("time", [-0.1, 1.0])
def test_a_context_of_noise_alone_is_refused(time):
    with pytest.raises(ValueError, match=f"context_time={time} must be"):
        TeacherForcing(SHAPE, causal=PAIRS, context_time=time)


@BOTH
def test_a_config_states_the_blocks(kind):
    config = ml_collections.ConfigDict({"method": dict(cls=kind)})
    with complete(config).unlocked():
        config.method.causal.frames_per_block = 2
    made = construct(config.method, "config.method", sample_shape=SHAPE)
    assert made == kind(SHAPE, causal=PAIRS)


TINY = WanConfig(
    *(16, 16, 2, 1), in_channels=2, out_channels=2, text_dim=10, freq_dim=16, dtype="float32"
)


def tiny_wan(seed):
    return Denoiser(
        weights(lambda rngs: Wan(TINY, rngs=nnx.Rngs(0) if rngs is None else rngs), seed)
    )


@BOTH
def test_a_step_of_training_lowers_the_loss_of_a_wan(kind):
    given, method = batch(4, (4, 2, 2, 2)), kind((4, 2, 2, 2), causal=PAIRS)
    tx = per_role({"generator": AdamW(learning_rate=3e-3).transform(9)})
    step = jax.jit(partial(train_step, method=method, tx=tx, update_generator=True))
    state, losses = init_state({"generator": tiny_wan(0)}, tx), []
    for _ in range(8):
        state = dataclasses.replace(state, step=jnp.zeros((), jnp.int32))  # the same draws
        state, metrics = step(state, {}, given, KEY)
        losses.append(float(metrics["generator/loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_a_block_learns_from_the_real_blocks_before_it_and_from_nothing_later():
    """The gradient of the loss with respect to the data reaches what a block may see."""
    net, causal = tiny_wan(1), PAIRS
    shape = (6, 2, 2, 2)
    given = batch(1, shape)

    def block_errors(video):
        """[3], of the blocks' outputs; only the context is `video`, the noisy half stays."""
        method = TeacherForcing(shape, causal=causal)
        out = method.predict(
            net,
            jnp.ones((1, *shape)),
            jnp.full((1, 6), 0.5),
            given["cond"],
            {"data": video, "index": jnp.arange(1)},
            KEY,
        )
        return jnp.sum(jnp.square(out.raw).reshape(3, -1), axis=1)

    gradients = jax.jit(jax.jacrev(block_errors))(given["data"])  # [3, 1, F, ...]
    reached = np.any(np.asarray(gradients) != 0, (1, 3, 4, 5))
    before = [[False] * 6, [True] * 2 + [False] * 4, [True] * 4 + [False] * 2]
    np.testing.assert_array_equal(reached, before)


def test_gradients_do_not_depend_on_how_a_batch_is_split():
    method = TeacherForcing((4, 2, 2, 2), causal=PAIRS, context_time=0.3)
    tx = per_role({"generator": AdamW(learning_rate=1e-3).transform(9)})
    given = batch(4, (4, 2, 2, 2))

    def stepped(accumulate):
        step = partial(train_step, method=method, tx=tx, update_generator=True)
        state = init_state({"generator": tiny_wan(0)}, tx)
        return jax.jit(partial(step, accumulate=accumulate))(state, {}, given, KEY)[1]

    assert_close(stepped(2), stepped(1), rtol=1e-4)
