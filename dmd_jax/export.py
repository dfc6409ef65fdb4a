"""Writes a Wan transformer for other programs, a student or any that can be loaded.

    python -m dmd_jax.export --checkpoint=student.safetensors --to=diffusers --out=pipeline
    python -m dmd_jax.export --checkpoint=student.safetensors --to=self_forcing --out=student.pt

    diffusers      a pipeline's folder; with --base=FOLDER the other parts of that pipeline too
    original       a folder as the Wan repository's, which ComfyUI and LightX2V read
    self_forcing   a file of torch as Self-Forcing's

Imports the rooms below.
"""

import sys
from pathlib import Path

from absl import app, flags

from dmd_jax import weights
from dmd_jax.devices.disk import check_writable
from dmd_jax.models.wan import Wan
from dmd_jax.weights import export

TARGETS = ("diffusers", "original", "self_forcing")
SHIFT = 5.0  # what Wan's repository samples with, unless told otherwise

FLAGS = flags.FLAGS


def write(checkpoint_path, to, out, *, dtype=None, shift=None, base=None):
    """Writes the transformer at `checkpoint_path` as `to`, one of TARGETS; returns what to know.

    Args:
        checkpoint_path: what `weights.denoiser` reads.
        out: the folder or file.
        dtype: of the tensors; None for that of the weights.
        shift: of the scheduler; None for the student's own.
        base: for diffusers, a pipeline's folder, for all that is not the transformer.

    Raises:
        FileNotFoundError, ValueError: of `weights.denoiser`; or it is no Wan, `out` is taken,
            `base` lacks a part, or the shift is not above 0.
    """
    if base is not None and to != "diffusers":
        raise ValueError(f"--base={base} is for --to=diffusers, not {to}")
    if base is not None:
        export.index_of(base)
    if shift is not None and shift <= 0:
        raise ValueError(f"--shift={shift} must be above 0; 1 shifts nothing")
    export.require_place(out, to_file=to == "self_forcing")
    net = weights.abstract(checkpoint_path).net
    if not isinstance(net, Wan):
        raise ValueError(f"{checkpoint_path} holds a {type(net).__name__}: a Wan is wanted")
    net = weights.denoiser(checkpoint_path).net
    if to != "diffusers":
        getattr(export, to)(out, net, dtype=dtype)
        return ""
    notes = weights.notes(checkpoint_path)
    times, shift = notes.get("times"), notes.get("shift", SHIFT) if shift is None else shift
    scheduler = export.few_step(shift) if times else export.many_step(shift)
    export.diffusers(out, net, scheduler=scheduler, dtype=dtype, base=base)
    return f"; sample with scheduler.set_timesteps(sigmas={times})" if times else ""


def define_flags():
    flags.DEFINE_string("checkpoint", None, "A checkpoint: ours, or a Wan transformer of others.")
    flags.DEFINE_enum("to", None, TARGETS, "Which program it is for.")
    flags.DEFINE_string("out", None, "The folder, or Self-Forcing's file.")
    flags.DEFINE_string("base", None, "A diffusers pipeline whose other parts are copied.")
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"], "Of the tensors; as they are if not given."
    )
    flags.DEFINE_float("shift", None, "Time shift of the scheduler; a student's own if not given.")
    flags.mark_flags_as_required(["checkpoint", "to", "out"])


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    out = Path(FLAGS.out).expanduser()
    try:
        check_writable(out.parent)
        said = write(
            FLAGS.checkpoint,
            FLAGS.to,
            out,
            dtype=FLAGS.dtype,
            shift=FLAGS.shift,
            base=FLAGS.base,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{FLAGS.checkpoint} for {FLAGS.to}: {out}{said}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
