"""Causal Wan: cached blocks, teacher forcing and the masked whole agree; long rollouts, devices."""

import dataclasses
import functools
from itertools import pairwise

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_wan import ROUNDING, SMALL, inputs, network

from dmd_jax.devices import sharding
from dmd_jax.models import kv_cache
from dmd_jax.models.wan import SHARDING_RULES, Causal
from dmd_jax.training import flops

CAUSAL = [
    Causal(frames_per_block=1),
    Causal(frames_per_block=3),
    Causal(frames_per_block=2, first_alone=True),
    Causal(frames_per_block=2, window=4),
    Causal(frames_per_block=1, window=3, sink=2),
    Causal(frames_per_block=2, first_alone=True, window=3, sink=1),
    Causal(frames_per_block=3, first_alone=True, window=4, sink=2),
]


def blocks(causal, frames):
    """[(first, end)] of the blocks of a video."""
    edges = [
        0,
        *range(
            1 if causal.first_alone else causal.frames_per_block, frames, causal.frames_per_block
        ),
        frames,
    ]
    return list(pairwise(edges))


@functools.partial(jax.jit, static_argnames="causal")
def next_block(net, x, timestep, text, causal, cache, start):
    """(velocity of a block, the cache with the block in it)."""
    out, own = net(x, timestep, text, causal=causal, cache=cache, start=start)
    return out, kv_cache.write(cache, own, kv_cache.ring(causal, cache.slots))


def block_by_block(net, x, timestep, text, causal, spare=0):
    """The velocity of a video, one cached block after another; the cache has the noisy blocks."""
    frames = x.shape[1]
    slots = frames if causal.window is None else causal.window + causal.sink
    cache = net.empty_cache(x.shape[0], slots + spare, *x.shape[2:4])
    made = []
    for first, end in blocks(causal, frames):
        part = x[:, first:end], timestep[:, first:end], text
        out, cache = next_block(net, *part, causal, cache, jnp.int32(first))
        made.append(out)
    return np.concatenate(made, axis=1)


@functools.partial(jax.jit, static_argnames="causal")
def at_once(net, x, timestep, text, causal=None, context=None):
    return net(x, timestep, text, causal=causal, context=context)


# Of 8 frames, the last block has fewer where blocks have 3, or 2 after a lone first frame.
@pytest.mark.parametrize(
    "causal, frames", [*((causal, 8) for causal in CAUSAL), (CAUSAL[1], 9), (CAUSAL[5], 9)], ids=str
)
def test_cached_blocks_equal_the_masked_whole(causal, frames):
    net = network(SMALL)
    x, timestep, text = inputs(SMALL, frames=frames, height=2, width=4, per_frame=True)
    whole = at_once(net, x, timestep, text, causal)
    made = block_by_block(net, x, timestep, text, causal)
    assert foreign.relative_error(made, whole) < ROUNDING
    # Slots to spare change nothing.
    assert (
        foreign.relative_error(block_by_block(net, x, timestep, text, causal, 4), made) < ROUNDING
    )
    # The mask does something.
    assert foreign.relative_error(whole, at_once(net, x, timestep, text)) > 1e-2


def test_no_frame_sees_a_later_block():
    net, causal = network(SMALL), Causal(frames_per_block=2)
    x, timestep, text = inputs(SMALL, frames=6, height=2, width=4)
    run = jax.jit(lambda x: net(x, timestep, text, causal=causal))
    changed = x.copy()
    changed[:, 4:] += 1
    np.testing.assert_allclose(run(changed)[:, :4], run(x)[:, :4], rtol=0, atol=1e-6)


def forced_by_cache(net, x, timestep, text, causal, context, context_time):
    """The velocity of each block of x, after a cache of the context's blocks at `context_time`."""
    frames = x.shape[1]
    slots = frames if causal.window is None else causal.window + causal.sink
    cache = net.empty_cache(x.shape[0], slots, *x.shape[2:4])
    made = []
    for first, end in blocks(causal, frames):
        part, at = slice(first, end), (text, causal, cache, jnp.int32(first))
        out, _ = next_block(net, x[:, part], timestep[:, part], *at)
        written_at = np.repeat(context_time[:, None], end - first, axis=1)
        _, cache = next_block(net, context[:, part], written_at, *at)
        made.append(out)
    return np.concatenate(made, axis=1)


