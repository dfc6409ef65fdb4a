"""Makes one block of a causal video and writes it to the KV cache; training and streaming share it.

Imports jax, random draws, the schedule, the cache of the networks, and `blocks`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Int32, Key, PyTree

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser, Output
from dmd_jax.diffusion.schedule import Schedule, check_step_times, shift_time
from dmd_jax.models import kv_cache
from dmd_jax.models.attention import Causal
from dmd_jax.models.kv_cache import KVCache
from dmd_jax.rollouts.blocks import Layout

# Tags of the random streams of a rollout.
NOISE, CONTEXT, EXIT, FIRST_EXIT, LAST, START = range(6)


class Steps(NamedTuple):
    """The times of a block's calls: row 1 is for the block at frame 0, row 0 for all others.

    Attributes:
        levels: times after the shift, zeros behind the last.
        lengths: how many calls a row has.
        own_first: whether the first block has a list of its own.
    """

    levels: Float32[Array, "2 steps"]
    lengths: Int32[Array, "2"]
    own_first: bool

    @classmethod
    def of(
        cls, times: Sequence[float], first_times: Sequence[float] | None, shift: float
    ) -> "Steps":
        """From lists of times before the shift; ValueError where they do not descend."""
        lists = [tuple(times), tuple(first_times or times)]
        for given in lists:
            check_step_times(given)
        width = max(map(len, lists)) + 1
        rows = jnp.asarray([t + (0.0,) * (width - len(t)) for t in lists], jnp.float32)
        lengths = jnp.asarray([len(t) for t in lists], jnp.int32)
        return cls(shift_time(rows, shift), lengths, first_times is not None)

    def row(self, start: Int[Array, "*blocks"]) -> Int[Array, "*blocks"]:
        """The row of the block whose first frame is `start`."""
        return (start == 0).astype(jnp.int32) if self.own_first else jnp.zeros_like(start)

    def last(self, start: Int[Array, ""]) -> Int[Array, ""]:
        """The last step of the block whose first frame is `start`."""
        return self.lengths[self.row(start)] - 1


def predict(
    generator: Denoiser,
    x: Float[Array, "B n H W C"],
    t: Float[ArrayLike, ""],
    cond: PyTree,
    causal: Causal,
    cache: KVCache,
    start: Int[ArrayLike, ""],
) -> Output:
    """One call for a block at one time; its `aux` is the K/V of the block's own frames."""
    t = jnp.full(len(x), t, jnp.float32)
    return generator.predict(x, t, cond, causal=causal, cache=cache, start=start)


@dataclasses.dataclass(frozen=True)
class BlockMaker:
    """Denoises a block, computes its keys and values (K/V), writes them to a cache.

    In all methods `start` is the number of the block's first frame in the video, and `block` its
    row of `step_noise`.

    Attributes:
        generator: a Denoiser of a causal network.
        cond: conditions with leading axis B.
        schedule: the generator's.
        causal: the network's Causal.
        key: of all random draws; None where nothing is drawn.
        index: int32 [B], the samples' positions in the global batch.
        steps: Steps; None where nothing is denoised.
        context_time: time, after the shift, at which a finished block is written: see
            `self_forcing`.
        step_noise: noise in place of drawn noise: see `self_forcing`.
    """

    generator: Denoiser
    cond: PyTree
    schedule: Schedule
    causal: Causal
    key: Key[Array, ""] | None
    index: Int[ArrayLike, " B"]
    steps: Steps | None = None
    context_time: float | None = None
    step_noise: Float[Array, "blocks steps B n H W C"] | None = None

    def denoise(
        self,
        noise: Float[Array, "B n H W C"],
        cache: KVCache,
        start: Int[Array, ""],
        exit_step: Int[ArrayLike, ""],
        block: Int[ArrayLike, ""] = 0,
    ) -> tuple[Float32[Array, "B n H W C"], Float32[Array, ""], Output]:
        """Takes a block from standard normal noise to its exit step, with fresh noise at each step.

        Returns:
            (input of the exit call, its time after the shift, its Output).
        """
        levels = self.steps.levels[self.steps.row(start)]

        def again(step, x):
            x0 = self._predict(x, levels[step], cache, start).x0
            eps = self._eps(NOISE, step, x, start, block)
            return self.schedule.add_noise(x0, eps, jnp.full(len(x), levels[step + 1]))

        x = self.schedule.sigma(levels[0]) * noise.astype(jnp.float32)
        x = jax.lax.fori_loop(0, exit_step, again, x)
        t = levels[exit_step]
        return x, t, self._predict(x, t, cache, start)

    def context(
        self,
        out: Output,
        cache: KVCache,
        start: Int[ArrayLike, ""],
        block: Int[ArrayLike, ""] = 0,
    ) -> KVCache:
        """The K/V of a finished block, whose exit call returned `out`, at the context time."""
        if self.context_time is None:
            return out.aux
        return self.encode(out.x0, self.context_time, cache, start, block)

    def encode(
        self,
        x0: Float[Array, "B n H W C"],
        time: float,
        cache: KVCache,
        start: Int[ArrayLike, ""],
        block: Int[ArrayLike, ""] = 0,
    ) -> KVCache:
        """The K/V of a block of clean latents, noised to `time`; at 0 nothing is added to them."""
        if time:
            eps = self._eps(CONTEXT, -1, x0, start, block)
            x0 = self.schedule.add_noise(x0, eps, jnp.full(len(x0), time))
        return self._predict(x0, time, cache, start).aux

    def write(self, cache: KVCache, own: KVCache) -> KVCache:
        """The cache with the K/V of a block's own frames."""
        return kv_cache.write(cache, own, kv_cache.ring(self.causal, cache.slots))

    def write_all(
        self,
        latents: Float[Array, "B F H W C"],
        cache: KVCache,
        start: Int[ArrayLike, ""],
        time: float,
        *,
        lone_first: bool,
    ) -> KVCache:
        """The cache with clean latents that are written block by block at `time`.

        Raises:
            ValueError: they do not end on the border of a block.
        """
        layout = Layout.of("latents", latents, self.causal, lone_first=lone_first)
        starts = layout.starts(start, 0)

        def write(block, place, size, cache):
            x0 = jax.lax.dynamic_slice_in_dim(latents, place, size, axis=1)
            return self.write(cache, self.encode(x0, time, cache, starts[block], block))

        return layout.for_each(write, cache)

    def _predict(self, x, t, cache, start):
        return predict(self.generator, x, t, self.cond, self.causal, cache, start)

    def _eps(self, tag, step, x, start, block):
        """The noise of a step, of the shape of x [B, n, ...]; `step` -1 is the context's."""
        if self.step_noise is not None:
            return self.step_noise[block, step][:, : x.shape[1]]
        return _draw(self.key, self.index, tag, step, x.shape[1:], start)


def first_noise(
    key: Key[Array, ""],
    index: Int[ArrayLike, " B"],
    shape: tuple[int, ...],
    start: Int[ArrayLike, ""],
) -> Float32[Array, "B n H W C"]:
    """Standard normal noise for a stream: a function of the key, the sample and the frame number.

    Args:
        key, index: those of the rollout.
        shape: (n, H, W, C) of a block.
        start: number of its first frame in the video.
    """
    return _draw(key, index, START, -1, shape, start)


def _draw(key, index, tag, step, shape, start):
    key = jax.random.fold_in(jax.random.fold_in(key, tag), start)
    return randomness.normal(jax.random.fold_in(key, step + 1), index, shape)
