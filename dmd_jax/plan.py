"""Plans a training run: what it needs on TPUs or GPUs, from their compiler, without any of them.

    python -m dmd_jax.plan --config=configs/dmd.py --topology=cpu:2
    python -m dmd_jax.plan --config=configs/self_forcing.py:wan_t2v_1_3b --topology=h100:8x8
    python -m dmd_jax.plan --config=configs/self_forcing.py:wan_t2v_1_3b --topology=v5p:4x4x4 \
        --config.mesh.fsdp=16 --config.mesh.context=4 --config.batch_size=16 --json=plan.json

Prints the memory of a device by role, whether the run fits, its FLOPs, the bytes that it moves, and
an estimate of its time. The exit code is 0 if it fits, 1 if it does not and 2 after an error. For
TPUs it needs `pip install 'dmd_jax[plan]'`, for GPUs 'dmd_jax[cuda]'. --search=8 compiles up to
eight other settings of mesh, rematerialisation and parts of the batch, and plans the fastest that
fits; where none does, also with arrays in the memory of the host or in int8. docs/scale.md explains
the search and the table.
"""

import functools
import json
import os
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from dmd_jax.devices import compilation
from dmd_jax.devices.disk import check_file, first_line, local_path, write_text
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.training import topologies
from dmd_jax.training.configuration import (
    compute_dtypes,
    expand_home,
    flag_error,
    require_config,
)
from dmd_jax.training.plan import plan
from dmd_jax.training.search import search

FLAGS = flags.FLAGS


def define_flags():
    config_flags.DEFINE_config_file("config", "configs/dmd.py", "The config program to plan.")
    flags.DEFINE_string(
        "topology", None, f"The devices to plan for: {topologies.KNOWN}.", required=True
    )
    flags.DEFINE_integer("slices", 1, "Slices of a TPU, joined by their hosts' network.")
    flags.DEFINE_integer(
        "search",
        0,
        "Compile up to so many settings, and plan the fastest that fits.",
        lower_bound=0,
    )
    flags.DEFINE_string("json", None, "A file for the plan as JSON.")
    flags.DEFINE_string(
        "compilation_cache",
        compilation.DIRECTORY,
        "Directory for compiled programs, where a run looks for its steps; '' for none.",
    )


def main(argv):
    if argv[1:]:
        refuse(f"unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # a chip of this machine is left alone
    config = FLAGS.config
    expand_home(config)
    use_float32_products(*compute_dtypes(config))
    try:
        if FLAGS.json:
            check_file(local_path(FLAGS.json))
        chip, devices = topologies.load(FLAGS.topology, FLAGS.slices)
        store_programs(devices[0].platform)
        result = searched(config, chip, devices) if FLAGS.search else plan(config, chip, devices)
    except (ValueError, OSError, ImportError) as error:
        refuse(error)
    except (RuntimeError, TypeError) as error:  # of a compiler; NotImplementedError among them
        refuse(f"the step cannot be compiled for {FLAGS.topology}: {first_line(error)}")
    print(result.table())
    if FLAGS.json:
        write_text(local_path(FLAGS.json), json.dumps(result.json(), indent=2) + "\n")
    sys.exit(0 if result.fits else 1)


def store_programs(platform):
    """Stores the compiled steps for runs: docs/scale.md, "Compiled before the run"."""
    if platform == "gpu":  # a run tunes its programs on the card, and must not find untuned ones
        jax.config.update("jax_compilation_cache_dir", None)
    else:
        compilation.store_programs(FLAGS.compilation_cache)
    # The compiler of a TPU that is not here cannot load what it has stored, and compiles it again.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


def searched(config, chip, devices):
    """The plan of the fastest settings that fit, or of the last ones if none do."""
    if chip is None:
        raise ValueError(
            "--search compares times, and those of a CPU are not known: name a TPU or GPU"
        )
    say = functools.partial(print, flush=True)
    best, result = search(config, chip, devices, FLAGS.search, say)
    say(f"{'the fastest that fits' if result.fits else 'nothing fits; the last'}:\n  {best.flags}")
    return result


def refuse(error):
    """Ends the program with one sentence."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def start():
    """Parses the command line, config and overrides included, and plans."""
    try:
        define_flags()
        app.define_help_flags()
        argv = FLAGS(sys.argv)
        require_config(FLAGS.config)
        FLAGS.config.lock()
    except Exception as error:  # a config program is a user's: it may raise anything
        refuse(flag_error(error, isinstance(error, flags.Error)))
    app.run(main, argv=argv, flags_parser=lambda argv: argv)


if __name__ == "__main__":
    start()
