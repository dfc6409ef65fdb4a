"""Every config and every variant of it builds, and its whole step works out, in shapes alone."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import programs
import pytest

from dmd_jax.run import build
from dmd_jax.step import train_step


def found():
    """(path, argument) of every config program and variant; None takes no argument."""
    for path in sorted((programs.ROOT / "configs").glob("*.py")):
        module = programs.load_module(path)
        for variant in getattr(module, "VARIANTS", {"": None}):
            yield path.name, variant


def made(name, variant, teacher, data_dir):
    """The config, with the tiny teacher in the place of the shipped one."""
    config = programs.load_config(f"configs/{name}", variant)
    config.data.data_dir = data_dir
    if "teacher" in config:
        config.teacher.weights = str(teacher)
    return config


@pytest.mark.parametrize("name, variant", list(found()))
def test_config_builds_and_its_step_works_out_in_shapes(name, variant, teacher, data_dir):
    run = build(made(name, variant, teacher, data_dir))
    config, state = run.config, run.state_shape()
    assert {leaf.sharding.mesh.size for leaf in jax.tree.leaves(state)} == {jax.device_count()}
    label = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    batch = {"cond": label, "uncond": label}
    if run.method.uses_data:
        shape = (config.batch_size, *run.source.image_shape)
        batch["data"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    kinds = {run.updates_generator(step) for step in range(config.generator_every)}
    for kind in kinds:
        step = partial(
            train_step, method=run.method, tx=run.tx, update_generator=kind, ema=run.ema,
            reuse_rollout=config.reuse_rollout, accumulate=config.accumulate,
        )  # fmt: skip
        after, metrics = jax.eval_shape(step, state, run.frozen, batch, key)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert {leaf.shape for leaf in jax.tree.leaves(metrics)} == {()}
    assert kinds and len(run.samplers()) == len(config.evaluate.steps)


@pytest.mark.parametrize("name, variant", list(found()))
def test_config_names_nothing_that_the_program_does_not_read(name, variant):
    config = programs.load_config(f"configs/{name}", variant)
    sections = {"log": {"every", "tensorboard"}, "checkpoint": {"every", "keep"}}
    for section, known in sections.items():
        assert set(config[section]) == known
    judged = {"features", "every", "samples", "num", "steps"}
    teacher = {"teacher_steps", "teacher_guidance", "recompute"}
    assert set(config.evaluate) == judged | (teacher if "teacher" in config else {"guidance"})


@pytest.mark.parametrize("name, variant", list(found()))
def test_config_says_the_command_that_runs_it(name, variant):
    command = f"python -m dmd_jax.main --config=configs/{name}"
    module = programs.load_module(Path("configs") / name)
    assert (f"{command}:{variant}" if variant else command) in module.__doc__
