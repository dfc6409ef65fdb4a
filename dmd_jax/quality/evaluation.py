"""The settings of an evaluation, and the rows of a report: real images, and each sampler.

All rows of a table use the same labels and the same noise. `evaluator.py` applies the settings to
a run. Imports the rooms below.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from dmd_jax import weights
from dmd_jax.data import Images, arrays, load, to_uint8
from dmd_jax.devices.disk import write_text
from dmd_jax.devices.processes import together
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.quality.features import SHIPPED, Features, load_features
from dmd_jax.quality.judge import Judge
from dmd_jax.rollouts import samplers
from dmd_jax.rollouts.samplers import Sampler

log = logging.getLogger(__name__)

SEED = 1_000_003  # of the noise of judged samples
LIMIT = 50_000  # images of a split that a judge uses


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run judges, how often, and with which samplers; a class that configs name.

    Attributes:
        every: steps between two judgements during training.
        features: file or shipped name of the feature network; '' shows samples and judges none.
        split: of the data set, the reference of the report. The best network of a run is selected
            against the training split instead.
        samples: number of samples to judge during training.
        num: number of samples for each row of the report.
        steps: numbers of steps of the trained network; the first is judged during training.
        guidance: weight for a network that is sampled in many steps; 1 disables it.
        teacher_steps, teacher_guidance: the same for the teacher of a run that has one.
        recompute: compute the teacher's rows even where they are stored.
        frames: of the videos whose quality is measured frame by frame (`drift`), for data that can;
            0 measures none. It may exceed the length of the training videos: only causal students
            reach it.
        beside: other checkpoints in the same report by frame, as pairs (name, checkpoint).

    Raises:
        ValueError: a number is out of range, or `steps` is empty.
    """

    every: int
    features: str = SHIPPED
    split: str = "test"
    samples: int = 500
    num: int = 2_000
    steps: tuple[int, ...] = (4, 2, 1)
    guidance: float = 1.0
    teacher_steps: tuple[int, ...] = ()
    teacher_guidance: float = 1.0
    recompute: bool = False
    frames: int = 0
    beside: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for name in ("every", "samples", "num"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.frames < 0:
            raise ValueError(f"frames={self.frames} must be 0 or more")
        if not self.steps:
            raise ValueError("steps=() must name one number of steps or more")
        for name in ("steps", "teacher_steps"):
            for steps in getattr(self, name):
                if steps < 1:
                    raise ValueError(f"{name}={getattr(self, name)}: {steps} must be 1 or more")


@functools.cache
def data_judge(
    name: str,
    data_dir: str | None = None,
    features: str = SHIPPED,
    *,
    split: str = "test",
    train: str = "train",
    limit: int = LIMIT,
) -> Judge:
    """The Judge of a data set. Its images and their features are computed once per process.

    In a job of many processes, all of them call it; where one cannot read its files, all raise.

    Args:
        name, data_dir: as for `data.load`.
        features: file or shipped name of a feature network, as for `load_features`.
        split: the reference.
        train: the split that generators learn from, for copies and for the row of real images.
        limit: of a larger split, so many images are used, at even distances.
    """

    def read():
        network, images = load_features(features), load(name, split, data_dir)
        network.require_fit(images)
        test = arrays(images, limit)
        same = split == train
        return network, test, test if same else arrays(load(name, train, data_dir), limit)

    # Devices of all processes compute the features, so that all must have read their files.
    network, test, learned = together(read)
    if network.data is not None and not network.classifies(name):
        log.warning(
            "%s is a classifier of %r: no accuracy is shown for %r",
            *(network.name, network.data, name),
        )
    return Judge(
        network,
        test=test,
        train=learned,
        data=name,
        reference=f"{len(test[0]):,} images of {name}, split {split}",
    )


def require_numbers(features: Features, num_classes: int, **counts: int) -> None:
    """Raises ValueError where so many samples cannot be judged, class by class."""
    least = num_classes * max(2, features.dim // num_classes + 1)
    for name, count in counts.items():
        if count % num_classes or count < least:
            raise ValueError(
                f"{name}={count} must be a multiple of the {num_classes} classes, {least} at least "
                f"({features.name} has {features.dim} features)"
            )


def require_real(features: Features, test: Images, train: Images, num: int) -> None:
    """Raises ValueError where there are too few real images to judge `num` samples against."""
    dim = f"{features.name} has {features.dim} features"
    for images, least, why in (
        (test, features.dim + 1, f"{dim}; take a larger split, or features='', which judges none"),
        (train, num, f"num={num} of them are judged as if they were samples; lower num"),
    ):
        if min(len(images), LIMIT) < least:
            raise ValueError(
                f"split {images.split!r} of {images.name!r} has {len(images)} images, and {least} "
                f"are needed: {why}"
            )


def draw_images(
    denoiser: Denoiser,
    sampler: Sampler,
    labels: np.ndarray,
    seed: int = SEED,
    *,
    show: bool = True,
) -> np.ndarray:
    """`samplers.draw_images` with a line that shows its progress.

    Args:
        denoiser: a network of images of a class, placed.
        sampler: as for `samplers.draw`.
        labels: int32 [N].
        seed: of the noise.
        show: whether to print the line.

    Returns:
        uint8 [N, H, W, C].
    """
    config, images = denoiser.net.config, []
    uncond = np.full_like(labels, config.uncond)
    batch = min(len(labels), samplers.BATCH)
    drawn = samplers.draw(denoiser, sampler, labels, uncond, config.sample_shape, seed, batch=batch)
    with Progress(f"sampling {sampler.title}", len(labels), enabled=show) as progress:
        for part in drawn:
            images.append(to_uint8(part))
            progress.advance(len(part))
    return np.concatenate(images)


def judged(
    denoiser: Denoiser, sampler: Sampler, judge: Judge, num: int, seed: int = SEED
) -> tuple[dict[str, Any], np.ndarray]:
    """Draws `num` samples of all classes in turn and judges them.

    Returns:
        (row: "name", "steps", "calls" (of the network, per sample) and the numbers of `judge`;
        the samples, uint8 [num, H, W, C]).
    """
    labels = samplers.balanced(num, denoiser.net.config.num_classes)
    images = draw_images(denoiser, sampler, labels, seed)
    return about(sampler) | judge(images, labels), images


def real_row(judge: Judge, num: int) -> dict[str, Any]:
    """The row of real images, judged as if they were `num` samples."""
    return {"name": "real images", "steps": 0, "calls": 0, **judge.floor(num)}


def teacher_rows(
    path: str | Path,
    ways: Sequence[Sampler],
    judge: Judge,
    num: int,
    *,
    denoiser: Denoiser | None = None,
    recompute: bool = False,
    store: Path | None = None,
) -> list[dict[str, Any]]:
    """The rows of a teacher; stored ones are used while everything that they depend on is the same.

    Args:
        path: the teacher's file or shipped name; stored rows are first looked up in
            `<file>.rows.json` in its folder.
        ways: its samplers.
        judge: the judge.
        num: number of samples.
        denoiser: the teacher, placed; loaded from `path` when a row is missing, if None.
        recompute: compute all rows again.
        store: file to look up rows in, and to add computed ones to; None for neither.
    """
    path = weights.find(path)
    with path.open("rb") as file:
        file_digest = hashlib.file_digest(file, "sha256").hexdigest()
    common = f"{file_digest} {judge.fingerprint} {num} {SEED}"
    if denoiser is not None:
        kept = {str(x.dtype) for x in jax.tree.leaves(denoiser)} & {"int8"}
        dtypes = {denoiser.net.config.dtype, *kept} - {"float32"}
        common += "".join(f" {dtype}" for dtype in sorted(dtypes))
    keys = {sampler: f"{_plain(sampler)} {digest(common)}" for sampler in ways}
    found = _stored_rows(store) | _stored_rows(path.with_suffix(".rows.json"))
    table = {} if recompute else found
    missing = [sampler for sampler in ways if keys[sampler] not in table]
    if missing:
        denoiser = weights.denoiser(path) if denoiser is None else denoiser
        table |= {keys[sampler]: judged(denoiser, sampler, judge, num)[0] for sampler in missing}
        if store and jax.process_index() == 0:
            write_text(store, json.dumps(_stored_rows(store) | table, indent=1) + "\n")
    return [table[key] | about(sampler) for sampler, key in keys.items()]


def about(sampler: Sampler) -> dict[str, Any]:
    """The entries of a row that describe the sampler and its cost."""
    return {"name": sampler.name, "steps": sampler.steps, "calls": sampler.calls}


def _plain(sampler):
    """The fields of a sampler that its samples depend on, as text."""
    values = {
        field.name: getattr(sampler, field.name)
        for field in dataclasses.fields(sampler)
        if field.name != "name"
    }
    text = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{type(sampler).__name__}({text})"


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stored_rows(path):
    """{key: row} of a file of rows; {} if it is missing or cannot be read."""
    try:
        return json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}


class Progress:
    """One line on the terminal that is updated in place; elsewhere, one line at the end.

    The first process prints it.

        with Progress("sampling teacher, 50 steps", 2000) as progress:
            progress.advance(250)
    """

    def __init__(
        self, title: str, total: int, *, enabled: bool = True, file: IO[str] | None = None
    ):
        self._title, self._total, self._done = title, total, 0
        self._file = sys.stderr if file is None else file
        self._enabled = enabled and jax.process_index() == 0

    def __enter__(self) -> "Progress":
        self.advance(0)
        return self

    def advance(self, count: int) -> None:
        """Adds `count` to what is done."""
        self._done += count
        if self._enabled and self._file.isatty():
            self._print("\r", "")

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._print("\r" if self._file.isatty() else "", "\n")

    def _print(self, start, end):
        text = f"{start}{self._title}: {self._done:,} of {self._total:,}"
        print(text, end=end, file=self._file, flush=True)