@pytest.mark.parametrize("causal", CAUSAL, ids=str)
def test_teacher_forcing_equals_a_cache_of_clean_blocks(causal):
    """[clean | noisy] at once, against each noisy block after a cache of the clean blocks."""
    net = network(SMALL)
    frames = 7 if causal.first_alone or causal.frames_per_block == 1 else 6
    given = inputs(SMALL, frames=frames, height=2, width=4, per_frame=True)
    clean = foreign.tensor("clean", given[0].shape)
    forced = at_once(net, *given, causal, clean)
    made = forced_by_cache(net, *given, causal, clean, np.zeros(2, np.float32))
    assert foreign.relative_error(made, forced) < ROUNDING


@pytest.mark.parametrize("time", [np.float32([625.0, 90.0]), np.float32(400.0)], ids=["B", "one"])
def test_a_noisy_context_equals_a_cache_that_was_written_at_its_time(time):
    net, causal = network(SMALL), Causal(frames_per_block=2, first_alone=True, window=3, sink=1)
    given = inputs(SMALL, frames=7, height=2, width=4, per_frame=True)
    context = foreign.tensor("context", given[0].shape)

    def run(**time):
        return jax.jit(lambda *given: net(*given, causal=causal, context=context, **time))(*given)

    forced = run(context_time=time)
    made = forced_by_cache(net, *given, causal, context, np.broadcast_to(time, 2))
    assert foreign.relative_error(made, forced) < 1e-5
    assert foreign.relative_error(run(), forced) > 1e-3
    np.testing.assert_array_equal(run(), run(context_time=0.0))


def test_a_noisy_block_sees_the_context_before_it_and_no_other():
    net, causal = network(SMALL), Causal(frames_per_block=2)
    given = inputs(SMALL, frames=6, height=2, width=4, per_frame=True)
    context = foreign.tensor("context", given[0].shape)
    run = jax.jit(lambda context: net(*given, causal=causal, context=context))
    changed = context.copy()
    changed[:, 2:4] += 1
    np.testing.assert_array_equal(run(changed)[:, :4], run(context)[:, :4])
    assert np.abs(run(changed)[:, 4:] - run(context)[:, 4:]).min(axis=(1, 2, 3)).max() > 1e-4


def test_a_rollout_far_beyond_the_window_compiles_once_and_sees_the_same_world():
    """Beyond window and reach, the output depends on the visible frames, not on their numbers."""
    config = dataclasses.replace(SMALL, reach=6)
    net, causal = network(config), Causal(frames_per_block=1, window=3, sink=1)
    x, timestep, text = inputs(config, frames=1, height=2, width=4)
    traces = []

    @jax.jit
    def step(cache, start):
        traces.append(start)
        return next_block(net, x, timestep, text, causal, cache, start)

    cache, made = net.empty_cache(2, 4, 2, 4), []
    shapes = jax.tree.map(jnp.shape, cache)
    for frame in range(40):
        out, cache = step(cache, jnp.int32(frame))
        made.append(np.asarray(out))
    assert len(traces) == 1 and jax.tree.map(jnp.shape, cache) == shapes
    # The input is the same block at every call. Once all visible frames are equal in all layers,
    # the output is constant, which it would not be if positions grew.
    assert foreign.relative_error(made[-1], made[-9]) < ROUNDING
    assert foreign.relative_error(made[4], made[0]) > 1e-3


def test_without_a_window_a_sink_changes_nothing():
    """Also for a video longer than those that the weights were trained on."""
    net, causal = network(dataclasses.replace(SMALL, reach=3)), Causal(frames_per_block=1, sink=1)
    x, timestep, text = inputs(SMALL, frames=6, height=2, width=4, per_frame=True)
    whole = at_once(net, x, timestep, text, causal)
    made = block_by_block(net, x, timestep, text, causal)
    assert foreign.relative_error(made, whole) < ROUNDING


