"""Masks: which keys a query may attend to.

A mask is a frozen value of a few integers, not an array of L x L: every kernel derives from it what
it needs. In the pictures below a row is a query, a column is a key, and both are whole frames;
`#` is attended, `.` is masked. A test compares the pictures with the masks. Imports only numpy.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Causal:
    """Which frames of a video a frame may attend to, when blocks of frames are generated in order.

    A frame attends to all frames of its own block and of earlier blocks. With a window, it attends
    to the last `window` frames up to the end of its own block, and to the first `sink` frames.

    frames_per_block=2          first_alone=True            window=3, sink=1

        # # . . . . . .         # . . . . . . .             # # . . . . . .
        # # . . . . . .         # # # . . . . .             # # . . . . . .
        # # # # . . . .         # # # . . . . .             # # # # . . . .
        # # # # . . . .         # # # # # . . .             # # # # . . . .
        # # # # # # . .         # # # # # . . .             # . . # # # . .
        # # # # # # . .         # # # # # # # .             # . . # # # . .
        # # # # # # # #         # # # # # # # .             # . . . . # # #
        # # # # # # # #         # # # # # # # #             # . . . . # # #

    Attributes:
        frames_per_block: frames that are generated together and attend to each other. The last
            block of a video may have fewer.
        first_alone: the first frame is a block of its own (the image that a video starts from).
        window: in frames, own block included; None for all frames. The end of an incomplete last
            block is where it would end if it were complete.
        sink: the first frames of the video, which stay visible after they have left the window.
        keep_sink: what becomes of a sink that has left the window where the prompt of a video
            changes: it keeps its keys and values of the old prompt, or it is forgotten.

    Raises:
        ValueError: a number is out of range, or the window is smaller than a block.
    """

    frames_per_block: int = 3
    first_alone: bool = False
    window: int | None = None
    sink: int = 0
    keep_sink: bool = False

    def __post_init__(self):
        if self.frames_per_block < 1 or self.sink < 0:
            raise ValueError(
                f"frames_per_block={self.frames_per_block} must be at least 1, and "
                f"sink={self.sink} at least 0"
            )
        if self.window is not None and self.window < self.frames_per_block:
            raise ValueError(
                f"window={self.window} is smaller than frames_per_block={self.frames_per_block} "
                "and would mask part of a frame's own block: make it at least as large"
            )

    @property
    def most_visible(self):
        """Frames that a frame attends to at most; None without a window."""
        return None if self.window is None else self.window + self.sink


class Mask:
    """Which keys a query may attend to. Queries that may attend to the same keys form a group.

    A kernel calls `group` once per query, outside its inner loop, and `group_allows` inside it:
    therefore `group_allows` uses comparisons only. Both take numpy or jax integers, work
    elementwise and broadcast.
    """

    def group(self, q_index):
        """An integer for each query. Queries of equal integers may attend to the same keys."""
        raise NotImplementedError

    def group_allows(self, group, kv_index):
        """Whether the queries of `group` may attend to the key at `kv_index`."""
        raise NotImplementedError

    def allows(self, q_index, kv_index):
        """Whether the query at `q_index` may attend to the key at `kv_index`, both from 0."""
        return self.group_allows(self.group(q_index), kv_index)


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """`Causal` over the tokens of a video, frame after frame. A group is the end of its block.

    Attributes:
        causal: blocks, window and sink, in frames.
        tokens_per_frame: tokens of a frame; 1 makes it a mask over frames.

    Raises:
        ValueError: tokens_per_frame is not positive.
    """

    causal: Causal
    tokens_per_frame: int = 1

    def __post_init__(self):
        if self.tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame={self.tokens_per_frame} must be at least 1")

    @property
    def block(self):
        """Tokens of a complete block."""
        return self.tokens_per_frame * self.causal.frames_per_block

    def group(self, q_index):
        """The end of the query's block, in tokens; an incomplete last block counts as complete."""
        first = self.tokens_per_frame if self.causal.first_alone else self.block
        return first + ((q_index - first) // self.block + 1) * self.block

    def group_allows(self, group, kv_index):
        causal = kv_index < group
        if self.causal.window is None:
            return causal
        in_window = kv_index >= group - self.causal.window * self.tokens_per_frame
        return causal & (in_window | (kv_index < self.causal.sink * self.tokens_per_frame))


@dataclasses.dataclass(frozen=True)
class TeacherForcing(Mask):
    """A clean video followed by the same video with noise: [clean | noisy].

    Clean queries attend to clean keys as `blocks` allows. Noisy queries attend to the noisy keys of
    their own block and, instead of earlier noisy blocks, to the clean keys of those blocks. With
    blocks of 2 frames, and with a window of 3 and a sink of 1 too:

          clean     |    noisy                  clean     |    noisy

        # # . . . . | . . . . . .             # # . . . . | . . . . . .
        # # . . . . | . . . . . .             # # . . . . | . . . . . .
        # # # # . . | . . . . . .             # # # # . . | . . . . . .
        # # # # . . | . . . . . .             # # # # . . | . . . . . .
        # # # # # # | . . . . . .             # . . # # # | . . . . . .
        # # # # # # | . . . . . .             # . . # # # | . . . . . .
        ------------+------------             ------------+------------
        . . . . . . | # # . . . .             . . . . . . | # # . . . .
        . . . . . . | # # . . . .             . . . . . . | # # . . . .
        # # . . . . | . . # # . .             # # . . . . | . . # # . .
        # # . . . . | . . # # . .             # # . . . . | . . # # . .
        # # # # . . | . . . . # #             # . . # . . | . . . . # #
        # # # # . . | . . . . # #             # . . # . . | . . . . # #

    A group is the end of its block within its half, negative for noisy queries.

    Attributes:
        blocks: the mask of the clean half.
        half: tokens of one half.
    """

    blocks: BlockCausal
    half: int

    def group(self, q_index):
        noisy = q_index >= self.half
        block_end = self.blocks.group(q_index - noisy * self.half)
        return block_end * (1 - 2 * noisy)

    def group_allows(self, group, kv_index):
        clean_query, block_end = group > 0, abs(group)
        block_start = block_end - self.blocks.block  # negative for a first block of one frame
        clean_key = kv_index < self.half
        before = clean_query | (kv_index < block_start)
        noisy_index = kv_index - self.half
        own_block = (noisy_index >= block_start) & (noisy_index < block_end)
        return (clean_key & before & self.blocks.group_allows(block_end, kv_index)) | (
            ~clean_query & ~clean_key & own_block
        )


@functools.lru_cache(maxsize=64)
def query_ranges(mask, queries, keys):
    """Cuts a sequence of queries into runs of one group.

    Returns:
        [(start, stop, ranges)]: the queries from `start` up to `stop` may attend to the keys of
        `ranges`, [(start, stop)] in order.
    """
    if mask is None:
        return [(0, queries, [(0, keys)])]
    groups = mask.group(np.arange(queries))
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    runs = []
    for start, stop in zip(starts, [*starts[1:], queries], strict=True):
        allowed = mask.group_allows(groups[start], np.arange(keys))
        edges = np.flatnonzero(np.diff(allowed, prepend=False, append=False))
        runs.append((int(start), int(stop), edges.reshape(-1, 2).tolist()))
    return runs
