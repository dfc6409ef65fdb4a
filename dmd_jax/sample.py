"""Draws samples from a checkpoint: few steps of a student, or many guided steps of a teacher.

Images, by class:

    python -m dmd_jax.sample --checkpoint=runs/dmd/generator.safetensors --out=samples.png
    python -m dmd_jax.sample --checkpoint=mnist_teacher --steps=50 --guidance=1.25 --out=samples.npz

Videos, by prompt; the endings of --out are the formats, several as in --out=a.mp4,a.gif,a.png.
Several prompts give a-000.mp4, a-001.mp4, ..., and one PNG, a contact sheet:

    python -m dmd_jax.sample --checkpoint=runs/dmd_wan_tiny/generator.safetensors \
        --prompts=prompts.txt --out=digits.gif,digits.png
    python -m dmd_jax.sample --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts=prompts.txt \
        --guidance=5 --shift=3 --out=waves.mp4
    python -m dmd_jax.sample --checkpoint=student.safetensors --mesh=fsdp=8 \
        --pipeline=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts=prompts.txt --out=waves.mp4

A causal student, block by block, for as long as you like: the frames are written as they are made.
A line of the prompts such as "120: a fast seven" changes the prompt of the video of the line before
it from that frame on:

    python -m dmd_jax.sample --stream --checkpoint=student.safetensors --prompts=prompts.txt \
        --frames=240 --out=a.mp4

Without --mesh, the cores of a CPU split the samples of a call; an accelerator is used alone.
"""

import contextlib
import sys
import time

import absl.logging
import jax
import numpy as np
from absl import app, flags

from dmd_jax.devices import cores, sharding
from dmd_jax.devices.disk import check_file, local_path
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.models.wan import WanConfig
from dmd_jax.pipelines import sampling, video
from dmd_jax.pipelines.prompts import read_prompts, read_scenes
from dmd_jax.pipelines.streaming import parse_causal, title
from dmd_jax.pipelines.video_stream import load_stream_model, play
from dmd_jax.quality import report
from dmd_jax.rollouts.samplers import BATCH, SOLVERS, balanced, draw_images, sampler_for

FLAGS = flags.FLAGS
SAMPLER = ("steps", "guidance", "shift", "solver")
# Flags that a stream does not take.
WHOLE = ("guidance", "solver", "negative", "images", "boundary", "batch", "num")


def define_flags():
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A file of this library, the name of a shipped one, or another program's Wan: a "
        "file, a folder, a name on the Hugging Face hub.",
    )
    flags.DEFINE_integer(
        "steps", None, "Network steps; a student's own, or 50 of a teacher.", lower_bound=1
    )
    flags.DEFINE_float("guidance", None, "Weight of a teacher's guidance; 1 disables it.")
    flags.DEFINE_float("shift", None, "Time shift; that of the checkpoint, or 1.")
    flags.DEFINE_enum(
        "solver", None, sorted(SOLVERS), "ODE solver of a teacher; euler if not given."
    )
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_list("out", ["samples.png"], "Files to write; their endings are the formats.")
    flags.DEFINE_list(
        "mesh",
        [],
        "Devices, as data=2,fsdp=4; all cores of a CPU, or the first accelerator, if not given.",
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which the networks compute.")
    flags.DEFINE_integer("num", 100, "Images: number.", lower_bound=1, upper_bound=10_000_000)
    flags.DEFINE_string("prompts", None, "Videos: a text file, one prompt a line.")
    flags.DEFINE_string("negative", "", "Videos: the negative prompt.")
    flags.DEFINE_string(
        "pipeline",
        None,
        "Videos: the checkpoint with VAE, text encoder and tokenizer; --checkpoint if not given.",
    )
    flags.DEFINE_list("images", None, "Videos: first frames, one for all prompts or one for each.")
    flags.DEFINE_integer("frames", 81, "Videos: number of frames.", lower_bound=1)
    flags.DEFINE_integer("height", 480, "Videos: pixels.", lower_bound=1)
    flags.DEFINE_integer("width", 832, "Videos: pixels.", lower_bound=1)
    flags.DEFINE_float("fps", 16, "Videos: frames per second.", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "Videos: number in one call.", lower_bound=1)
    flags.DEFINE_float(
        "boundary",
        None,
        "Videos: the time, 0 ... 1, from which on Wan 2.2's high-noise expert is called, below it "
        "the low-noise one: 0.875 for its text-to-video pair, 0.9 for its image-to-video pair.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_bool("stream", False, "Videos: make them block by block, by a causal student.")
    flags.DEFINE_list(
        "causal",
        [],
        "Streams: frames_per_block=3,first_alone=1,window=12,sink=3; a student's own if not given.",
    )
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    use_float32_products(FLAGS.dtype)
    try:
        with devices():
            sample()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def devices():
    """A context that sets the mesh of --mesh, or one of the CPU's cores."""
    batch = FLAGS.batch if FLAGS.prompts else min(FLAGS.num, BATCH)
    return jax.set_mesh(mesh(FLAGS.mesh, batch)) if FLAGS.mesh else cores.shared(batch)


def mesh(axes, batch):
    """The mesh of ["data=2", "fsdp=4"]; data takes the devices that the others leave.

    A CPU is divided into as many devices as it needs, or as can share `batch` samples.
    """
    try:
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes)}
        cores.split_cores(batch, even=False, mesh=tuple(({"data": -1} | sizes).values()))
        return sharding.make_mesh(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--mesh={','.join(axes)}: write it as data=2,fsdp=4, of the axes "
            f"{', '.join(sharding.AXES)} ({error})"
        ) from None


