"""Encodes a folder of videos once, so that training holds no video encoder.

    python -m dmd_jax.embed --prompts=clips --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --out=embeddings
    python -m dmd_jax.encode --videos=clips --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --embeddings=embeddings --out=latents

The folder holds videos, each beside a text file of the same name that says what it shows; of each
its beginning is taken. What it makes is read by `dmd_jax.data.Prompts`. Started again after an
interruption, it goes on where it was. Imports the rooms below, and embed.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from absl import app, flags

from dmd_jax.data import latents, to_float
from dmd_jax.data.embeddings import Embeddings
from dmd_jax.devices.disk import check_writable
from dmd_jax.pipelines import clips, wan
from dmd_jax.pipelines.prompts import identity
from dmd_jax.pipelines.video import read_video

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("videos", None, "A folder of videos, a.mp4 with its caption in a.txt.")
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A Wan checkpoint or its VAE: a folder, a file, a name on the Hugging Face hub.",
    )
    flags.DEFINE_string(
        "embeddings",
        None,
        "Of the captions: what dmd_jax.embed made with that folder as --prompts.",
    )
    flags.DEFINE_string("out", None, "The folder of the latents.")
    flags.DEFINE_integer("frames", 81, "Frames of a video.", lower_bound=1)
    flags.DEFINE_integer("height", 480, "Pixels; videos are scaled and cropped.", lower_bound=1)
    flags.DEFINE_integer("width", 832, "Pixels.", lower_bound=1)
    flags.DEFINE_float(
        "fps", 16, "Frames a second to read at: 16 for most Wans, 24 for 2.2's 5B.", lower_bound=1
    )
    flags.mark_flags_as_required(["videos", "checkpoint", "embeddings", "out"])


def caption_rows(videos, embeddings):
    """For each video of `clips.captioned`, the row of its caption.

    Raises:
        ValueError: a caption is not among the embeddings.
    """
    rows = {prompt: row for row, prompt in enumerate(embeddings.prompts)}
    if absent := [path for path, caption in videos if caption not in rows]:
        raise ValueError(
            f"{embeddings.path} lacks the captions of {len(absent)} of {len(videos)} videos, as of "
            f"{absent[0]}: embed them with `python -m dmd_jax.embed --prompts={FLAGS.videos} ...`"
        )
    return [rows[caption] for _, caption in videos]


def encode_videos():
    """Encodes what the flags ask for; returns the latents."""
    videos = clips.captioned(FLAGS.videos)
    rows = caption_rows(videos, Embeddings(Path(FLAGS.embeddings).expanduser()))
    size = dict(height=FLAGS.height, width=FLAGS.width)
    around = wan.WanPipeline(FLAGS.checkpoint, FLAGS.frames, **size)
    paths, how = [path for path, _ in videos], dict(frames=FLAGS.frames, fps=FLAGS.fps, **size)
    clips.require_clips(paths, **how)
    out = Path(FLAGS.out).expanduser()
    check_writable(out)

    def encode(numbered):
        number, path = numbered
        start = time.time()
        [latent] = around.encode(to_float(read_video(path, **how))[None])
        print(f"video {number} of {len(paths)}, {time.time() - start:.1f} s: {path}", flush=True)
        return latent

    root = Path(FLAGS.videos).expanduser()
    held = [
        (path.relative_to(root).as_posix(), path.stat().st_size, row)
        for path, row in zip(paths, rows, strict=True)
    ]
    source = {
        "vae": identity(around.vae),
        "videos": hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16],
        "fps": FLAGS.fps,
    }
    numbered = zip(enumerate(paths, 1), rows, strict=True)
    latents.write(out, numbered, encode, around.sample_shape, source=source)
    return latents.Latents(out)


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    try:
        made = encode_videos()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(made)} latents, {list(made.shape)} each: {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
