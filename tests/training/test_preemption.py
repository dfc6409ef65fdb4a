"""Signals become a request to stop, which the loop reads."""

import signal
from concurrent.futures import Future

import pytest

from dmd_jax.training.preemption import Preemption


def test_sigterm_is_a_question_not_an_end():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested(1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.requested(2)
        signal.raise_signal(signal.SIGTERM)  # the impatient scheduler changes nothing
        assert preemption.requested(3)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, which shells take from jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_second_interrupt_interrupts(interruptible):
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is interruptible


class Endless(Future):
    """A compilation that never ends; a signal arrives while it is waited for."""

    def result(self, timeout=None):
        assert timeout is not None, "nothing would look for a signal"
        signal.raise_signal(signal.SIGTERM)
        raise TimeoutError


def test_a_signal_ends_the_wait_for_a_compilation():
    with Preemption() as preemption:
        assert preemption.wait(Endless()) is None
        assert preemption.requested(1)


def test_a_wait_gives_the_result_or_the_error_of_the_compilation():
    done, failed, late = Future(), Future(), Future()
    done.set_result("compiled")
    failed.set_exception(ValueError("no"))
    late.set_exception(TimeoutError("of its own"))
    with Preemption() as preemption:
        assert preemption.wait(done) == "compiled"
        with pytest.raises(ValueError, match="no"):
            preemption.wait(failed)
        with pytest.raises(TimeoutError, match="of its own"):
            preemption.wait(late)
