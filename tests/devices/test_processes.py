"""Processes of a job agree; two real ones do in test_sharding.py."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dmd_jax.devices.processes import together


@pytest.fixture
def other(monkeypatch):
    """Makes this process one of two; returns how to say whether the other one fails."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def fails(answer):
        def gather(flag):
            return np.array([flag, answer])

        monkeypatch.setattr(multihost_utils, "process_allgather", gather)

    return fails


def test_what_all_processes_can_do_is_done(other):
    other(False)
    assert together(divmod, 7, 2) == (3, 1)


def test_a_failure_of_another_process_is_one_here(other):
    other(True)
    with pytest.raises(RuntimeError, match="process 1 of the job failed; its log has the reason"):
        together(divmod, 7, 2)


@pytest.mark.parametrize("answer", [False, True])
def test_a_failure_here_is_told_to_the_others_and_raised_as_it_is(answer, other):
    other(answer)
    with pytest.raises(ZeroDivisionError):
        together(divmod, 7, 0)


def test_a_single_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(multihost_utils, "process_allgather", None)
    assert together(divmod, 7, 2) == (3, 1)
