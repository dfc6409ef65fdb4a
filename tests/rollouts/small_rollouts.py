"""Rollouts of two small videos: `self_forcing` under jit, and the plain loop that it must equal."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from toys import normal

from dmd_jax.devices import randomness
from dmd_jax.diffusion.schedule import FlowMatching, shift_time
from dmd_jax.models import kv_cache
from dmd_jax.models.wan import Causal, WanConfig
from dmd_jax.rollouts.self_forcing import self_forcing

FLOW = FlowMatching()
KEY = jax.random.key(3)
TIMES = (1.0, 0.75, 0.5, 0.25)
CONFIG = WanConfig(
    dim=16, ffn=24, heads=2, depth=2, in_channels=3, out_channels=3, text_dim=5, freq_dim=8, reach=6
)
SIZE = (4, 4, 3)  # of a frame: 4 tokens
PAIRS = Causal(2)
COND = normal(1, 2, 4, 5)


@functools.cache
def compiled(**static):
    """A jitted rollout; all that is an array is an argument of it."""

    @jax.jit
    def run(generator, noise, cond, key, traced):
        return self_forcing(generator, noise, cond, key, schedule=FLOW, **static, **traced)

    return run


def roll(generator, frames=6, cond=COND, key=KEY, *, noise=None, **how):
    """A rollout of two samples, under jit."""
    noise = normal(0, len(cond), frames, *SIZE) if noise is None else noise
    how = dict(times=TIMES, shift=5.0, causal=PAIRS) | how
    traced = {k: how.pop(k) for k in list(how) if isinstance(how[k], jax.Array | kv_cache.KVCache)}
    return compiled(**how)(generator, noise, cond, key, traced)


# The plain loop, as one writes it from the paper: a gradient through everything that is not said to
# be a constant. It keeps all that backpropagation needs of all blocks. What is compiled is one call
# and not the loop: so all loops share it.


@functools.partial(jax.jit, static_argnames="causal")
def predict(generator, x, t, causal, cache, start):
    """(x0, keys and values of its own frames) of one call at a time for all."""
    out = generator.predict(x, jnp.full(2, t), COND, causal=causal, cache=cache, start=start)
    return out.x0, out.aux


@jax.jit
def renoise(x0, tag, first, step, t):
    """x0 at time t, with the noise that belongs to this block and step."""
    key = jax.random.fold_in(jax.random.fold_in(KEY, tag), first)
    eps = randomness.normal(jax.random.fold_in(key, step), jnp.arange(2), x0.shape[1:])
    return FLOW.add_noise(x0, eps, jnp.full(2, t))


@jax.jit
def write(cache, own):
    """A cache that has room for every frame, and now those of `own`."""
    return kv_cache.write(cache, own, kv_cache.Ring(cache.slots, sink=0))


def by_hand(generator, noise, exits, *, causal, context_time=0.0, initial=None, first_times=None):
    """x0 [B, F, ...] by the plain loop, blocks of `causal` from frame 0 on."""
    known = 0 if initial is None else initial.shape[1]
    frames, size = known + noise.shape[1], causal.frames_per_block
    constant = jax.lax.stop_gradient(generator)
    cache = generator.empty_cache(2, 30, *SIZE[:2])
    borders = [0, *range(1 if causal.first_alone else size, frames + 1, size)]
    x0s, exits = [], iter(exits)
    for first, stop in pairwise(borders):
        at = dict(causal=causal, cache=cache, start=jnp.int32(first))
        if stop <= known:
            x0 = initial[:, first:stop]
            own = predict(constant, x0, 0.0, **at)[1]
        else:
            lists = first_times if first_times and first == 0 else TIMES
            levels = np.asarray(shift_time(np.float32((*lists, 0.0)), 5.0))
            x, exit_step = noise[:, first - known : stop - known], next(exits)
            for step in range(exit_step):
                x0 = predict(constant, x, levels[step], **at)[0]
                x = renoise(x0, 0, first, step + 1, levels[step + 1])
            x0, own = predict(generator, x, levels[exit_step], **at)
            if context_time is not None:
                context = jax.lax.stop_gradient(x0)
                if context_time:
                    context = renoise(context, 1, first, 0, context_time)
                own = predict(constant, context, context_time, **at)[1]
        x0s.append(x0)
        cache = write(cache, jax.lax.stop_gradient(own))
    return jnp.concatenate(x0s, axis=1)
