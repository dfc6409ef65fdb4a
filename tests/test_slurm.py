"""launch/slurm.sbatch in a real Slurm, on this machine: peers, preemption, requeue."""

import json
import re
import sys

import programs
import pytest
import slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm.INSTALLED, reason="Slurm (slurm-wlm, munge) is not installed"),
]

SMALL = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
PATIENCE = 900  # seconds for a start of two JAX processes on a busy machine


class Job:
    """A job of the launcher: two tasks of one node."""

    def __init__(self, cluster, clone, *flags):
        script = ("sbatch", "--parsable", *SMALL, "launch/slurm.sbatch", *flags)
        self.number = cluster(*script, cwd=clone).strip()
        self._cluster, self._log = cluster, clone / f"dmd_jax-{self.number}.log"

    def shown(self, field):
        """A field of what Slurm says about the job: JobState, Restarts."""
        said = self._cluster("scontrol", "show", "job", self.number)
        return re.search(rf"\b{field}=(\S+)", said)[1]

    def said(self, words):
        """How often the job has printed these words."""
        return self._log.read_text().count(words) if self._log.exists() else 0

    def until(self, condition, seconds=PATIENCE):
        """Waits for `condition()`; fails, with the log, where the job ends before."""

        def met():
            ended = self.shown("JobState") in ("COMPLETED", "FAILED", "TIMEOUT")
            found = condition()
            assert found or not ended, self._log.read_text()
            return found

        slurm.until(met, seconds)


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster() as call:
        yield call


@pytest.fixture
def clone(tmp_path):
    """A directory as a user submits from: this clone, with its virtual environment."""
    for name in ("launch", "dmd_jax", "configs"):
        (tmp_path / name).symlink_to(programs.ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


TASK = """#!/usr/bin/env bash
# In place of Python: waits for SIGTERM, and "has saved" then; a file says with what else it ends.
trap 'exit 75' TERM
echo begun
until [ -e end ]; do sleep 0.1; done
exit "$(cat end)"
"""


@pytest.fixture
def pretence(clone):
    """The clone, with tasks in place of Python that train nothing."""
    (clone / ".venv").unlink()
    (clone / ".venv" / "bin").mkdir(parents=True)
    python = clone / ".venv" / "bin" / "python"
    python.write_text(TASK)
    python.chmod(0o755)
    return clone


def test_a_job_comes_back_after_the_signal_of_its_time_limit_and_not_after_its_end(
    cluster, pretence
):
    job = Job(cluster, pretence)
    job.until(lambda: job.said("begun") == 2)
    # What --signal sends before the time is up: SIGTERM to the tasks, not to the script.
    cluster("scancel", "--signal=TERM", job.number)
    job.until(lambda: job.said("begun") == 4)
    (pretence / "end").write_text("0")
    job.until(lambda: job.shown("JobState") == "COMPLETED")
    assert job.shown("Restarts") == "1"


def test_a_job_that_is_cancelled_or_fails_does_not_come_back(cluster, pretence):
    cancelled = Job(cluster, pretence)
    cancelled.until(lambda: cancelled.said("begun") == 2)
    cluster("scancel", cancelled.number)  # its tasks end as those of a preempted job do
    cancelled.until(lambda: cancelled.shown("JobState") == "CANCELLED", 120)
    (pretence / "end").write_text("1")
    failed = Job(cluster, pretence)
    failed.until(lambda: failed.shown("JobState") == "FAILED", 120)
    assert cancelled.shown("Restarts") == failed.shown("Restarts") == "0"
    assert cancelled.shown("JobState") == "CANCELLED"


STEPS = 300
RUN = {
    "steps": STEPS,
    "log.every": 20,
    "checkpoint.every": 20,
    "evaluate.every": STEPS,
    "evaluate.steps": (1,),
}


def test_a_preempted_job_goes_on_to_its_end(cluster, clone, teacher, data_dir, monkeypatch):
    """Two tasks, nothing set but --distributed; a more urgent job takes the node from them."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    workdir = clone / "run"
    flags = programs.flags(workdir, programs.short(teacher, data_dir, **RUN))
    job = Job(cluster, clone, *flags)
    job.until(lambda: any(workdir.glob("checkpoints/[0-9]*")))
    assert job.said("devices: 2 (cpu)") == 2  # each of the tasks sees the other's device
    cluster("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=true")
    job.until(lambda: job.said("stopped and saved at step") == 2)
    assert not (workdir / "checkpoints" / str(STEPS)).exists()  # it was interrupted in time

    job.until(lambda: job.shown("JobState") == "COMPLETED")
    assert job.shown("Restarts") == "1" and job.said("going on from step") == 2
    assert (workdir / "report.md").exists()
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [line["step"] for line in lines if "generator/loss" in line]
    assert losses == list(range(20, STEPS + 1, 20))
