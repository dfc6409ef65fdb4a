"""Keys and values of the frames that a causal video network has behind it. Imports jax alone.

The cache has a fixed number of slots, a frame each. The first `sink` frames of a video keep theirs
for good; the others take turns (a ring), so that nothing is ever moved and a rollout of any length
compiles once. Keys lie in it without position: attention does not care where in memory a key is,
and a position is given to it anew at every call, small however long the rollout (`positions`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

EMPTY = -1


class KVCache(NamedTuple):
    """A value: `write` returns a new one. All layers of a network share `frames`."""

    keys: jax.Array  # [layers, B, slots, T, N, H]: T tokens a frame, N heads of width H
    values: jax.Array
    frames: jax.Array  # int32 [slots]: which frame of the video lies there; EMPTY for none


def empty(layers, batch, slots, tokens, heads, width, dtype):
    """A KVCache of nothing, with room for `slots` frames."""
    shape = (layers, batch, slots, tokens, heads, width)
    keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return KVCache(keys, values, jnp.full(slots, EMPTY, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which frame goes to which slot, and what position its key has.

    Attributes:
        slots: frames that fit.
        sink: the first frames of the video, which stay.
        reach: the longest distance between frames, in frames, that the network was trained on. The
            sink is shown no farther away than that.
    """

    slots: int
    sink: int
    reach: int

    @property
    def table(self):
        """Positions are in [0, table)."""
        return max(self.slots, self.reach)

    def slot(self, frames):
        """Where int32 [n] frames belong."""
        turn = self.sink + (frames - self.sink) % (self.slots - self.sink)
        return jnp.where(frames < self.sink, frames, turn)

    def positions(self, frames, end):
        """Positions of int32 [n] frames, when `end` frames of the video are known.

        Only differences of positions matter to rotary embeddings, so the last frame is always at
        `table` - 1. An EMPTY frame is given some position or other.
        """
        held = jnp.where(frames < self.sink, jnp.maximum(frames, frames + end - self.reach), frames)
        return jnp.clip(held - end + self.table, 0, self.table - 1)
