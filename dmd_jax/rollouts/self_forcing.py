"""Self-Forcing: a causal generator makes a video block by block, from its own earlier blocks.

Huang et al. 2025 (arXiv 2506.08009). Each block of frames is denoised in a few calls with fresh
noise between them, stops at its exit step, and is written to the KV cache, which later blocks
attend to. The gradient passes through the exit call of every graded block and through nothing else:
cached keys and values are constants. So the rollout runs without gradient, and the backward pass
evaluates the exit calls once more, one block at a time, against the finished cache. Its memory is
that of one block, however many blocks there are.

Imports jax, the mesh and random draws, the schedule, and the cache of the networks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import Schedule
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import Causal
from dmd_jax.models.kv_cache import KVCache
from dmd_jax.rollouts.backward_simulation import Rollout, constant
from dmd_jax.rollouts.block_maker import EXIT, FIRST_EXIT, LAST, BlockMaker, Steps, predict
from dmd_jax.rollouts.blocks import GRADED, Layout


def self_forcing(
    generator: Denoiser,
    noise: Float[Array, "B F H W C"],
    cond: PyTree,
    key: Key[Array, ""],
    *,
    times: Sequence[float],
    schedule: Schedule,
    causal: Causal,
    shift: float = 1.0,
    first_times: Sequence[float] | None = None,
    exit_step: Int[ArrayLike, ""] | Int[ArrayLike, " blocks"] | None = None,
    per_block_exit: bool = False,
    last_step_share: float = 0.0,
    context_time: float | None = 0.0,
    initial: Float[Array, "B F0 H W C"] | None = None,
    graded: int | None = None,
    blocks: Int[ArrayLike, ""] | None = None,
    index: Int[ArrayLike, " B"] | None = None,
    step_noise: Float[Array, "blocks steps B n H W C"] | None = None,
    cache: KVCache | None = None,
    start: Int[ArrayLike, ""] = 0,
) -> Rollout:
    """Generates a video, or goes on with one, block by block.

    One compilation serves every exit step, number of blocks and position in the stream: they are
    traced values, and nothing is read on the host.

    Args:
        generator: a Denoiser of a causal network: `predict(x, t, cond, causal=, cache=, start=)`
            returns the keys and values of its own frames as `aux`.
        noise: standard normal, [B, F, H, W, C].
        cond: conditions with leading axis B, of the whole call. To switch the prompt, end the call,
            `recache`, and go on with another.
        key: of all random draws. The noise between steps is a function of (key, sample, first frame
            of the block, step): a video made in several calls equals one made in one.
        times: times of the calls before the shift, descending, such as (1, .75, .5, .25).
        schedule: the generator's schedule.
        causal: the network's Causal: frames per block, lone first frame, window, sink.
        shift: see `schedule.shift_time`.
        first_times: another list of times for the block that begins at frame 0 of the video, which
            draws an exit step of its own; None for the same.
        exit_step: the call to stop after, int32 [] for all blocks, as an index into `times`, or
            [blocks] for one a block; random if None. May be traced.
        per_block_exit: draw an exit step for each block, not one for all.
        last_step_share: probability of forcing the last step of every block, one draw a rollout;
            otherwise exit steps are uniform. 1 is inference.
        context_time: time, after the shift, at which a finished block is noised and written to the
            cache: 0 is clean, and adds no noise. None writes the keys and values of the exit call
            itself, which costs no further call; an early exit then writes noisy context.
        initial: clean latents [B, F0, H, W, C] that the video goes on from. They are written at
            time 0, block by block, and are the first frames of x0.
        graded: only the last so many frames of `noise` pass gradient; None for all. A lone first
            frame passes it only where all frames do.
        blocks: how many blocks are made, int32 [], of those that `noise` has room for; the first
            ones are left out. None for all. May be traced.
        index: int32 [B], the samples' positions in the global batch; 0 ... B-1 if None.
        step_noise: [blocks, steps, B, n, H, W, C], taken in place of drawn noise. The last of the
            `steps` is the context's; a lone first block takes the first frame.
        cache: a KVCache to go on from; None for an empty one.
        start: number of the first new frame in the video. May be traced.

    Returns:
        Rollout: x0 float32 [B, F0 + F, H, W, C]; mask bool [B, F0 + F], True where graded, None if
        all frames are; t_from and t_to of the exit step that the blocks share, (1, 0) if they have
        exits of their own; cache, which the next call takes.

    Raises:
        ValueError: `noise`, `initial` or `graded` does not end on the border of a block; `times` do
            not descend; `exit_step` or `blocks` is out of range (checked where it is an int);
            `cache` has too few slots for the window, the sink and the graded frames,
            or, without a window, for the whole video. (In the last case, frames outside of the
            cache are NaN where `start` is traced.)
    """
    steps = Steps.of(times, first_times, shift)
    lone_first = cache is None
    known = 0 if initial is None else initial.shape[1]
    layout = Layout.of("noise", noise, causal, lone_first=lone_first and not known)
    graded = noise.shape[1] if graded is None else graded
    layout.graded(graded)  # refuses a border within a block
    _require_in_range("exit_step", exit_step, 0, len(times) - 1)
    _require_in_range("blocks", blocks, 1, layout.total)
    if cache is None:
        cache = empty_cache(generator, noise, causal, graded, start + known + noise.shape[1])
    _require_room(cache, causal, graded)
    index = jnp.arange(noise.shape[0]) if index is None else index
    frozen, noise, cond, initial, cache = constant((generator, noise, cond, initial, cache))
    how = dict(steps=steps, context_time=context_time, step_noise=step_noise)
    maker = BlockMaker(frozen, cond, schedule, causal, key, index, **how)

    if known:
        cache = maker.write_all(initial, cache, start, 0.0, lone_first=lone_first)
    left_out = 0 if blocks is None else layout.total - blocks
    starts = layout.starts(start + known, left_out)
    exits, shared = _exit_steps(key, starts, steps, exit_step, per_block_exit, last_step_share)
    x0, calls, cache = _roll_out(maker, layout, noise, cache, starts, exits, left_out)
    x0 = _exit_calls((causal, layout, graded), generator, x0, calls)
    x0 = _nan_outside(x0, cache, causal, start + known)
    if known:
        x0 = jnp.concatenate([initial.astype(x0.dtype), x0], axis=1)
    ends = jnp.asarray((*times, 0.0), jnp.float32)
    bounds = (1.0, 0.0) if shared is None else (ends[shared], ends[shared + 1])
    mask = _mask(layout, x0.shape[:2], graded, left_out if blocks is not None else None)
    return Rollout(x0, mask, *(jnp.float32(t) for t in bounds), cond, cache)


def recache(
    generator: Denoiser,
    latents: Float[Array, "B F H W C"],
    cond: PyTree,
    key: Key[Array, ""] | None = None,
    *,
    schedule: Schedule,
    causal: Causal,
    cache: KVCache,
    start: Int[ArrayLike, ""],
    context_time: float | None = 0.0,
    index: Int[ArrayLike, " B"] | None = None,
) -> KVCache:
    """Computes a cache anew from latents, under another conditioning: a prompt switch (LongLive).

    Args:
        generator, schedule, causal, index: as for `self_forcing`.
        latents: the last frames of the video, [B, n, H, W, C], from the border of a block on.
        cond: the new conditions.
        key: of the context noise; only where `context_time` is above 0.
        cache: the stream's cache, for its size and, with `causal.keep_sink`, its sink.
        start: number of the first of these frames in the video. May be traced.
        context_time: as for `self_forcing`; None means 0, for there is no exit call.

    Returns:
        KVCache.
    """
    index = jnp.arange(latents.shape[0]) if index is None else index
    frozen, latents, cond = constant((generator, latents, cond))
    cache = kv_cache.forget(cache, causal.sink if causal.keep_sink else 0)
    maker = BlockMaker(frozen, cond, schedule, causal, key, index)
    return maker.write_all(latents, cache, start, context_time or 0.0, lone_first=False)


def _exit_steps(key, starts, steps, exit_step, per_block_exit, last_step_share):
    """Exit steps int32 [blocks], and the shared one, [], an index into `times`; None if none is."""
    tagged = partial(jax.random.fold_in, key)
    last = jax.random.bernoulli(tagged(LAST), last_step_share)
    length, first_length = steps.lengths

    def draw(key, length):
        return jnp.where(last, length - 1, jax.random.randint(key, (), 0, length))

    if exit_step is not None and jnp.ndim(exit_step):
        return jnp.asarray(exit_step, jnp.int32), None
    shared = draw(tagged(EXIT), length) if exit_step is None else jnp.asarray(exit_step, jnp.int32)
    exits = jnp.broadcast_to(shared, starts.shape)
    if exit_step is None and per_block_exit:
        exits = jax.vmap(lambda s: draw(jax.random.fold_in(tagged(EXIT), s), length))(starts)
        shared = None
    if steps.own_first:
        exits = jnp.where(steps.row(starts) > 0, draw(tagged(FIRST_EXIT), first_length), exits)
    return exits, shared


class _Calls(NamedTuple):
    """The exit calls of a rollout, constants all: what it takes to make them again."""

    inputs: jax.Array  # float32 [B, F, ...]
    times: jax.Array  # float32 [blocks]
    starts: jax.Array  # int32 [blocks]
    left_out: Any  # int or int32 []: blocks that were not made
    cond: Any
    cache: kv_cache.KVCache


def _roll_out(maker, layout, noise, cache, starts, exits, left_out):
    """Makes all blocks without gradient: (x0 [B, F, ...], _Calls, cache)."""

    def make(block, place, size, carry):
        x0, inputs, times, cache = carry
        start = starts[block]
        part = jax.lax.dynamic_slice_in_dim(noise, place, size, axis=1)
        x, t, out = maker.denoise(part, cache, start, exits[block], block)
        cache = maker.write(cache, maker.context(out, cache, start, block))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=1)
        return put(x0, out.x0), put(inputs, x), times.at[block].set(t), cache

    zeros = jnp.zeros(noise.shape, jnp.float32)
    carry = zeros, zeros, jnp.zeros(layout.total), cache
    x0, inputs, times, cache = layout.for_each(make, carry, left_out=left_out)
    return x0, _Calls(inputs, times, starts, left_out, maker.cond, cache), cache


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exit_calls(plan, generator, x0, calls):
    """x0, as a function of the generator by way of the exit calls that made it.

    A scan of the calls in place of this would keep every block's activations for the backward pass.

    Args:
        plan: (causal, layout, graded), static.
        generator: what is differentiated.
        x0: what the calls returned, [B, F, ...].
        calls: _Calls.
    """
    return x0


def _keep(plan, generator, x0, calls):
    """Saves the weights that have a gradient and the others, as adapters' bases, in two trees."""
    x0, calls = custom_vjp_primal_tree_values((x0, calls))
    learned = jax.tree.map(lambda x: x.value if x.perturbed else None, generator)
    others = jax.tree.map(lambda x: None if x.perturbed else x.value, generator)
    return x0, (learned, others, calls)


