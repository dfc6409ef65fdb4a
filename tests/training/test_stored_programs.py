"""What a plan compiles, the run on such devices does not compile again."""

from collections import Counter

import jax
import programs
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dmd_jax.training import loop
from dmd_jax.training.plan import plan_run, prepare
from dmd_jax.training.run import build


@pytest.fixture
def events(tmp_path):
    """Counts of hits and misses of a new directory of compiled programs."""
    counts, before = Counter(), jax.config.jax_compilation_cache_dir

    def note(event, **_):
        counts[event.rsplit("/", 1)[-1]] += 1

    jax.monitoring.register_event_listener(note)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    yield counts
    jax.monitoring.unregister_event_listener(note)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


# A step that is compiled soon: one call of the generator, which is updated at every step.
SMALL = {
    "method.times": (1.0,),
    "method.strides": (1,),
    "method.last_step_share": 0.0,
    "generator_every": 1,
    "mesh.data": 1,
    "mesh.fsdp": 2,
}


def test_a_run_finds_the_step_of_its_plan(teacher, data_dir, events):
    config, devices = programs.config(teacher, data_dir, **SMALL), jax.devices()[:2]
    planned = plan_run(prepare(config, devices), None)
    assert (events["cache_misses"], events["cache_hits"]) == (1, 0)
    run = build(config, devices)
    with jax.set_mesh(run.mesh):
        batch, key = next(run.batches(0)), loop.root_key(config)
        events.clear()
        loop.lower(run, batch, key, True).compile()
    assert (events["cache_misses"], events["cache_hits"]) == (0, 1)
    assert plan_run(prepare(config, devices), None) == planned  # a stored program says the same
