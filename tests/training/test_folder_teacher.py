"""Runs whose teacher is a folder of another program: from the first step to the report."""

import json
import types

import foreign
import jax
import numpy as np
import programs
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from dmd_jax.data import embeddings, moving_digits, word_vectors
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.models.wan_vae import TINY, WanVAE
from dmd_jax.training import loop
from dmd_jax.training.run import build
from dmd_jax.weights import wan as names
from dmd_jax.weights import wan_vae as vae_names
from dmd_jax.weights.table import their_shapes

QUICK = {
    **{"steps": 3, "log.every": 1, "log.tensorboard": False, "checkpoint.every": 3},
    **{"evaluate.every": 3, "evaluate.num": 8, "evaluate.steps": (2,)},
    **{"evaluate.teacher_steps": (2,), "generator_every": 2, "batch_size": 8},
}


def write_folder(folder, config, seed=""):
    """A transformer as a diffusers pipeline holds it, in two shards without settings of ours."""
    net = jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    shapes = their_shapes(net, names.table(config, "diffusers"))
    tensors = {name: foreign.weight(name + seed, shape) for name, shape in shapes.items()}
    part = folder / "transformer"
    part.mkdir(parents=True)
    for i in range(2):
        shard = {name: tensors[name] for name in sorted(tensors)[i::2]}
        save_file(shard, part / f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors")
    (part / "config.json").write_text(json.dumps(names.to_settings(config, "diffusers")))
    return folder


def train(config, workdir, devices):
    run = build(config, jax.devices()[:devices])
    with jax.set_mesh(run.mesh):
        return loop.train(run, workdir)


def test_a_run_starts_and_resumes_from_a_folder_and_refuses_another_one(tmp_path):
    channels = moving_digits.FOLD**2
    model = WanConfig(16, 16, 2, 1, channels, channels, word_vectors.DIM)
    folder, workdir = write_folder(tmp_path / "pipe", model), tmp_path / "run"
    config = programs.load_config("configs/dmd.py", "wan_tiny")
    values = QUICK | {"data.num": 80, "teacher.weights": str(folder)}
    values |= {f"data.{part}": str(tmp_path / part) for part in ("latents", "embeddings")}
    config.update_from_flattened_dict(values | {"fake_score.weights": "teacher"})
    report = train(config, workdir, 1)
    assert "| teacher | 2 |" in report.read_text()
    config.steps = 4
    assert train(config, workdir, 1) == report
    [_, last] = sorted(map(int, (p.name for p in (workdir / "checkpoints").iterdir())))
    assert last == 4
    (tmp_path / "pipe").rename(tmp_path / "old")
    write_folder(tmp_path / "pipe", model, seed="other")
    with pytest.raises(ValueError, match=r"teacher\.sha256: the run here has"):
        train(config, workdir, 1)


def write_vae(folder):
    """The autoencoder of a pipeline of diffusers, in miniature."""
    vae = jax.eval_shape(lambda: WanVAE(TINY, rngs=nnx.Rngs(0)))
    shapes = their_shapes(vae, vae_names.table(TINY, "diffusers"))
    tensors = {name: foreign.weight(name, shape) for name, shape in shapes.items()}
    (folder / "vae").mkdir()
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    settings = json.dumps(vae_names.to_settings(TINY, "diffusers"))
    (folder / "vae" / "config.json").write_text(settings)


def test_the_autoencoders_file_belongs_to_the_identity_of_a_run(tmp_path):
    write_vae(tmp_path)
    config = ConfigDict({"vae": {"weights": str(tmp_path)}})
    run = types.SimpleNamespace(config=config, frozen={}, others={"vae": "loaded"})
    before = loop._identity(run)
    assert before.keys() == {"vae.weights", "vae.sha256"} and loop._identity(run) == before
    [file] = (tmp_path / "vae").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file)
    assert loop._identity(run)["vae.sha256"] != before["vae.sha256"]


def miniature(path, tmp_path, channels, sample_shape):
    """A pod's recipe with networks and prompts in folders: all but the sizes."""
    compute = dict(dtype="bfloat16", remat="full")
    common = dict(depth=2, in_channels=channels, out_channels=channels, text_dim=12, freq_dim=16)
    small = WanConfig(32, 48, 2, **common, **compute)
    large = WanConfig(64, 48, 4, **common, **compute)
    models = {"teacher": large, "generator": small, "fake_score": small}
    write_folder(tmp_path / "small", small), write_folder(tmp_path / "large", large)
    embeddings.write(
        tmp_path / "embeddings",
        [f"prompt {i}" for i in range(9)],
        "",
        lambda asked: [foreign.tensor(text, (3, 12)) for text in asked],
        8,
        12,
    )
    config = programs.load_config(path, "wan_t2v_1_3b")
    assert config.mesh.fsdp == -1 and not config.method.batched_guidance
    values = QUICK | {"data.embeddings": str(tmp_path / "embeddings")}
    values |= {"data.sample_shape": sample_shape}
    for role, model in models.items():
        assert dict(config[role].compute)["dtype"] == model.dtype
        assert dict(config[role].compute)["remat"] == model.remat
        values[f"{role}.weights"] = str(tmp_path / ("large" if role == "teacher" else "small"))
        for name in ("dim", "ffn", "heads", "depth", "in_channels", "out_channels", "text_dim"):
            values[f"{role}.model.{name}"] = getattr(model, name)
        values[f"{role}.model.freq_dim"] = model.freq_dim
    config.update_from_flattened_dict(values)
    return config


def assert_runs_to_its_report(config, workdir):
    report = train(config, workdir, 4)
    assert "samples" in report.read_text() and (workdir / "report.png").exists()
    exported = programs.tensors(workdir / "generator.safetensors")
    assert all(np.isfinite(weight).all() for weight in exported.values())


@pytest.mark.slow
def test_the_pods_recipe_in_miniature_runs_to_its_report_from_folders(tmp_path):
    """bfloat16, full remat, fsdp, prompts and two-pass guidance."""
    config = miniature("configs/dmd.py", tmp_path, 4, (3, 4, 4, 4))
    assert_runs_to_its_report(config, tmp_path / "run")


@pytest.mark.slow
def test_self_forcing_in_miniature_runs_on_videos_longer_than_the_teachers(tmp_path):
    """12 frames or 9, of which the last 6 are compared, the first of them encoded as an image."""
    config = miniature("configs/self_forcing.py", tmp_path, 16, (12, 4, 4, 16))
    config.update_from_flattened_dict(
        {
            "method.video.compared": 6,
            "method.video.least_blocks": 3,
            "method.video.image_latent": True,
        }
    )
    with pytest.raises(ValueError, match="image_latent needs an autoencoder"):
        build(config, jax.devices()[:4])
    with config.unlocked():
        config.vae = {"weights": str(tmp_path / "large")}
    with pytest.raises(ValueError, match=r"config\.vae: .*large"):
        build(config, jax.devices()[:4])
    write_vae(tmp_path / "large")
    assert_runs_to_its_report(config, tmp_path / "run")
