"""Wan: equal to diffusers, causal evaluation in all its forms, long rollouts, devices, refusals."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models import kv_cache, wan
from dmd_jax.models.wan import SHARDING_RULES, Causal, Conditions, Wan, WanConfig
from dmd_jax.weights import wan as names
from dmd_jax.weights.table import fill, their_shapes

STORED = Path(__file__).with_name("wan_reference.npz")
SMALL = WanConfig(dim=48, ffn=64, heads=2, depth=2, in_channels=4, out_channels=4, text_dim=10)
IMAGE = dataclasses.replace(SMALL, in_channels=6, image_dim=14)
# The rounding of float32 (6e-8) through some hundred operations, in the norm.
ROUNDING = 2e-5


def network(config):
    """A Wan whose weights are those that `foreign.give_weights` gives to diffusers' network."""
    shape = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    rows = names.table(config, "diffusers")
    theirs = their_shapes(shape, rows)
    return fill(shape, rows, lambda name: foreign.weight(name, theirs[name]))


def inputs(config, frames=3, height=4, width=6, batch=2, text=7, per_frame=False):
    """(x, timestep, conditions) of these sizes."""
    x = foreign.tensor("x", (batch, frames, height, width, config.out_channels))
    shape = (batch, frames) if per_frame else (batch,)
    timestep = 1000 * np.abs(np.sin(foreign.tensor("t", shape)))
    cond = foreign.tensor("text", (batch, text, config.text_dim))
    if config.in_channels > config.out_channels:
        extra = config.in_channels - config.out_channels
        frames = foreign.tensor("frames", (*x.shape[:-1], extra))
        image = foreign.tensor("image", (batch, 5, config.image_dim)) if config.image_dim else None
        cond = Conditions(cond, frames, image)
    return x, timestep, cond


def with_gradient(net, x, timestep, cond):
    """(velocity, gradient of its product with a fixed direction)."""

    def value(x):
        out = net(x, timestep, cond)
        return jnp.vdot(out, foreign.tensor("direction", out.shape)), out

    gradient, out = jax.grad(value, has_aux=True)(x)
    return out, gradient


def diffusers_with_gradient(config, x, timestep, cond):
    """The same by diffusers' WanTransformer3DModel."""
    import torch

    diffusers = pytest.importorskip("diffusers")
    settings = names.to_settings(config, "diffusers")
    settings.pop("_class_name")
    module = foreign.give_weights(diffusers.WanTransformer3DModel(**settings))
    text, frames, image = cond if isinstance(cond, Conditions) else (cond, None, None)
    tokens = x.shape[2] * x.shape[3] // 4
    latents = torch.tensor(x, requires_grad=True)
    full = latents if frames is None else torch.cat([latents, torch.tensor(frames)], -1)
    if timestep.ndim == 2:  # diffusers takes a time for each token
        timestep = np.repeat(timestep, tokens, axis=1)
    out = module(
        full.permute(0, 4, 1, 2, 3),
        torch.tensor(timestep),
        torch.tensor(text),
        None if image is None else torch.tensor(image),
        return_dict=False,
    )[0].permute(0, 2, 3, 4, 1)
    (out * torch.tensor(foreign.tensor("direction", tuple(out.shape)))).sum().backward()
    return out.detach().numpy(), latents.grad.numpy()


