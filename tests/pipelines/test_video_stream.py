"""Prompts in, frames out: scenes of several prompts, decoding in pieces, times."""

import itertools

import jax
import numpy as np
import pytest
import toys

from dmd_jax import sample, weights
from dmd_jax.data import moving_digits, to_uint8, word_vectors
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.models.wan_vae import TINY, WanVAE
from dmd_jax.pipelines import streaming
from dmd_jax.pipelines.prompts import Scene, read_scenes
from dmd_jax.pipelines.video_stream import (
    StreamModel,
    Times,
    load_stream_model,
    play,
)
from dmd_jax.pipelines.wan import WanPipeline

CAUSAL = dict(frames_per_block=2, first_alone=True, window=4, sink=1)
SIDE = moving_digits.SIZE
TWO = Scene((0, 5), ("three moves left", "four moves up"))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a tiny causal student of moving digits that learnt nothing."""
    channels = moving_digits.FOLD**2
    config = WanConfig(16, 16, 2, 1, channels, channels, word_vectors.DIM)
    path = tmp_path_factory.mktemp("digits") / "student.safetensors"
    net = toys.weights(lambda rngs: Wan(config, rngs=rngs), 0)
    notes = {"data": "moving_digits", "times": (1.0, 0.5), "shift": 1.0, "causal": CAUSAL}
    weights.save(path, Denoiser(net), **notes)
    return path


@pytest.fixture(scope="module")
def model(student):
    return load_stream_model(student)


def test_a_scene_switches_at_the_first_block_that_begins_at_its_frame_or_later(model):
    """Blocks begin at frames 0, 1, 3, 5, ...: the switch at frame 5 is one of the fourth block."""
    video, pieces = play(model, TWO, 8, seed=3)
    frames = np.concatenate(list(pieces))
    assert frames.shape == (8, SIDE, SIDE, 3) and frames.dtype == np.uint8
    one = np.concatenate(list(play(model, Scene((0,), TWO.prompts[:1]), 8, seed=3)[1]))
    np.testing.assert_array_equal(frames[:5], one[:5])
    assert np.any(frames[5:] != one[5:])
    late = Scene((0, 4), TWO.prompts)  # within a block: the same switch
    np.testing.assert_array_equal(np.concatenate(list(play(model, late, 8, seed=3)[1])), frames)
    assert video.blocks == 5 and video.times.frames == 9  # the last block is cut


def test_times_are_those_of_the_parts(model):
    model.warm_up()
    began = streaming._denoise._cache_size(), streaming._write._cache_size()
    video, pieces = play(model, TWO, 9)
    assert video.first_frame is None and video.times == Times()
    next(pieces)
    first = video.first_frame
    assert first > video.times.denoising > 0 and video.times.decoding > 0
    assert video.times.cache < video.times.denoising  # nothing is written yet
    list(pieces)
    assert video.first_frame == first and video.times.cache > 0
    # Nothing is compiled after the warm-up, neither by a switch.
    assert began == (streaming._denoise._cache_size(), streaming._write._cache_size())


def test_times_add_up():
    times = Times(1.0, 0.5, 0.5, 8) + Times(2.0, 0.0, 0.0, 4)
    assert times == Times(3.0, 0.5, 0.5, 12) and times.rate == 3.0
    assert str(times) == "3.0 frames per second (denoising 75%, cache 12%, decoding 12%)"
    assert Times().rate == 0.0


def test_without_a_window_there_is_room_for_the_frames_that_were_asked_for(student):
    model = load_stream_model(student, causal=Causal(2, first_alone=True), frames=6)
    assert model.longest == 7  # whole blocks
    frames = np.concatenate(list(play(model, Scene((0,), ("three",)), 6)[1]))
    assert len(frames) == 6
    with pytest.raises(ValueError, match="has 7 latent frames, and there is room for 7"):
        list(play(model, Scene((0,), ("three",)), 8)[1])
    assert load_stream_model(student, causal=Causal(2), frames=1).warm_up() > 0


def around(vae):
    """A WanPipeline of which only the VAE is there."""
    pipeline = object.__new__(WanPipeline)
    pipeline.__dict__.update(vae=vae, _vae_config=vae.config)
    return pipeline


def test_a_video_decoded_block_by_block_is_that_of_the_whole():
    vae = toys.weights(lambda rngs: WanVAE(TINY, rngs=rngs), 0)
    latents = np.random.default_rng(0).standard_normal((1, 5, 2, 2, 16)).astype(np.float32)
    whole = to_uint8(jax.jit(lambda vae, z: vae.decode(z))(vae, latents)[0])
    pipeline = around(vae)
    decode = pipeline.decoder()
    pieces = [decode(latents[:, a:b]) for a, b in ((0, 1), (1, 3), (3, 5))]
    assert [len(piece) for piece in pieces] == [1, 8, 8]
    assert np.abs(np.concatenate(pieces).astype(int) - whole).max() <= 1  # rounding of a byte
    other = pipeline.decoder()(latents[:, :1])  # another video begins without caches
    np.testing.assert_array_equal(other, pieces[0])
    assert [pipeline.latent_frames(n) for n in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]


def test_the_pieces_of_a_video_are_its_blocks(model):
    video = model.start(model.embed("three moves left"))
    pieces = list(itertools.islice(video, 3))
    assert [(piece.block, len(piece.frames)) for piece in pieces] == [(0, 1), (1, 2), (2, 2)]
    assert [piece.times.frames for piece in pieces] == [1, 2, 2]
    assert isinstance(model, StreamModel) and model.sampler.causal == Causal(**CAUSAL)


def test_a_file_of_prompts_is_a_list_of_scenes(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a slow three\n\n120: a fast seven\n240: nine\n12:30, waves\n")
    first = Scene((0, 120, 240), ("a slow three", "a fast seven", "nine"))
    assert read_scenes(path) == [first, Scene((0,), ("12:30, waves",))]


@pytest.mark.parametrize("text", ["5: three", "three\n0: four", "three\n9: four\n9: five"])
def test_a_scene_that_does_not_go_forward_is_refused(tmp_path, text):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="changes the prompt of a video from a frame on"):
        read_scenes(path)


def test_videos_of_one_seed_have_noise_of_their_own(call, model, student, tmp_path):
    """Two lines with one prompt are two videos."""
    from PIL import Image

    (tmp_path / "prompts.txt").write_text("three\nthree\n")
    arguments = f"--checkpoint={student}", f"--prompts={tmp_path / 'prompts.txt'}", "--frames=1"
    assert call(sample, "--stream", *arguments, f"--out={tmp_path / 'a.gif'}") is None
    for number in range(2):
        (frame,) = np.concatenate(list(play(model, Scene((0,), ("three",)), 1, 0, number)[1]))
        with Image.open(tmp_path / f"a-00{number}.gif") as gif:
            shown = np.asarray(gif.convert("RGB")).astype(int)
        assert np.abs(shown - frame).mean() < 2
        if number == 0:
            first = shown
    assert np.abs(shown - first).mean() > 10


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("three moves left\n5: four moves up\nfive\n")
    return path


def test_the_command_writes_every_scene_and_says_how_fast(call, student, prompts, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "a.gif"
    arguments = f"--checkpoint={student}", f"--prompts={prompts}", f"--out={out}", "--frames=8"
    assert call(sample, "--stream", *arguments, "--seed=3") is None
    printed = capsys.readouterr().out
    assert "blocks of 2 frames in 2 steps" in printed and "compiled in" in printed
    assert "a-001.gif: first frame after" in printed
    assert printed.count("frames per second (denoising") == 2
    with Image.open(tmp_path / "a-000.gif") as gif:
        assert gif.n_frames == 8 and gif.size == (SIDE, SIDE)
    model = load_stream_model(student)
    wanted = np.concatenate(list(play(model, read_scenes(prompts)[0], 8, seed=3)[1]))
    with Image.open(tmp_path / "a-000.gif") as gif:
        gif.seek(7)
        shown = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(shown - wanted[7]).mean() < 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts={prompts}", "--out=a.gif", "--batch=2"], "--stream takes no --batch"),
        (["--out=a.gif"], "give a file as --prompts"),
        (["--prompts={prompts}", "--out=a.png"], "the ending says the format, .mp4, .gif"),
        (["--prompts={prompts}", "--out=a.gif", "--causal=3"], "--causal=3: write it as"),
    ],
)
def test_the_command_refuses_before_it_computes(call, student, prompts, arguments, message):
    given = (argument.format(prompts=prompts) for argument in arguments)
    output = call(sample, "--stream", f"--checkpoint={student}", *given)
    assert output.startswith("error: ") and message in output


def test_a_student_that_does_not_stream_is_refused(student, teacher, tmp_path):
    with pytest.raises(ValueError, match="is a network of images"):
        load_stream_model(teacher)
    with pytest.raises(ValueError, match="does not say which frames are a block"):
        load_stream_model("moving_digits_teacher")
