"""Encodes a folder of videos once, so that training needs no video encoder.

    python -m dmd_jax.embed --prompts=clips --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --out=embeddings
    python -m dmd_jax.encode --videos=clips --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --embeddings=embeddings --out=latents

The folder has videos, and for each a text file of the same name with its caption. The first frames
of each video are encoded. `dmd_jax.data.Prompts` reads the result. A second start after an
interruption resumes.
"""

import functools
import sys

import absl.logging
from absl import app, flags

from dmd_jax.devices.precision import use_float32_products
from dmd_jax.pipelines.precompute import encode_videos

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
        "The folder that dmd_jax.embed wrote with --videos as its --prompts.",
    )
    flags.DEFINE_string("out", None, "The folder of the latents.")
    flags.DEFINE_integer("frames", 81, "Frames of a video.", lower_bound=1)
    flags.DEFINE_integer("height", 480, "Pixels; videos are scaled and cropped.", lower_bound=1)
    flags.DEFINE_integer("width", 832, "Pixels.", lower_bound=1)
    flags.DEFINE_float(
        "fps", 16, "Frames per second to read at: 16 for most Wans, 24 for 2.2's 5B.", lower_bound=1
    )
    flags.mark_flags_as_required(["videos", "checkpoint", "embeddings", "out"])


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    use_float32_products("float32")  # the VAE
    try:
        result = encode_videos(
            FLAGS.videos,
            FLAGS.checkpoint,
            FLAGS.embeddings,
            FLAGS.out,
            num_frames=FLAGS.frames,
            height=FLAGS.height,
            width=FLAGS.width,
            fps=FLAGS.fps,
            progress=functools.partial(print, flush=True),
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(result)} latents, {list(result.shape)} each: {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
