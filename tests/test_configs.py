"""Every config and every variant of it builds, and its whole step works out, in shapes alone."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from ml_collections import ConfigDict

from dmd_jax.data import ImagePairs, MovingDigits, OdePairs, Prompts, trajectories
from dmd_jax.methods.causal_ode import CausalODE
from dmd_jax.methods.causal_pretrain import TeacherForcing
from dmd_jax.training.configuration import complete, defaults, differences, flatten
from dmd_jax.training.description import describe
from dmd_jax.training.run import build


def found():
    """(path, argument) of every config program and variant; None takes no argument."""
    for path in sorted((programs.ROOT / "configs").glob("*.py")):
        module = programs.load_module(path)
        for variant in getattr(module, "VARIANTS", {"": None}):
            yield path.name, variant


def short_config(name, variant, teacher, data_dir):
    """The config, with the tiny teacher in the place of the shipped one of digits."""
    config = programs.load_config(f"configs/{name}", variant)
    if config.data.get("cls") is MovingDigits:
        config.data.embeddings, config.data.latents = (
            f"{data_dir}/moving_{part}" for part in ("embeddings", "latents")
        )
    elif config.data.get("cls") in (None, ImagePairs):
        config.data.data_dir = data_dir
        if "pairs" in config.data:
            config.data.pairs = one_pair(f"{data_dir}/pairs")
        if "teacher" in config:
            config.teacher.weights = str(teacher)
        if "discriminator" in config:
            config.discriminator.model.blocks = (0,)  # of the tiny teacher's one layer
    return config


def one_pair(path):
    """Writes a folder of one pair of a noise and an image."""
    shape = (28, 28, 1)
    pair = np.zeros((2, *shape))
    trajectories.write(path, [(0, 0)], lambda _: pair, shape, levels=[1.0], source={})
    return path


def batch_shape(run):
    """The batch of a run, in shapes."""
    size, model = run.config.batch_size, run.nets["generator"].net.config
    condition = jax.ShapeDtypeStruct((size,), jnp.int32)
    if hasattr(model, "text_dim"):
        condition = jax.ShapeDtypeStruct((size, 512, model.text_dim), jnp.bfloat16)
    batch = {"cond": condition, "uncond": condition}
    if run.method.uses_data:
        batch["data"] = jax.ShapeDtypeStruct((size, *run.source.sample_shape), jnp.float32)
    if isinstance(run.source, ImagePairs):
        batch["trajectory"] = {time: batch["data"] for time in (1.0, 0.0)}
    return batch


@pytest.mark.parametrize("name, variant", list(found()))
def test_config_builds_and_its_step_works_out_in_shapes(name, variant, teacher, data_dir):
    config = short_config(name, variant, teacher, data_dir)
    # The weights and prompts of a pod's recipe are not here: as in a dry run.
    run = build(config, files=config.data.get("cls") is not Prompts)
    config, state = run.config, run.state_shape()
    assert {leaf.sharding.mesh.size for leaf in jax.tree.leaves(state)} == {jax.device_count()}
    batch = batch_shape(run)
    key = jax.eval_shape(lambda: jax.random.key(0))
    kinds = {run.updates_generator(step) for step in range(config.generator_every)}
    for kind in kinds:
        step = partial(run.step, update_generator=kind)
        after, metrics = jax.eval_shape(step, state, run.frozen_shape(), batch, key)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert {leaf.shape for leaf in jax.tree.leaves(metrics)} == {()}
    assert kinds and len(run.evaluator.samplers) == len(config.evaluate.steps)


@pytest.mark.parametrize("name, variant", list(found()))
def test_config_names_nothing_that_the_program_does_not_read(name, variant):
    config = programs.load_config(f"configs/{name}", variant)
    sections = {"log": {"every", "tensorboard", "wandb"}, "checkpoint": {"every", "keep"}}
    for section, known in sections.items():
        assert set(config[section]) == {"cls", *known}


@pytest.mark.parametrize("name, variant", list(found()))
def test_a_run_of_the_config_is_the_same_run_when_it_is_started_again(name, variant):
    config = programs.load_config(f"configs/{name}", variant)
    stored = json.loads(json.dumps(flatten(config)))
    assert differences(defaults(config) | stored, flatten(config)) == ""


@pytest.mark.parametrize("name, variant", list(found()))
def test_config_says_the_command_that_runs_it(name, variant):
    command = f"python -m dmd_jax.main --config=configs/{name}"
    module = programs.load_module(Path("configs") / name)
    assert (f"{command}:{variant}" if variant else command) in module.__doc__


@pytest.mark.parametrize("source, method", [(Prompts, TeacherForcing), (OdePairs, CausalODE)])
def test_a_dry_run_counts_the_work_of_a_method_that_learns_from_videos_without_them(source, method):
    config = programs.load_config("configs/pretrain.py", "wan_small")
    data = dict(cls=source, embeddings="no", latents="no", sample_shape=(6, 4, 4, 4))
    with config.unlocked():
        config.data = complete(ConfigDict(data))
        config.method = complete(ConfigDict(dict(cls=method)))
        for name in ("in_channels", "out_channels", "text_dim"):
            config.generator.model[name] = 4
    config.evaluate.guidance = 1.0  # a student has none
    output = describe(build(config, jax.devices()[:1], files=False))
    assert "with the generator's update" in output


def test_the_pods_recipe_says_what_each_role_takes_without_its_weights(teacher, data_dir):
    config = short_config("dmd.py", "wan_t2v_1_3b", teacher, data_dir)
    output = describe(build(config, files=False))
    assert "teacher     14,288,491,584  bfloat16   27253.1 MiB" in output
    assert "generator    1,418,996,800   float32    5413.0 MiB" in output
    with pytest.raises(FileNotFoundError, match="there are no embeddings at 'embeddings'"):
        build(config)
