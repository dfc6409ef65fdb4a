r"""Quality by frame of several runs: means over their seeds, and the spread.

    for seed in 0 1 2; do
      python -m dmd_jax.main --config=configs/self_forcing.py --config.seed=$seed \
          --workdir=runs/sf_$seed
      python -m dmd_jax.main --config=configs/self_forcing.py:teacher_forcing --config.seed=$seed \
          --workdir=runs/tf_$seed
    done
    python benchmarks/by_frame.py runs/sf_*/report.json runs/tf_*/report.json

Rows of one name are one row of the table. A cell is the mean over the seeds of the mean over the
frames of a stretch; where there are several, with the lowest and the highest.
"""

import json
import sys
from pathlib import Path

import numpy as np

from dmd_jax.data.bouncing_digits import FRAMES
from dmd_jax.quality.drift import MEASURES, summary


def table(reports: list[list[dict]], length: int = FRAMES) -> str:
    """Markdown of reports (the rows of report.json), in stretches of `length` frames."""
    rows: dict[str, list[dict]] = {}
    for row in (row for report in reports for row in report):
        if row["by_frame"] not in (known := rows.setdefault(row["name"], [])):
            known.append(row["by_frame"])
    lines = ["| | frames | seeds | " + " | ".join(MEASURES) + " |"]
    lines.append("|---|---:|---:|" + "---:|" * len(MEASURES))
    for name, seeds in rows.items():
        frames = len(seeds[0]["digit"])
        for start in range(0, frames, length):
            part = slice(start, min(start + length, frames))
            means = [summary(numbers, part) for numbers in seeds]
            cells = " | ".join(_cell([mean[measure] for mean in means]) for measure in MEASURES)
            lines.append(f"| {name} | {start + 1} to {part.stop} | {len(seeds)} | {cells} |")
    return "\n".join(lines)


def _cell(values):
    if None in values:
        return "–"
    text = f"{np.mean(values):.3f}"
    return f"{text} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else text


if __name__ == "__main__":
    print(table([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