def random_case(seed):
    """A configuration and sizes drawn at random: (config, keywords of `inputs`)."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 7))
    image = seed % 5 == 4
    config = WanConfig(
        dim=heads * int(rng.choice([8, 12, 16, 22, 30])),
        ffn=int(rng.integers(8, 80)),
        heads=heads,
        depth=int(rng.integers(1, 4)),
        in_channels=7 if image else 4,
        out_channels=4,
        text_dim=int(rng.integers(4, 20)),
        image_dim=12 if image else 0,
        freq_dim=int(rng.choice([16, 64, 256])),
    )
    sizes = dict(
        frames=int(rng.integers(1, 6)),
        height=2 * int(rng.integers(1, 5)),
        width=2 * int(rng.integers(1, 5)),
        batch=int(rng.integers(1, 3)),
        text=512 if image else int(rng.integers(1, 40)),  # diffusers counts on 512 beside an image
        per_frame=seed % 4 == 3,
    )
    return config, sizes


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(20))
def test_equals_diffusers_in_value_and_gradient(seed):
    config, sizes = random_case(seed)
    given = inputs(config, **sizes)
    wanted = diffusers_with_gradient(config, *given)
    made = jax.jit(with_gradient)(network(config), *given)
    for ours, theirs in zip(made, wanted, strict=True):
        assert foreign.relative_error(ours, theirs) < ROUNDING


STORED_CASES = {
    "text": (SMALL, {}),
    "image": (IMAGE, dict(text=512)),
    "frames": (SMALL, dict(per_frame=True)),
}


def store():
    """Makes the stored numbers: PYTHONPATH=.:tests python -c "...test_wan.store()"."""
    arrays = {}
    for name, (config, sizes) in STORED_CASES.items():
        out, gradient = diffusers_with_gradient(config, *inputs(config, **sizes))
        arrays |= {f"{name}/out": out, f"{name}/gradient": gradient}
    np.savez_compressed(STORED, **arrays)


@pytest.mark.parametrize("name", STORED_CASES)
def test_equals_the_stored_numbers_of_diffusers(name):
    config, sizes = STORED_CASES[name]
    out, gradient = jax.jit(with_gradient)(network(config), *inputs(config, **sizes))
    with np.load(STORED) as stored:
        assert foreign.relative_error(out, stored[f"{name}/out"]) < ROUNDING
        assert foreign.relative_error(gradient, stored[f"{name}/gradient"]) < ROUNDING


def test_one_time_for_all_frames_is_that_time_for_each():
    net, (x, timestep, text) = network(SMALL), inputs(SMALL)
    each = np.repeat(timestep[:, None], x.shape[1], axis=1)
    run = jax.jit(lambda *args: net(*args))
    assert foreign.relative_error(run(x, each, text), run(x, timestep, text)) < 1e-6


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


def next_block(net, x, timestep, text, causal, cache, start):
    """(velocity of a block, the cache with the block in it)."""
    out, own = net(x, timestep, text, causal=causal, cache=cache, start=start)
    return out, kv_cache.write(cache, own, kv_cache.ring(causal, cache.slots))


def block_by_block(net, x, timestep, text, causal, spare=0):
    """The velocity of a video, one cached block after another; the cache has the noisy blocks."""
    frames = x.shape[1]
    slots = frames if causal.window is None else causal.window + causal.sink
    cache = net.empty_cache(x.shape[0], slots + spare, *x.shape[2:4])
    step = jax.jit(lambda x, t, *at: next_block(net, x, t, text, causal, *at))
    made = []
    for first, end in blocks(causal, frames):
        out, cache = step(x[:, first:end], timestep[:, first:end], cache, jnp.int32(first))
        made.append(out)
    return np.concatenate(made, axis=1)


@pytest.mark.parametrize("frames", [8, 9])  # whole blocks, and a last one that has fewer
@pytest.mark.parametrize("causal", CAUSAL, ids=str)
def test_cached_blocks_equal_the_masked_whole(causal, frames):
    net = network(SMALL)
    x, timestep, text = inputs(SMALL, frames=frames, height=2, width=4, per_frame=True)
    whole = jax.jit(lambda x: net(x, timestep, text, causal=causal))(x)
    made = block_by_block(net, x, timestep, text, causal)
    assert foreign.relative_error(made, whole) < ROUNDING
    # Slots to spare change nothing.
    assert (
        foreign.relative_error(block_by_block(net, x, timestep, text, causal, 4), made) < ROUNDING
    )
    # The mask does something.
    free = jax.jit(lambda x: net(x, timestep, text))(x)
    assert foreign.relative_error(whole, free) > 1e-2


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
    step = jax.jit(lambda x, t, *at: next_block(net, x, t, text, causal, *at))
    made = []
    for first, end in blocks(causal, frames):
        part = slice(first, end)
        out, _ = step(x[:, part], timestep[:, part], cache, jnp.int32(first))
        written_at = np.repeat(context_time[:, None], end - first, axis=1)
        _, cache = step(context[:, part], written_at, cache, jnp.int32(first))
        made.append(out)
    return np.concatenate(made, axis=1)


@pytest.mark.parametrize("causal", CAUSAL, ids=str)
def test_teacher_forcing_equals_a_cache_of_clean_blocks(causal):
    """[clean | noisy] at once, against each noisy block after a cache of the clean blocks."""
    net = network(SMALL)
    frames = 7 if causal.first_alone or causal.frames_per_block == 1 else 6
    given = inputs(SMALL, frames=frames, height=2, width=4, per_frame=True)
    clean = foreign.tensor("clean", given[0].shape)
    forced = jax.jit(lambda *given: net(*given, causal=causal, context=clean))(*given)
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
    whole = jax.jit(lambda x: net(x, timestep, text, causal=causal))(x)
    made = block_by_block(net, x, timestep, text, causal)
    assert foreign.relative_error(made, whole) < ROUNDING


def test_a_sink_and_a_window_longer_than_the_trained_videos_have_positions_of_their_own():
    net = network(dataclasses.replace(SMALL, reach=3))
    causal = Causal(frames_per_block=1, window=4, sink=1)
    x, timestep, text = inputs(SMALL, frames=5, height=2, width=4, per_frame=True)
    whole = jax.jit(lambda x: net(x, timestep, text, causal=causal))(x)
    made = block_by_block(net, x, timestep, text, causal)
    assert foreign.relative_error(made, whole) < ROUNDING


def test_a_cache_may_begin_another_video():
    net, causal = network(SMALL), Causal(frames_per_block=1, window=3, sink=2)
    x, timestep, text = inputs(SMALL, frames=7, height=2, width=4, per_frame=True)
    run = jax.jit(lambda x, t, *at: next_block(net, x, t, text, causal, *at))

    def video(cache):
        made = []
        for frame in range(x.shape[1]):
            part = slice(frame, frame + 1)
            out, cache = run(x[:, part], timestep[:, part], cache, jnp.int32(frame))
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


def test_remat_and_unrolling_change_nothing():
    given = inputs(SMALL)
    plain = jax.jit(with_gradient)(network(SMALL), *given)
    other = dataclasses.replace(SMALL, remat="full", unroll=2)
    for a, b in zip(jax.jit(with_gradient)(network(other), *given), plain, strict=True):
        assert foreign.relative_error(a, b) < 1e-6


def test_bfloat16_is_near_float32():
    """Half a percent: bfloat16 rounds by 2^-9 and the residual stream is rounded at each layer."""
    given = inputs(SMALL)
    half = network(dataclasses.replace(SMALL, dtype="bfloat16"))
    out, wanted = half(*given), network(SMALL)(*given)
    assert out.dtype == jnp.float32
    assert 1e-5 < foreign.relative_error(out, wanted) < 3e-2


def test_eight_devices_give_what_one_gives():
    net, (x, timestep, text) = network(SMALL), inputs(SMALL, frames=4, batch=4)
    wanted = jax.jit(with_gradient)(net, x, timestep, text)
    mesh = sharding.make_mesh(data=2, fsdp=2, context=1, tensor=2)
    placed = jax.device_put(net, sharding.infer(net, SHARDING_RULES, mesh))
    with jax.set_mesh(mesh):
        made = jax.jit(with_gradient)(placed, *sharding.global_batch((x, timestep, text)))
    for a, b in zip(made, wanted, strict=True):
        assert foreign.relative_error(a, b) < ROUNDING


def test_a_cached_rollout_on_eight_devices_is_that_of_one():
    """With a batch that data does not divide, and blocks that are split over context."""
    net, causal = network(SMALL), Causal(frames_per_block=1, window=2, sink=1)
    given = inputs(SMALL, frames=4, height=2, width=6, batch=3, per_frame=True)
    wanted = block_by_block(net, *given, causal)
    mesh = sharding.make_mesh(data=2, context=2, tensor=2)
    placed = jax.device_put(net, sharding.infer(net, SHARDING_RULES, mesh))
    with jax.set_mesh(mesh):
        assert foreign.relative_error(block_by_block(placed, *given, causal), wanted) < ROUNDING


def test_a_denoiser_takes_it_as_it_is():
    net, (x, _, text) = network(SMALL), inputs(SMALL)
    t = np.array([0.25, 1.0], np.float32)
    x0 = Denoiser(net)(x, t, text)
    wanted = x - t[:, None, None, None, None] * net(x, 1000 * t, text)
    np.testing.assert_allclose(x0, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(x=np.zeros((2, 3, 5, 6, 4))), "even H and W"),
        (dict(x=np.zeros((2, 3, 4, 6, 16))), r"must be \[B, F, H, W, 4\]"),
        (dict(x=np.zeros((3, 4, 6, 4))), r"must be \[B, F, H, W, 4\]"),
        (dict(timestep=np.zeros((2, 2))), "timestep"),
        (dict(text=np.zeros((2, 7, 9))), r"text .* must be \[2, L, 10\]"),
        (dict(text=np.zeros((1, 7, 10))), r"text .* must be \[2, L, 10\]"),
        (dict(text=Conditions(np.zeros((2, 7, 10)), np.zeros((2, 3, 4, 6, 2)))), "no other takes"),
        (dict(context=np.zeros((2, 3, 4, 6, 4))), "need `causal`"),
        (dict(causal=Causal(), start=0), "a cache needs `start`"),
        (dict(context_time=np.zeros(2)), "there is none"),
        (dict(causal=Causal(), context_time=0.0), "there is none"),
        (
            dict(causal=Causal(), context=np.zeros((2, 3, 4, 6, 4)), context_time=np.zeros((2, 3))),
            r"context_time \(2, 3\) must be \(\) or \(2,\)",
        ),
        # As many tokens, of frames of another shape.
        (dict(causal=Causal(), context=np.zeros((2, 3, 6, 4, 4))), r"must be \[2, 3, 4, 6, 4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(change, complaint):
    x, timestep, text = inputs(SMALL)
    given = dict(x=x, timestep=timestep, text=text) | change
    with pytest.raises(ValueError, match=complaint):
        network(SMALL)(**given)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(frames=np.zeros((2, 1, 4, 6, 2))), r"frames .* must be \[2, 3, 4, 6, 2\]"),
        (dict(frames=np.zeros((2, 3, 4, 6, 1))), r"frames .* must be \[2, 3, 4, 6, 2\]"),
        (dict(image=np.zeros((2, 14))), r"image .* must be \[2, I, 14\]"),
        (dict(image=None), "needs its `Conditions`"),
    ],
)
def test_conditions_of_other_shapes_are_refused(change, complaint):
    x, timestep, conditions = inputs(IMAGE)
    with pytest.raises(ValueError, match=complaint):
        network(IMAGE)(x, timestep, conditions._replace(**change))


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


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: dataclasses.replace(SMALL, heads=5), "heads=5"),
        (lambda: dataclasses.replace(SMALL, out_channels=9), "out_channels=9"),
        (lambda: dataclasses.replace(SMALL, dtype="float16"), "float16"),
        (lambda: kv_cache.ring(Causal(window=6, sink=1), 6), "must have room for 7"),
    ],
)
def test_numbers_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


# Parameters of the published checkpoints, as their model cards round them.
@pytest.mark.parametrize(
    "config, billions",
    [(wan.T2V_1_3B, 1.42), (wan.T2V_14B, 14.29), (wan.I2V_14B, 16.40), (wan.TI2V_5B, 5.00)],
    ids=["t2v_1_3b", "t2v_14b", "i2v_14b", "ti2v_5b"],
)
def test_the_presets_have_the_published_size(config, billions):
    net = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(net))
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_features_are_the_tokens_after_the_named_layers():
    net, args = network(SMALL), inputs(SMALL)
    same, features = jax.jit(lambda net: net(*args, features=(0, 1)))(net)
    assert features.shape == (2, 2, 3 * 2 * 3, 48)
    np.testing.assert_allclose(same, jax.jit(lambda net: net(*args))(net), rtol=1e-4, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 0.01
    with pytest.raises(ValueError, match="features are those of whole videos"):
        net(*args, features=(0,), causal=Causal(1), context=args[0])
