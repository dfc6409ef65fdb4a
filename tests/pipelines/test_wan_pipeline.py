"""Around a network of videos: prompts to conditions, latents to files, as diffusers has them."""

import json
import shutil
import sys
from functools import partial

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from dmd_jax import sample, weights
from dmd_jax.data import moving_digits, to_uint8, word_vectors
from dmd_jax.devices import randomness, sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import step_times
from dmd_jax.models.wan import Conditions, Wan, WanConfig
from dmd_jax.pipelines import sampling, wan
from dmd_jax.pipelines.video import save_image

SIZE = {"num_frames": 5, "height": 32, "width": 48, "dtype": "float32"}
PROMPTS = ["a cat  walks &amp; sees waves", "waves"]


@pytest.fixture
def program(call):
    """`call` of `python -m dmd_jax.sample`."""
    return partial(call, sample)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The file of a tiny student of moving digits that learnt nothing."""
    channels = moving_digits.FOLD**2
    config = WanConfig(16, 16, 2, 1, channels, channels, word_vectors.DIM)
    path = tmp_path_factory.mktemp("digits") / "student.safetensors"
    notes = {"data": "moving_digits", "times": (1.0, 0.5), "shift": 1.0}
    weights.save(path, Denoiser(Wan(config, rngs=nnx.Rngs(0))), **notes)
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("three moves left\n\nfour moves up and right\n")
    return path


def test_program_writes_every_video_and_one_sheet(program, digits, prompts, tmp_path):
    from PIL import Image

    asked = f"--out={tmp_path}/a.gif,{tmp_path}/a.png"
    assert program(f"--checkpoint={digits}", f"--prompts={prompts}", asked) is None
    for name in ("a-000.gif", "a-001.gif"):
        with Image.open(tmp_path / name) as video:
            assert video.n_frames == moving_digits.FRAMES
    with Image.open(tmp_path / "a.png") as sheet:
        side = moving_digits.SIZE
        assert sheet.size == (moving_digits.FRAMES * side, 2 * side)
        first = np.asarray(sheet)
    again = f"--out={tmp_path}/b.png"
    assert program(f"--checkpoint={digits}", f"--prompts={prompts}", again, "--batch=2") is None
    with Image.open(tmp_path / "b.png") as sheet:
        assert np.abs(np.asarray(sheet).astype(int) - first).max() <= 1  # the same noise


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "makes videos of prompts: give a file as --prompts"),
        (["--prompts=nowhere.txt"], "no file of prompts at 'nowhere.txt'"),
        (["--prompts={prompts}", "--out=a.npz"], "--out=a.npz: the ending says the format, .mp4"),
        (["--prompts={prompts}", "--guidance=2"], "guidance is in its weights already"),
        (["--prompts={prompts}", "--mesh=fsdp"], "--mesh=fsdp: write it as data=2,fsdp=4"),
        (["--prompts={prompts}", "--mesh=fsdp=3"], "does not fit"),
        (["--prompts={prompts}", "steps=1"], "unknown argument 'steps=1'; options start with --"),
        (["--prompts={prompts}/a"], "Not a directory"),
        (["--prompts={prompts}", "--out="], "--out names no file"),
        (["--prompts={prompts}", "--out={prompts}.png"], "prompts.txt.png is a folder: name a"),
        (["--prompts={prompts}", "--out=a.mp4"], "videos need PyAV: pip install"),
        (["--prompts={prompts}", "--boundary=0.8"], "a transformer, and a transformer_2 is wanted"),
    ],
)
def test_program_refuses_with_one_message_before_it_samples(
    program, digits, prompts, args, message, monkeypatch
):
    monkeypatch.setattr(sampling, "draw", None)
    monkeypatch.setitem(sys.modules, "av", None)
    prompts.with_suffix(".txt.png").mkdir()
    output = program(f"--checkpoint={digits}", *(arg.format(prompts=prompts) for arg in args))
    assert output.startswith("error: ") and message in output


@pytest.mark.parametrize("flag", ["--boundary=875", "--fps=0", "--steps=0"])
def test_numbers_out_of_range_are_refused_as_flags(program, digits, prompts, flag, capsys):
    assert program(f"--checkpoint={digits}", f"--prompts={prompts}", flag) == 1
    assert f"flag {flag}" in capsys.readouterr().err


def test_a_transformer_alone_wants_a_pipeline(program, digits, prompts, tmp_path):
    weights.save(tmp_path / "a.safetensors", weights.denoiser(digits))
    network = tmp_path / "a.safetensors"
    output = program(f"--checkpoint={network}", f"--prompts={prompts}", "--out=a.gif")
    assert "a.safetensors is a transformer alone: name with --pipeline" in output


def test_a_continuation_keeps_its_first_frame_at_time_zero():
    found = {}

    def denoiser(x_t, t, text):
        found.update(x_t=x_t, t=t)
        return 0 * x_t

    frame = np.full((2, 1, 4, 4, 3), 0.5, np.float32)
    noise = jnp.ones((2, 3, 4, 4, 3))
    cond = wan.Start(np.zeros((2, 1, 8)), frame)
    out = wan.Continuation(denoiser)(noise, jnp.float32([1.0, 0.25]), cond)
    np.testing.assert_array_equal(found["t"], [[0, 1, 1], [0, 0.25, 0.25]])
    np.testing.assert_array_equal(found["x_t"][:, :1], frame)
    np.testing.assert_array_equal(out[:, :1], frame)
    assert not np.any(out[:, 1:])


def transformer(name, **settings):
    """diffusers' network, tiny; its weights depend on `name`."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=64, ffn_dim=64,
        num_layers=2, **settings,
    )  # fmt: skip
    foreign.give_weights(network)
    # Only the last layer depends on `name`: equal features, another velocity.
    last = network.proj_out.weight
    last.data.copy_(last.new_tensor(foreign.tensor(name, (64, 48))))
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole pipeline, tiny, as diffusers and transformers write one."""
    pytest.importorskip("ftfy")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("pipeline")
    vae = foreign.give_weights(diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1))
    vae.decoder.conv_out.requires_grad_(False).weight.mul_(0.2)  # few pixels shall be clipped
    config = transformers.UMT5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    parts = {
        "transformer": transformer("high"),
        "vae": vae,
        "text_encoder": foreign.give_weights(transformers.UMT5EncoderModel(config)),
    }
    for name, part in parts.items():
        part.save_pretrained(root / name)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(["a cat walks & sees the waves"] * 20, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    (root / "tokenizer").mkdir()
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return root


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """The same with two transformers, as Wan 2.2's A14B has them."""
    root = tmp_path_factory.mktemp("pair") / "pipeline"
    shutil.copytree(folder, root)
    transformer("low").save_pretrained(root / "transformer_2")
    return root


