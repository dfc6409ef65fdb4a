"""Settings of all tests: virtual devices, fast compilation, one compilation cache, shared files."""

import typechecks  # noqa: F401  installs a hook, before every import of the library

# isort: split
import os
import shutil
import sys
import tempfile

import jax
import programs
import pytest
from absl import app, flags

from dmd_jax import data
from dmd_jax.quality import evaluation, features

# By configuration and not by XLA_FLAGS: programs that a test starts decide for themselves.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The tests' time is compilation. Partitioning and arithmetic stay as they are; code is less tuned.
jax.config.update("jax_disable_most_optimizations", True)
# XLA's older code generator takes less than half the time of its newer one, and one piece less than
# many. Programs that a test starts have it too. The JAX of Python 3.12 and later no longer has it.
if jax.__version_info__ < (0, 11):
    FAST = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()

CACHE = "JAX_COMPILATION_CACHE_DIR"
# Modules of the longest tests, begun first: so all workers end at about the same time.
LONGEST = (
    *("slurm", "loop", "long_run", "folder_teacher", "meshes", "benchmarks", "run", "launch"),
    *("self_forcing", "wan", "checkpoint", "stopped_programs", "refusals", "main", "docs"),
)


def pytest_configure(config):
    """One compilation cache for the run: its workers and the programs that they start share it.

    It is a new directory, removed at the end, unless the environment names one that stays.
    """
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="dmd_jax_cache_")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True))
    # Programs read these from the environment, which this process has already read.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Sorts the modules of `LONGEST` to the front."""
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Frees a module's compiled programs, which would grow to gigabytes over all modules."""
    yield
    jax.clear_caches()


def pytest_runtest_setup(item):
    """What is compared with PyTorch's code is skipped where there is none."""
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data directory in which 'mnist5k' stands prepared."""
    directory = str(tmp_path_factory.mktemp("tfds"))
    data.load("mnist5k", "train", directory)
    return directory


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The file of a tiny teacher of digits that learnt nothing."""
    return programs.save_tiny(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="session")
def real_judge(data_dir):
    """The judge of the embedded digits, whose features of the test images are computed once."""
    return evaluation.data_judge("mnist5k", data_dir, features.SHIPPED)


@pytest.fixture
def command_line(monkeypatch):
    """Sets sys.argv; what a program then defines and sets for its process is reset after it."""
    app.define_help_flags()  # absl does so once in a process
    known = set(flags.FLAGS)

    def forget():
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()

    def give(*args):
        forget()
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])

    yield give
    forget()
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture
def call(command_line):
    """Calls the program of a module in this process; what it exits with: None for success."""

    def call(module, *args):
        command_line(*args)
        module.define_flags()
        with pytest.raises(SystemExit) as end:
            app.run(module.main)
        return end.value.code

    return call


@pytest.fixture
def start(command_line):
    """Calls the program `main` in this process; returns its exit code: None for success."""
    from dmd_jax import main  # the rooms of training, which most tests do not need

    def call(*args):
        command_line(*args, "--compilation_cache=")
        with pytest.raises(SystemExit) as end:
            main.start()
        return end.value.code

    return call