def test_a_sink_and_a_window_longer_than_the_trained_videos_have_positions_of_their_own():
    net = network(dataclasses.replace(SMALL, reach=3))
    causal = Causal(frames_per_block=1, window=4, sink=1)
    x, timestep, text = inputs(SMALL, frames=5, height=2, width=4, per_frame=True)
    whole = at_once(net, x, timestep, text, causal)
    made = block_by_block(net, x, timestep, text, causal)
    assert foreign.relative_error(made, whole) < ROUNDING


def test_slots_that_a_block_cannot_see_cost_nothing():
    net = network(SMALL)
    x, timestep, text = inputs(SMALL, frames=2, height=2, width=4)

    def work(causal, slots):
        cache = net.empty_cache(2, slots, 2, 4)
        return flops.count(lambda x: next_block(net, x, timestep, text, causal, cache, 0), x)

    window, short = Causal(2, window=3, sink=1), Causal(2, window=2)
    assert work(window, 4) == work(window, 9) == work(Causal(2), 4) < work(Causal(2), 9)
    assert work(short, 2) == work(short, 5) < work(window, 4)  # the block sees itself alone


def test_a_cache_may_begin_another_video():
    net, causal = network(SMALL), Causal(frames_per_block=1, window=3, sink=2)
    x, timestep, text = inputs(SMALL, frames=7, height=2, width=4, per_frame=True)

    def video(cache):
        made = []
        for frame in range(x.shape[1]):
            part = slice(frame, frame + 1)
            given = x[:, part], timestep[:, part], text
            out, cache = next_block(net, *given, causal, cache, jnp.int32(frame))
            made.append(out)
        return np.concatenate(made, axis=1), cache

    first, cache = video(net.empty_cache(2, 5, 2, 4))
    np.testing.assert_array_equal(video(cache)[0], first)


def test_what_is_cached_is_a_constant_but_a_block_learns_from_itself():
    net, causal = network(SMALL), Causal(frames_per_block=1)
    x, timestep, text = inputs(SMALL, frames=2, height=2, width=4, per_frame=True)

    def second(x):
        cache = net.empty_cache(2, 2, 2, 4)
        _, cache = next_block(net, x[:, :1], timestep[:, :1], text, causal, cache, 0)
        out, _ = next_block(net, x[:, 1:], timestep[:, 1:], text, causal, cache, 1)
        return jnp.sum(jnp.square(out))

    gradient = jax.jit(jax.grad(second))(x)
    assert not np.any(gradient[:, 0]) and np.all(np.any(gradient[:, 1], axis=(1, 2, 3)))


def test_a_cached_rollout_on_eight_devices_is_that_of_one():
    """With a batch that data does not divide, blocks and heads that context does not divide."""
    net, causal = network(SMALL), Causal(frames_per_block=1, window=2, sink=1)
    given = inputs(SMALL, frames=4, height=2, width=6, batch=3, per_frame=True)
    wanted = block_by_block(net, *given, causal)
    mesh = sharding.make_mesh(data=2, context=4)
    placed = jax.device_put(net, sharding.infer(net, SHARDING_RULES, mesh))
    with jax.set_mesh(mesh):
        assert foreign.relative_error(block_by_block(placed, *given, causal), wanted) < ROUNDING


@pytest.mark.parametrize(
    "causal, size, complaint",
    [
        (Causal(), (2, 3, 4, 4), r"keys of the cache .* must be \[2, 2, slots, 6, 2, 24\]"),
        (Causal(), (1, 3, 4, 6), r"keys of the cache .* must be \[2, 2, slots, 6, 2, 24\]"),
        (Causal(), (2, 2, 4, 6), "3 frames do not fit a cache of 2"),
        # They would see each other, the earlier block the later one too.
        (Causal(frames_per_block=2), (2, 4, 4, 6), "x has 3 frames, but a block has 2"),
        (Causal(window=3, sink=1), (2, 3, 4, 6), "must have room for 4"),
    ],
    ids=str,
)
def test_a_cache_of_another_size_is_refused(causal, size, complaint):
    x, timestep, text = inputs(SMALL)
    net = network(SMALL)
    with pytest.raises(ValueError, match=complaint):
        net(x, timestep, text, causal=causal, cache=net.empty_cache(*size), start=0)
