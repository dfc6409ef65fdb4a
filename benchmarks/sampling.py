"""Time of `python -m dmd_jax.sample` on one core and on all, as processes in turn.

    python benchmarks/sampling.py --checkpoint=mnist_teacher --num=2000 --steps=50

Each time is what the command prints: loading, compilation, sampling and writing. The last line
compares the images of the two.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

CHECKPOINT = flags.DEFINE_string("checkpoint", "mnist_teacher", "What to sample.")
NUM = flags.DEFINE_integer("num", 2000, "Images.")
STEPS = flags.DEFINE_integer("steps", 50, "Network steps.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Runs of each.")
DEVICES = {"one device": {"JAX_NUM_CPU_DEVICES": "1"}, "all cores": {}}


def seconds(out, environment):
    """Runs the command; returns the seconds that it prints."""
    command = [sys.executable, "-m", "dmd_jax.sample", f"--checkpoint={CHECKPOINT.value}"]
    command += [f"--num={NUM.value}", f"--steps={STEPS.value}", f"--out={out}"]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(re.search(r", ([\d.]+) s: ", done.stdout)[1])


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder) / f"{i}.npz" for i, name in enumerate(DEVICES)}
        times = {name: [] for name in DEVICES}
        for _ in range(ROUNDS.value):
            for name, environment in DEVICES.items():
                times[name].append(seconds(outs[name], environment))
        for name, found in times.items():
            print(f"{name:<12}{min(found):8.1f} s  {found}")
        one, all_cores = (np.load(out)["images"].astype(int) for out in outs.values())
    off = np.abs(one - all_cores)
    print(f"images: largest difference {off.max()}, in {np.mean(off > 0):.2e} of the pixels")


if __name__ == "__main__":
    app.run(main)
