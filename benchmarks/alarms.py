r"""Runs that fail on purpose: what the metrics of health show, and how long before the samples do.

    python benchmarks/alarms.py --out=runs/alarms
    python benchmarks/alarms.py --out=runs/alarms --only=rate    and the healthy run beside it

Each run is configs/dmd.py with one mistake; none is stopped. The table says at which step the
alarms ring and the monitor would have stopped the run (docs/training.md#alarms), at which step the
samples have become bad (twice the distance of the healthy run at that step, from there to the end),
and which metrics left those of the healthy run first, when, and how far (in brackets: healthy).
Runs that have ended are not run again.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from dmd_jax.training.alarms import Alarms
from dmd_jax.training.health import Diverged, Monitor, Thresholds

EVERY = 25  # steps between records
JUDGED = 50  # steps between judgements
RATIO = 2.0  # a metric has left that of the healthy run where it differs by this factor

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


def rung(metrics):
    """{what an alarm says first: the step at which it rings}."""
    alarms, found = Alarms(), {}
    for step, record in metrics.items():
        numbers = {key: value for key, value in record.items() if value is not None}
        for line in alarms.update(step, numbers):
            found.setdefault(line.split(": ")[1].split(" is ")[0], step)
    return found


def spoiled(distances, healthy):
    """The first step from which the distance stays above twice the healthy one; None if none is."""
    bad = [step for step in distances if step in healthy]
    good = [step for step in bad if distances[step] <= 2 * healthy[step]]
    return next((step for step in bad if not good or step > good[-1]), None)


def first_signs(metrics, healthy):
    """[(step, metric, value, healthy value)]: where metrics leave those of the healthy run.

    A sign is a metric that is beyond the healthy one of the same step by the factor `RATIO` in
    `Thresholds.patience` records in a row. The strongest of a step comes first.
    """
    signs, patience = [], Thresholds().patience
    for key in next(iter(healthy.values())):
        if key == "step" or "learning_rate" in key or "per_second" in key:
            continue
        pairs = {
            step: (record[key], healthy[step][key])
            for step, record in metrics.items()
            if step in healthy and record.get(key) and healthy[step].get(key)
        }
        # The distance of both in factors; another sign is the farthest.
        far = {
            step: abs(math.log(a / b)) if a * b > 0 else math.inf for step, (a, b) in pairs.items()
        }
        steps = list(pairs)
        for place in range(len(steps) - patience + 1):
            if all(far[step] > math.log(RATIO) for step in steps[place : place + patience]):
                first = steps[place]
                signs.append((first, -far[first], key, *pairs[first]))
                break
    return [(step, key, a, b) for step, _, key, a, b in sorted(signs)]


def table(folder, names):
    """Markdown of the runs that are there."""
    lines = [
        "| wrong | alarms (step: what) | monitor stops at | samples are bad from "
        "| first signs (step: metric) | FD |",
        "| --- | --- | --- | ---: | --- | ---: |",
    ]
    for name in names:
        what, _, _, partner = RUNS[name]
        metrics, distances = records(folder, name)
        usual, good = records(folder, partner)
        stop = stopped(metrics)
        signs = "; ".join(
            f"{step}: `{key}` {value:.2g} ({usual_value:.2g})"
            for step, key, value, usual_value in first_signs(metrics, usual)[:4]
        )
        lines.append(
            f"| {what} | {'; '.join(f'{step}: {line}' for line, step in rung(metrics).items())} "
            f"| {f'{stop[0]}, {stop[1]}' if stop else 'never'} "
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
    names = [*dict.fromkeys(each for name in names for each in (RUNS[name][3], name))]
    for name in names:
        train(name, options.steps, options.out, more)
    print(table(options.out, names))


if __name__ == "__main__":
    main()
