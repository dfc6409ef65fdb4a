"""Quality against the index of the frame: how long a video stays good (exposure bias, drift).

A student that generates from its own frames is judged far beyond the length of its training. Every
number is a list with one value a frame. Imports numpy, the feature networks and `report`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dmd_jax.data.bouncing_digits import PLACE, centre, inside
from dmd_jax.quality import report
from dmd_jax.quality.features import SHIPPED, load_features

LAG = 4  # frames over which motion is measured: a slow digit moves in every fourth one
TURN = np.pi / 3  # least change of direction that counts as one
JUMP = 1.5 * PLACE  # pixels; the longest move, along a diagonal, has 1.41 places

MEASURES = {
    "digit": "share of frames whose digit is the one asked for, by the metric network",
    "sharpness": "squared differences of neighbouring pixels over squared pixels",
    "brightness": "mean of the pixels, from 0 to 1; neither here nor above are those of the walls",
    "speed": f"distance that the digit moves in {LAG} frames, over that asked for",
    "jumps": "share of videos whose digit moves by more than one place at once",
    "turns": f"share of videos that turn by more than {round(np.degrees(TURN))} degrees",
}

ByFrame = dict[str, list[float | None]]


class Videos(Protocol):
    """A data source whose videos show one moving digit, such as `BouncingDigits`."""

    def asked(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(digits, speeds in pixels per frame) that the prompts at `rows` ask for."""
        ...

    def digits(self, videos: np.ndarray) -> np.ndarray:
        """The digit of every frame as a scan of MNIST, uint8 [N, F, 28, 28, 1]."""
        ...


def by_frame(videos: np.ndarray, rows: Sequence[int], source: Videos) -> ByFrame:
    """Measures videos frame by frame.

    Args:
        videos: uint8 [N, F, H, W, 1].
        rows: of their prompts.
        source: what the prompts ask for.

    Returns:
        {name: F numbers} by the names of `MEASURES`; None where a frame has no such number: the
        first `LAG` have no speed, the first and the last no turn, the first no jump.
    """
    wanted, speeds = source.asked(rows)
    scans = source.digits(videos)
    _, logits = load_features(SHIPPED).extract(scans.reshape(-1, *scans.shape[2:]))
    right = logits.argmax(-1).reshape(videos.shape[:2]) == wanted[:, None]
    levels = inside(videos)[..., 0].astype(np.float32) / 255
    places, unknown = centre(levels), [None] * LAG
    steps = places[:, LAG:] - places[:, :-LAG]
    jumps = np.linalg.norm(np.diff(places, axis=1), axis=-1) > JUMP
    speed = np.linalg.norm(steps, axis=-1) / (LAG * speeds[:, None])
    numbers = {
        "digit": right.mean(0).tolist(),
        "sharpness": _sharpness(levels).mean(0).tolist(),
        "brightness": levels.mean((0, 2, 3)).tolist(),
        "speed": unknown + speed.mean(0).tolist(),
        "jumps": [None, *jumps.mean(0).tolist()],
        "turns": unknown + _turns(steps).mean(0).tolist() + unknown,
    }
    return {name: values[: videos.shape[1]] for name, values in numbers.items()}


def _sharpness(levels):
    """[N, F] of [N, F, H, W]; 0 for a black frame."""
    edges = sum(np.square(np.diff(levels, axis=axis)).sum((2, 3)) for axis in (2, 3))
    return edges / np.maximum(np.square(levels).sum((2, 3)), 1e-6)


def _turns(steps):
    """Whether the direction turns from one step to the next: bool [N, F - LAG] of [N, F, 2]."""
    angles = np.arctan2(steps[..., 0], steps[..., 1])
    change = np.abs(angles[:, LAG:] - angles[:, :-LAG])
    return np.minimum(change, 2 * np.pi - change) > TURN


