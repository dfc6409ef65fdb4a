"""The ODE of a causal network, block by block: how a causal teacher, or a start, samples.

Imports jax, jaxtyping, diffusion/, and the pieces of a block in this room.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int, Key, PyTree

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import check_step_times, shift_time
from dmd_jax.models.attention import Causal
from dmd_jax.rollouts.backward_simulation import constant
from dmd_jax.rollouts.block_maker import BlockMaker, predict
from dmd_jax.rollouts.blocks import Layout
from dmd_jax.rollouts.ode import euler_step
from dmd_jax.rollouts.self_forcing import empty_cache


def block_ode(
    denoiser: Denoiser,
    noise: Float[Array, "B F H W C"],
    cond: PyTree,
    uncond: PyTree,
    key: Key[Array, ""],
    *,
    times: Sequence[float],
    causal: Causal,
    guidance: float = 1.0,
    shift: float = 1.0,
    context_time: float = 0.0,
    index: Int[Array, " B"] | None = None,
) -> Float32[Array, "B F H W C"]:
    """Samples a video of a causal network: each block in guided Euler steps, after those before it.

    Args:
        denoiser: a Denoiser of a causal network.
        noise: standard normal.
        cond, uncond: conditions and the unconditional input of guidance, with leading axis B. Each
            has a cache of its own.
        key: of the context noise.
        times: times of the calls before the shift, descending from 1.
        causal: blocks, window and sink.
        guidance: weight of classifier-free guidance; 1 disables it, and costs one pass.
        shift: see `schedule.shift_time`.
        context_time: as for `self_forcing`.
        index: positions of the samples in the global batch; 0 ... B-1 if None.

    Raises:
        ValueError: the frames do not divide into blocks, or `times` do not descend.
    """
    check_step_times(times)
    batch, schedule = len(noise), denoiser.schedule
    layout = Layout.of("noise", noise, causal, lone_first=True)
    index = jnp.arange(batch) if index is None else index
    net, noise, cond, uncond = constant((denoiser, noise, cond, uncond))
    levels = shift_time(jnp.asarray((*times, 0.0), jnp.float32), shift)
    two = guidance != 1
    # Interleaved, as in `denoiser.guided`: both halves of a pair stay on the device of the sample.
    both = jax.tree.map(_pair, cond, uncond) if two else cond
    maker = BlockMaker(net, both, schedule, causal, key, _pair(index, index) if two else index)

    def guided(x, t, cache, start):
        x = _pair(x, x) if two else x
        x0 = predict(net, x, t, both, causal, cache, start).x0
        if not two:
            return x0
        x0_cond, x0_uncond = x0[::2], x0[1::2]
        return x0_uncond + guidance * (x0_cond - x0_uncond)

    def make(block, place, size, carry):
        videos, cache = carry
        start = layout.starts(0, 0)[block]
        x = jax.lax.dynamic_slice_in_dim(noise, place, size, axis=1)

        def step(x, pair):
            t, t_next = (jnp.full(batch, level) for level in pair)
            return euler_step(x, guided(x, pair[0], cache, start), t, t_next, schedule), None

        x, _ = jax.lax.scan(step, schedule.sigma(levels[0]) * x, (levels[:-1], levels[1:]))
        own = maker.encode(_pair(x, x) if two else x, context_time, cache, start, block)
        videos = jax.lax.dynamic_update_slice_in_dim(videos, x, place, axis=1)
        return videos, maker.write(cache, own)

    cache = empty_cache(net, _pair(noise, noise) if two else noise, causal, 0, noise.shape[1])
    return layout.for_each(make, (jnp.zeros(noise.shape, jnp.float32), cache))[0]


def _pair(a, b):
    """[B, ...] and [B, ...] as [2B, ...], in turn."""
    return rearrange(jnp.stack([a, b], axis=1), "b two ... -> (b two) ...")
