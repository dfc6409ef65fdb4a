"""Trajectories of a causal teacher's ODE along real videos, for `methods.causal_ode`.

Solved, with the folders of `dmd_jax.embed` and `dmd_jax.encode`:

    python -m dmd_jax.ode_pairs --checkpoint=runs/causal/generator.safetensors \
        --embeddings=embeddings --latents=latents --out=pairs

or converted from the LMDB files of Self-Forcing or Causal-Forcing (`pip install lmdb`). The first
call writes pairs/prompts.txt, to be embedded; the second converts:

    python -m dmd_jax.ode_pairs --lmdb=ode_pairs_lmdb --shift=8 --embeddings=embeddings --out=pairs

`dmd_jax.data.OdePairs` reads the result. A second start after an interruption resumes.
"""

import functools
import sys

import jax
from absl import app, flags

from dmd_jax.devices import sharding
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.models.attention import Causal
from dmd_jax.pipelines import ode_pairs

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string(
        "checkpoint", None, "The causal teacher: a file, a folder, a name on the Hugging Face hub."
    )
    flags.DEFINE_string("lmdb", None, "A folder of LMDB files to convert; instead of --checkpoint.")
    flags.DEFINE_string("embeddings", None, "The folder that dmd_jax.embed wrote.")
    flags.DEFINE_string("latents", None, "The folder of real videos that dmd_jax.encode wrote.")
    flags.DEFINE_string("out", None, "The folder of the trajectories.")
    flags.DEFINE_list(
        "times", list(ode_pairs.TIMES), "The stored points: the student's times before the shift."
    )
    flags.DEFINE_float("shift", 5.0, "Time shift of the ODE's steps, and of the student's calls.")
    flags.DEFINE_integer("steps", 48, "Euler steps.", lower_bound=1)
    flags.DEFINE_float("guidance", 6.0, "Weight of the teacher's guidance; 1 disables it.")
    flags.DEFINE_integer("frames_per_block", 3, "Latent frames of the teacher's blocks.")
    flags.DEFINE_bool("first_alone", False, "Whether the first frame is a block of its own.")
    flags.DEFINE_integer("window", None, "Frames that the teacher attends to; all if not given.")
    flags.DEFINE_integer("sink", 0, "First frames that stay visible behind the window.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("batch", 1, "Videos in one call.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which the teacher computes.")
    flags.mark_flags_as_required(["embeddings", "out"])


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    use_float32_products(FLAGS.dtype)
    try:
        result = make(functools.partial(print, flush=True))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(result)} trajectories, {list(result.shape)} each: {FLAGS.out}")


def make(progress):
    """Solves or converts, as the flags say."""
    times = numbers(FLAGS.times)
    if (FLAGS.checkpoint is None) == (FLAGS.lmdb is None):
        raise ValueError("name a teacher as --checkpoint, or files to convert as --lmdb")
    if FLAGS.lmdb is not None:
        where = dict(times=times, shift=FLAGS.shift, progress=progress)
        return ode_pairs.convert(FLAGS.lmdb, FLAGS.embeddings, FLAGS.out, **where)
    if FLAGS.latents is None:
        raise ValueError("name the real videos that the teacher goes along, as --latents")
    how = ode_pairs.Solution(
        causal=Causal(FLAGS.frames_per_block, FLAGS.first_alone, FLAGS.window, FLAGS.sink),
        times=times,
        shift=FLAGS.shift,
        steps=FLAGS.steps,
        guidance=FLAGS.guidance,
        seed=FLAGS.seed,
    )
    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=-1)):  # whatever the teacher's size
        return ode_pairs.solve(
            FLAGS.checkpoint,
            FLAGS.embeddings,
            FLAGS.latents,
            FLAGS.out,
            how,
            batch=FLAGS.batch,
            dtype=FLAGS.dtype,
            progress=progress,
        )


def numbers(texts):
    """The numbers of a list flag."""
    try:
        return tuple(float(text) for text in texts)
    except ValueError as error:
        raise ValueError(f"--times={','.join(map(str, texts))}: {error}") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
