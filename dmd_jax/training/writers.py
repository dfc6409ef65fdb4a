"""What a run leaves to look at: metrics.jsonl, PNG images, TensorBoard, a line on the console.

Floor 0: knows names, numbers and pictures; imports no other room. JSON lines and PNG are always
written and need nothing but Pillow. TensorBoard (through clu) needs TensorFlow, which takes seconds
to import: that happens in a background thread, beside the compilation, and what is written before
it is done waits in a queue. A run never stops for want of TensorFlow.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import jax
import numpy as np
from etils import epath
from PIL import Image

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run logs: `config.log`.

    Attributes:
        every: steps between two records of the metrics, which are means over these steps.
        tensorboard: whether to write TensorBoard files too.

    Raises:
        ValueError: `every` is below 1.
    """

    every: int = 50
    tensorboard: bool = True

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every} must be 1 or more")


class Writer:
    """Scalars, image grids and texts of one run, written by the first process only.

        <workdir>/metrics.jsonl              one JSON object a line: step and scalars
        <workdir>/images/<name>_<step>.png
        <workdir>/tensorboard/

    No call waits for TensorFlow or for the encoding of an image; `close` waits for all of it.

    Args:
        workdir: a directory; made where there is none.
        tensorboard: False to do without.
    """

    def __init__(self, workdir: epath.PathLike, *, tensorboard: bool = True):
        self._workdir = epath.Path(workdir)
        self._lines = self._workdir / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._board: Any = None
        # One worker keeps the order; Python runs what is queued even if nobody calls close().
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="writer")
        if self._writes:
            self._workdir.mkdir(parents=True, exist_ok=True)
            if tensorboard:
                self._worker.submit(self._open_board)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def rewind(self, step: int) -> None:
        """Drops the JSON lines after `step`, and one that a kill cut short: called on resume.

        So a killed and resumed run has one record, each step once. Images are written over;
        TensorBoard's files cannot be cut, there the repeated steps are seen twice.
        """
        if not (self._writes and self._lines.exists()):
            return
        kept = [line for line in self._lines.read_text().splitlines() if _step_of(line) <= step]
        fresh = self._lines.with_name("metrics.jsonl.tmp")
        fresh.write_text("".join(f"{line}\n" for line in kept))
        fresh.replace(self._lines)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes host numbers by name. JSON has no NaN or infinity: they become null."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        sound = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **sound}) + "\n")
        self._submit(self._to_board, "write_scalars", step, values)

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Writes one picture, uint8 [H, W, C] with C = 1, 3 or 4.

        Raises:
            ValueError: another shape or dtype.
        """
        if grid.dtype != np.uint8 or grid.ndim != 3 or grid.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"{name}: an image is uint8 [H, W, C] with C = 1, 3 or 4, "
                f"not {grid.dtype} {list(grid.shape)}"
            )
        self._submit(self._to_png, self._workdir / "images" / f"{name}_{step:07d}.png", grid)
        self._submit(self._to_board, "write_images", step, {name: grid[None]})

    def texts(self, step: int, name: str, markdown: str) -> None:
        """Shows a text in TensorBoard."""
        self._submit(self._to_board, "write_texts", step, {name: markdown})

    def close(self) -> None:
        """Writes out all that is queued, waiting for TensorFlow if it is still being imported."""
        self._submit(self._close_board)
        self._worker.shutdown()

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        if self._writes:
            self._worker.submit(function, *args)

    # What follows runs in the worker, where an exception would be lost.

    def _to_png(self, path: epath.Path, grid: np.ndarray) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(file, "PNG")
        except Exception as error:
            log.warning("%s could not be written: %s", path, error)

    def _open_board(self) -> None:
        try:
            self._board = open_tensorboard(str(self._workdir / "tensorboard"))
        except Exception as error:  # a broken TensorFlow fails in many ways
            log.warning(
                "No TensorBoard: %s: %s. The run goes on with metrics.jsonl and images/ in %s. "
                "To have it, install tensorflow and tensorboard.",
                type(error).__name__,
                error,
                self._workdir,
            )

    def _to_board(self, method: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        try:
            getattr(self._board, method)(step, values)
            self._board.flush()
        except Exception as error:
            self._board = None
            log.warning("TensorBoard is off from step %s on: %s", step, error)

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()


def open_tensorboard(directory: str) -> Any:
    """A clu writer of TensorBoard summaries; imports TensorFlow, without its chatter and devices.

    Raises:
        ImportError: TensorFlow or tensorboard is missing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it announces itself on stderr
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        # Where TensorFlow has been at work before, it is too late, and not ours to say.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    from clu import metric_writers

    return metric_writers.SummaryWriter(directory)


def _step_of(line: str) -> float:
    """The step of a JSON line; infinite where the line is not whole."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """One line on the console per record: where the run is, how fast, and how long it will take.

        step   350/2000  generator/loss 0.214  fake_score/loss 0.183  6.9 steps/s  ...  3:59 left

    The clock starts at the first report, which therefore shows no rate: with it after the first
    step, compilation does not count. (clu's ReportProgress would import TensorFlow here.)

    Args:
        total: the last step.
        samples_per_step: global batch size.
        shown: the metrics to print, where a record has them.
        file: where to print; standard error by default.
    """

    def __init__(
        self,
        total: int,
        samples_per_step: int,
        *,
        shown: tuple[str, ...] = ("generator/loss", "fake_score/loss"),
        file: IO[str] | None = None,
    ):
        self._total = total
        self._samples_per_step = samples_per_step
        self._shown = shown
        self._file = file
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def report(self, step: int, record: Mapping[str, float]) -> dict[str, float]:
        """Prints the line, on the first process; returns the rates, for who wants to plot them.

        Returns:
            `steps_per_second` and `samples_per_second` since the last report; nothing at first.
        """
        now = time.monotonic()
        rates = {}
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        parts += [f"{name} {record[name]:.4g}" for name in self._shown if name in record]
        if self._first is None:
            self._first = step, now
        elif self._last[0] < step:
            rate = (step - self._last[0]) / max(now - self._last[1], 1e-9)
            rates = {
                "steps_per_second": rate,
                "samples_per_second": rate * self._samples_per_step,
            }
            # Time left from the mean over the run: evaluations and saves are part of what is left.
            per_step = (now - self._first[1]) / (step - self._first[0])
            parts += [
                f"{rate:.3g} steps/s",
                f"{rates['samples_per_second']:.4g} samples/s",
                f"{_clock(per_step * (self._total - step))} left",
            ]
        self._last = step, now
        if jax.process_index() == 0:
            print("  ".join(parts), file=self._file or sys.stderr, flush=True)
        return rates


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
