"""A web page on which a causal student makes a video as long as you watch.

python -m dmd_jax.stream --checkpoint=student.safetensors
python -m dmd_jax.stream --checkpoint=student.safetensors \
    --pipeline=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dtype=bfloat16

It listens on this machine only: reach it from elsewhere through `ssh -L 8000:localhost:8000`.
"""

import functools
import sys
from pathlib import Path

import absl.logging
from absl import app, flags

from dmd_jax.devices.precision import use_float32_products
from dmd_jax.pipelines import server, video
from dmd_jax.pipelines.player import Player
from dmd_jax.pipelines.sampling import video_config
from dmd_jax.pipelines.streaming import block_sampler, parse_causal
from dmd_jax.pipelines.video_stream import load_stream_model

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("checkpoint", None, "A causal student of videos.")
    flags.DEFINE_string(
        "pipeline",
        None,
        "The checkpoint with VAE, text encoder and tokenizer; --checkpoint if not given.",
    )
    flags.DEFINE_integer("steps", None, "Calls of a block; the student's own if not given.")
    flags.DEFINE_float("shift", None, "Time shift; the student's own if not given.")
    flags.DEFINE_list(
        "causal",
        [],
        "frames_per_block=3,first_alone=1,window=12,sink=3; the student's own if not given.",
    )
    flags.DEFINE_integer(
        "frames", 960, "Longest video of a student without a window.", lower_bound=1
    )
    flags.DEFINE_integer("height", 480, "Pixels.", lower_bound=1)
    flags.DEFINE_integer("width", 832, "Pixels.", lower_bound=1)
    flags.DEFINE_float("fps", 16, "Frames per second.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which the networks compute.")
    flags.DEFINE_string("host", "localhost", "Address to listen on.")
    flags.DEFINE_integer("port", 8000, "Port; 0 for a free one.", lower_bound=0, upper_bound=65535)
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)  # the server says every request
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    use_float32_products(FLAGS.dtype)
    try:
        stream()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def stream():
    """Serves the page until it is interrupted."""
    video.require_rate(FLAGS.fps)
    how = dict(steps=FLAGS.steps, shift=FLAGS.shift, causal=parse_causal(FLAGS.causal))
    video_config(FLAGS.checkpoint)  # both refuse before anything is loaded
    block_sampler(FLAGS.checkpoint, **how)
    load = functools.partial(
        load_stream_model,
        FLAGS.checkpoint,
        **how,
        pipeline=FLAGS.pipeline,
        frames=FLAGS.frames,
        height=FLAGS.height,
        width=FLAGS.width,
        dtype=FLAGS.dtype,
        keep_text_encoder=True,
    )
    player = Player(load, fps=FLAGS.fps)
    title = Path(FLAGS.checkpoint).stem
    with server.serve(player, FLAGS.host, FLAGS.port, title=title, fps=FLAGS.fps) as site:
        player.start()
        if FLAGS.host not in server.LOOPBACK:
            print(f"warning: anyone who reaches {FLAGS.host} can use this page; it has no password")
        print(f"http://{FLAGS.host}:{site.socket.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        try:
            site.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    define_flags()
    app.run(main)
