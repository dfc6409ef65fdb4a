"""A Slurm cluster of one node on this machine, its daemons in a directory of their own."""

import contextlib
import functools
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

INSTALLED = all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch", "srun")))

# JAX connects to the name of the first node, so that it must be one that resolves.
# cred_expire: a requeued job is held for that long, 120 s by default.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={root}/munge,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=train Nodes=localhost PriorityTier=1 Default=YES
PartitionName=urgent Nodes=localhost PriorityTier=2
"""
# Two files stand in for GPUs. Slurm only counts them.
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def free_ports(count):
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def until(condition, seconds):
    """Waits for `condition()`; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def cluster():
    """Two CPUs, two "GPUs", two partitions: jobs of `urgent` requeue those of `train`.

    Yields call(*command, cwd=None): runs a command of Slurm, returns what it prints. Skips the
    test where the daemons do not run, for want of rights or of a host's name.
    """
    root = Path(tempfile.mkdtemp(prefix="slurm_"))  # short: a socket's path has 107 bytes
    root.chmod(0o755)  # munge wants its socket within everybody's reach
    host = socket.gethostname().split(".")[0]
    config, key = root / "slurm.conf", root / "key"
    values = {"root": root, "host": host, "user": getpass.getuser(), "ports": free_ports(2)}
    config.write_text(CONFIG.format(**values))
    (root / "gres.conf").write_text(GPUS)
    (root / "state").mkdir()
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(config)}

    run = functools.partial(subprocess.run, env=env, capture_output=True, text=True, check=False)

    def call(*command, cwd=None):
        done = run(list(map(str, command)), cwd=cwd)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    files = [("key-file", "key"), ("socket", "munge"), ("pid-file", "munged.pid")]
    files += [("log-file", "munged.log"), ("seed-file", "seed")]
    munge = [f"--{option}={root / name}" for option, name in files]
    daemons = (
        ["munged", "--foreground", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    )
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        for command in daemons:
            log = stack.enter_context((root / f"{command[0]}.out").open("w"))
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        try:
            until(lambda: "idle" in run("sinfo").stdout, 60)
        except AssertionError:
            pytest.skip("Slurm is installed, but its daemons do not run on this machine")
        try:
            yield call
        finally:
            call("scancel", "--user", getpass.getuser())
            until(lambda: not call("squeue", "--noheader"), 180)
