"""The command that trains: flags, distributed start, mesh, then the training program.

    python -m dmd_jax.main --config=configs/dmd.py
    python -m dmd_jax.main --config=configs/dmd.py:one_step --workdir=runs/mine --config.seed=1
    python -m dmd_jax.main --config=configs/dmd.py --dry_run

Imports the rooms; no room imports a command.
"""

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

# Before TensorFlow is imported: it prints notices that do not concern a user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

import dmd_jax
from dmd_jax.devices import compilation, cores
from dmd_jax.devices.disk import first_line
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.training import checkpoint, health, loop, profiling
from dmd_jax.training.configuration import (
    compute_dtypes,
    expand_home,
    flag_error,
    require_config,
)
from dmd_jax.training.description import describe
from dmd_jax.training.preemption import STOPPED, Stopped
from dmd_jax.training.run import build

FLAGS = flags.FLAGS
REFUSALS = (ValueError, OSError, ImportError, checkpoint.CheckpointError, health.Diverged)
PATIENCE = 300  # seconds in which all processes of a job must have joined
MEMORY = (
    "Lower config.batch_size, raise config.accumulate, set config.<role>.compute.remat='full', or "
    "split the weights over more devices by config.mesh.fsdp"
)


def define_flags():
    config_flags.DEFINE_config_file("config", "configs/dmd.py", "The config program to run.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run: a second start there resumes it. Default: runs/<config>.",
    )
    flags.DEFINE_bool("dry_run", False, "Check the config, print shapes and bytes, exit.")
    flags.DEFINE_string(
        "profile",
        None,
        "FIRST:COUNT, the steps to trace into <workdir>/profile, for TensorBoard's profile plugin.",
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other processes of a Cloud TPU, GKE, Slurm or Open MPI job first.",
    )
    flags.DEFINE_string(
        "compilation_cache",
        compilation.DIRECTORY,
        "Directory for compiled programs; '' for none.",
    )
    flags.DEFINE_bool("version", False, "Print the version, exit.")


def workdir():
    """--workdir, or runs/<name of the config and its argument>: runs/dmd_one_step."""
    if FLAGS.workdir:
        if "://" in FLAGS.workdir:
            refuse(f"--workdir={FLAGS.workdir}: mount the bucket, and name a directory in it")
        return Path(FLAGS.workdir).expanduser()
    path, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return Path("runs") / "_".join(filter(None, (Path(path).stem, argument)))


def refuse(error):
    """Ends the program with one message; --verbosity=1 shows the traceback."""
    absl.logging.debug("refused", exc_info=error if isinstance(error, Exception) else None)
    sys.exit(f"error: {error}")


def refusing(call, *args, **kwargs):
    """Returns call(*args, **kwargs); an error that the user can correct ends the program."""
    try:
        return call(*args, **kwargs)
    except REFUSALS as error:
        refuse(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refuse(f"the memory of the device is too small ({first_line(error)}). {MEMORY}")


def split_cores(config):
    """Divides the CPU into devices: the number that the mesh states, or that divides the batch."""
    batch = config.get("batch_size", 1) // max(config.get("accumulate", 1), 1)
    axes = {"data": -1} | dict(config.get("mesh", {}))
    cores.split_cores(batch, mesh=tuple(axes.values()))


def join():
    """Joins the other processes of the job; the scheduler knows their addresses.

    Where one does not come, JAX aborts the process with a trace of C++ frames. A timer is first.
    """
    logging.getLogger("jax._src.distributed").setLevel(logging.INFO)  # the coordinator's address
    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=2 * PATIENCE)
    except ValueError as error:
        refuse(
            f"--distributed found no Cloud TPU, GKE, Slurm or Open MPI job to join ({error}); a "
            "single process needs no such flag"
        )
    finally:
        timer.cancel()


def give_up():
    """Ends a process that waits in vain for others."""
    print(
        f"error: not all processes of this job have joined within {PATIENCE} s; this one, on "
        f"{socket.gethostname()}, ends. Look in the logs of the others for one that never started "
        "or has failed. If all of them have waited, they cannot reach the coordinator: the line "
        "'Connecting to' above has its address; JAX_COORDINATOR_PORT sets another port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def main(argv):
    # Show the progress of this library, but only warnings of others.
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger("dmd_jax").setLevel(logging.INFO)
    if len(argv) > 1:
        refuse(f"unknown argument {argv[1]!r}; options start with --")
    compilation.store_programs(FLAGS.compilation_cache)
    config = FLAGS.config
    expand_home(config)
    use_float32_products(*compute_dtypes(config))
    split_cores(config)
    if FLAGS.distributed:
        join()
    profile = range(0)
    if FLAGS.profile:
        profile = refusing(profiling.parse_steps, FLAGS.profile, config.steps)
    run = refusing(build, config, files=not FLAGS.dry_run)
    print(refusing(describe, run), flush=True)
    if FLAGS.dry_run:
        return
    try:
        with jax.set_mesh(run.mesh):
            refusing(loop.train, run, workdir(), profile)
    except Stopped as stop:
        print(stop, flush=True)
        sys.exit(STOPPED)
    except KeyboardInterrupt:  # the second Ctrl-C
        print("interrupted; the same command goes on from its last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def start():
    """Parses the command line, config and overrides included, and runs."""
    if "--version" in sys.argv[1:]:  # before flags are parsed, which needs a config program
        print(f"dmd_jax {dmd_jax.__version__}")
        sys.exit()
    try:
        # Defining the flags already reads the config and its overrides, which may raise.
        define_flags()
        app.define_help_flags()
        argv = FLAGS(sys.argv)
        require_config(FLAGS.config)
        FLAGS.config.lock()
    except Exception as error:  # a config program is a user's: it may raise anything
        refuse(flag_error(error, isinstance(error, flags.Error)))
    try:
        app.run(main, argv=argv, flags_parser=lambda argv: argv)
    except BaseException as end:
        if loop.compiling():
            leave(end)
        raise


def leave(end):
    """Exits without waiting for a compilation in the background. What was to be saved is.

    A normal exit would destroy objects that the compiler's thread still uses.

    Args:
        end: SystemExit, or an error that nobody caught.
    """
    if crashed := isinstance(end, Exception):
        traceback.print_exception(end)
    code = 1 if crashed else end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_count() > 1 and not crashed:  # it waits for others, which may wait for this one
        jax.distributed.shutdown()
    os._exit(code or 0)


if __name__ == "__main__":
    start()
