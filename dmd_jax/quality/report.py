"""Tables and figures: rows and uint8 images in, Markdown or a PNG file out.

A row is a dict: `name` of the sampler ("teacher", "student", ...), `steps`, `calls` (network calls
per image, guidance included) and the numbers of a `Judge`. The row of real images has no steps and
no calls (absent, None or 0). Imports only numpy, Pillow and matplotlib.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, object]

# Key, heading, format.
COLUMNS = (
    ("steps", "steps", "d"),
    ("calls", "calls", "d"),
    ("fd", "{metric} ↓", ".3g"),
    ("kid", "kernel distance ↓", ".2f"),
    ("precision", "precision ↑", ".3f"),
    ("recall", "recall ↑", ".3f"),
    ("accuracy", "accuracy ↑", ".1%"),
    ("diversity", "diversity", ".2f"),
    ("nearest_train", "nearest train", ".1f"),
)
LEGEND = """\
{metric}: Fréchet distance to {reference}, in the features of {network}. calls: network calls per
image, guidance included. accuracy: of the requested label. diversity: mean distance within a class
over that of the reference. nearest train: median distance to the nearest train image, in grey
levels; below that of real images it means copies or blur. The row of real images is what a perfect
generator reaches.
"""
INCEPTION = "Inception"
OTHER = "a network for this data; not comparable with an Inception FID"

INK, FAINT, RULE = "#1b1f24", "#6e7781", "#d8dee4"
COLOURS = ("#57606a", "#0969da", "#bc4c00", "#1a7f37", "#8250df")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
}
TILE_GAP = 2  # pixels between images of a grid
MAX_COLUMNS = 12  # of the figure: more, and its text is too small on a page


def markdown(rows: Sequence[Row], metric: str, reference: str = "test images") -> str:
    """A table of the rows in the given order, with a legend; a missing number is a dash.

    Args:
        rows: see the module's docstring.
        metric: the name of the Fréchet distance, as `Judge.name`.
        reference: the real images, as `Judge.reference`.
    """
    columns = [(key, heading.format(metric=metric), spec) for key, heading, spec in COLUMNS]
    network = INCEPTION if metric == "FID" else OTHER
    legend = LEGEND.format(metric=metric, reference=reference, network=network)
    return f"{_table(rows, columns)}\n{textwrap.fill(legend, 100)}\n"


def page(title: str, body: str, cost: Mapping[str, str] | None = None) -> str:
    """A report as Markdown; its figure is report.png in the same folder.

    Args:
        title: one line.
        body: the table, or the text that replaces it.
        cost: further lines by name, such as {"forward passes": "1.2 million"}.
    """
    lines = "".join(f"- {name}: {text}\n" for name, text in (cost or {}).items())
    return f"# {title}\n\n![samples](report.png)\n\n{body}" + (lines and f"\n{lines}")


def measured(rows: Sequence[Row], measures: Mapping[str, str]) -> str:
    """A table of numbers that the data measure themselves.

    Args:
        rows: see the module's docstring.
        measures: legend by the key of the number.
    """
    columns = (*COLUMNS[:2], *((name, name, ".3f") for name in measures))
    legend = "".join(f"{name}: {words}.\n" for name, words in measures.items())
    return f"{_table(rows, columns)}\n{legend}"


def _table(rows, columns):
    lines = ["| | " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for row in rows:
        cells = (_cell(row.get(key), spec) for key, _, spec in columns)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object, spec: str) -> str:
    none = value is None or (spec == "d" and value == 0)  # Real images have neither.
    return "–" if none else format(value, spec)


def grid(images: np.ndarray, columns: int, background: int = 255) -> np.ndarray:
    """Images side by side, in reading order.

    Args:
        images: uint8 [N, H, W, C].
        columns: images a row; the last row may be shorter.
        background: grey level of the gaps.

    Returns:
        uint8 [height, width, C].
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    tiles = np.full(
        (rows * columns, height + TILE_GAP, width + TILE_GAP, channels), background, np.uint8
    )
    tiles[:count, :height, :width] = images
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    whole = tiles.reshape(rows * (height + TILE_GAP), columns * (width + TILE_GAP), channels)
    return whole[:-TILE_GAP, :-TILE_GAP]


def save_grid(path: str | Path, images: np.ndarray, columns: int) -> None:
    """Writes `grid(images, columns)` as PNG, small images enlarged by a whole factor.

    Args:
        path: ends in .png.
        images: uint8 [N, H, W, C], C = 1 or 3.
        columns: images a row.
    """
    zoom = max(1, 64 // images.shape[1])
    picture = grid(images.repeat(zoom, 1).repeat(zoom, 2), columns)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path)


