"""Self-Forcing's rollout: equal to the plain loop in value and gradient, in pieces, on a mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_rollouts import COND, CONFIG, FLOW, KEY, PAIRS, SIZE, TIMES, by_hand, roll
from toys import assert_close, assert_same, normal, weights

from dmd_jax.devices import randomness, sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import shift_time
from dmd_jax.models import kv_cache
from dmd_jax.models.wan import SHARDING_RULES, Causal, Wan
from dmd_jax.rollouts.self_forcing import recache, self_forcing
from dmd_jax.weights import adapters


@pytest.fixture(scope="module")
def generator():
    return Denoiser(weights(lambda rngs: Wan(CONFIG, rngs=rngs), 0))


CASES = {
    "frame by frame": dict(causal=Causal(1)),
    "a lone first frame": dict(causal=Causal(2, first_alone=True), frames=7),
    "a window and a sink": dict(causal=Causal(2, window=4, sink=2), frames=10),
    "a sink that is no whole block, context of the exit call": dict(
        causal=Causal(2, window=4, sink=1), context_time=None, frames=10
    ),
    "noisy context, another list for the first block": dict(
        causal=Causal(2), context_time=0.3, first_times=(1.0, 0.6)
    ),
    "initial frames": dict(causal=Causal(2, window=4), frames=6, initial=normal(5, 2, 4, *SIZE)),
    "an image to start from": dict(
        causal=Causal(2, first_alone=True), frames=6, initial=normal(5, 2, 1, *SIZE)
    ),
}


FAST = ("a lone first frame", "a window and a sink")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_equals_the_plain_loop_in_value_and_in_every_gradient(generator, case):
    how = dict(CASES[case])
    frames = how.pop("frames", 6)
    noise = normal(0, 2, frames, *SIZE)
    blocks = -(-frames // how["causal"].frames_per_block)
    exits = [(1, 0, 2)[i % 3] for i in range(blocks)]
    direction = normal(9, 2, frames, *SIZE)

    def ours(generator):
        return roll(generator, noise=noise, exit_step=jnp.array(exits), **how).x0

    def plain(generator):
        return by_hand(generator, noise, exits, **how)

    x0, gradient = jax.jit(with_gradient, static_argnums=0)(ours, generator, direction)
    wanted_x0, wanted = with_gradient(plain, generator, direction)
    assert_close(x0, wanted_x0, rtol=2e-5, atol=2e-5)
    assert_close(gradient, wanted, rtol=2e-4, atol=2e-5)


def with_gradient(run, generator, direction):
    """(x0, gradient of its product with a direction, of the last frames) of run(generator)."""

    def of(generator):
        x0 = run(generator)
        return jnp.vdot(x0[:, -direction.shape[1] :], direction), x0

    (_, x0), gradient = jax.value_and_grad(of, has_aux=True)(generator)
    return x0, gradient


def test_only_graded_blocks_pass_gradient(generator):
    """With graded=4 of 6 frames: the gradient of the last four alone."""
    noise, exits = normal(0, 2, 6, *SIZE), [1, 3, 0]
    last_four = jnp.arange(6)[:, None, None, None] >= 2

    @jax.jit
    def ours(generator, direction):
        def of(generator):
            rollout = roll(generator, noise=noise, exit_step=jnp.array(exits), graded=4)
            return jnp.vdot(rollout.x0, direction), rollout.mask

        return jax.grad(of, has_aux=True)(generator)

    def plain(generator):
        return by_hand(generator, noise, exits, causal=PAIRS)

    direction = normal(9, 2, 6, *SIZE)
    gradient, mask = ours(generator, jnp.where(last_four, 0, direction))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(mask, [[False] * 2 + [True] * 4] * 2)
    direction = jnp.where(last_four, direction, 0)
    gradient, _ = ours(generator, direction)
    wanted = with_gradient(plain, generator, direction)[1]
    assert_close(gradient, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("causal", [PAIRS, Causal(2, window=4, sink=2), Causal(2, True)], ids=str)
def test_a_shorter_rollout_is_that_of_its_blocks_alone(generator, causal):
    """`blocks` leaves out the first ones: the rest is a video that begins at frame 0."""
    frames = 6 + causal.first_alone
    noise, short = normal(0, 2, frames + 4, *SIZE), 3 + causal.first_alone
    direction = normal(9, 2, frames, *SIZE)

    def plain(generator):
        return by_hand(generator, noise[:, 4:], [1] * short, causal=causal)

    alone, wanted = with_gradient(plain, generator, direction)

    def of(generator, blocks):
        rollout = roll(generator, noise=noise, causal=causal, exit_step=jnp.int32(1), blocks=blocks)
        weights = jnp.concatenate([jnp.full((2, 4, *SIZE), jnp.nan), direction], 1)
        return jnp.sum(jnp.where(rollout.mask[..., None, None, None], rollout.x0 * weights, 0)), (
            rollout
        )

    (_, rollout), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(
        generator, jnp.int32(short)
    )
    assert_close(rollout.x0[:, 4:], alone, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(rollout.mask, [[False] * 4 + [True] * frames] * 2)
    assert_close(gradient, wanted, rtol=2e-4, atol=2e-5)


def test_the_mask_keeps_no_frame_that_has_no_gradient(generator):
    """With few blocks, a lone first frame lies within the last `graded` frames: it is not one."""
    noise, causal = normal(0, 2, 7, *SIZE), Causal(2, True)

    @jax.jit
    def gradient(generator, frame):
        def of(generator):
            how = dict(causal=causal, exit_step=jnp.int32(0), graded=4, blocks=jnp.int32(2))
            rollout = roll(generator, noise=noise, **how)
            return jnp.sum(jnp.square(rollout.x0[:, frame])), rollout.mask

        return jax.grad(of, has_aux=True)(generator)

    for frame, passes in ((4, False), (5, True)):
        leaves, mask = gradient(generator, jnp.int32(frame))
        assert any(bool(np.any(leaf)) for leaf in jax.tree.leaves(leaves)) == passes
    np.testing.assert_array_equal(mask, [[False] * 5 + [True] * 2] * 2)


@pytest.mark.parametrize(
    "causal, context_time",
    [
        (PAIRS, 0.3),
        (Causal(2, window=4, sink=1), 0.0),
        (Causal(2, window=4, sink=1), None),
        (Causal(2, True, window=4, sink=1), 0.3),
    ],
    ids=str,
)
def test_a_stream_made_in_pieces_equals_one_made_whole(generator, causal, context_time):
    first = 4 + causal.first_alone
    noise = normal(0, 2, first + 8, *SIZE)
    how = dict(causal=causal, last_step_share=1.0, context_time=context_time, graded=0)
    how |= dict(first_times=(1.0, 0.9, 0.8, 0.7, 0.6))
    whole = roll(generator, noise=noise, **how).x0
    cache = generator.empty_cache(2, causal.most_visible or first + 8, *SIZE[:2])
    piece = roll(generator, noise=noise[:, :first], **how)
    if causal.window is None:  # the first call has room for its own frames alone
        cache = kv_cache.write(cache, piece.cache, kv_cache.ring(causal, cache.slots))
    else:
        cache = piece.cache
    parts = [piece.x0]
    for start in (first, first + 4):  # of one length: one compilation serves both
        part = noise[:, start : start + 4]
        piece = roll(generator, noise=part, cache=cache, start=jnp.int32(start), **how)
        parts, cache = [*parts, piece.x0], piece.cache
    assert_close(jnp.concatenate(parts, 1), whole, rtol=2e-5, atol=2e-5)


def test_noisy_context_is_that_of_the_exit_call(generator):
    steps = normal(4, 1, 5, 2, 2, *SIZE)
    rollout = roll(generator, 2, context_time=None, exit_step=jnp.int32(2), step_noise=steps)
    levels = np.asarray(shift_time(np.float32(TIMES), 5.0))
    empty, x = generator.empty_cache(2, 2, *SIZE[:2]), normal(0, 2, 2, *SIZE)
    for step in range(3):
        out = generator.predict(
            x, jnp.full(2, levels[step]), COND, causal=PAIRS, cache=empty, start=jnp.int32(0)
        )
        x = FLOW.add_noise(out.x0, steps[0, step], jnp.full(2, levels[step + 1]))
    assert_close(rollout.x0, out.x0, rtol=2e-5, atol=2e-5)
    assert_close(rollout.cache.keys, out.aux.keys, rtol=2e-5, atol=2e-5)


def test_step_noise_stands_in_for_what_is_drawn(generator):
    """The last of its steps is the context's; a lone first block takes the first frame."""
    causal, noise = Causal(2, first_alone=True), normal(0, 2, 5, *SIZE)
    drawn = np.zeros((3, 5, 2, 2, *SIZE), np.float32)
    for block, (start, size) in enumerate([(0, 1), (1, 2), (3, 2)]):
        for tag, steps in ((0, range(3)), (1, [-1])):
            key = jax.random.fold_in(jax.random.fold_in(KEY, tag), start)
            for step in steps:
                drawn[block, step, :, :size] = randomness.normal(
                    jax.random.fold_in(key, step + 1), jnp.arange(2), (size, *SIZE)
                )
    how = dict(noise=noise, causal=causal, context_time=0.4, exit_step=jnp.int32(3))
    other = roll(generator, key=jax.random.key(99), step_noise=jnp.asarray(drawn), **how)
    assert_close(other.x0, roll(generator, **how).x0, rtol=2e-5, atol=2e-5)


