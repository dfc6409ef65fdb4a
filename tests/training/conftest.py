"""Tiny runs in this process, for the tests of the room."""

import json

import jax
import programs
import pytest

from dmd_jax.training import configuration, loop, run


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of a module that train alike share their compiled steps: most of a tiny run's time."""
    compile_steps, known = loop.compile_steps, {}

    def once(run):
        values = configuration.flatten(run.config).items()
        apart = ("log.", "checkpoint.", "evaluate.")
        kept = sorted(
            (name, json.dumps(value)) for name, value in values if not name.startswith(apart)
        )
        key = run.mesh, tuple(kept)
        if key not in known:
            known[key] = compile_steps(run)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "compile_steps", once)
        yield


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