@contextlib.contextmanager
def drawing(path: str | Path, **how: object) -> Iterator[Figure]:
    """A matplotlib Figure in the style of reports, which becomes a PNG file at the end.

    matplotlib is imported here: it would be a sixth of what every command imports at its start.

    Args:
        path: ends in .png.
        how: further arguments of the Figure, such as `figsize`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(dpi=160, facecolor="white", **how)
        yield figure
        figure.savefig(path)


def gallery(
    path: str | Path, images: Mapping[str, np.ndarray], columns: int, *, title: str
) -> None:
    """Draws the samples of several samplers side by side, as one PNG.

    Args:
        path: ends in .png.
        images: {title of the sampler: uint8 [N, H, W, C]}, drawn from left to right.
        columns: images a row of one sampler.
        title: one line above all.
    """
    grids = {name: grid(samples, columns) for name, samples in images.items()}
    height, width, _ = next(iter(grids.values())).shape
    wide = max(5.0, min(12.0, len(grids) * width / 60)) / len(grids)  # inches, of one sampler
    size = wide * len(grids), min(wide * height / width, 9.0) + 0.9
    with drawing(path, figsize=size) as page:
        page.suptitle(title, x=0.02, ha="left", size=13, weight="bold")
        for place, (name, mosaic) in enumerate(grids.items(), 1):
            axes = page.add_subplot(1, len(grids), place)
            axes.set_axis_off()
            axes.set_title(name.replace(", ", "\n"), size=9)  # columns may be narrow
            axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        page.tight_layout()


def figure(
    path: str | Path,
    rows: Sequence[Row],
    images: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    metric: str,
    title: str,
) -> None:
    """Draws samples and quality side by side as one PNG.

    Left: one row of images per entry, one column per noise and label, columns sorted by label.
    Right: Fréchet distance against network calls, one line for all rows of a name, and a dashed
    line for the row of real images.

    Args:
        path: ends in .png.
        rows: see the module's docstring.
        images: {title of the row, "teacher, 50 steps": uint8 [N, H, W, C]}, drawn in this order;
            the text after the comma is smaller. Of more than `MAX_COLUMNS` columns every second,
            third, ... is drawn.
        labels: int [N], of the columns; the same for all entries.
        metric: the name of the Fréchet distance, as `Judge.name`.
        title: one line above all.
    """
    order = np.argsort(labels, kind="stable")[:: -(-len(labels) // MAX_COLUMNS)]
    mosaic = grid(np.concatenate([samples[order] for samples in images.values()]), len(order))
    high = max(2.9, 0.42 * len(images))  # inches, of both drawings
    wide = high * mosaic.shape[1] / mosaic.shape[0]
    width, height = 1.05 + wide + 0.75 + 3.9 + 0.4, high + 1.35
    with drawing(path, figsize=(width, height)) as page:
        left, right = (
            page.add_axes((x / width, 0.55 / height, w / width, high / height))
            for x, w in ((1.05, wide), (1.05 + wide + 0.75, 3.9))
        )
        page.text(0.14 / width, 1 - 0.18 / height, title, va="top", size=13, weight="bold")
        left.imshow(mosaic, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        _name_tiles(left, list(images), labels[order], mosaic.shape)
        _draw_quality(right, rows, metric)


def _name_tiles(
    axes: Axes, names: Sequence[str], labels: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Names to the left of the rows, labels above the columns, of a mosaic of that shape."""
    axes.set_axis_off()
    tile_height, tile_width = (
        (shape[0] + TILE_GAP) / len(names),
        (shape[1] + TILE_GAP) / len(labels),
    )
    for row, (name, _, detail) in enumerate(name.partition(", ") for name in names):
        at = {"x": -0.2 * tile_width, "y": (row + 0.5) * tile_height, "ha": "right"}
        axes.text(s=name, va="bottom" if detail else "center", weight="bold", **at)
        axes.text(s=detail, va="top", color=FAINT, size=8, **at)
    for label in np.unique(labels):
        middle = (np.flatnonzero(labels == label).mean() + 0.5) * tile_width
        axes.text(middle, -0.13 * tile_height, str(label), ha="center", color=FAINT)


def _draw_quality(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    models = [row for row in rows if row.get("calls")]
    most = max((row["calls"] for row in models), default=0)
    for name, colour in zip(dict.fromkeys(r["name"] for r in models), COLOURS, strict=False):
        points = sorted((r["calls"], r["fd"]) for r in models if r["name"] == name)
        calls, distances = zip(*points, strict=True)
        axes.plot(calls, distances, "o-", color=colour, lw=2, ms=6.5, mec="white", mew=1.2)
        side, ha = (-8, "right") if calls[0] == most else (8, "left")  # the drawing ends at `most`
        _note(axes, name, points[0], (side, 2), color=colour, weight="bold", ha=ha)
        if len(points) > 1:
            # To the right, where the line does not go.
            _note(axes, f"{distances[-1]:.3g}", points[-1], (7, -3), color=colour)
    for row in rows:
        if not row.get("calls"):
            axes.axhline(row["fd"], color=FAINT, lw=1, ls=(0, (4, 3)))
            text, at = f"{row['name']} {row['fd']:.3g}", (1, row["fd"])
            _note(axes, text, at, (0, 4), ha="right", xycoords=axes.get_yaxis_transform())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["calls"] for row in models}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.tick_params(length=0)
    axes.margins(x=0.06, y=0.1)
    axes.set_xlabel("network calls per image")
    axes.set_title(f"{metric}  (lower is better)", loc="left", size=9, color=FAINT)


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], **how) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", **({"xycoords": "data"} | how))
