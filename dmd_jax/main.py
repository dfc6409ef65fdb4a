"""The entry point everywhere: flags, distributed start, mesh, then the training program.

    python -m dmd_jax.main --config=configs/dmd.py
    python -m dmd_jax.main --config=configs/dmd.py:one_step --workdir=runs/mine --config.seed=1
    python -m dmd_jax.main --config=configs/dmd.py --dry_run

Imports everything below; nothing imports it.
"""

import logging
import os
import sys
from pathlib import Path

# Before TensorFlow is imported by anything: its notices are not ours to print.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from dmd_jax.devices import cores
from dmd_jax.training import checkpoint, health, loop
from dmd_jax.training.run import build, describe

FLAGS = flags.FLAGS


def define_flags():
    config_flags.DEFINE_config_file("config", "configs/dmd.py", "The config program to run.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run lives: a second start there resumes. Default: runs/<config>.",
    )
    flags.DEFINE_bool("dry_run", False, "Resolve the config, print shapes and bytes, exit.")
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes of a Cloud TPU, GKE, Slurm or Open MPI job first.",
    )
    flags.DEFINE_string(
        "compilation_cache", "~/.cache/dmd_jax", "Where compiled programs are kept; '' for nowhere."
    )


def workdir():
    """--workdir, or runs/<the config's name>, its argument included: runs/dmd_one_step."""
    if FLAGS.workdir:
        if "://" in FLAGS.workdir:
            refuse(f"--workdir={FLAGS.workdir}: mount the bucket, and give a directory")
        return Path(FLAGS.workdir)
    path, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return Path("runs") / "_".join(filter(None, (Path(path).stem, argument)))


def refuse(error):
    """Ends the program with one clear message; --verbosity=1 shows where it came from."""
    absl.logging.debug("refused", exc_info=error if isinstance(error, Exception) else None)
    sys.exit(f"error: {error}")


def join():
    """Joins the job's other processes; their addresses are the scheduler's to know."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        refuse(
            f"--distributed found no Cloud TPU, GKE, Slurm or Open MPI job to join ({error}); a "
            "single process does without that flag"
        )


def main(argv):
    # Our own progress, and only warnings of the libraries below us.
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger("dmd_jax").setLevel(logging.INFO)
    if len(argv) > 1:
        refuse(f"unknown argument {argv[1]!r}; options start with --")
    if FLAGS.compilation_cache:
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(FLAGS.compilation_cache).expanduser())
        )
    cores.split_cores(
        FLAGS.config.get("batch_size", 1) // max(FLAGS.config.get("accumulate", 1), 1)
    )
    if FLAGS.distributed:
        join()
    try:
        run = build(FLAGS.config, files=not FLAGS.dry_run)
    except (ValueError, OSError, ImportError) as error:
        refuse(error)
    print(describe(run), flush=True)
    if FLAGS.dry_run:
        return
    try:
        with jax.set_mesh(run.mesh):
            loop.train(run, workdir())
    except (ValueError, OSError, checkpoint.CheckpointError, health.Diverged) as error:
        refuse(error)


def start():
    """Parses the command line, config and overrides included, and runs."""
    try:
        # Reads the default config and its overrides, and may refuse them, already here.
        define_flags()
        app.define_help_flags()
        argv = app.parse_flags_with_usage(sys.argv)
        FLAGS.config.lock()  # reads the config program
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        told = error.args[0] if isinstance(error, KeyError) else error  # a KeyError quotes its text
        refuse(f"in the config or a --config.* override: {told}")
    app.run(main, argv=argv, flags_parser=lambda argv: argv)


if __name__ == "__main__":
    start()