def test_one_compilation_serves_every_exit_number_of_blocks_and_position(generator):
    traced, cache = [], generator.empty_cache(2, 20, *SIZE[:2])

    @jax.jit
    def run(generator, exit_step, blocks, start):
        traced.append(exit_step)
        how = dict(times=TIMES, schedule=FLOW, causal=PAIRS, cache=cache)
        return self_forcing(
            generator,
            normal(0, 2, 4, *SIZE),
            COND,
            KEY,
            exit_step=exit_step,
            blocks=blocks,
            start=start,
            **how,
        ).x0

    made = [run(generator, *map(jnp.int32, at)) for at in [(0, 2, 0), (3, 2, 0), (3, 1, 4)]]
    assert len(traced) == 1 and len({np.asarray(x).tobytes() for x in made}) == 3
    with jax.transfer_guard("disallow"):  # nothing is read on the host
        run(generator, *jax.device_put((np.int32(1), np.int32(2), np.int32(0))))


def test_the_memory_of_the_gradient_does_not_grow_with_the_blocks(generator):
    def temporaries(blocks):
        frames = 2 * blocks
        noise, causal = jnp.zeros((2, frames, *SIZE)), Causal(2, window=4)
        cache = generator.empty_cache(2, 4 + 24, *SIZE[:2])  # the same for all

        def loss(generator):
            how = dict(times=TIMES, schedule=FLOW, causal=causal, cache=cache, start=0)
            return jnp.sum(self_forcing(generator, noise, COND, KEY, **how).x0)

        compiled = jax.jit(jax.grad(loss)).lower(generator).compile()
        # What is as long as the video, some arrays of its latents, may grow.
        return compiled.memory_analysis().temp_size_in_bytes - 10 * noise.nbytes

    assert temporaries(12) <= 1.02 * temporaries(3)


