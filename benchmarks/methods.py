r"""Every method on the shipped teacher of digits, at equal network passes.

    python benchmarks/methods.py --out=runs/methods
    python benchmarks/methods.py --out=runs/methods --only=dmd,sid --seeds=0 --passes=50_000
    python -m dmd_jax.main --config=benchmarks/methods.py:dmd --config.seed=1    # one run alone

A pass is a forward pass of the teacher's network over one image, counted in FLOPs: the steps of a
run are as many as its passes allow. Learning rates, batches and weights are those of
configs/dmd.py. One student serves 4, 2 and 1 steps, but for a method that fixes its steps. Runs
that have a report are not run again, so that a second start goes on; each start ends with the
tables and the figure of all reports in the folder, `methods.md` and `methods.png`.
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from dmd_jax.quality.report import COLOURS, INK, RULE, STYLE
from dmd_jax.training.cost import cost
from dmd_jax.training.run import build

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BUDGETS = dict(strides=(1, 2, 4))  # one student for 4, 2 and 1 steps
SHORT = dict(warmup=100)  # of the tangent: these runs have fewer steps than the config's

# name: (heading, variant of configs/dmd.py, changes of its method, steps of the student)
METHODS = {
    "dmd": ("DMD", "", {}, (4, 2, 1)),
    "one_step": ("DMD, for one step alone", "one_step", {}, (1,)),
    "any_step": ("DMD, drawn times of 1 to 8 steps", "any_step", {}, (8, 4, 3, 2, 1)),
    "sid": ("SiD", "sid", {}, (4, 2, 1)),
    "dmd2": ("DMD2", "dmd2", BUDGETS, (4, 2, 1)),
    "sida": ("SiDA", "sida", BUDGETS, (4, 2, 1)),
    "f_distill": ("f-distill, Jensen-Shannon", "f_distill", BUDGETS, (4, 2, 1)),
    "decoupled": ("Decoupled DMD", "decoupled", BUDGETS, (4, 2, 1)),
    "phased": ("Phased DMD, two experts", "phased", {}, (4,)),
    "tdm": ("TDM: Phased DMD, a call a phase, one network", "tdm", {}, (4,)),
    "rcm": ("rCM", "rcm", BUDGETS | SHORT, (4, 2, 1)),
    "consistency": ("consistency distillation", "consistency", {}, (4, 2, 1)),
    "scm": ("sCM", "scm", SHORT, (4, 2, 1)),
    "meanflow": ("MeanFlow", "meanflow", SHORT, (4, 2, 1)),
}
# key of a report's rows: (heading, format)
MEASURES = {
    "fd": ("FD-MNIST64 ↓", ".2f"),
    "precision": ("precision ↑", ".3f"),
    "recall": ("recall ↑", ".3f"),
    "accuracy": ("accuracy ↑", ".1%"),
    "diversity": ("diversity", ".2f"),
    "nearest_train": ("nearest train", ".1f"),
}


def get_config(name):
    """The config of one method; how many steps it has is for the caller to say."""
    _, variant, changes, steps = METHODS[name]
    config = runpy.run_path(str(CONFIGS / "dmd.py"))["get_config"](variant)
    config.method.update(changes)
    config.evaluate.update(steps=steps, teacher_steps=(50,), every=100_000)  # judged at the end
    return config


def work(name, passes):
    """What a run of so many passes is: a dict of numbers."""
    run = build(get_config(name))
    total = cost(run)
    updates = sum(total.steps.values())
    step = total.run / updates / (total.forward / total.batch_size)
    return {
        "steps": round(passes / step),
        "networks": len(run.nets) + len(run.frozen),
        "passes": step / total.batch_size,
        "data": run.method.uses_data,
    }


def train(name, seed, steps, folder, more):
    """One run, from the command line, as a user has it; nothing where it has its report."""
    workdir = folder / f"{name}_{seed}"
    if (workdir / "report.json").exists():
        return
    command = (
        *(sys.executable, "-m", "dmd_jax.main", f"--config={__file__}:{name}"),
        *(f"--config.seed={seed}", f"--config.steps={steps}", f"--workdir={workdir}", *more),
    )
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def results(folder):
    """{(name, student's steps): [row of a seed]}, the teacher as ("teacher", 50)."""
    rows = {}
    for name in METHODS:
        for path in sorted(folder.glob(f"{name}_[0-9]*/report.json")):
            speed = _speed(path.parent / "metrics.jsonl")
            for row in json.loads(path.read_text()):
                if row["name"] == "student":
                    rows.setdefault((name, row["steps"]), []).append(row | {"speed": speed})
                else:
                    rows[row["name"], row["steps"]] = [row]
    return rows


def _speed(metrics):
    """The median of the logged steps per second."""
    records = map(json.loads, metrics.read_text().splitlines())
    speeds = [record["steps_per_second"] for record in records if "steps_per_second" in record]
    return float(np.median(speeds)) if speeds else np.nan


def quality_table(rows, steps):
    """Markdown of students in so many steps, the nearest to the data first, below the teacher.

    Means over the seeds; of distances, with the lowest and the highest.
    """
    lines = [
        "| | steps | seeds | " + " | ".join(heading for heading, _ in MEASURES.values()) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(MEASURES),
    ]
    known = [key for key in rows if key[0] not in METHODS]
    students = [key for key in rows if key[0] in METHODS and key[1] == steps]
    students.sort(key=lambda key: np.mean([row["fd"] for row in rows[key]]))
    for key in known + students:
        name, number = key
        heading = METHODS[name][0] if name in METHODS else name
        cells = [_cell([row[measure] for row in rows[key]], measure) for measure in MEASURES]
        count = len(rows[key]) if name in METHODS else ""
        lines.append(f"| {heading} | {number or ''} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values, key):
    spec = MEASURES[key][1]
    text = format(np.mean(values), spec)
    if key != "fd" or len(values) == 1:
        return text
    return f"{text} ({min(values):{spec}} to {max(values):{spec}})"


def work_table(works, rows):
    """Markdown: what each method takes."""
    lines = [
        "| | networks | real data | passes a sample and step | steps | minutes |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, numbers in works.items():
        speeds = [row["speed"] for key, seeds in rows.items() if key[0] == name for row in seeds]
        minutes = f"{numbers['steps'] / np.mean(speeds) / 60:.1f}" if speeds else ""
        lines.append(
            f"| {METHODS[name][0]} | {numbers['networks']} | {'yes' if numbers['data'] else 'no'} "
            f"| {numbers['passes']:.1f} | {numbers['steps']:,} | {minutes} |"
        )
    return "\n".join(lines)


def figure(rows):
    """Distances: a line for each method, a colour for each number of steps, a dot for each seed."""
    names = [name for name in METHODS if any(key[0] == name for key in rows)]
    with rc_context(STYLE):
        drawing = Figure(figsize=(7.2, 0.6 + 0.3 * len(names)), layout="constrained")
        axes = drawing.subplots()
        for steps, colour in zip((4, 2, 1), COLOURS[1:], strict=False):
            points = [
                (row["fd"], place)
                for place, name in enumerate(names)
                for row in rows.get((name, steps), ())
            ]
            if not points:  # of methods that fix their steps
                continue
            label = f"{steps} step{'s' if steps > 1 else ''}"
            axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.8, label=label)
        if ("teacher", 50) in rows:
            line = rows["teacher", 50][0]["fd"]
            axes.axvline(line, color=INK, linestyle="--", linewidth=1, label="teacher, 50 steps")
        axes.set_yticks(range(len(names)), [METHODS[name][0] for name in names])
        axes.invert_yaxis()
        axes.grid(axis="y", color=RULE)
        axes.set(xscale="log", xlabel="FD-MNIST64 (lower is better)")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return drawing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--passes", type=int, default=125_000, help="of one image, for each run")
    options, more = parser.parse_known_args()
    names = options.only.split(",")
    if unknown := set(names) - set(METHODS):
        parser.error(f"--only: no {sorted(unknown)} among {sorted(METHODS)}")
    works = {name: work(name, options.passes) for name in names}
    for seed in options.seeds.split(","):
        for name, numbers in works.items():
            train(name, seed, numbers["steps"], options.out, more)
    rows = results(options.out)
    tables = [quality_table(rows, steps) for steps in (4, 2, 1)]
    text = "\n\n".join([*tables, work_table(works, rows)]) + "\n"
    (options.out / "methods.md").write_text(text)
    figure(rows).savefig(options.out / "methods.png", dpi=130)
    print(text)


if __name__ == "__main__":
    main()
