"""The keys and values (K/V) of earlier frames, which a causal video network attends to.

The cache has a fixed number of slots, one frame each. With a window, the first `sink` frames of a
video stay in their slots and later frames take turns in the others (a ring). Nothing is moved, so a
rollout of any length is one compiled program. With 2 slots for the sink and 3 for the window, frame
7 overwrites frame 4:

    slot      0   1   2   3   4
    frame     0   1   5   6   4 -> 7

More slots than the window and the sink need change nothing: which frames a block attends to follows
from their numbers. Training has them, to read the context of every graded block from one finished
cache.

Keys are stored before the rotary embedding. The order of keys in memory does not matter to
attention, and at every call each key is rotated to a position relative to the newest frame
(`Ring.positions`), which stays small in a video of any length. Imports jax and devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.devices import sharding

EMPTY = -1


class KVCache(NamedTuple):
    """K/V of all layers, by slot, or those of a block's own frames, in order (see `write`).

    It is a value: nothing changes it in place.
    """

    keys: jax.Array  # [layers, B, slots, T, N, H]: T tokens a frame, N heads of width H
    values: jax.Array
    frames: jax.Array  # int32 [slots]: number of the frame in each slot; EMPTY for none

    @property
    def slots(self):
        """How many frames there is room for."""
        return self.frames.shape[0]


def empty(layers, batch, slots, tokens, heads, width, dtype):
    """A KVCache without frames, with room for `slots` of them."""
    shape = (layers, batch, slots, tokens, heads, width)
    return KVCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(slots, EMPTY, jnp.int32)
    )


def write(cache, own, ring):
    """The cache after the K/V of `own`, a KVCache of new frames, are put into their slots."""
    slots = ring.slot(own.frames)
    keys = cache.keys.at[:, :, slots].set(own.keys)
    values = cache.values.at[:, :, slots].set(own.values)
    keys, values = sharding.shard_heads((keys, values), axis=1)
    return KVCache(keys, values, cache.frames.at[slots].set(own.frames))


def forget(cache, keep=0):
    """The cache without its frames, except frames 0 ... keep - 1 of the video."""
    kept = (cache.frames >= 0) & (cache.frames < keep)
    return cache._replace(frames=jnp.where(kept, cache.frames, EMPTY))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which frame is in which slot.

    Attributes:
        slots: slots of the cache.
        sink: the first frames of the video, which are never overwritten.
    """

    slots: int
    sink: int

    def slot(self, frames):
        """The slots of int32 [n] frames."""
        turn = self.sink + (frames - self.sink) % (self.slots - self.sink)
        return jnp.where(frames < self.sink, frames, turn)

    def positions(self, frames, end, length):
        """Positions of int32 [n] frames for a rotary embedding, which uses their differences alone.

        The newest frame has the last position, length - 1, and earlier frames those before it. Once
        a video is longer than `length`, frame f of the sink stays at position f.

        Args:
            frames: int32 [n], numbers in the video; for EMPTY the position has no meaning.
            end: number of the newest frame plus 1.
            length: positions are in [0, length); at least as many as frames that are visible.
        """
        positions = frames + length - end
        positions = jnp.where(frames < self.sink, jnp.maximum(frames, positions), positions)
        return jnp.clip(positions, 0, length - 1)


def ring(causal, slots):
    """How a cache of `slots` slots serves a `Causal`.

    Raises:
        ValueError: it has fewer slots than the window and the sink need.
    """
    if causal.window is None:
        return Ring(slots, sink=0)  # every frame stays: no slot has to be kept for the sink
    if slots < causal.most_visible:
        raise ValueError(
            f"a cache of {slots} frames for window={causal.window} and sink={causal.sink}: it must "
            f"have room for {causal.most_visible} or more"
        )
    return Ring(slots, causal.sink)
