r"""Runs that fail on purpose: what the metrics of health show, and how long before the samples do.

    python benchmarks/alarms.py --out=runs/alarms
    python benchmarks/alarms.py --out=runs/alarms --only=healthy,rate

Each run is configs/dmd.py with one mistake; none is stopped. The table says at which step the
monitor with its default thresholds would have stopped the run (docs/resume.md), at which step the
samples have become bad (twice the distance of the healthy run at that step, from there to the end),
and which metrics left the range of the healthy run first, and when. Runs that have ended are not
run again.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from dmd_jax.training.health import Diverged, Monitor, Thresholds

EVERY = 25  # steps between records
JUDGED = 50  # steps between judgements
RATIO = 2.0  # a metric has left the range of a healthy run where it is beyond it by this factor

# name: (what is wrong, variant, flags, the healthy run to compare with)
RUNS = {
    "healthy": ("nothing", "", (), "healthy"),
    "rate": (
        "the generator's rate, 30 times",
        "",
        ("--config.generator.optimizer.learning_rate=4.5e-3",),
        "healthy",
    ),
    "critic": (
        "the fake score's rate, a 400th",
        "",
        ("--config.fake_score.optimizer.learning_rate=1e-6",),
        "healthy",
    ),
    "guidance": ("guidance 6 for 1.25", "", ("--config.method.guidance=6.0",), "healthy"),
    "healthy_gan": ("nothing", "dmd2", (), "healthy_gan"),
    "gan": ("gan_weight 20 for 0.2", "dmd2", ("--config.method.gan_weight=20.0",), "healthy_gan"),
}


def train(name, steps, folder, more):
    """One run; nothing where it has its report."""
    _, variant, flags, _ = RUNS[name]
    if (folder / name / "report.json").exists():
        return
    config = ":".join(filter(None, ("configs/dmd.py", variant)))
    command = (
        *(sys.executable, "-m", "dmd_jax.main", f"--config={config}", f"--config.steps={steps}"),
        *(f"--workdir={folder / name}", f"--config.log.every={EVERY}", *flags),
        *("--config.evaluate.steps=(4,)", "--config.evaluate.teacher_steps=(50,)"),
        *(f"--config.evaluate.every={JUDGED}", f"--config.health.patience={steps}", *more),
    )
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def records(folder, name):
    """({step: metrics}, {step: distance}) of a run."""
    metrics, distances = {}, {}
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "quality/fd" in record:  # None where it was not finite
            fd = record["quality/fd"]
            distances[record["step"]] = math.inf if fd is None else fd
        if "generator/loss" in record:
            metrics[record["step"]] = record
    return metrics, distances


def stopped(metrics):
    """The step at which the monitor stops a run, and the symptom; None if it never does."""
    monitor = Monitor(Thresholds())
    for step, record in metrics.items():
        numbers = {key: value for key, value in record.items() if value is not None}
        try:
            monitor.update(step, numbers)
        except Diverged as error:
            return step, str(error).split(", ")[1].split(":")[0]
    return None


def spoiled(distances, healthy):
    """The first step from which the distance stays above twice the healthy one; None if none is."""
    bad = [step for step in distances if step in healthy]
    good = [step for step in bad if distances[step] <= 2 * healthy[step]]
    return next((step for step in bad if not good or step > good[-1]), None)


def first_signs(metrics, healthy):
    """[(step, metric, value, healthy range)] at which metrics leave the healthy range for good."""
    signs = []
    for key in next(iter(healthy.values())):
        if key == "step" or "learning_rate" in key or "per_second" in key:
            continue
        usual = [record[key] for record in healthy.values() if record.get(key) is not None]
        found = {s: record[key] for s, record in metrics.items() if record.get(key) is not None}
        if not usual or not found or min(usual) <= 0:
            continue
        low, high = min(usual) / RATIO, max(usual) * RATIO
        fine = [step for step, value in found.items() if low <= value <= high]
        bad = [step for step in found if not fine or step > fine[-1]]
        if bad:
            signs.append((bad[0], key, found[bad[0]], f"{min(usual):.2g} to {max(usual):.2g}"))
    return sorted(signs)


def table(folder, names):
    """Markdown of the runs that are there."""
    lines = [
        "| wrong | monitor stops at | samples are bad from | first signs (step: metric) | FD |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for name in names:
        what, _, _, partner = RUNS[name]
        metrics, distances = records(folder, name)
        usual, good = records(folder, partner)
        stop = stopped(metrics)
        signs = "; ".join(
            f"{step}: `{key}` {value:.2g} ({usually})"
            for step, key, value, usually in first_signs(metrics, usual)[:4]
        )
        lines.append(
            f"| {what} | {f'{stop[0]}, {stop[1]}' if stop else 'never'} "
            f"| {spoiled(distances, good) or 'never'} | {signs or 'none'} "
            f"| {[*distances.values()][-1]:.2f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default=",".join(RUNS), help="names of runs, with commas")
    parser.add_argument("--steps", type=int, default=600)
    options, more = parser.parse_known_args()
    names = options.only.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"--only: no {sorted(unknown)} among {sorted(RUNS)}")
    for name in names:
        train(name, options.steps, options.out, more)
    print(table(options.out, names))


if __name__ == "__main__":
    main()
