"""Self-Forcing's rollout: equal to the plain loop in value and gradient, in pieces, on a mesh."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_close, weights

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import FlowMatching, shift_time
from dmd_jax.models import kv_cache
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.rollouts.self_forcing import self_forcing

FLOW = FlowMatching()
KEY = jax.random.key(3)
TIMES = (1.0, 0.75, 0.5, 0.25)
CONFIG = WanConfig(
    dim=16, ffn=24, heads=2, depth=2, in_channels=3, out_channels=3, text_dim=5, freq_dim=8, reach=6
)
SIZE = (4, 4, 3)  # of a frame: 4 tokens
PAIRS = Causal(2)


@pytest.fixture(scope="module")
def generator():
    return Denoiser(weights(lambda rngs: Wan(CONFIG, rngs=rngs), 0))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


COND = normal(1, 2, 4, 5)


def roll(generator, frames=6, cond=COND, key=KEY, *, noise=None, **how):
    """A rollout of two samples, under jit."""
    noise = normal(0, len(cond), frames, *SIZE) if noise is None else noise
    how = dict(times=TIMES, shift=5.0, causal=PAIRS) | how
    traced = {k: how.pop(k) for k in list(how) if isinstance(how[k], jax.Array | kv_cache.KVCache)}
    static = partial(self_forcing, schedule=FLOW, **how)
    return jax.jit(lambda g, n, c, k, traced: static(g, n, c, k, **traced))(
        generator, noise, cond, key, traced
    )


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
            levels = [float(shift_time(t, 5.0)) for t in (*lists, 0.0)]
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


CASES = {
    "blocks of 2": dict(causal=Causal(2)),
    "frame by frame": dict(causal=Causal(1)),
    "a lone first frame": dict(causal=Causal(2, first_alone=True), frames=7),
    "a window": dict(causal=Causal(2, window=4), frames=10),
    "a window and a sink": dict(causal=Causal(2, window=4, sink=2), frames=10),
    "a sink that is no whole block": dict(causal=Causal(2, window=4, sink=1), frames=10),
    "noisy context": dict(causal=Causal(2), context_time=0.3),
    "context of the exit call": dict(causal=Causal(2), context_time=None),
    "initial frames": dict(causal=Causal(2, window=4), frames=6, initial=normal(5, 2, 4, *SIZE)),
    "an image to start from": dict(
        causal=Causal(2, first_alone=True), frames=6, initial=normal(5, 2, 1, *SIZE)
    ),
    "another list for the first block": dict(causal=Causal(2), first_times=(1.0, 0.6)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop_in_value_and_in_every_gradient(generator, case):
    how = dict(CASES[case])
    frames = how.pop("frames", 6)
    noise = normal(0, 2, frames, *SIZE)
    blocks = -(-frames // how["causal"].frames_per_block)
    exits = [(2 * i + 1) % (2 if "first_times" in how and i == 0 else 4) for i in range(blocks)]
    direction = normal(9, 2, frames, *SIZE)

    def value(run):
        def of(generator):
            x0 = run(generator)
            return jnp.vdot(x0[:, -frames:], direction), x0

        return jax.value_and_grad(of, has_aux=True)(generator)

    (_, x0), grad = value(lambda g: roll(g, noise=noise, exit_step=jnp.array(exits), **how).x0)
    (_, wanted_x0), wanted = value(lambda g: by_hand(g, noise, exits, **how))
    assert_close(x0, wanted_x0, rtol=2e-5, atol=2e-5)
    assert_close(grad, wanted, rtol=2e-4, atol=2e-5)
