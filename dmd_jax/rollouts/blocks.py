"""How the frames of a video divide into the blocks of a causal rollout. Imports only jax."""

import dataclasses

import jax
import jax.numpy as jnp

# Names of the functions in which a number of blocks is a traced value: of those that are made, and
# of those that are evaluated again for the gradient.
BLOCKS, GRADED = "loop_over_blocks", "loop_over_graded_blocks"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the frames of a rollout divide into blocks.

    Attributes:
        lone: whether the first block is a single frame.
        size: frames of every other block.
        count: how many other blocks there are.
    """

    lone: bool
    size: int
    count: int

    @classmethod
    def of(cls, name, latents, causal, *, lone_first):
        """The layout of latents [B, F, ...]; ValueError where they end within a block."""
        frames, size = latents.shape[1], causal.frames_per_block
        lone = causal.first_alone and lone_first
        if not frames or (frames - lone) % size:
            blocks = f"1 frame and blocks of {size}" if lone else f"blocks of {size}"
            raise ValueError(f"{name}: {frames} frames do not divide into {blocks}")
        return cls(lone, size, (frames - lone) // size)

    @property
    def total(self):
        """How many blocks there are."""
        return self.lone + self.count

    @property
    def frames(self):
        return self.lone + self.size * self.count

    def made(self, blocks):
        """How many frames the first `blocks` blocks have; may be traced."""
        return self.lone + self.size * (blocks - self.lone)

    def graded(self, frames):
        """The blocks of the last `frames` frames: (whether the lone one is, the first other)."""
        if frames == self.frames:
            return self.lone, 0
        if not 0 <= frames < self.frames or frames % self.size:
            raise ValueError(
                f"graded={frames} of {self.frames} frames does not begin on the border of a block "
                f"of {self.size}"
            )
        return False, self.count - frames // self.size

    def for_each(self, body, carry, *, left_out=0, lone=True, first=0, name=BLOCKS):
        """carry = body(block, place, size, carry) for each block in order; returns the last carry.

        Args:
            body: `place` is where the `size` frames of the block are in `noise`.
            left_out: how many of the other blocks come before the first that is generated; the lone
                block lies directly before that one. May be traced.
            lone: whether the lone block takes part, if there is one.
            first: the first of the other blocks that takes part.
            name: of the loop, where its length is traced.
        """
        if self.lone and lone:
            carry = body(0, self.size * left_out, 1, carry)
        if not self.count:
            return carry

        def other(i, carry):
            return body(self.lone + i, self.lone + self.size * i, self.size, carry)

        # Known bounds make it a loop of known length, whose FLOPs can be counted.
        if isinstance(left_out, int):
            return jax.lax.fori_loop(max(first, left_out), self.count, other, carry)

        def loop(start, carry):
            return jax.lax.fori_loop(start, self.count, other, carry)

        loop.__name__ = name
        return jax.jit(loop)(jnp.maximum(first, left_out), carry)

    def starts(self, start, left_out):
        """int32 [blocks]: the first frame of each block in the video; `left_out` come before it."""
        others = start + self.lone + self.size * (jnp.arange(self.count) - left_out)
        return jnp.concatenate([jnp.full(int(self.lone), start), others]).astype(jnp.int32)
