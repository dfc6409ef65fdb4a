"""A whole run whose videos go on from step to step: born on a mesh, stopped, gone on with."""

import jax
import programs
import pytest
from ml_collections import ConfigDict
from tiny_runs import start
from toys import assert_same, weights

from dmd_jax import weights as files
from dmd_jax.data import BouncingDigits
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.long_tuning import LongTuning
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.training import loop
from dmd_jax.training.configuration import complete
from dmd_jax.training.preemption import Preemption, Stopped
from dmd_jax.training.run import build


def save_networks(folder):
    """Two tiny Wan networks for bouncing digits: paths by role."""
    config = WanConfig(16, 24, 2, 1, **BouncingDigits().model_fields, freq_dim=8, reach=6)
    paths = [str(folder / f"{seed}.safetensors") for seed in range(2)]
    for seed, path in enumerate(paths):
        files.save(path, Denoiser(weights(lambda rngs: Wan(config, rngs=rngs), seed)))
    return dict(teacher=paths[0], generator=paths[1], fake_score=paths[1])


def config(networks):
    config = programs.load_config("configs/self_forcing.py", "wan_t2v_1_3b")
    causal = dict(cls=Causal, frames_per_block=2, window=4, sink=2)
    video = dict(cls=LongTuning, causal=causal, frames=14, overlap=2)
    with config.unlocked():
        config.data = complete(ConfigDict(dict(cls=BouncingDigits, frames=6)))
        config.method = complete(ConfigDict(dict(cls=DMD, times=(1.0, 0.5), video=video)))
        for role, path in networks.items():
            del config[role].model
            config[role].weights = path
            config[role].compute = dict(dtype="float32", remat="none", unroll=1)
        config.batch_size, config.steps, config.generator_every = 16, 5, 2
        config.mesh.data, config.mesh.fsdp = -1, 1
        config.checkpoint.every, config.log.every, config.log.tensorboard = 3, 1, False
        config.evaluate.every, config.evaluate.num = 100, 4
        config.evaluate.teacher_steps, config.evaluate.steps = (2,), (2,)
    return config


def places(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_a_run_on_long_videos_is_split_over_the_devices_and_goes_on_bit_for_bit(
    tmp_path, monkeypatch
):
    run = build(config(save_networks(tmp_path)))
    with jax.set_mesh(run.mesh):
        shape = run.state_shape()
        state, _ = run.start()
    assert start(run, tmp_path / "whole")
    with monkeypatch.context() as patched:  # amid the videos: after step 3 new ones begin
        patched.setattr(Preemption, "requested", lambda self, step: step == 2)
        with pytest.raises(Stopped, match="at step 2;"):
            start(run, tmp_path / "parts")
    monkeypatch.setattr(loop, "_report", lambda *_: "no second report")
    start(run, tmp_path / "parts")
    whole, parts = (
        files.denoiser(tmp_path / name / "generator.safetensors") for name in ("whole", "parts")
    )
    assert_same(parts, whole)
    assert places(state) == places(shape)
    keys, made = shape.stream.cache.keys, shape.stream.made
    assert keys.sharding.shard_shape(keys.shape)[1] == 16 // run.mesh.size
    assert made.sharding.is_fully_replicated
