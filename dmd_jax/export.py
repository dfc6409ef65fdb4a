"""Writes a Wan transformer, or an adapter of one, for other programs.

python -m dmd_jax.export --checkpoint=student.safetensors --to=diffusers --out=pipeline
python -m dmd_jax.export --checkpoint=student.safetensors --to=self_forcing --out=student.pt
python -m dmd_jax.export --checkpoint=adapter.safetensors --to=diffusers_lora --out=lora.safetensors

diffusers      the folder of a pipeline; --base=FOLDER copies its other parts from there
original       a folder in the layout of the Wan repository, which ComfyUI and LightX2V read
self_forcing   a file of torch as Self-Forcing writes it

diffusers_lora, comfyui_lora   of an adapter: a safetensors file with the names of the program
"""

import math
import sys
from pathlib import Path

from absl import app, flags

from dmd_jax import weights
from dmd_jax.devices.disk import check_writable, local_path
from dmd_jax.models.wan import Wan
from dmd_jax.weights import adapter_files, export

TARGETS = ("diffusers", "original", "self_forcing")
ADAPTERS = tuple(adapter_files.OTHERS)
SHIFT = 5.0  # the default of Wan's repository

FLAGS = flags.FLAGS


def write(checkpoint_path, to, out, *, dtype=None, shift=None, base=None):
    """Writes what is at `checkpoint_path` as `to`, of TARGETS or ADAPTERS; returns a hint of use.

    Args:
        checkpoint_path: as for `weights.denoiser`; for ADAPTERS, the adapter's file.
        out: the folder or file.
        dtype: of the tensors; None for that of the weights.
        shift: of the scheduler; None for the student's own.
        base: for diffusers, the folder of a pipeline whose other parts are copied.

    Raises:
        FileNotFoundError, ValueError: of `weights.denoiser`; or it is no Wan, `out` exists, `base`
            lacks a part, or the shift is not above 0.
    """
    if base is not None and to != "diffusers":
        raise ValueError(f"--base={base} is for --to=diffusers, not {to}")
    if base is not None:
        export.index_of(base)
    if shift is not None and not 0 < shift < math.inf:
        raise ValueError(f"--shift={shift} must be above 0; 1 shifts nothing")
    if to in ADAPTERS:
        if shift is not None:
            raise ValueError(f"--shift={shift} is for --to=diffusers, not {to}")
        if Path(out).exists():
            raise ValueError(f"{out} is there already: choose another file")
        adapter_files.convert(checkpoint_path, to, out, dtype)
        return ""
    export.require_place(out, to_file=to == "self_forcing")
    net = weights.abstract(checkpoint_path).net
    if not isinstance(net, Wan):
        raise ValueError(
            f"{checkpoint_path} holds a {type(net).__name__}: only a Wan can be exported, because "
            "other programs have no class for it"
        )
    net = weights.denoiser(checkpoint_path).net
    if to != "diffusers":
        getattr(export, to)(out, net, dtype=dtype)
        return ""
    notes = weights.notes(checkpoint_path)
    times, shift = notes.get("times"), notes.get("shift", SHIFT) if shift is None else shift
    scheduler = export.many_step(shift)
    if times:
        scheduler = export.few_step(shift, fresh_noise="phases" not in notes)
    export.diffusers(out, net, scheduler=scheduler, dtype=dtype, base=base)
    return f"; sample with scheduler.set_timesteps(sigmas={times})" if times else ""


def define_flags():
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A checkpoint or an adapter of this library, or another program's Wan.",
    )
    flags.DEFINE_enum("to", None, TARGETS + ADAPTERS, "The program to write for.")
    flags.DEFINE_string("out", None, "The folder, or the file of Self-Forcing or of an adapter.")
    flags.DEFINE_string("base", None, "A diffusers pipeline whose other parts are copied.")
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"], "Of the tensors; that of the weights if not given."
    )
    flags.DEFINE_float("shift", None, "Time shift of the scheduler; a student's own if not given.")
    flags.mark_flags_as_required(["checkpoint", "to", "out"])


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    out = local_path(FLAGS.out)
    try:
        check_writable(out.parent)
        hint = write(
            FLAGS.checkpoint,
            FLAGS.to,
            out,
            dtype=FLAGS.dtype,
            shift=FLAGS.shift,
            base=FLAGS.base,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{FLAGS.checkpoint} for {FLAGS.to}: {out}{hint}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