def _replay(plan, saved, gradient):
    """The sum of the blocks' gradients: each exit call again, one after the other."""
    (causal, layout, graded), (learned, others, calls) = plan, saved

    def of_block(block, place, size):
        x, cotangent = (
            jax.lax.dynamic_slice_in_dim(a, place, size, axis=1) for a in (calls.inputs, gradient)
        )

        def exit_call(learned):
            generator = jax.tree.map(_either, learned, others, is_leaf=_is_none)
            t, start = calls.times[block], calls.starts[block]
            return predict(generator, x, t, calls.cond, causal, calls.cache, start).x0

        return jax.vjp(exit_call, learned)[1](cotangent)[0]

    def add(block, place, size, total):
        return jax.tree.map(jnp.add, total, of_block(block, place, size))

    zeros = jax.tree.map(jnp.zeros_like, learned)
    lone, first = layout.graded(graded)
    which = dict(left_out=calls.left_out, lone=lone, first=first, name=GRADED)
    total = layout.for_each(add, zeros, **which)
    return total, None, None


def _is_none(x):
    return x is None


def _either(a, b):
    return b if a is None else a


_exit_calls.defvjp(_keep, _replay, symbolic_zeros=True)


def empty_cache(
    generator: Denoiser,
    noise: Float[Array, "B F H W C"] | jax.ShapeDtypeStruct,
    causal: Causal,
    graded: int,
    end: Int[ArrayLike, ""],
) -> KVCache:
    """A cache for the window, the sink and the graded frames; without a window, for `end` frames.

    Raises:
        ValueError: `end` is traced, and there is no window.
    """
    batch, _, height, width, _ = noise.shape
    slots = end if causal.window is None else causal.window + causal.sink + graded
    if not isinstance(slots, int):
        raise ValueError("start is traced: give a cache, whose size does not depend on it")
    return generator.empty_cache(batch, slots, height, width)


