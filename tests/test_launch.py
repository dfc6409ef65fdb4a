"""Every launcher starts the one entry point, and --distributed joins what a scheduler started."""

import json
import os
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import programs
import pytest
import yaml

from dmd_jax.training.preemption import STOPPED

LAUNCH = programs.ROOT / "launch"
SCRIPTS = ("gke_xpk.sh", "gpu_node.sh", "slurm.sbatch", "tpu_pod.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_that_starts_main(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], check=False).returncode == 0
    # One process drives all GPUs of a node; all other launchers start several.
    start = "python -m dmd_jax.main" + ("" if name == "gpu_node.sh" else " --distributed")
    assert start in (LAUNCH / name).read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = subprocess.run(
        ["shellcheck", *(LAUNCH / name for name in SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "" and found.returncode == 0


def test_the_jobset_starts_main_once_a_host():
    [job] = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"][:4] == ["python", "-m", "dmd_jax.main", "--distributed"]
    # 4x4 chips, as many a host as the container asks for.
    columns, rows = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert columns * rows == chips * spec["completions"]


def test_every_scheduler_knows_the_status_of_a_stopped_run():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    rules = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [STOPPED]
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED]
    for name in ("gke_xpk.sh", "slurm.sbatch", "tpu_pod.sh"):
        assert re.search(rf"(=|= |!= ){STOPPED}\b", (LAUNCH / name).read_text()), name


GCLOUD = """#!/usr/bin/env bash
# Stands in for Google's: one slice, whose first training ends with STATUS and leaves it in STATE.
cd "$(dirname "$0")" && printf '%s\\n' "$*" >> calls
case $* in
  *" describe "*) cat state ;;
  *" create "*) echo ACTIVE > state ;;
  *" delete "*) rm state ;;
  *" ssh "*) if [ ! -e trained ]; then touch trained; echo "$STATE" > state; exit "$STATUS"; fi ;;
esac
"""


def stand_in(directory, name, source):
    """Writes a program in place of one that is not here."""
    (directory / name).write_text(source)
    (directory / name).chmod(0o755)


def launch(directory, name, *args, **environment):
    """Runs a script with the programs of a directory before others; returns the ended process."""
    environment = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"} | environment
    return subprocess.run(
        [LAUNCH / name, *args], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "status, state, ends, calls",
    [
        (0, "ACTIVE", 0, "create scp ssh"),
        (1, "ACTIVE", 1, "create scp ssh"),  # an error, which would come again
        (75, "ACTIVE", 0, "create scp ssh scp ssh"),
        (255, "SUSPENDED", 0, "create scp ssh delete create scp ssh"),
    ],
    ids=["done", "error", "stopped", "taken-away"],
)
def test_a_tpu_slice_that_is_taken_away_is_asked_for_again(status, state, ends, calls, tmp_path):
    stand_in(tmp_path, "gcloud", GCLOUD)
    stand_in(tmp_path, "sleep", "#!/bin/sh\n")
    environment = dict(MOUNT="mount it", STATUS=str(status), STATE=state)
    args = "slice", "zone", "v6e-16", "--workdir=a b"
    ended = launch(tmp_path, "tpu_pod.sh", *args, **environment)
    assert ended.returncode == ends, ended.stderr
    made = (tmp_path / "calls").read_text()
    assert re.findall(r"^compute tpus \S+ (create|delete|scp|ssh) ", made, re.M) == calls.split()
    assert "--runtime-version=v2-alpha-tpuv6e" in made and " mount it\n" in made
    assert "-m dmd_jax.main --distributed --workdir=a\\ b" in made


def test_a_tpu_slice_that_is_refused_is_not_asked_for_without_end(tmp_path):
    refusing = GCLOUD.replace("echo ACTIVE > state", "exit 1")
    stand_in(tmp_path, "gcloud", refusing)
    stand_in(tmp_path, "sleep", "#!/bin/sh\n")
    assert launch(tmp_path, "tpu_pod.sh", "slice", "zone", "v6e-16").returncode == 1
    assert (tmp_path / "calls").read_text().count(" create ") == 10


def test_a_tpu_slice_of_no_known_type_is_not_asked_for(tmp_path):
    stand_in(tmp_path, "gcloud", "#!/bin/sh\nexit 9\n")
    ended = launch(tmp_path, "tpu_pod.sh", "slice", "zone", "--config=configs/dmd.py")
    assert ended.returncode == 2
    assert "--config=configs/dmd.py is no type of slice" in ended.stderr


def test_xpk_gets_the_command_as_one_argument(tmp_path):
    stand_in(tmp_path, "xpk", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    args = "run", "cluster", "v6e-16", "image", "--workdir=a b"
    printed = launch(tmp_path, "gke_xpk.sh", *args).stdout
    command = "cd /dmd_jax && exec python -m dmd_jax.main --distributed --workdir=a\\ b"
    assert f"--command={command}" in printed and "--restart-on-exit-codes=75\n" in printed


def slurm(process, count, port):
    """The environment of a task of a Slurm job; JAX derives its port from the job's number."""
    return {
        "SLURM_JOB_ID": str(port - (2**16 - 2**12)),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def free_port():
    """A port that nobody listens on, of the range that JAX uses under Slurm."""
    for port in range(2**16 - 2**12, 2**16):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
    raise OSError("no free port")


@pytest.mark.slow
def test_distributed_is_refused_where_there_is_nothing_to_join():
    completed = programs.python("-m", "dmd_jax.main", "--distributed", "--dry_run")
    assert completed.returncode == 1
    assert completed.stderr.startswith("error: --distributed found no ")


IMPATIENT = "from dmd_jax import main; main.PATIENCE = 3; main.start()"


@pytest.mark.slow
@pytest.mark.parametrize("alone", [0, 1], ids=["coordinator", "other"])
def test_a_job_with_a_process_missing_ends_with_an_error(alone):
    """JAX would abort it later, without a word of what is wrong."""
    variables = slurm(alone, 2, free_port())
    ended = programs.python("-c", IMPATIENT, "--distributed", "--dry_run", **variables)
    assert ended.returncode == 1
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("error: not all processes of this job have joined within 3 s")
    assert f"Connecting to JAX distributed service on {variables['SLURM_STEP_NODELIST']}:" in (
        ended.stderr
    )


@pytest.mark.slow
def test_two_processes_of_a_job_train_as_one(tmp_path, teacher, data_dir):
    """Under Slurm's variables, to the report; the same numbers as one process to rounding."""

    def run(name, *more, **environment):
        few = {"steps": 6, "evaluate.every": 4, "evaluate.steps": (2,)}
        flags = programs.flags(tmp_path / name, programs.short(teacher, data_dir, **few))
        return programs.python("-m", "dmd_jax.main", *more, *flags, **environment)

    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(run, "two", "--distributed", **slurm(i, 2, port)) for i in range(2)]
        ended = [pool.submit(run, "one"), *tasks]
        for completed in (task.result() for task in ended):
            assert completed.returncode == 0, completed.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for loss in (key for key in a if key.endswith("/loss")):
            np.testing.assert_allclose(a[loss], b[loss], rtol=1e-3)
    assert (tmp_path / "two" / "report.md").exists()
    assert (tmp_path / "two" / "generator.safetensors").exists()
