"""Whole runs, most in processes of their own: killed, stopped, resumed, finished."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import programs
import pytest
from tiny_runs import records, start

from dmd_jax.training import checkpoint
from dmd_jax.training.preemption import STOPPED, Preemption, Stopped
from dmd_jax.training.run import build

pytestmark = pytest.mark.slow

STEPS = 200
RUN = {
    "steps": STEPS,
    "checkpoint.every": 20,
    "evaluate.every": 60,
    "log.every": 10,
    "log.tensorboard": False,
}


@pytest.fixture(scope="module")
def launch(teacher, data_dir):
    """Starts a run in a directory; returns the process, its output in a pipe."""

    def call(workdir, **overrides):
        values = programs.short(teacher, data_dir, **(RUN | overrides))
        return subprocess.Popen(
            [sys.executable, "-m", "dmd_jax.main", *programs.flags(workdir, values)],
            cwd=programs.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return call


@pytest.fixture(scope="module")
def straight(launch, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    process = launch(workdir)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert (workdir / "report.md").exists() and (workdir / "report.png").exists()
    return workdir


@pytest.fixture(scope="module")
def final_state(teacher, data_dir):
    """Reads all of a run's last state: {path: array}."""
    run = build(programs.config(teacher, data_dir, **RUN), devices=jax.devices()[:1])

    def read(workdir):
        state, extra = checkpoint.read(workdir / "checkpoints" / str(STEPS), run.state_shape())
        named = checkpoint.named_leaves(state)
        return {name: np.asarray(leaf) for name, leaf in named.items()}, extra

    return read


def until(condition, process):
    """Waits for `condition()` while the process lives."""
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def newest(saved):
    """The last complete checkpoint, 0 before the first: old ones go, so that one may be missed."""
    return max((int(path.name) for path in saved.glob("*") if path.name.isdigit()), default=0)


def assert_same_run(workdir, straight, final_state):
    (state, extra), (wanted, wanted_extra) = final_state(workdir), final_state(straight)
    assert state.keys() == wanted.keys() and extra == wanted_extra
    assert [name for name in state if state[name].tobytes() != wanted[name].tobytes()] == []
    for name in ("generator.safetensors", "best.safetensors"):
        assert programs.same_tensors(workdir / name, straight / name)
    assert records(workdir) == records(straight)


def test_a_run_killed_and_stopped_at_every_moment_ends_with_the_bits_of_one_that_was_not(
    launch, straight, final_state, tmp_path
):
    """One run, four times interrupted: each start has to go on from what the one before left."""
    workdir = tmp_path / "run"
    metrics, saved = workdir / "metrics.jsonl", workdir / "checkpoints"

    def interrupt(when, how=signal.SIGKILL):
        process = launch(workdir)
        until(when, process)
        process.send_signal(how)
        output, _ = process.communicate()
        assert not (saved / str(STEPS)).exists()  # it was interrupted in time
        return process.returncode, output

    interrupt(metrics.exists)  # before the first checkpoint
    code, output = interrupt(lambda: newest(saved) >= 40, signal.SIGTERM)
    assert code == STOPPED and "stopped and saved at step" in output
    code, output = interrupt(lambda: newest(saved) >= 80)  # between two checkpoints
    assert code == -signal.SIGKILL and "going on from step" in output
    interrupt(lambda: any(saved.glob("*tmp*")))  # while saving

    process = launch(workdir)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same_run(workdir, straight, final_state)


def test_a_finished_run_says_so_reprints_its_report_and_refuses_another_config(launch, straight):
    report = (straight / "report.md").read_text()
    process = launch(straight)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert "this run is finished" in printed and report in printed

    other = launch(straight, **{"method.guidance": 3.0})
    printed, _ = other.communicate()
    assert other.returncode != 0 and "Traceback" not in printed
    assert "method.guidance: the run here has 1.25, this command 3.0" in printed


def test_videos_of_prompts_train_go_on_and_are_judged(tmp_path, monkeypatch):
    """In this process: the command's own part is that of the runs above."""
    config = programs.load_config("configs/dmd.py", "wan_tiny")
    config.update_from_flattened_dict(
        {
            **{"steps": 4, "batch_size": 8, "checkpoint.every": 2, "evaluate.every": 3},
            "generator_every": 1,  # so that it learns after the stop, too
            **{"evaluate.num": 8, "evaluate.steps": (2,), "evaluate.teacher_steps": (2,)},
            **{"log.every": 2, "log.tensorboard": False, "data.num": 80},
            **{f"data.{part}": str(tmp_path / part) for part in ("latents", "embeddings")},
            # A loop over the layers is compiled sooner than all of them.
            **{f"{role}.compute.unroll": 1 for role in ("teacher", "generator", "fake_score")},
        }
    )

    def train(name):
        return start(build(config, jax.devices()[:1]), tmp_path / name)

    report = train("straight").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(Preemption, "requested", lambda self, step: step == 2)
        with pytest.raises(Stopped, match="at step 2;"):
            train("stopped")
    assert train("stopped")
    straight, stopped = (
        tmp_path / name / "generator.safetensors" for name in ("straight", "stopped")
    )
    assert programs.same_tensors(stopped, straight)
    assert "| digit | motion | flicker |" in report and "| real | – | – |" in report
    assert (tmp_path / "straight" / "report.png").exists()
