"""Training batches as a function of the step: the step is the only state to save.

The seed fixes one endless order of the examples, a permutation per epoch. Sample j of the global
batch of step s is element `s * batch_size + j` of it, for any number of hosts and after any resume.
This file may import numpy and grain.
"""

import sys
from collections.abc import Iterator

import grain
import numpy as np

from dmd_jax.data.source import Source

# Batches read ahead of the step, each on its own thread.
PREFETCH = 4


class Batches:
    """The batches of one host: `batches[step]`, or `batches.iterate(start_step)` to read ahead.

    A batch is what the source's `examples` returns, or `conditions` with `with_data=False`: rows
    `process_index * b` to `(process_index + 1) * b` of the global batch, b = batch_size /
    process_count. An epoch may end inside a batch.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        with_data: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Computes the order.

        Args:
            source: the examples.
            batch_size: samples per step over all hosts.
            seed: of the order, not negative; the same on all hosts.
            with_data: whether to read whole examples or their conditions alone.
            process_index, process_count: the part of each batch and the number of equal parts;
                hosts whose devices store the same rows read the same part
                (`sharding.batch_part`).

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
        self._read = source.examples if with_data else source.conditions
        self._batch_size = batch_size
        self._local_size = batch_size // process_count
        self._offset = process_index * self._local_size
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        start = int(step) * self._batch_size + self._offset
        return self._read([self._order[i] for i in range(start, start + self._local_size)])

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields `self[start_step]`, `self[start_step + 1]`, ... without end, read ahead.

        Args:
            start_step: the first step to read; in a resumed run, the number of finished steps.

        Returns:
            An iterator with its own threads.
        """
        start = int(start_step)
        ahead = grain.ReadOptions(num_threads=PREFETCH, prefetch_buffer_size=PREFETCH)
        steps = grain.MapDataset.range(sys.maxsize).map(lambda offset: self[start + offset])
        return iter(steps.to_iter_dataset(ahead))