def sample():
    """Draws the samples that the flags describe, and writes them."""
    if FLAGS.stream:
        return stream()
    if FLAGS["causal"].present:
        raise ValueError("--causal: only a stream takes it; add --stream")
    start, ways = time.time(), {name: FLAGS[name].value for name in SAMPLER}
    sampler = sampler_for(FLAGS.checkpoint, **ways)
    config = sampling.network_config(FLAGS.checkpoint, FLAGS.boundary)
    videos = isinstance(config, WanConfig)
    outs = [local_path(out) for out in FLAGS.out]
    video.require_rate(FLAGS.fps)
    require_files(outs, (".mp4", ".gif", ".png") if videos else (".png", ".npz"))
    count = write_videos(outs, ways) if videos else write_images(outs, sampler, config)
    named = ", ".join(map(str, outs))
    print(f"{count} samples, {sampler}, {time.time() - start:.1f} s: {named}")


def stream():
    """Makes the videos of --prompts block by block, and writes their frames as they are made."""
    if given := [f"--{name}" for name in WHOLE if FLAGS[name].present]:
        raise ValueError(f"--stream takes no {', '.join(given)}: a student's calls are its own")
    if FLAGS.prompts is None:
        raise ValueError("--stream makes videos of prompts: give a file as --prompts")
    outs, scenes = [local_path(out) for out in FLAGS.out], read_scenes(FLAGS.prompts)
    video.require_rate(FLAGS.fps)
    require_files(outs, (".mp4", ".gif"))
    model = load_stream_model(
        FLAGS.checkpoint,
        steps=FLAGS.steps,
        shift=FLAGS.shift,
        causal=parse_causal(FLAGS.causal),
        pipeline=FLAGS.pipeline,
        frames=FLAGS.frames,
        height=FLAGS.height,
        width=FLAGS.width,
        dtype=FLAGS.dtype,
    )
    print(f"{title(model.sampler)}; compiled in {model.warm_up():.1f} s", flush=True)
    for i, scene in enumerate(scenes):
        names = [numbered(out, i, len(scenes)) for out in outs]
        with contextlib.ExitStack() as files:
            writers = [files.enter_context(video.video_writer(n, FLAGS.fps)) for n in names]
            made, pieces = play(model, scene, FLAGS.frames, FLAGS.seed, i)
            for frames in pieces:
                for write in writers:
                    write(frames)
        named = ", ".join(map(str, names))
        print(f"{named}: first frame after {made.first_frame:.2f} s, {made.times}", flush=True)


def numbered(out, i, count):
    """The file of the i-th of `count` videos."""
    return out.with_stem(f"{out.stem}-{i:03d}") if count > 1 else out


def require_files(outs, known):
    """Raises ValueError if --out names no file, or one that cannot be written."""
    if not outs:
        raise ValueError("--out names no file")
    for out in outs:
        if out.suffix not in known:
            raise ValueError(f"--out={out}: the ending says the format, {', '.join(known)}")
        if out.suffix == ".mp4":
            video.import_av()
        check_file(out)


def write_images(outs, sampler, config):
    """Draws and writes --num images of every class in turn; returns the number."""
    if FLAGS.prompts is not None:
        raise ValueError(f"{FLAGS.checkpoint} makes images of classes: drop --prompts")
    labels = balanced(FLAGS.num, config.num_classes)
    denoiser = sampling.load_denoiser(FLAGS.checkpoint, dtype=FLAGS.dtype)
    images = draw_images(denoiser, sampler, labels, FLAGS.seed)
    for out in outs:
        if out.suffix == ".npz":
            np.savez_compressed(out, images=images, labels=labels)
        else:
            report.save_grid(out, images, config.num_classes)
    return len(images)


def write_videos(outs, ways):
    """Draws the videos of --prompts and writes each at once; returns the number."""
    if FLAGS.prompts is None:
        raise ValueError(f"{FLAGS.checkpoint} makes videos of prompts: give a file as --prompts")
    prompts, sheet = read_prompts(FLAGS.prompts), []
    videos = sampling.sample_videos(
        FLAGS.checkpoint,
        prompts,
        **ways,
        negative=FLAGS.negative,
        images=FLAGS.images,
        pipeline=FLAGS.pipeline,
        boundary=FLAGS.boundary,
        num_frames=FLAGS.frames,
        height=FLAGS.height,
        width=FLAGS.width,
        seed=FLAGS.seed,
        batch=FLAGS.batch,
        dtype=FLAGS.dtype,
    )
    for i, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
        for out in outs:
            if out.suffix == ".png":
                sheet.append(video.contact_sheet(frames[None]))
            else:
                video.save_video(numbered(out, i, len(prompts)), frames, FLAGS.fps)
        print(f"video {i + 1} of {len(prompts)}: {prompt[:60]}", flush=True)
    for out in outs:
        if out.suffix == ".png":
            video.save_image(out, np.concatenate(sheet))
    return len(prompts)


if __name__ == "__main__":
    define_flags()
    app.run(main)
