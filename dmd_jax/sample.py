"""Draws samples from a checkpoint: few steps of a student, or many guided steps of a teacher.

Images, by class:

    python -m dmd_jax.sample --checkpoint=runs/dmd/generator.safetensors --out=samples.png
    python -m dmd_jax.sample --checkpoint=mnist_teacher --steps=50 --guidance=1.25 --out=samples.npz

Videos, by prompt; --out names files by their endings, of which --out=a.mp4,a.gif,a.png asks for all
(with several prompts a-000.mp4, a-001.mp4, ...; the PNG is one contact sheet):

    python -m dmd_jax.sample --checkpoint=runs/dmd_wan_tiny/generator.safetensors \
        --prompts=prompts.txt --out=digits.gif,digits.png
    python -m dmd_jax.sample --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts=prompts.txt \
        --guidance=5 --shift=3 --out=waves.mp4
    python -m dmd_jax.sample --checkpoint=student.safetensors --mesh=fsdp=8 \
        --pipeline=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts=prompts.txt --out=waves.mp4

Imports the rooms below.
"""

import contextlib
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.devices.disk import check_writable
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.wan import Experts, WanConfig
from dmd_jax.pipelines import video, wan
from dmd_jax.pipelines.prompts import read_prompts
from dmd_jax.quality import report
from dmd_jax.rollouts.samplers import SOLVERS, balanced, draw, draw_images, sampler_for
from dmd_jax.weights import files

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A file of this library, the name of a shipped one, or a Wan transformer of others: a "
        "file, a folder, a name on the Hugging Face hub.",
    )
    flags.DEFINE_integer(
        "steps", None, "Network steps; a student's own, or 50 of a teacher.", lower_bound=1
    )
    flags.DEFINE_float("guidance", None, "Weight of a teacher's guidance; 1, the default, is none.")
    flags.DEFINE_float("shift", None, "Time shift; a student's own, or 1.")
    flags.DEFINE_enum("solver", "euler", sorted(SOLVERS), "How a teacher's steps are taken.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_list("out", ["samples.png"], "Where to; the endings say the formats.")
    flags.DEFINE_list("mesh", [], "Devices, as data=2,fsdp=4; the first alone if not given.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What networks compute in.")
    flags.DEFINE_integer("num", 100, "Images: how many.", lower_bound=1)
    flags.DEFINE_string("prompts", None, "Videos: a text file, one prompt a line.")
    flags.DEFINE_string("negative", "", "Videos: what guidance moves away from.")
    flags.DEFINE_string(
        "pipeline", None, "Videos: where VAE, text encoder and tokenizer are; --checkpoint if none."
    )
    flags.DEFINE_list("images", None, "Videos: first frames, one for all prompts or one for each.")
    flags.DEFINE_integer("frames", 81, "Videos: how many frames.", lower_bound=1)
    flags.DEFINE_integer("height", 480, "Videos: pixels.", lower_bound=1)
    flags.DEFINE_integer("width", 832, "Videos: pixels.", lower_bound=1)
    flags.DEFINE_float("fps", 16, "Videos: frames a second.", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "Videos: how many in one call.", lower_bound=1)
    flags.DEFINE_float(
        "boundary",
        None,
        "Videos: the time, 0 ... 1, above which Wan 2.2's high-noise expert is asked and below "
        "which the other: 0.875 of its text-to-video pair, 0.9 of its image-to-video pair.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    try:
        with contextlib.ExitStack() as stack:
            if FLAGS.mesh:
                stack.enter_context(jax.set_mesh(mesh(FLAGS.mesh)))
            sample()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def mesh(axes):
    """The mesh of ["data=2", "fsdp=4"]; data takes what the others leave."""
    try:
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes)}
        return sharding.make_mesh(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--mesh={','.join(axes)}: say it as data=2,fsdp=4, of the axes "
            f"{', '.join(sharding.AXES)} ({error})"
        ) from None


def sample():
    """Draws what the flags ask for, and writes it."""
    asked = dict(steps=FLAGS.steps, guidance=FLAGS.guidance, shift=FLAGS.shift)
    sampler = sampler_for(FLAGS.checkpoint, **asked, solver=FLAGS.solver)
    config, *_ = (weights.abstract(FLAGS.checkpoint, part=part).net.config for part in parts())
    videos = isinstance(config, WanConfig)
    outs = [Path(out).expanduser() for out in FLAGS.out]
    require_files(outs, (".mp4", ".gif", ".png") if videos else (".png", ".npz"))
    start = time.time()
    count = (sample_videos if videos else sample_images)(config, sampler, outs)
    named = ", ".join(map(str, outs))
    print(f"{count} samples, {sampler}, {time.time() - start:.1f} s: {named}")


