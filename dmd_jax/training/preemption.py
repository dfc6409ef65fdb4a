"""Being asked to stop: signals, and the notice that a preemptible machine gives."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Turns SIGTERM and the first Ctrl-C into a question that the training loop asks every step.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.requested(step): save and leave

    A second Ctrl-C raises KeyboardInterrupt as usual. In a run of many hosts the signal reaches
    them at different steps; there JAX's own notice of preemption is asked instead, which names
    one step for all, and must be asked at every step by every host.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to save and leave after `step`: the same answer on every host."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __enter__(self) -> "Preemption":
        # JAX's notice owns SIGTERM where there are many hosts; Python allows handlers in the main
        # thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
        # Not print or logging: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: saving, then leaving.\n".encode())

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