def test_a_frozen_base_has_no_gradient_and_its_adapter_the_right_one(generator):
    net = generator.net
    shapes = adapters.abstract(net, r"ffn/up/kernel$", 3)
    adapter = {name: normal(i, *x.shape) / 4 for i, (name, x) in enumerate(shapes.items())}
    noise, how = normal(0, 2, 4, *SIZE), dict(times=TIMES, schedule=FLOW, causal=PAIRS)

    def loss(net):
        how["exit_step"] = jnp.int32(1)
        return jnp.sum(self_forcing(Denoiser(net), noise, COND, KEY, **how).x0 ** 2)

    def of_adapter(adapter):
        return loss(adapters.attach(net, adapter, 0.5))

    found = jax.jit(jax.grad(of_adapter))(adapter)
    whole = jax.jit(jax.grad(loss))(adapters.merge(net, adapter, 0.5))
    A, B = adapter.values()
    change = np.asarray(whole.blocks.ffn.up.kernel[...])
    wanted = dict(zip(adapter, (0.5 * change @ B.mT, 0.5 * A.mT @ change), strict=True))
    assert_close(found, wanted, rtol=2e-3, atol=2e-4)
    products = re.compile(r"f32\[(16,24|24,16)\] = dot_general")  # gradients of ffn/up and down
    assert products.search(str(jax.make_jaxpr(jax.grad(loss))(net)))
    assert not products.search(str(jax.make_jaxpr(jax.grad(of_adapter))(adapter)))


def test_exits_are_drawn_as_asked(generator):
    """One for all blocks, the last one always, or one for each block."""

    def exits(**how):
        """The bounds (t_from, t_to) of 32 rollouts."""
        rollouts = [roll(generator, 2, key=jax.random.key(i), **how) for i in range(32)]
        return {(float(rollout.t_from), float(rollout.t_to)) for rollout in rollouts}

    assert exits() == {(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)}
    assert exits(last_step_share=1.0) == {(0.25, 0.0)}
    assert exits(per_block_exit=True) == {(1.0, 0.0)}


