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

STEPS = 1000
RUN = {
    "steps": STEPS,
    "log.every": 50,
    "checkpoint.every": 50,
    "evaluate.every": STEPS,
    "evaluate.steps": (1,),
}


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


def test_a_job_finds_its_peers_is_stopped_and_preempted_and_comes_back_to_its_end(
    cluster, clone, teacher, data_dir, monkeypatch
):
    """Two tasks, nothing set but --distributed; the job is submitted once."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    workdir, saved = clone / "run", clone / "run" / "checkpoints"
    small = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
    flags = programs.flags(workdir, programs.short(teacher, data_dir, **RUN))
    script = ("sbatch", "--parsable", *small, "launch/slurm.sbatch", *flags)
    job = cluster(*script, cwd=clone).strip()

    def shown(field):
        return re.search(rf"\b{field}=(\S+)", cluster("scontrol", "show", "job", job))[1]

    def log():
        path = clone / f"dmd_jax-{job}.log"
        return path.read_text() if path.exists() else ""

    def trains(restarts):
        """Whether this start has gone beyond the newest checkpoint that it found."""
        state = shown("JobState")
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log()
        begun = log().count("devices: 2 (cpu)") > 2 * restarts
        return begun and len(list(saved.glob("[0-9]*"))) > 0 and state == "RUNNING"

    slurm.until(lambda: trains(0), 900)
    # What --signal sends before the time is up: SIGTERM to the tasks, not to the script.
    cluster("scancel", "--signal=TERM", job)
    slurm.until(lambda: shown("Restarts") == "1", 300)
    assert log().count("stopped and saved at step") == 2, log()

    slurm.until(lambda: trains(1) and "going on from step" in log(), 900)
    urgent = ("--partition=urgent", "--nodes=1", "--ntasks=2", "--output=/dev/null")
    cluster("sbatch", *urgent, "--wrap=true")
    slurm.until(lambda: shown("Restarts") == "2", 300)
    assert log().count("stopped and saved at step") == 4, log()
    assert not (saved / str(STEPS)).exists()  # it was interrupted in time, both times

    slurm.until(lambda: shown("JobState") == "COMPLETED", 900)
    assert log().count("going on from step") == 4
    assert (workdir / "report.md").exists()
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [line["step"] for line in lines if "generator/loss" in line]
    assert losses == list(range(50, STEPS + 1, 50))
