"""Folders of videos become latents that training reads: end to end, resumption, refusals."""

import functools
import json

import foreign
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dmd_jax import encode
from dmd_jax.data import Batches, Prompts, embeddings, latents, to_float
from dmd_jax.models.wan_vae import WanVAE, WanVAEConfig
from dmd_jax.pipelines import precompute
from dmd_jax.pipelines.prompts import read_prompts
from dmd_jax.pipelines.video import read_video, save_video
from dmd_jax.weights import wan_vae as names
from dmd_jax.weights.table import fill, their_shapes

pytest.importorskip("av")
pytestmark = pytest.mark.wan
CAPTIONS = {"b": "a wave breaks", "a": "a cat", "sub/c": "a cat", "d": "rain"}
TINY = WanVAEConfig(
    encoder_dim=4,
    decoder_dim=4,
    mean=(0.1, -0.3, 0.2),
    std=(2.0, 0.5, 1.5),
    multipliers=(1, 2, 2),
    blocks=1,
    temporal=(False, True),
)
SHAPE = (3, 4, 8, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pipeline's folder with a tiny VAE, as diffusers writes one; and how that encodes."""
    shape = jax.eval_shape(lambda: WanVAE(TINY, rngs=nnx.Rngs(0)))
    rows = names.table(TINY, "diffusers")
    shapes = their_shapes(shape, rows)
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "vae").mkdir()
    tensors = {name: foreign.weight(name, shape) for name, shape in shapes.items()}
    save_file(tensors, root / "vae" / "diffusion_pytorch_model.safetensors")
    (root / "vae" / "config.json").write_text(json.dumps(names.to_settings(TINY, "diffusers")))
    vae = fill(shape, rows, tensors.get)
    return root, jax.jit(lambda video: vae.encode(video))


@pytest.fixture
def clips(tmp_path):
    """Four videos of seven frames with captions, of which two have the same."""
    root = tmp_path / "clips"
    for name, caption in CAPTIONS.items():
        pixels = 127.5 + 100 * np.tanh(foreign.tensor(name, (7, 20, 40, 3)))
        save_video(root / f"{name}.mp4", pixels.astype(np.uint8), fps=16)
        (root / f"{name}.txt").write_text(caption + "\n")
    return root


def embedded(path, prompts):
    """A store of made-up embeddings."""
    rows = {prompt: np.full((2, 8), i) for i, prompt in enumerate([*prompts, ""])}
    embeddings.write(path, prompts, "", lambda asked: [rows[p] for p in asked], 4, 8)
    return path


@pytest.fixture
def program(call, checkpoint, clips, tmp_path):
    """`call` of `python -m dmd_jax.encode`, with the usual flags where none are given."""
    captions = read_prompts(clips)
    assert captions == ["a cat", "a wave breaks", "rain"]
    texts = embedded(tmp_path / "embeddings", captions)
    usual = dict(videos=clips, checkpoint=checkpoint[0], embeddings=texts, out=tmp_path / "latents")

    usual |= dict(frames=5, height=16, width=32)

    def program(**given):
        return call(encode, *(f"--{name}={value}" for name, value in (usual | given).items()))

    return program


def test_training_reads_what_the_vae_makes_of_each_file(
    program, checkpoint, clips, tmp_path, capsys
):
    assert program() is None
    output = capsys.readouterr().out
    assert "video 4 of 4" in output and f"4 latents, {list(SHAPE)} each" in output
    data = Prompts(str(tmp_path / "embeddings"), SHAPE, str(tmp_path / "latents"))
    data.open()
    assert len(data) == 4
    result = data.examples(range(4))
    for row, (name, prompt) in enumerate([("a", 0), ("b", 1), ("d", 2), ("sub/c", 0)]):
        video = read_video(clips / f"{name}.mp4", frames=5, height=16, width=32)
        wanted = checkpoint[1](to_float(video)[None])[0]
        np.testing.assert_allclose(result["data"][row], wanted, rtol=2**-10, atol=1e-4)  # float16
        assert np.all(result["cond"][row, :2] == prompt)
    assert Batches(data, 2, seed=0)[0]["data"].shape == (2, *SHAPE)


def test_a_stopped_run_goes_on_and_a_finished_one_reads_nothing(
    program, clips, monkeypatch, tmp_path
):
    monkeypatch.setattr(latents, "write", functools.partial(latents.write, shard=2))
    read = []

    def stopping(path, **how):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(path.name)
        return read_video(path, **how)

    monkeypatch.setattr(precompute, "read_video", stopping)
    with pytest.raises(KeyboardInterrupt):
        program()
    read.clear()
    assert program() is None and read == ["d.mp4", "c.mp4"]
    assert program() is None and read == ["d.mp4", "c.mp4"]
    output = program(fps=8, frames=1)
    assert "latents with shape" in output
    save_video(clips / "d.mp4", np.zeros((9, 20, 40, 3), np.uint8))
    assert "has latents with source = " in program()


def test_what_does_not_fit_is_refused_before_anything_is_read(
    program, clips, checkpoint, monkeypatch, tmp_path
):
    monkeypatch.setattr(precompute, "read_video", None)
    monkeypatch.setattr(precompute.weights, "load", None)
    (tmp_path / "file").write_text("no video")
    texts = embedded(tmp_path / "others", ["a cat", "rain"])
    for given, complaint in (
        (dict(videos=tmp_path / "nowhere"), "there is no video in"),
        (dict(checkpoint=tmp_path / "nowhere"), "no checkpoint file at"),
        (dict(embeddings=tmp_path / "nowhere"), "there are no embeddings at"),
        (dict(embeddings=texts), f"lacks the captions of 1 of 4 videos, as of {clips}/b.mp4"),
        (dict(frames=6), "6 frames of 16x32: this VAE takes 2 k + 1 frames"),
        (dict(width=28), "sides that 8 divides"),
        (dict(frames=9), "d.mp4 has 7 frames of 20x40 at 16 frames a second, less than 9"),
        (dict(height=32), "b.mp4 has 7 frames of 20x40"),
        (dict(out=tmp_path / "file"), "cannot be written to"),
    ):
        output = program(**given)
        assert output.startswith("error: ") and complaint in output, output
    (clips / "d.txt").unlink()
    assert f"write its caption into {clips}/d.txt" in program()
    (clips / "d.txt").write_text("rain")
    (clips / "d.mp4").write_text("no video")
    assert "d.mp4 cannot be read as a video" in program()
