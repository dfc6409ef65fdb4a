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
# be a constant. It keeps all that backpropagation needs of all blocks.


def by_hand(generator, noise, exits, *, causal, context_time=0.0, initial=None, first_times=None):
    """x0 [B, F, ...] by the plain loop, blocks of `causal` from frame 0 on."""
    frames = noise.shape[1] + (0 if initial is None else initial.shape[1])
    cache = generator.empty_cache(2, 3 * frames, *SIZE[:2])
    borders = [
        0,
        *range(
            1 if causal.first_alone else causal.frames_per_block,
            frames + 1,
            causal.frames_per_block,
        ),
    ]
    x0s, known = [], 0 if initial is None else initial.shape[1]

    def predict(net, x, t):
        return net.predict(x, jnp.full(2, t), COND, causal=causal, cache=cache, start=first)

    for first, stop in pairwise(borders):
        if stop <= known:
            own = predict(generator, initial[:, first:stop], 0.0).aux
            x0s.append(initial[:, first:stop])
        else:
            exit_step = exits[len(x0s) - sum(b < known for b in borders[:-1])]
            lists = first_times if first_times and first == 0 else TIMES
            levels = np.asarray(shift_time(np.float32((*lists, 0.0)), 5.0))
            x = noise[:, first - known : stop - known]
            for step in range(exit_step):
                x0 = jax.lax.stop_gradient(predict(generator, x, levels[step]).x0)
                key = jax.random.fold_in(jax.random.fold_in(KEY, 0), first)
                eps = randomness.normal(
                    jax.random.fold_in(key, step + 1), jnp.arange(2), x.shape[1:]
                )
                x = FLOW.add_noise(x0, eps, jnp.full(2, levels[step + 1]))
            out = predict(generator, x, levels[exit_step])
            x0s.append(out.x0)
            own = out.aux
            if context_time is not None:
                x0 = out.x0
                if context_time:
                    key = jax.random.fold_in(jax.random.fold_in(KEY, 1), first)
                    eps = randomness.normal(jax.random.fold_in(key, 0), jnp.arange(2), x.shape[1:])
                    x0 = FLOW.add_noise(x0, eps, jnp.full(2, context_time))
                own = predict(generator, x0, context_time).aux
        ring = kv_cache.Ring(cache.slots, sink=0)  # room for every frame
        cache = kv_cache.write(cache, jax.lax.stop_gradient(own), ring)
    return jnp.concatenate(x0s, axis=1)
