"""Requests to stop: SIGTERM, Ctrl-C, and the preemption notice of JAX. Imports jax."""

import os
import signal
import threading
from concurrent.futures import Future
from typing import Any

import jax
from jax.experimental import multihost_utils

# The exit status of a run that was stopped: "try again later" (EX_TEMPFAIL of sysexits.h). Not 0,
# which a scheduler would take for the end of the training, and not that of an error.
STOPPED = 75


class Stopped(Exception):
    """The run was asked to stop before its last step, and is saved."""


class Preemption:
    """Turns SIGTERM and the first Ctrl-C into a flag that the training loop reads at every step.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.requested(step): save and leave

    A second Ctrl-C raises KeyboardInterrupt as usual. In a run of many processes the signal reaches
    them at different steps; there JAX's preemption service is asked instead, which chooses one step
    for all, and which every process must ask at every step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to save and leave after `step`: the same answer on every host."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def wait(self, future: Future) -> Any:
        """The future's result; None if this process is asked to stop before it is there.

        With many processes, which must stop at the same step, it always waits for the result.
        """
        while not self._asked:
            try:
                # The handler runs in this thread and only sets a flag: waking another one from a
                # handler could deadlock.
                return future.result(timeout=0.1)
            except TimeoutError:
                if future.done():  # the error is the future's own
                    raise
        return None

    def __enter__(self) -> "Preemption":
        # With many processes JAX handles SIGTERM. Python allows handlers in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self._asked = True
        what = "saving, then leaving"
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
            what += "; a second Ctrl-C leaves at once, without saving"
        # Not print or logging: the signal may have interrupted one of them.
        os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
