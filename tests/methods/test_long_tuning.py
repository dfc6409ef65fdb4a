"""Streaming long tuning: chunks of one long video, its prompts, its state between two steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Halved, assert_close, assert_same, normal, video_networks

from dmd_jax.devices import randomness, sharding
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.long_tuning import LongTuning
from dmd_jax.methods.sid import SiD
from dmd_jax.models.wan import Causal
from dmd_jax.rollouts.self_forcing import recache, self_forcing
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.optimizer import AdamW, per_role
from dmd_jax.training.step import init_state, train_step

SHAPE = (6, 4, 4, 3)
WINDOW = Causal(2, window=4, sink=2)
LONG = LongTuning(WINDOW, frames=14, overlap=2)  # chunks of 6, 4 and 4 new frames
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def nets():
    return video_networks() | {"vae": Halved()}


def method(video=LONG, kind=DMD, **how):
    how = dict(times=(1.0, 0.5), shift=5.0, score_shift=5.0, guidance=2.0) | how
    return kind(SHAPE, video=video, **how)


def batch(seed=1, num=2):
    cond = normal(seed, num, 3, 5)
    return {"cond": cond, "uncond": jnp.zeros_like(cond), "index": jnp.arange(num)}


@functools.cache
def roller(dmd):
    """The jitted rollout of a method: (generator, batch with its streams, key) -> Rollout."""
    frozen = {"vae": Halved()}
    return jax.jit(lambda generator, batch, key: dmd.rollout(generator, frozen, batch, key))


def chunks(dmd, nets, count, streams=None):
    """[(key, Rollout)] of consecutive steps; the conditions of each step differ."""
    generator, made = nets["generator"], []
    streams = dmd.streams(generator, batch()["cond"]) if streams is None else streams
    for step in range(count):
        key = jax.random.fold_in(KEY, step)
        made.append((key, roller(dmd)(generator, batch(step) | {"stream": streams}, key)))
        streams = made[-1][1].stream
    return made


def noise(key):
    return randomness.normal(jax.random.split(key, 3)[0], jnp.arange(2), SHAPE)


def test_the_cache_of_a_stream_is_split_by_rows_and_heads(nets):
    streams = jax.eval_shape(lambda: method().streams(nets["generator"], batch()["cond"]))
    mesh = sharding.make_mesh(data=2, context=2, devices=jax.devices()[:4])

    def of_a_device(x, spec):
        place = jax.sharding.NamedSharding(mesh, sharding.fit(spec, x.shape, mesh))
        return place.shard_shape(x.shape)

    found = jax.tree.map(of_a_device, streams, streams.specs())
    assert streams.cache.keys.shape[1:] == (2, 12, 4, 2, 8)
    assert found.cache.keys[1:] == found.cache.values[1:] == (1, 12, 4, 1, 8)
    assert found.latents == (1, *SHAPE) and found.cond == (1, 3, 5) and found.made == ()


def test_chunks_are_one_long_rollout(nets):
    """With one call a block and frozen weights, for then all noise is that of the beginning."""
    dmd = method(dataclasses.replace(LONG, prompt_switch=False), times=(1.0,))
    made = chunks(dmd, nets, 3)
    parts = [noise(key)[:, 2 * (step > 0) :] for step, (key, _) in enumerate(made)]
    how = dict(times=(1.0,), shift=5.0, schedule=nets["generator"].schedule, causal=WINDOW)
    given = jnp.concatenate(parts, axis=1), batch(0)["cond"], KEY
    whole = jax.jit(lambda net: self_forcing(net, *given, graded=0, **how).x0)(nets["generator"])
    for start, (_, rollout) in zip((0, 4, 8), made, strict=True):
        assert_close(rollout.x0, whole[:, start : start + 6], rtol=5e-5, atol=5e-5)
        new = [False] * 2 + [True] * 4 if start else [True] * 6
        np.testing.assert_array_equal(rollout.mask, [new] * 2)
        assert_same(rollout.cond, batch(0)["cond"])
        assert int(rollout.stream.made) == start + 6


def test_a_video_that_is_full_is_followed_by_a_new_one_of_other_prompts(nets):
    """And nothing of the old one, not even NaN in its cache, reaches the new one."""
    dmd = method()
    generator = nets["generator"]
    full = chunks(dmd, nets, 3)[-1][1].stream
    assert int(full.made) == 14
    broken = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x, full
    )
    fresh = dmd.streams(generator, batch()["cond"])
    one, other = (
        roller(dmd)(generator, batch(9) | {"stream": streams}, KEY) for streams in (broken, fresh)
    )
    assert_same((one.x0, one.mask, one.cond), (other.x0, other.mask, other.cond))
    assert_same(one.stream, other.stream)
    assert int(one.stream.made) == 6


def test_videos_end_where_a_frame_is_not_finite(nets):
    dmd = method()
    [(_, first)] = chunks(dmd, nets, 1)
    keys = first.stream.cache.keys.at[:, 1].set(jnp.nan)  # of the second sample
    cache = first.stream.cache._replace(keys=keys)
    broken = first.stream._replace(cache=cache, switch=jnp.int32(0))
    [(_, rollout)] = chunks(dmd, nets, 1, broken)
    assert np.isfinite(rollout.x0[0]).all() and not np.isfinite(rollout.x0[1]).all()
    assert int(rollout.stream.made) == LONG.frames


def test_prompts_change_once_at_a_border_that_is_drawn(nets):
    dmd, borders = method(), set()
    for seed in range(8):
        streams = dmd.streams(nets["generator"], batch()["cond"])
        key = jax.random.key(seed)
        given = batch(0) | {"stream": streams}
        borders.add(int(roller(dmd)(nets["generator"], given, key).stream.switch))
    assert borders == {6, 10}


@pytest.mark.parametrize(
    "keep_sink, context_time",
    [
        (True, 0.3),
        pytest.param(False, 0.3, marks=pytest.mark.slow),
        pytest.param(True, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_switch_is_a_recache_of_the_window(nets, keep_sink, context_time):
    """The next chunk is that of a cache computed anew under the conditions of its step."""
    causal = dataclasses.replace(WINDOW, keep_sink=keep_sink)
    video = dataclasses.replace(LONG, causal=causal, context_time=context_time)
    dmd, generator = method(video, times=(1.0,)), nets["generator"]
    [(_, first)] = chunks(dmd, nets, 1)
    streams, changed = first.stream._replace(switch=jnp.int32(6)), batch(7)
    rollout = roller(dmd)(generator, changed | {"stream": streams}, KEY)
    assert_same(rollout.cond, changed["cond"])

    rollout_key, _, context_key = jax.random.split(jax.random.split(KEY, 3)[2], 3)
    how = dict(schedule=generator.schedule, causal=causal, context_time=context_time)
    cond, window = changed["cond"], first.x0[:, 2:]

    @jax.jit
    def by_hand(generator):
        cache = recache(generator, window, cond, context_key, cache=streams.cache, start=2, **how)
        then = how | dict(times=(1.0,), shift=5.0, cache=cache, start=6)
        return self_forcing(generator, noise(KEY)[:, 2:], cond, rollout_key, **then).x0

    assert_close(rollout.x0[:, 2:], by_hand(generator), rtol=2e-5, atol=2e-5)


def test_new_frames_alone_pass_gradient_and_count_in_both_losses(nets):
    dmd = method()
    streams = chunks(dmd, nets, 1)[0][1].stream._replace(switch=jnp.int32(0))
    given = batch(4) | {"stream": streams}
    rollout = roller(dmd)(nets["generator"], given, KEY)

    def generator_loss(x0):
        return dmd.compare(rollout._replace(x0=x0), nets, given, KEY, jax.random.key(8))[0]

    gradient = jax.jit(jax.grad(generator_loss))(rollout.x0)
    assert not np.any(gradient[:, :2]) and np.all(np.any(gradient[:, 2:], (0, 2, 3, 4)))

    @jax.jit
    @jax.grad
    def weights_gradient(generator, counts):
        """Of the sum of the frames that count, [F] of 0 and 1."""
        frames = dmd.rollout(generator, nets, given, KEY).x0.sum((0, 2, 3, 4))
        return jnp.vdot(frames, counts)

    old = jnp.arange(6.0) < 2
    for counts, passes in ((old, False), (~old, True)):
        leaves = jax.tree.leaves(weights_gradient(nets["generator"], counts.astype(jnp.float32)))
        assert any(np.any(x) for x in leaves) == passes


def test_the_first_frame_that_a_later_chunk_compares_is_an_image(nets):
    """Of the frames before it and itself, 5; the video goes on from the frame itself."""
    plain, imaged = method(), method(dataclasses.replace(LONG, image_latent=True))
    (_, first), (_, second) = chunks(imaged, nets, 2)
    (_, plain_first), (_, plain_second) = chunks(plain, nets, 2)
    assert imaged.needs_vae and not plain.needs_vae
    assert_close(first.x0, plain_first.x0)
    assert_close(second.x0[:, :1], 0.5 * first.x0[:, 4:5] + 5)
    assert_close(second.x0[:, 1:], plain_second.x0[:, 1:])
    assert_close(second.stream, plain_second.stream)


TX = per_role({role: AdamW(1e-3).transform(10) for role in ("generator", "fake_score")})


def state_of(dmd, nets):
    trainable = {role: nets[role] for role in ("generator", "fake_score")}
    return init_state(trainable, TX, stream=dmd.streams(nets["generator"], batch(0, 4)["cond"]))


@functools.cache
def step_of(dmd, **how):
    """A jitted step that updates both networks: (state, teacher, cond) -> (state, metrics)."""

    @jax.jit
    def step(state, teacher, cond):
        frozen, data = {"teacher": teacher, "vae": Halved()}, {"cond": cond, "uncond": 0 * cond}
        return train_step(state, frozen, data, KEY, method=dmd, tx=TX, update_generator=True, **how)

    return step


@pytest.mark.parametrize("kind", [DMD, pytest.param(SiD, marks=pytest.mark.slow)])
def test_steps_go_on_from_each_other_and_accumulation_changes_nothing(nets, kind):
    dmd, ends = method(kind=kind), []
    for step in (step_of(dmd), step_of(dmd, accumulate=2)):
        state, made = state_of(dmd, nets), []
        for i in range(4):
            state, metrics = step(state, nets["teacher"], batch(i, 4)["cond"])
            made.append(int(state.stream.made))
            assert metrics["generator/skipped"] == 0 and metrics["fake_score/skipped"] == 0
        assert made == [6, 10, 14, 6]
        ends.append((state.stream, state.opt_state))
    assert_close(ends[1][0], ends[0][0], rtol=1e-3, atol=1e-3)
    assert_close(ends[1][1], ends[0][1], rtol=1e-2, atol=1e-4)


def test_the_critic_has_the_next_chunk_or_the_generators(nets):
    """LongLive's order: the generator's chunk, then the critic's."""
    for step, made in ((step_of(method()), 6), (step_of(method(), reuse_rollout=False), 10)):
        state, _ = step(state_of(method(), nets), nets["teacher"], batch(0, 4)["cond"])
        assert int(state.stream.made) == made


