"""Streams of a causal student: the video of one rollout, in constant memory, with new prompts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import assert_close

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models import kv_cache
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.pipelines import streaming
from dmd_jax.pipelines.streaming import Stream, block_sampler, parse_causal
from dmd_jax.rollouts.block_maker import first_noise
from dmd_jax.rollouts.samplers import CausalFewStep
from dmd_jax.rollouts.self_forcing import recache, self_forcing

CONFIG = WanConfig(
    dim=16, ffn=24, heads=2, depth=2, in_channels=3, out_channels=3, text_dim=5, freq_dim=8, reach=6
)
SIZE = (4, 4, 3)
SEED, KEY = 7, jax.random.key(7)
TIMES = (1.0, 0.5)
WINDOW = Causal(2, window=4, sink=2)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(toys.weights(lambda rngs: Wan(CONFIG, rngs=rngs), 0))


def cond(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 4, 5)), jnp.float32)


def stream(denoiser, sampler, **how):
    return Stream(denoiser, cond(1), sampler, size=SIZE, seed=SEED, **how)


def take(stream, frames):
    """The next `frames` latent frames, whole blocks."""
    blocks, end = [], stream.frames + frames
    while stream.frames < end:
        blocks.append(next(stream))
    return jnp.concatenate(blocks, axis=1)


def noise(causal, start, frames):
    """What the blocks of frames start, start + 1, ... begin with."""
    blocks, end = [], start + frames
    while start < end:
        size = 1 if causal.first_alone and start == 0 else causal.frames_per_block
        blocks.append(first_noise(KEY, jnp.arange(2), (size, *SIZE), jnp.int32(start)))
        start += size
    return jnp.concatenate(blocks, axis=1)


def roll(denoiser, sampler, start, frames, given, **how):
    """`self_forcing` in its last step."""
    how = dict(graded=0, last_step_share=1.0, start=start, **how)
    how |= dict(times=sampler.times, first_times=sampler.first_times, shift=sampler.shift)
    return jax.jit(
        lambda denoiser, noise: self_forcing(
            denoiser,
            noise,
            given,
            KEY,
            schedule=denoiser.schedule,
            causal=sampler.causal,
            context_time=sampler.context_time,
            **how,
        )
    )(denoiser, noise(sampler.causal, start, frames))


SAMPLERS = {
    "all frames visible": CausalFewStep(TIMES, causal=Causal(2)),
    "a window and a sink": CausalFewStep(TIMES, causal=WINDOW, shift=5.0),
    "a lone first frame": CausalFewStep(TIMES, causal=Causal(2, first_alone=True, window=5)),
    "noisy context, another list for the first block": CausalFewStep(
        (1.0,), causal=WINDOW, first_times=TIMES, context_time=0.3
    ),
    "context of the last call": CausalFewStep(TIMES, causal=WINDOW, context_time=None),
}


FAST = ("a window and a sink", "a lone first frame")


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS],
)
def test_a_stream_is_one_rollout(denoiser, name):
    sampler = SAMPLERS[name]
    frames = 10 + sampler.causal.first_alone
    made = take(stream(denoiser, sampler, longest=frames), frames)
    assert made.dtype == jnp.float32
    whole = roll(denoiser, sampler, 0, frames, cond(1)).x0
    assert_close(made, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "context_time, before, keep_sink",
    [
        (0.3, 8, True),
        pytest.param(0.3, 2, True, marks=pytest.mark.slow),
        pytest.param(0.3, 8, False, marks=pytest.mark.slow),
        pytest.param(None, 8, False, marks=pytest.mark.slow),
    ],
)
def test_a_switch_is_a_rollout_a_recache_and_a_rollout(denoiser, context_time, before, keep_sink):
    """Where the window holds the sink still, and where it has left it behind."""
    causal = dataclasses.replace(WINDOW, keep_sink=keep_sink)
    sampler = CausalFewStep(TIMES, causal=causal, shift=5.0, context_time=context_time)
    made = stream(denoiser, sampler)
    first = take(made, before)
    made.switch(cond(2))
    second = take(made, 6)

    whole = roll(denoiser, sampler, 0, before, cond(1))
    known = whole.x0[:, -WINDOW.window :]
    how = dict(schedule=denoiser.schedule, causal=causal, context_time=context_time)
    how |= dict(cache=whole.cache, start=before - known.shape[1])
    cache = jax.jit(lambda net: recache(net, known, cond(2), KEY, **how))(denoiser)
    wanted = roll(denoiser, sampler, before, 6, cond(2), cache=cache).x0
    assert_close(first, whole.x0, rtol=2e-5, atol=2e-5)
    assert_close(second, wanted, rtol=5e-5, atol=5e-5)
    unchanged = stream(denoiser, sampler)
    take(unchanged, before)
    assert np.abs(take(unchanged, 6) - second).max() > 1e-2


def test_two_programs_serve_a_stream_of_any_length(denoiser):
    """And a switch needs no other; nothing is read on the host, and the cache does not grow."""

    def compiled():
        return np.array([f._cache_size() for f in (streaming._denoise, streaming._write)])

    before = compiled()
    made = stream(denoiser, CausalFewStep(TIMES, causal=WINDOW, shift=3.0))  # as in no other test
    take(made, 4)
    bytes_at_first = made.cache.keys.nbytes
    with jax.transfer_guard("disallow"):
        take(made, 16)
    made.switch(cond(2))
    take(made, 4)
    np.testing.assert_array_equal(compiled() - before, [1, 1])
    assert made.cache.keys.nbytes == bytes_at_first and made.cache.slots == 6


def test_a_block_is_available_before_it_is_written(denoiser):
    made = stream(denoiser, SAMPLERS["a window and a sink"])
    next(made)
    assert set(np.asarray(made.cache.frames)) == {kv_cache.EMPTY}
    made.write()
    np.testing.assert_array_equal(made.cache.frames[:2], [0, 1])
    made.write()  # nothing more
    next(made)
    np.testing.assert_array_equal(made.cache.frames, [0, 1] + [kv_cache.EMPTY] * 4)


def test_without_a_window_a_video_ends(denoiser):
    sampler = SAMPLERS["all frames visible"]
    with pytest.raises(ValueError, match="give `longest`, its number of latent frames"):
        stream(denoiser, sampler)
    made = stream(denoiser, sampler, longest=5)
    take(made, 4)
    assert made.full
    with pytest.raises(ValueError, match="has 4 latent frames, and there is room for 5"):
        next(made)


def test_a_seed_makes_the_same_video_again_and_another_another(denoiser):
    sampler = SAMPLERS["a window and a sink"]
    one, again, other = (
        np.asarray(next(Stream(denoiser, cond(1), sampler, size=SIZE, seed=seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


NOTES = dict(times=[1.0, 0.75, 0.5, 0.25], shift=5.0)
CAUSAL = dict(frames_per_block=2, first_alone=False, window=4, sink=2)


@pytest.fixture
def save(denoiser, tmp_path):
    def save(**notes):
        weights.save(tmp_path / "student.safetensors", denoiser, **notes)
        return tmp_path / "student.safetensors"

    return save


def test_a_students_file_says_how_it_is_streamed(save):
    notes = dict(causal=CAUSAL, context_time=None, first_times=[1.0, 0.5])
    student = save(**NOTES, **notes)
    wanted = CausalFewStep(tuple(NOTES["times"]), 5.0, WINDOW, (1.0, 0.5), None)
    assert block_sampler(student) == wanted
    changed = block_sampler(student, steps=2, shift=1.0, causal=Causal(3))
    assert changed == CausalFewStep(TIMES, 1.0, Causal(3), (1.0, 0.5), None)
    plain = block_sampler(save(**NOTES, causal=CAUSAL))
    assert plain == CausalFewStep(tuple(NOTES["times"]), 5.0, WINDOW)


def test_a_file_that_does_not_say_is_refused(save):
    with pytest.raises(ValueError, match="does not say which frames are a block"):
        block_sampler(save(**NOTES))
    assert block_sampler(save(**NOTES), causal=CAUSAL).causal == WINDOW
    with pytest.raises(ValueError, match="is no distilled student: give --steps"):
        block_sampler(save(causal=CAUSAL))
    assert block_sampler(save(causal=CAUSAL), steps=2) == CausalFewStep(TIMES, causal=WINDOW)


def test_a_causal_is_written_in_words():
    written = "frames_per_block=2", "first_alone=1", "window=4"
    assert parse_causal(written) == Causal(2, True, window=4)
    assert parse_causal([]) is None


@pytest.mark.parametrize("written", [["3"], ["window=x"], ["windows=3"], ["window=1"]])
def test_a_causal_that_is_written_otherwise_is_refused(written):
    with pytest.raises(ValueError, match="write it as frames_per_block=3,first_alone=1"):
        parse_causal(written)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(times=(0.5, 1.0)), "descend"),
        (dict(first_times=(0.5, 1.0)), "descend"),
        (dict(shift=0.0), "shift=0.0 must be above 0"),
        (dict(context_time=2.0), "context_time=2.0 must be in"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        CausalFewStep(**(dict(times=TIMES, causal=WINDOW) | changes))


def test_the_iterator_goes_on(denoiser):
    made = stream(denoiser, SAMPLERS["a window and a sink"])
    assert len(list(itertools.islice(made, 3))) == 3 and made.frames == 6
