"""Tiny runs in this process, for the tests of the room."""

import json

import jax
import programs
import pytest

from dmd_jax.training import configuration, loop, run


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of a module that train alike share their compiled steps: most of a tiny run's time.

    A step depends on their number only through learning rates that decay.
    """
    compile_steps, known = loop.compile_steps, {}

    def once(run):
        values = configuration.flatten(run.config)
        apart = ("log.", "checkpoint.", "evaluate.")
        if all(value == "constant" for name, value in values.items() if name.endswith("r.decay")):
            apart += ("steps",)
        kept = sorted(
            (name, json.dumps(value))
            for name, value in values.items()
            if not name.startswith(apart)
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