def test_a_stream_goes_on_from_a_checkpoint_bit_for_bit(nets, tmp_path):
    dmd = method()
    step = step_of(dmd)
    state, _ = step(state_of(dmd, nets), nets["teacher"], batch(0, 4)["cond"])
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        restored, _, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    again = [step(x, nets["teacher"], batch(1, 4)["cond"])[0] for x in (state, restored)]
    assert_same(*again)
    assert int(again[0].stream.made) == 10


@pytest.mark.parametrize(
    "how, complaint",
    [
        (dict(causal=Causal(2)), "a long video needs a window"),
        (dict(causal=Causal(2, window=8)), "at most the 6 frames of a sample"),
        (dict(causal=Causal(5, True, window=5)), "first_alone must be False"),
        (dict(overlap=3), "overlap=3 must be whole blocks of 2 frames"),
        (dict(overlap=6), "fewer than the 6 frames"),
        (dict(overlap=0, image_latent=True), "it needs overlap > 0"),
        (dict(frames=9), "frames=9 leave no room for a second chunk: give 10"),
    ],
    ids=str,
)
def test_videos_that_cannot_be_are_refused(how, complaint):
    with pytest.raises(ValueError, match=complaint):
        method(dataclasses.replace(LONG, **how))


def test_chunks_without_overlap_follow_each_other(nets):
    dmd = method(LongTuning(WINDOW, frames=12, overlap=0))
    (_, first), (_, second) = chunks(dmd, nets, 2)
    assert int(second.stream.made) == 12 and bool(np.all(second.mask))
    assert_same(second.stream.latents, second.x0)
    assert np.abs(first.x0 - second.x0).max() > 0.1
