"""A campaign of faults: killed runs, damaged checkpoints and bad input. Prints what went wrong.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills=5 --inputs=60 --nodamage

The run is a short one of configs/dmd.py with the shipped teacher: eight steps, a checkpoint after
every second, a judgement after every fourth, and a report.

    --kills    SIGKILL to the training program at random moments. Half of them follow the clock,
               half the n-th change in the run's folder, because runs are seldom caught writing by
               the clock. The same command then goes on, until a run reaches its end; the next run
               starts in a new folder. Every fourth run compiles anew.
    --damage   the newest checkpoint is damaged in each of `DAMAGES`, and the run goes on in this
               process
    --inputs   mistakes in commands and files: see `faulty_inputs.py`

A run that was disturbed must leave the files of one that was not, bit for bit, except for rates and
the id of its process; or refuse to start, in a sentence, and change nothing.
"""

import collections
import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faulty_files
import faulty_inputs
import jax
import numpy as np
from absl import app, flags

from dmd_jax.devices.paths import named_leaves
from dmd_jax.main import REFUSALS
from dmd_jax.training import checkpoint, loop
from dmd_jax.training.run import build

KILLS = flags.DEFINE_integer("kills", 100, "Number of SIGKILLs.", lower_bound=0)
DAMAGE = flags.DEFINE_bool("damage", True, "Whether checkpoints are damaged.")
INPUTS = flags.DEFINE_integer("inputs", 1000, "Number of bad inputs.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments and of the mistakes.")

ROOT = Path(__file__).parents[1]
STEPS = 8
SHORT = {
    "batch_size": 2,
    "steps": STEPS,
    "log.every": 2,
    "log.tensorboard": False,
    "checkpoint.every": 2,
    "evaluate.every": 4,
    "evaluate.samples": 70,
    "evaluate.num": 70,
    "evaluate.steps": (1,),
    "evaluate.teacher_steps": (1,),
    **{f"{role}.compute.unroll": 1 for role in ("teacher", "generator", "fake_score")},
}
SERIES = ("checkpoints", "best")
OWN = ("lock", "metrics.jsonl", "damaged", *SERIES)  # not compared byte by byte
NOBODY = 65534  # root reads everything: a run that must not is this user's
FAST = {  # less time for the compiler
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Program:
    """One process of the training command, its output in a file."""

    def __init__(self, workdir, data, cache):
        overrides = {**SHORT, "data.data_dir": data}
        self.workdir, self.output = workdir, workdir.with_suffix(".txt")
        command = [sys.executable, "-m", "dmd_jax.main", "--config=configs/dmd.py"]
        command += [f"--config.{name}={value}" for name, value in overrides.items()]
        command += [f"--workdir={workdir}", f"--compilation_cache={cache}"]
        env = os.environ | FAST | {"PYTHONPATH": str(ROOT)}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )

    def text(self):
        return self.output.read_text(errors="replace")

    def wait(self):
        """The exit code."""
        return self.process.wait()

    def kill(self):
        """Sends SIGKILL. Returns whether the process was still running."""
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def phase(self):
        """What the process is doing, as far as one can see from outside."""
        text, report = self.text(), f"step {STEPS}/{STEPS}"
        if any(self.workdir.glob("*/*orbax-checkpoint-tmp*")):
            return "saving"
        if "one checkpoint:" not in text:
            return "start-up"
        if report in text:
            return "exports, last judgement, report"
        if "step " not in text.partition("compiled first")[2] + text.partition("going on")[2]:
            return "loading and compiling"
        return "judging" if text.splitlines()[-1].startswith("sampling") else "steps"


def entries(folder):
    """The names in a folder and the sizes of its files, at this moment."""
    found = set()
    for parent, folders, files in os.walk(folder):
        found.update(os.path.join(parent, name) for name in folders)
        for file in files:
            path = os.path.join(parent, file)
            found.add((path, os.path.getsize(path) if os.path.exists(path) else -1))
    return found


def kill_by_clock(program, rng, whole):
    """Waits for a moment within the seconds of a whole run; returns at its end at the latest."""
    moment = time.monotonic() + rng.uniform(0, whole)
    while time.monotonic() < moment and program.process.poll() is None:
        time.sleep(0.002)


def kill_by_change(program, rng, whole):
    """Waits for the n-th change in the run's folder."""
    left, before = rng.randint(1, 90), entries(program.workdir)
    while left > 0 and program.process.poll() is None:
        time.sleep(0.01)
        now = entries(program.workdir)
        left, before = left - (now != before), now


def kills(folder, data, wanted, rng, count):
    """Kills `count` times; returns a list of what is wrong."""
    phases, wrong, runs, killed = collections.Counter(), [], 0, 0
    while killed < count:
        runs += 1
        workdir, cache = folder / f"run_{runs}", folder / f"cache_{runs // 4}"
        while True:
            program = Program(workdir, data, cache)
            if killed < count:
                rng.choice((kill_by_clock, kill_by_change))(program, rng, wanted.seconds)
                phase = program.phase()
                if program.kill():
                    killed += 1
                    phases[phase] += 1
                    continue
            if code := program.wait():
                wrong.append(f"{program.output}: exit code {code}")
            break
        differs = wanted.compare(workdir)
        wrong += differs
        print(f"{killed} kills, {runs} runs ended, {len(wrong)} wrong", flush=True)
        if not (code or differs):
            shutil.rmtree(workdir)
    print(f"{killed} kills of {runs} runs: {dict(phases)}")
    return wrong