def _require_room(cache, causal, graded):
    """Refuses a cache in which later blocks would overwrite what a graded block attends to."""
    if causal.window is None:
        return  # see `_nan_outside`
    needed = causal.most_visible + max(graded - causal.frames_per_block, 0)
    if cache.slots < needed:
        raise ValueError(
            f"a cache of {cache.slots} frames for window={causal.window}, sink={causal.sink} and "
            f"graded={graded}: it must have room for {needed} or more"
        )


def _require_in_range(name, number, low, high):
    """Refuses an integer out of range; a traced one is not known here."""
    if isinstance(number, int) and not low <= number <= high:
        raise ValueError(f"{name}={number} must be in [{low}, {high}]")


def _nan_outside(x0, cache, causal, start):
    """NaN for frames that a cache without a window has no room for.

    Raises:
        ValueError: instead, where `start` is known.
    """
    slots, end = cache.slots, start + x0.shape[1]
    if causal.window is not None:
        return x0
    if isinstance(end, int):
        if end > slots:
            raise ValueError(
                f"a video of {end} frames outgrows a cache of {slots} frames: without a window "
                "every frame stays visible. Give causal.window, or a cache of as many frames"
            )
        return x0
    inside = start + jnp.arange(x0.shape[1]) < slots
    return jnp.where(inside[:, None, None, None], x0, jnp.nan)


def _mask(layout, shape, graded, left_out):
    """bool [B, F0 + F], True where graded; None if everything is."""
    frames = shape[1]
    if graded == frames and left_out is None:
        return None
    first = frames - graded
    if left_out is not None:
        # A lone first block may lie within the last frames then, and is replayed with all or not.
        not_replayed = layout.lone and graded < layout.frames
        begin = frames - layout.frames + layout.size * left_out + not_replayed
        first = jnp.maximum(first, begin)
    return jnp.broadcast_to(jnp.arange(frames) >= first, shape)