def test_a_recomputed_cache_is_that_of_the_rollout_and_of_the_new_prompt(generator):
    causal = Causal(2, window=4, sink=2)
    whole = roll(generator, 6, causal=causal, exit_step=jnp.int32(1), graded=0)
    how = dict(schedule=FLOW, causal=causal, cache=whole.cache, start=0)
    same = recache(generator, whole.x0, COND, **how)
    np.testing.assert_array_equal(same.frames, whole.cache.frames)
    assert_close(same.keys, whole.cache.keys, rtol=2e-5, atol=2e-5)
    other = recache(generator, whole.x0, 2 * COND, **how)
    assert not np.allclose(other.keys[1], whole.cache.keys[1], atol=1e-3)
    keeping = dict(start=2, causal=dataclasses.replace(causal, keep_sink=True))
    kept = recache(generator, whole.x0[:, 2:], 2 * COND, **how | keeping)
    np.testing.assert_array_equal(kept.frames, whole.cache.frames)
    assert_same(kept.keys[:, :, :2], whole.cache.keys[:, :, :2])
    without = recache(generator, whole.x0[:, 2:], COND, **how | dict(start=2))
    assert set(np.asarray(without.frames)) == {kv_cache.EMPTY, 2, 3, 4, 5}


def of_eight_videos(generator, cond):
    """(x0, gradient) of a rollout."""

    def run(generator):
        how = dict(causal=Causal(2, window=4, sink=2), frames=8, exit_step=jnp.int32(2))
        return roll(generator, cond=cond, **how).x0

    return with_gradient(run, generator, normal(9, 8, 8, *SIZE))


@pytest.fixture(scope="module")
def on_one_device(generator):
    return jax.jit(of_eight_videos)(generator, normal(1, 8, 4, 5))


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=4), dict(fsdp=2, context=4)], ids=str)
def test_eight_devices_give_what_one_gives(generator, on_one_device, axes):
    x0, gradient = on_one_device
    mesh = sharding.make_mesh(**axes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(generator, sharding.infer(generator, SHARDING_RULES, mesh))
        parts, summed = jax.jit(of_eight_videos)(placed, sharding.global_batch(normal(1, 8, 4, 5)))
    assert_close(parts, x0, rtol=2e-5, atol=2e-5)
    assert_close(summed, gradient, rtol=5e-4, atol=5e-5)


def test_bfloat16_is_near_float32(generator):
    net = dataclasses.replace(generator.net.config, dtype="bfloat16")
    rough = Denoiser(weights(lambda rngs: Wan(net, rngs=rngs), 0))
    rollout = roll(rough, exit_step=jnp.int32(1))
    exact = roll(generator, exit_step=jnp.int32(1)).x0
    assert rollout.cache.keys.dtype == jnp.bfloat16 and rollout.x0.dtype == jnp.float32
    error = jnp.linalg.norm(rollout.x0 - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.05


def test_frames_beyond_a_cache_without_a_window_are_nan_or_refused(generator):
    cache = generator.empty_cache(2, 6, *SIZE[:2])
    rollout = roll(generator, 4, cache=cache, start=jnp.int32(4))
    assert np.all(np.isfinite(rollout.x0[:, :2])) and np.all(np.isnan(rollout.x0[:, 2:]))
    with pytest.raises(ValueError, match="a video of 8 frames outgrows a cache of 6 frames"):
        roll(generator, 4, cache=cache, start=4)


@pytest.mark.parametrize(
    "how, complaint",
    [
        (dict(frames=5), "noise: 5 frames do not divide into blocks of 2"),
        (dict(frames=4, causal=Causal(2, True)), "do not divide into 1 frame and blocks of 2"),
        (dict(initial=normal(5, 2, 1, *SIZE)), "latents: 1 frames do not divide into blocks of 2"),
        (dict(graded=3), "graded=3 of 6 frames does not begin on the border of a block of 2"),
        (dict(graded=8), "graded=8 of 6 frames"),
        (dict(times=(0.5, 1.0)), "must descend"),
        (dict(first_times=(0.5, 1.0)), "must descend"),
        (dict(exit_step=4), r"exit_step=4 must be in \[0, 3\]"),
        (dict(exit_step=-1), r"exit_step=-1 must be in \[0, 3\]"),
        (dict(blocks=0), r"blocks=0 must be in \[1, 3\]"),
        (dict(blocks=4), r"blocks=4 must be in \[1, 3\]"),
        (dict(start=jnp.int32(0)), "start is traced: give a cache"),
    ],
    ids=str,
)
def test_what_cannot_be_rolled_out_is_refused(generator, how, complaint):
    with pytest.raises(ValueError, match=complaint):
        roll(generator, **how)


def test_a_cache_without_room_for_the_graded_frames_is_refused(generator):
    cache = generator.empty_cache(2, 6, *SIZE[:2])
    causal = Causal(2, window=4, sink=2)
    with pytest.raises(ValueError, match="graded=6: it must have room for 10 or more"):
        roll(generator, 6, causal=causal, cache=cache, start=jnp.int32(6))