# Damage. Each takes the folder of a checkpoint.


def largest(path):
    """The largest file of a checkpoint: values of weights."""
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncated(path):
    os.truncate(largest(path), largest(path).stat().st_size // 2)


def deleted(path):
    largest(path).unlink()


def zeroed(path):
    content = bytearray(largest(path).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    largest(path).write_bytes(content)


def flipped(path):
    content = bytearray(largest(path).read_bytes())
    content[len(content) // 2] ^= 1
    largest(path).write_bytes(content)


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def without_metadata(path):
    (path / "state" / "_METADATA").unlink()
    (path / "_CHECKPOINT_METADATA").unlink()


def unreadable(path):
    largest(path).chmod(0)


def half_renamed(path):
    path.rename(path.with_name(f"{path.name}.orbax-checkpoint-tmp-7"))


def garbage(path):
    (path / "manifest" / "metadata").write_text('{"arrays": {"nets": [')


def file_in_its_place(path):
    shutil.rmtree(path)
    path.write_text("a checkpoint\n")


DAMAGES = (
    *(truncated, deleted, zeroed, flipped, emptied, without_metadata, unreadable, half_renamed),
    *(garbage, file_in_its_place),
)


def damages(folder, wanted):
    """Damages the newest checkpoint in each way and starts the run again; returns what is wrong."""
    wrong = []
    for damage in DAMAGES:
        workdir = folder / damage.__name__
        shutil.copytree(wanted.workdir, workdir)
        damage(workdir / "checkpoints" / str(STEPS))
        before = entries(workdir)
        with as_nobody(folder) if damage is unreadable else contextlib.nullcontext():
            refusal, told = resumed(wanted.run, workdir)
        print(f"{damage.__name__}: {told or 'read all the same, and verified'}", flush=True)
        if refusal and (changed := before ^ entries(workdir)):
            wrong.append(f"{workdir}: refused, and changed {sorted(map(str, changed))}")
        if not refusal:
            wrong += wanted.compare(workdir)
    return wrong


def resumed(run, workdir):
    """Goes on with a run in this process. Returns (whether it was refused, what was said)."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setLevel(logging.WARNING)
    logging.getLogger("dmd_jax").addHandler(handler)
    refused = False
    try:
        with jax.set_mesh(run.mesh), contextlib.redirect_stdout(io.StringIO()):
            loop.train(run, workdir)
    except REFUSALS as error:
        refused = True
        said.write(f"error: {error}")
    logging.getLogger("dmd_jax").removeHandler(handler)
    return refused, said.getvalue().strip()


@contextlib.contextmanager
def as_nobody(folder):
    """Files are opened as another user, who owns the folder, if this process is root's."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class Wanted:
    """What an undisturbed run leaves, and how many seconds it takes."""

    def __init__(self, workdir, data, cache):
        self.workdir = workdir
        start, program = time.monotonic(), Program(workdir, data, cache)
        if program.wait():
            sys.exit(f"the undisturbed run failed:\n{program.text()}")
        self.seconds = time.monotonic() - start
        config = faulty_files.load_config()
        config.update_from_flattened_dict({**SHORT, "data.data_dir": str(data)})
        self.run = build(config)
        shape = self.run.state_shape()
        self.shapes = {"checkpoints": shape, "best": shape.ema}

    def compare(self, workdir):
        """What differs in another run's folder, as a list of lines."""
        here, there = self.files(workdir), self.files(self.workdir)
        wrong = [f"{workdir}: {name} differs" for name in there if here.get(name) != there[name]]
        return wrong + [f"{workdir}: {name} is left over" for name in here.keys() - there.keys()]

    def files(self, workdir):
        """{name: content} of a run's folder: checkpoints as arrays, records without rates."""
        found = {
            path.relative_to(workdir).as_posix(): path.read_bytes()
            for path in workdir.rglob("*")
            if path.is_file() and path.relative_to(workdir).parts[0] not in OWN
        }
        records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        found["metrics.jsonl"] = [
            {name: value for name, value in record.items() if "per_second" not in name}
            for record in records
        ]
        for series, shape in self.shapes.items():
            for path in (workdir / series).iterdir():
                tree, extra = checkpoint.read(path, shape)
                arrays = {n: np.asarray(x).tobytes() for n, x in named_leaves(tree).items()}
                found[f"{series}/{path.name}"] = arrays, extra
        return found


def main(_):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # as the programs
    folder, rng = Path(tempfile.mkdtemp(prefix="faults_")), random.Random(SEED.value)
    print(f"files of failures stay in {folder}")
    wrong = []
    if KILLS.value or DAMAGE.value:
        data, cache = folder / "data", folder / "cache"
        wanted = Wanted(folder / "undisturbed", data, cache)
        print(f"an undisturbed run takes {wanted.seconds:.0f} s", flush=True)
    if DAMAGE.value:
        wrong += damages(folder, wanted)
    if KILLS.value:
        wrong += kills(folder, data, wanted, rng, KILLS.value)
    if INPUTS.value:
        wrong += faulty_inputs.campaign(folder, SEED.value, INPUTS.value)
    if not wrong:
        shutil.rmtree(folder)
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    app.run(main)
