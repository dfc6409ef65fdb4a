"""Training batches whose position is the step: nothing but the step need be saved.

There is one endless order of the examples, a permutation per epoch, fixed by the seed. Sample j of
the global batch of step s is element `s * batch_size + j` of it, on any number of hosts, in a
resumed run as in a straight one. This file may import numpy and grain.
"""

import sys
from collections.abc import Iterator

import grain
import numpy as np

from dmd_jax.data.pixels import to_float
from dmd_jax.data.source import Source

# Batches made ahead of the step, each on a thread of its own.
PREFETCH = 4


class Batches:
    """The batches of one host: `batches[step]`, or `batches.iterate(start_step)` to read ahead.

    A batch is {'image': float32 [b, H, W, C] in [-1, 1], 'label': int32 [b]}: rows
    `process_index * b` to `(process_index + 1) * b` of the global batch, b = batch_size /
    process_count. An epoch ends where the examples end, inside a batch if need be.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Fixes the order.

        Args:
            source: the examples.
            batch_size: samples per step over all hosts.
            seed: of the order, not negative; the same on all hosts.
            process_index: this host, as `jax.process_index()`.
            process_count: hosts, as `jax.process_count()`.

        Raises:
            ValueError: the hosts cannot share the batch evenly, there is no such host, or the
                seed is negative.
        """
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size {batch_size} must be a positive multiple of process_count "
                f"{process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self._source = source
        self._batch_size = batch_size
        self._local_size = batch_size // process_count
        self._offset = process_index * self._local_size
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        start = int(step) * self._batch_size + self._offset
        images, labels = self._source.take(
            [self._order[position] for position in range(start, start + self._local_size)]
        )
        return {"image": to_float(images), "label": labels}

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields `self[start_step]`, `self[start_step + 1]`, ... without end, made ahead of time.

        Args:
            start_step: the first step to read, in a resumed run the first that is not yet done.

        Returns:
            An iterator with threads of its own.
        """
        start = int(start_step)
        ahead = grain.ReadOptions(num_threads=PREFETCH, prefetch_buffer_size=PREFETCH)
        steps = grain.MapDataset.range(sys.maxsize).map(lambda offset: self[start + offset])
        return iter(steps.to_iter_dataset(ahead))