def summary(numbers: ByFrame, frames: slice) -> dict[str, float | None]:
    """Means over some of the frames; None where no frame of them has the number."""
    known = {name: [x for x in values[frames] if x is not None] for name, values in numbers.items()}
    return {name: float(np.mean(xs)) if xs else None for name, xs in known.items()}


def markdown(rows: Sequence[Mapping], length: int) -> str:
    """A table of rows with `name` and `by_frame`, in stretches as long as a training video.

    Args:
        rows: in order; a row may have fewer frames than others.
        length: frames of a training video.
    """
    longest = max(len(row["by_frame"]["digit"]) for row in rows)
    lines = ["| | frames | " + " | ".join(MEASURES) + " |", "|---|---:|" + "---:|" * len(MEASURES)]
    for row in rows:
        for start in range(0, longest, length):
            part = slice(start, start + length)
            if not (known := row["by_frame"]["digit"][part]):
                continue
            means = summary(row["by_frame"], part)
            cells = " | ".join("–" if x is None else f"{x:.3f}" for x in means.values())
            lines.append(f"| {row['name']} | {start + 1} to {start + len(known)} | {cells} |")
    return "\n".join(lines) + "\n\n" + "".join(f"{k}: {v}.\n" for k, v in MEASURES.items())


def figure(path: str | Path, rows: Sequence[Mapping], length: int, *, title: str) -> None:
    """Draws every measure against the frame, one line a row, as PNG.

    Args:
        path: ends in .png.
        rows: with `name` and `by_frame`.
        length: frames of a training video, marked.
        title: one line above all.
    """
    with report.drawing(path, figsize=(14, 2.9), layout="constrained") as page:
        page.suptitle(title, x=0.01, ha="left", size=13, weight="bold")
        for place, name in enumerate(MEASURES, 1):
            axes = page.add_subplot(1, len(MEASURES), place)
            for number, row in enumerate(rows):
                values = np.array(row["by_frame"][name], float)
                real = row["name"] == "real"
                how = dict(color=report.FAINT, ls="--") if real else {}
                colour = report.COLOURS[number % len(report.COLOURS)]
                axes.plot(
                    1 + np.arange(len(values)),
                    values,
                    **({"color": colour} | how),
                    lw=1.6,
                    label=row["name"],
                )
            axes.axvline(length, color=report.RULE, lw=1)
            axes.set_title(name, loc="left", size=9)
            axes.set_xlabel("frame")
            if name in ("brightness", "speed", "jumps"):
                axes.set_ylim(0)
        page.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(rows),
            frameon=False,
        )


def strips(videos: Mapping[str, np.ndarray], every: int) -> dict[str, np.ndarray]:
    """Film strips: every so many frames of each video, side by side.

    Args:
        videos: {name: uint8 [N, F, H, W, C]}.
        every: distance of the frames that are shown.

    Returns:
        {name: uint8 [N, H, shown W, C]}.
    """

    def strip(x):
        x = x[:, ::every]
        return x.transpose(0, 2, 1, 3, 4).reshape(len(x), x.shape[2], -1, x.shape[-1])

    return {name: strip(x) for name, x in videos.items()}


def save_gif(path: str | Path, videos: Mapping[str, np.ndarray], zoom: int = 4) -> None:
    """Writes videos as one looping GIF: a row of them for each name, in the mapping's order.

    Args:
        path: ends in .gif.
        videos: {name: uint8 [N, F, H, W, 1]}; shorter ones stop at their last frame.
        zoom: whole factor of enlargement.
    """
    longest = max(x.shape[1] for x in videos.values())
    held = [
        np.pad(x, ((0, 0), (0, longest - x.shape[1]), (0, 0), (0, 0), (0, 0)), "edge")
        for x in videos.values()
    ]
    count = held[0].shape[0]
    frames = [
        Image.fromarray(
            report.grid(np.concatenate([x[:, i] for x in held]), count, 90)
            .repeat(zoom, 0)
            .repeat(zoom, 1)[..., 0]
        )
        for i in range(longest)
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0)
