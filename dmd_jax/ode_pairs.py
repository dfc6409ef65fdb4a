"""Trajectories of a teacher's ODE, for `methods.dmd1` (images) and `methods.causal_ode` (videos).

Of a teacher of images, pairs of a noise and the end of its ODE, for all classes in turn:

    python -m dmd_jax.ode_pairs --checkpoint=mnist_teacher --guidance=1.5 --num=5000 --out=pairs

Of a causal teacher, along real videos, with the folders of `dmd_jax.embed` and `dmd_jax.encode`:

    python -m dmd_jax.ode_pairs --checkpoint=runs/causal/generator.safetensors \
        --embeddings=embeddings --latents=latents --out=pairs

or converted from the LMDB files of Self-Forcing or Causal-Forcing (`pip install lmdb`). The first
call writes pairs/prompts.txt, to be embedded; the second converts:

    python -m dmd_jax.ode_pairs --lmdb=ode_pairs_lmdb --shift=8 --embeddings=embeddings --out=pairs

`dmd_jax.data.ImagePairs` and `OdePairs` read the results. A second start after an interruption
resumes.
"""

import dataclasses
import functools
import sys

import absl.logging
import jax
from absl import app, flags

from dmd_jax.devices import sharding
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.models.attention import Causal
from dmd_jax.pipelines import ode_pairs
from dmd_jax.pipelines.sampling import network_config

FLAGS = flags.FLAGS
SOLVED = ("times", "shift", "steps", "guidance")  # flags whose defaults depend on the teacher


def _listed(name):
    """The two defaults of a flag of `SOLVED`, in words."""
    videos, images = (getattr(how, name) for how in (ode_pairs.Solution(), ode_pairs.OF_IMAGES))
    return f"{videos} for videos, {images} for images."


def define_flags():
    flags.DEFINE_string(
        "checkpoint", None, "The teacher: a file, a folder, a name on the Hugging Face hub."
    )
    flags.DEFINE_string("lmdb", None, "A folder of LMDB files to convert; instead of --checkpoint.")
    flags.DEFINE_string("embeddings", None, "The folder that dmd_jax.embed wrote.")
    flags.DEFINE_string("latents", None, "The folder of real videos that dmd_jax.encode wrote.")
    flags.DEFINE_string("out", None, "The folder of the trajectories.")
    flags.DEFINE_integer("num", 10_000, "Images: number.", lower_bound=1)
    flags.DEFINE_list(
        "times",
        None,
        f"The stored points: the student's times before the shift. Default: {_listed('times')}",
    )
    flags.DEFINE_float(
        "shift",
        None,
        f"Time shift of the ODE's steps, and of the student's calls. Default: {_listed('shift')}",
    )
    flags.DEFINE_integer("steps", None, f"Euler steps. Default: {_listed('steps')}", lower_bound=1)
    flags.DEFINE_float(
        "guidance",
        None,
        f"Weight of the teacher's guidance; 1 disables it. Default: {_listed('guidance')}",
    )
    flags.DEFINE_integer("frames_per_block", 3, "Latent frames of the teacher's blocks.")
    flags.DEFINE_bool("first_alone", False, "Whether the first frame is a block of its own.")
    flags.DEFINE_integer("window", None, "Frames that the teacher attends to; all if not given.")
    flags.DEFINE_integer("sink", 0, "First frames that stay visible behind the window.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer(
        "batch",
        None,
        f"Trajectories in one call. Default: 1 video, {ode_pairs.IMAGES} images.",
        lower_bound=1,
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which the teacher computes.")
    flags.mark_flag_as_required("out")


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    use_float32_products(FLAGS.dtype)
    try:
        result = make(functools.partial(print, flush=True))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(result)} trajectories, {list(result.shape)} each: {FLAGS.out}")


def make(progress):
    """Solves or converts, as the flags say."""
    if (FLAGS.checkpoint is None) == (FLAGS.lmdb is None):
        raise ValueError("name a teacher as --checkpoint, or files to convert as --lmdb")
    if FLAGS.lmdb is None and hasattr(network_config(FLAGS.checkpoint), "num_classes"):
        return of_images(progress)
    if FLAGS.embeddings is None:
        raise ValueError("name the folder of the captions' embeddings, as --embeddings")
    if FLAGS.lmdb is not None:
        where = dict(shift=ode_pairs.Solution.shift) | given("times", "shift")
        folders = FLAGS.lmdb, FLAGS.embeddings, FLAGS.out
        return ode_pairs.convert(*folders, **where, progress=progress)
    if FLAGS.latents is None:
        raise ValueError("name the real videos that the teacher goes along, as --latents")
    causal = Causal(FLAGS.frames_per_block, FLAGS.first_alone, FLAGS.window, FLAGS.sink)
    how = ode_pairs.Solution(causal=causal, seed=FLAGS.seed, **given(*SOLVED))
    folders = FLAGS.embeddings, FLAGS.latents, FLAGS.out
    with mesh():
        return ode_pairs.solve(FLAGS.checkpoint, *folders, how, **calls(progress))


def of_images(progress):
    """Solves the ODE of a teacher of images, as the flags say."""
    for name in ("embeddings", "latents"):
        if FLAGS[name].value is not None:
            raise ValueError(
                f"--{name}: {FLAGS.checkpoint} makes images of a class, not videos: leave it out"
            )
    how = dataclasses.replace(ode_pairs.OF_IMAGES, seed=FLAGS.seed, **given(*SOLVED))
    with mesh():
        return ode_pairs.solve_images(
            FLAGS.checkpoint, FLAGS.out, how, num=FLAGS.num, **calls(progress)
        )


def mesh():
    """All devices share the weights, whatever the teacher's size."""
    return jax.set_mesh(sharding.make_mesh(data=1, fsdp=-1))


def calls(progress):
    """How the teacher is called, as the flags say."""
    return given("batch") | dict(dtype=FLAGS.dtype, progress=progress)


def given(*names):
    """{name: value} of those flags that the command line gives."""
    values = {name: FLAGS[name].value for name in names}
    values = {name: value for name, value in values.items() if value is not None}
    return values | ({"times": numbers(values["times"])} if "times" in values else {})


def numbers(texts):
    """The numbers of a list flag."""
    try:
        return tuple(float(text) for text in texts)
    except ValueError as error:
        raise ValueError(f"--times={','.join(map(str, texts))}: {error}") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