def require_files(outs, known):
    """Raises ValueError where there is nothing to write, or it could not be written."""
    if not outs:
        raise ValueError("--out names no file")
    for out in outs:
        if out.suffix not in known:
            raise ValueError(f"--out={out}: the ending says the format, {', '.join(known)}")
        if out.is_dir():
            raise ValueError(f"--out={out} is a folder: name a file")
        if out.suffix == ".mp4":
            video.import_av()
        check_writable(out.parent)


def parts():
    """Which transformers of --checkpoint are asked: its only one, or Wan 2.2's pair.

    Raises:
        ValueError: there is a pair, and nothing says when each is asked.
    """
    if FLAGS.boundary is not None:
        return "transformer", "transformer_2"
    root = Path(FLAGS.checkpoint).expanduser()
    if any((root / name).is_dir() for name in files.SUBFOLDERS["transformer_2"]):
        raise ValueError(f"{root} holds a pair of transformers: say when each is asked, --boundary")
    return ("transformer",)


def load(**overrides):
    """The Denoiser of --checkpoint, on the mesh if there is one."""
    path, places = FLAGS.checkpoint, None
    if FLAGS.mesh:
        shape = weights.abstract(path, **overrides)
        rules = weights.sharding_rules(shape.net)
        places = sharding.infer(shape, rules, jax.sharding.get_mesh())
    found = [weights.denoiser(path, part=part, shardings=places, **overrides) for part in parts()]
    if len(found) == 1:
        return found[0]
    high, low = found
    experts = Experts(high.net, low.net, 1000 * FLAGS.boundary)
    return Denoiser(experts, high.schedule, high.prediction)


def sample_images(config, sampler, outs):
    """Images of every class in turn; returns how many."""
    labels = balanced(FLAGS.num, config.num_classes)
    images = draw_images(load(dtype=FLAGS.dtype), sampler, labels, FLAGS.seed)
    for out in outs:
        if out.suffix == ".npz":
            np.savez_compressed(out, images=images, labels=labels)
        else:
            report.save_grid(out, images, config.num_classes)
    return len(images)


def surroundings():
    """The pipeline around --checkpoint.

    Raises:
        ValueError: --checkpoint is a file, in which there is none.
    """
    if weights.notes(FLAGS.checkpoint).get("data") == "moving_digits":
        return wan.DigitsPipeline()
    if FLAGS.pipeline is None and Path(FLAGS.checkpoint).expanduser().is_file():
        raise ValueError(
            f"{FLAGS.checkpoint} is a transformer alone: name with --pipeline the checkpoint that "
            "has its VAE, text encoder and tokenizer"
        )
    return wan.WanPipeline(
        FLAGS.pipeline or FLAGS.checkpoint, FLAGS.frames, FLAGS.height, FLAGS.width, FLAGS.dtype
    )


def sample_videos(config, sampler, outs):
    """Videos of --prompts, each written as soon as it is made; returns how many."""
    if FLAGS.prompts is None:
        raise ValueError(f"{FLAGS.checkpoint} makes videos of prompts: give a file as --prompts")
    prompts, around, images = read_prompts(FLAGS.prompts), surroundings(), None
    if FLAGS.images:
        images = wan.first_frames(FLAGS.images, len(prompts), FLAGS.height, FLAGS.width)
    cond, uncond = around.conditions(prompts, FLAGS.negative, config, images)
    denoiser = load(dtype=FLAGS.dtype)
    if isinstance(cond, wan.Start):
        denoiser = wan.Continuation(denoiser)
    latents = draw(
        denoiser, sampler, cond, uncond, around.sample_shape, FLAGS.seed, batch=FLAGS.batch
    )
    sheet, made = [], 0
    for part in latents:
        for frames in around.frames(part):
            for out in outs:
                if out.suffix == ".png":
                    sheet.append(video.contact_sheet(frames[None]))
                else:
                    name = f"{out.stem}-{made:03d}" if len(prompts) > 1 else out.stem
                    video.save_video(out.with_stem(name), frames, FLAGS.fps)
            made += 1
            print(f"video {made} of {len(prompts)}: {prompts[made - 1][:60]}", flush=True)
    for out in outs:
        if out.suffix == ".png":
            video.save_image(out, np.concatenate(sheet))
    return made


if __name__ == "__main__":
    define_flags()
    app.run(main)
