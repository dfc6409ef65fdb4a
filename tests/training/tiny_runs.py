"""What tests of tiny runs share: started in this process, and what they leave."""

import json

import jax
import programs

from dmd_jax.training import checkpoint, loop

STEPS = programs.SHORT["steps"]


def start(run, workdir, profile=range(0)):
    """`loop.train` under the run's mesh."""
    with jax.set_mesh(run.mesh):
        return loop.train(run, workdir, profile)


def final(run, workdir, step=STEPS):
    """The TrainState that a run left, and what else it kept."""
    return checkpoint.read(workdir / "checkpoints" / str(step), run.state_shape())


def records(workdir):
    """The lines of metrics.jsonl without the rates, which are measurements."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
