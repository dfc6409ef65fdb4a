"""Every launcher starts the one entry point, and --distributed joins what a scheduler started."""

import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import programs
import pytest
import yaml

LAUNCH = programs.ROOT / "launch"
SCRIPTS = ("gpu_node.sh", "slurm.sbatch", "tpu_pod.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_that_starts_main(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], check=False).returncode == 0
    # One process drives all GPUs of a node; all other launchers start several.
    start = "python -m dmd_jax.main" + ("" if name == "gpu_node.sh" else " --distributed")
    assert start in (LAUNCH / name).read_text()


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