@pytest.fixture(scope="module")
def image_to_video(folder, tmp_path_factory):
    """The same as Wan 2.1's image-to-video networks have it: CLIP, and 20 more channels."""
    import transformers

    root = tmp_path_factory.mktemp("image") / "pipeline"
    shutil.copytree(folder, root)
    shutil.rmtree(root / "transformer")
    result = transformer("high", in_channels=36, image_dim=16, added_kv_proj_dim=48)
    result.save_pretrained(root / "transformer")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    encoder = foreign.give_weights(transformers.CLIPVisionModel(config))
    encoder.save_pretrained(root / "image_encoder")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    processor.save_pretrained(root / "image_processor")
    return root


def diffusers_pipeline(kind, root, **settings):
    """diffusers' pipeline of a folder; its scheduler takes the times of `step_times`."""
    import diffusers
    import transformers

    class Scheduler(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(sigmas=list(step_times(steps)), device=device)

    classes = {
        "transformer": diffusers.WanTransformer3DModel,
        "transformer_2": diffusers.WanTransformer3DModel,
        "image_encoder": transformers.CLIPVisionModel,
        "image_processor": transformers.CLIPImageProcessor,
    }
    parts = {
        name: cls.from_pretrained(root / name)
        for name, cls in classes.items()
        if (root / name).is_dir()
    }
    return getattr(diffusers, kind)(
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(root / "tokenizer" / "tokenizer.json"),
            pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        ),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(root / "text_encoder"),
        vae=diffusers.AutoencoderKLWan.from_pretrained(root / "vae"),
        scheduler=Scheduler(shift=3.0),
        **parts,
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(folder):
    """diffusers' pipeline of the same folder."""
    return diffusers_pipeline("WanImageToVideoPipeline", folder)


@pytest.mark.torch
def test_prompts_become_what_diffusers_makes_of_them(folder, theirs):
    import torch

    around = wan.WanPipeline(str(folder), **SIZE)
    cond, uncond = around.conditions(PROMPTS, "", weights.abstract(folder).net.config)
    with torch.no_grad():
        wanted, negative = theirs.encode_prompt(PROMPTS, "", True, 1, max_sequence_length=512)
    assert foreign.relative_error(cond, wanted) < 1e-4
    assert foreign.relative_error(uncond, negative) < 1e-4


@pytest.mark.torch
def test_an_image_becomes_what_diffusers_makes_of_it(folder, theirs):
    import torch

    around = wan.WanPipeline(str(folder), **SIZE)
    config = WanConfig(dim=8, ffn=8, heads=2, depth=1, in_channels=36, text_dim=32)
    image = to_uint8(np.tanh(foreign.tensor("image", (1, 32, 48, 3))))
    cond, _ = around.conditions(["waves"], "", config, image)
    assert isinstance(cond, Conditions) and cond.image is None
    pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        _, wanted = theirs.prepare_latents(
            pixels, 1, 16, 32, 48, 5, torch.float32, torch.device("cpu"), torch.Generator()
        )
    assert foreign.relative_error(cond.frames, np.moveaxis(wanted.numpy(), 1, -1)) < 1e-4


@pytest.fixture
def first_frame(tmp_path):
    """The file of a picture of just the size of the videos."""
    path = tmp_path / "first.png"
    save_image(path, to_uint8(np.tanh(foreign.tensor("image", (32, 48, 3)))))
    return path


@pytest.mark.torch
def test_clip_features_are_those_of_diffusers(image_to_video, first_frame):
    from PIL import Image

    around = diffusers_pipeline("WanImageToVideoPipeline", image_to_video)
    with Image.open(first_frame) as image:
        wanted = around.encode_image(image).detach()
        result = wan.clip_features(image_to_video, np.asarray(image)[None])
    assert result.shape == (1, 5, 16) and foreign.relative_error(result, wanted) < 1e-6


# name: (folder, diffusers' pipeline, its settings, the program's flags, whether an image is given)
WHOLE = {
    "text": ("folder", "WanPipeline", {}, [], False),
    "pair": ("pair", "WanPipeline", {"boundary_ratio": 0.8}, ["--boundary=0.8"], False),
    "image": ("image_to_video", "WanImageToVideoPipeline", {}, [], True),
    "first_frame": ("folder", "WanImageToVideoPipeline", {"expand_timesteps": True}, [], True),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", WHOLE)
def test_program_makes_the_video_that_diffusers_makes(
    program, request, first_frame, tmp_path, name
):
    """From the same noise. The sheet holds all five frames, and a PNG every bit of them."""
    import torch
    from PIL import Image

    where, kind, settings, flags, takes_image = WHOLE[name]
    root = request.getfixturevalue(where)
    (tmp_path / "prompts.txt").write_text("a cat sees waves\n")
    flags = [*flags, "--frames=5", "--height=32", "--width=48", "--negative=waves"]
    flags += [f"--images={first_frame}"] if takes_image else []
    asked = "--steps=4", "--guidance=4", "--shift=3", "--seed=5"
    files = f"--checkpoint={root}", f"--prompts={tmp_path}/prompts.txt", f"--out={tmp_path}/a.png"
    assert program(*files, *asked, *flags) is None
    with Image.open(tmp_path / "a.png") as sheet:
        result = rearrange(np.asarray(sheet), "h (t w) c -> t h w c", t=5).astype(float)
    noise_key, _ = jax.random.split(jax.random.key(5))
    noise = np.array(randomness.normal(noise_key, np.arange(1), (2, 4, 6, 16)))
    with Image.open(first_frame) as image:
        image_input = {"image": image} if takes_image else {}
        wanted = diffusers_pipeline(kind, root, **settings)(
            prompt="a cat sees waves", negative_prompt="waves", height=32, width=48, num_frames=5,
            num_inference_steps=4, guidance_scale=4.0, output_type="np",
            latents=torch.from_numpy(np.moveaxis(noise, -1, 1)), **image_input,
        ).frames[0]  # fmt: skip
    assert np.mean((wanted > 0) & (wanted < 1)) > 0.9  # clipping would hide differences
    assert np.abs(result - 255 * wanted).max() < 0.6  # half a level, and what float32 rounds


@pytest.mark.torch
def test_every_expert_of_a_pair_is_asked(program, pair, tmp_path):
    """At its boundary, and nowhere else: the times are 1, 0.9, 0.75 and 0.5."""
    (tmp_path / "prompts.txt").write_text("waves\n")
    files = f"--checkpoint={pair}", f"--prompts={tmp_path}/prompts.txt"
    size = "--frames=5", "--height=32", "--width=48", "--steps=4", "--shift=3"
    result = {}
    for boundary in (0.95, 0.9, 0.8, 0.4):
        out = tmp_path / f"{boundary}.png"
        assert program(*files, *size, f"--boundary={boundary}", f"--out={out}") is None
        result[boundary] = out.read_bytes()
    assert result[0.9] == result[0.8]
    assert len({result[b] for b in (0.95, 0.8, 0.4)}) == 3


@pytest.mark.torch
def test_what_does_not_go_together_is_refused_before_the_text_encoder_is_read(
    program, digits, folder, pair, image_to_video, prompts, monkeypatch
):
    monkeypatch.setattr(wan, "embed", None)
    for given, complaint in (
        ([f"--checkpoint={image_to_video}"], "an image-to-video network: give it --images"),
        ([f"--checkpoint={pair}"], "holds a pair of transformers: give the time that divides them"),
        ([f"--checkpoint={folder}", "--boundary=0.8"], "has no transformer_2"),
    ):
        assert complaint in program(*given, f"--prompts={prompts}", "--out=a.gif", "--frames=5")
    around = wan.WanPipeline(str(folder), **SIZE)
    with pytest.raises(ValueError, match=r"4 channels and reads texts of width 64; .* 16 and 32"):
        around.conditions(PROMPTS, "", weights.abstract(digits).net.config)


@pytest.mark.torch
def test_program_makes_videos_of_a_diffusers_pipeline(program, folder, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "prompts.txt").write_text("waves\n")
    size = "--frames=5", "--height=32", "--width=48", "--steps=2", "--guidance=4", "--shift=3"
    where = f"--checkpoint={folder}", f"--prompts={tmp_path}/prompts.txt"
    assert program(*where, *size, "--solver=unipc", f"--out={tmp_path}/a.mp4") is None
    from dmd_jax.pipelines.video import read_video

    assert read_video(tmp_path / "a.mp4").shape == (5, 32, 48, 3)
    output = program(*where, "--frames=6", "--height=32", "--width=48")
    assert "6 frames of 32x48: this VAE takes 4 k + 1 frames" in output


@pytest.mark.parametrize("flag", ["checkpoint", "prompts", "out", "pipeline"])
def test_addresses_are_refused_wherever_a_path_is_taken(program, digits, prompts, tmp_path, flag):
    weights.save(tmp_path / "a.safetensors", weights.denoiser(digits))
    given = {"checkpoint": tmp_path / "a.safetensors", "prompts": prompts, "out": "a.gif"}
    given |= {flag: "gs://bucket/a.gif"}
    output = program(*(f"--{name}={value}" for name, value in given.items()))
    assert "gs://bucket/a.gif: only local paths are read and written; mount the bucket" in output


def test_videos_of_prompts_are_drawn_by_a_function(digits):
    """Checked when it is called, drawn when a video is taken; noise belongs to the index."""
    prompts = ["three moves left", "four moves up and right", "two"]
    with pytest.raises(ValueError, match="solves no ODE"):
        sampling.sample_videos(digits, prompts, solver="unipc")
    with pytest.raises(ValueError, match="a network of images: it takes no prompts"):
        sampling.sample_videos("mnist_teacher", prompts)
    one, two = (list(sampling.sample_videos(digits, prompts, batch=n)) for n in (1, 2))
    shape = (moving_digits.FRAMES, moving_digits.SIZE, moving_digits.SIZE, 3)
    assert [video.shape for video in one] == [shape] * 3 and one[0].dtype == np.uint8
    for a, b in zip(one, two, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


def test_what_a_causal_student_cannot_make_is_refused_before_it_is_loaded(
    digits, monkeypatch, tmp_path
):
    monkeypatch.setattr(sampling, "load_denoiser", None)
    path, causal = tmp_path / "causal.safetensors", {"frames_per_block": 3}
    notes = {"data": "moving_digits", "times": (1.0, 0.5), "shift": 1.0, "causal": causal}
    weights.save(path, weights.denoiser(digits), **notes)
    with pytest.raises(ValueError, match="the video: 4 frames do not divide into blocks of 3"):
        sampling.sample_videos(path, ["two"])
    with pytest.raises(ValueError, match="drop --images and --boundary"):
        sampling.sample_videos(path, ["two"], images=["a.png"])


def test_on_a_mesh_the_denoiser_is_loaded_in_parts(digits):
    whole = sampling.load_denoiser(digits)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=4)):
        spread = sampling.load_denoiser(digits)
        parts = {len(x.sharding.device_set) for x in jax.tree.leaves(spread)}
        assert parts == {8}
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(a, jax.device_get(b))
