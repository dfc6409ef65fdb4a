"""Tiny runs in this process, for the tests of the room."""

import jax
import programs
import pytest

from dmd_jax.training import loop, run


@pytest.fixture(scope="module")
def build(teacher, data_dir):
    """A tiny run, on one device by default."""

    def call(devices=1, **overrides):
        config = programs.config(teacher, data_dir, **overrides)
        return run.build(config, jax.devices()[:devices])

    return call


@pytest.fixture
def no_report(monkeypatch):
    """Leaves out the report, which costs more than all the steps of a tiny run."""
    monkeypatch.setattr(loop, "_report", lambda *_: "no report")
