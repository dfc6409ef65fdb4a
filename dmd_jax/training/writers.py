"""What a run writes: metrics.jsonl, PNG images, TensorBoard, Weights & Biases, progress lines.

Takes names, numbers and pictures; imports no other room. JSON lines and PNG are always written and
need nothing but Pillow. TensorBoard (through clu) needs TensorFlow, whose import takes seconds: it
happens in a background thread, during compilation, and what is written before waits in a queue. A
board that fails never stops a run.
"""

import contextlib
import dataclasses
import html
import importlib.util
import json
import logging
import math
import os
import secrets
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
        wandb: a project of Weights & Biases, to write to it too; None for none.

    Raises:
        ValueError: `every` is below 1, or Weights & Biases is asked for and not installed.
    """

    every: int = 50
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every} must be 1 or more")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"wandb={self.wandb!r} needs the package wandb: pip install 'dmd_jax[wandb]', or "
                "leave the field empty"
            )


class Writer:
    """Scalars, image grids and texts of one run, written by the first process only.

        <workdir>/metrics.jsonl              one JSON object per line: step and scalars
        <workdir>/images/<name>_<step>.png
        <workdir>/tensorboard/
        <workdir>/wandb_id.txt, wandb/       which run of Weights & Biases this is, and its files

    No call waits for TensorFlow, for an upload or for the encoding of an image; `close` waits for
    all of them.

    Args:
        workdir: a directory; created if it does not exist.
        tensorboard: whether to write TensorBoard's files.
        wandb: the project of Weights & Biases; None for none. A second Writer of the same workdir
            continues the same run there. WANDB_MODE=offline works without network and account.
        config: the settings that Weights & Biases lists for this run.

    Raises:
        ValueError: Weights & Biases cannot be started.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._workdir = epath.Path(workdir)
        self._lines = self._workdir / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._boards: dict[str, Any] = {}
        # One worker keeps the order; Python runs what is queued even if nobody calls close().
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="writer")
        if not self._writes:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        if wandb:  # in this thread: it may ask for an account, or refuse the run
            self._boards["Weights & Biases"] = open_wandb(self._workdir, wandb, config or {})
        if tensorboard:
            self._worker.submit(self._open_tensorboard)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def rewind(self, step: int) -> None:
        """Drops the JSON lines after `step`, and one that a kill cut short: called on resume.

        A resumed run then has every step once. Images are overwritten.
        TensorBoard and Weights & Biases cannot remove what they have: they show repeated steps
        twice.
        """
        if not (self._writes and self._lines.exists()):
            return
        lines = self._lines.read_bytes().decode(errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        fresh = self._lines.with_name("metrics.jsonl.tmp")
        fresh.write_text("".join(f"{line}\n" for line in kept))
        fresh.replace(self._lines)

    def history(self, name: str) -> dict[int, float | None]:
        """{step: value} of a number in the JSON lines; on process 0, which writes them."""
        lines = self._lines.read_text().splitlines() if self._lines.exists() else ()
        return {r["step"]: r[name] for r in map(json.loads, lines) if name in r}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes host numbers by name. JSON has no NaN or infinity: they become null."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        sound = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **sound}) + "\n")
        self._submit(self._to_boards, "write_scalars", step, values)

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
        self._submit(self._to_boards, "write_images", step, {name: grid[None]})

    def texts(self, step: int, name: str, markdown: str) -> None:
        """Shows a text in TensorBoard and Weights & Biases."""
        self._submit(self._to_boards, "write_texts", step, {name: markdown})

    def close(self) -> None:
        """Writes everything that is queued, and waits for it."""
        self._submit(self._close_boards)
        self._worker.shutdown()

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        if self._writes:
            self._worker.submit(function, *args)

    # The methods below run in the worker, where an exception would be lost.

    def _to_png(self, path: epath.Path, grid: np.ndarray) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(file, "PNG")
        except Exception as error:
            log.warning("%s could not be written: %s", path, error)

    def _open_tensorboard(self) -> None:
        try:
            self._boards["TensorBoard"] = open_tensorboard(str(self._workdir / "tensorboard"))
        except Exception as error:  # a broken TensorFlow fails in many ways
            log.warning(
                "No TensorBoard: %s: %s. The run goes on with metrics.jsonl and images/ in %s. "
                "To have it, install tensorflow and tensorboard.",
                type(error).__name__,
                error,
                self._workdir,
            )

    def _to_boards(self, method: str, step: int, values: Mapping[str, Any]) -> None:
        for name, board in list(self._boards.items()):
            try:
                getattr(board, method)(step, values)
                board.flush()
            except Exception as error:
                del self._boards[name]
                log.warning("%s is off from step %s on: %s", name, step, error)

    def _close_boards(self) -> None:
        for name, board in self._boards.items():
            try:
                board.close()
            except Exception as error:
                log.warning("%s could not be closed: %s", name, error)


def open_tensorboard(directory: str) -> Any:
    """A clu writer of TensorBoard summaries; imports TensorFlow without its notices and devices.

    Raises:
        ImportError: TensorFlow or tensorboard is missing.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it announces itself on stderr
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        # TensorFlow refuses this where the process has used it before; its devices then stay.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    from clu import metric_writers

    return metric_writers.SummaryWriter(directory)


def open_wandb(workdir: epath.Path, project: str, config: Mapping[str, Any]) -> "WandbBoard":
    """Starts the run of Weights & Biases that belongs to a workdir, or continues it.

    Raises:
        ValueError: it cannot be started.
    """
    import wandb

    stored = workdir / "wandb_id.txt"
    if not stored.exists():
        stored.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(
            project=project,
            id=stored.read_text().strip(),
            name=workdir.name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
    except Exception as error:  # no account, no network, a run that was deleted
        raise ValueError(
            f"config.log.wandb={project!r} cannot be started: {error}. Log in with `wandb login`, "
            "set WANDB_MODE=offline, or leave the field empty"
        ) from error
    # Steps of its own would have to increase, and those of a resumed run repeat.
    run.define_metric("*", step_metric="step")
    return WandbBoard(run, wandb)


class WandbBoard:
    """A run of Weights & Biases with the methods of clu's writers."""

    def __init__(self, run: Any, wandb: Any):
        self._run = run
        self._wandb = wandb

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def write_images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Images uint8 [N, H, W, C] by name."""
        images = {name: list(map(self._wandb.Image, grids)) for name, grids in values.items()}
        self._run.log({"step": step, **images})

    def write_texts(self, step: int, values: Mapping[str, str]) -> None:
        texts = {name: f"<pre>{html.escape(text)}</pre>" for name, text in values.items()}
        self._run.log({"step": step, **{k: self._wandb.Html(v) for k, v in texts.items()}})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def _step_of(line: str) -> float:
    """The step of a JSON line; infinity if the line is incomplete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """One line on the console per record: steps done, losses, speed and time left.

        step   350/2000  generator/loss 0.214  fake_score/loss 0.183  6.9 steps/s  ...  3:59 left

    The clock starts at the first report, which therefore shows no rate: called after the first
    step, it excludes compilation. (clu's ReportProgress would import TensorFlow here.)

    Args:
        total: the last step.
        samples_per_step: global batch size.
        frames_per_sample: F of samples [F, H, W, C]; None for samples without frames. For
            latents these are latent frames, not frames of the decoded video.
        shown: the metrics to print, where a record has them.
        file: where to print; standard error by default.
    """

    def __init__(
        self,
        total: int,
        samples_per_step: int,
        *,
        frames_per_sample: int | None = None,
        shown: tuple[str, ...] = ("generator/loss", "fake_score/loss"),
        file: IO[str] | None = None,
    ):
        self._total = total
        self._samples_per_step = samples_per_step
        self._frames_per_sample = frames_per_sample
        self._shown = shown
        self._file = file
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def report(self, step: int, record: Mapping[str, float]) -> dict[str, float]:
        """Prints the line, on the first process; returns the rates since the last report.

        Returns:
            `steps_per_second`, `samples_per_second` and, of samples with frames,
            `frames_per_second`; {} at the first report.
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
            if self._frames_per_sample is not None:
                frames = rates["samples_per_second"] * self._frames_per_sample
                rates["frames_per_second"] = frames
            # From the mean over the run: the time left includes evaluations and checkpoints.
            per_step = (now - self._first[1]) / (step - self._first[0])
            parts.append(f"{rate:.3g} steps/s")
            parts += [
                f"{rates[f'{unit}_per_second']:.4g} {unit}/s"
                for unit in ("samples", "frames")
                if f"{unit}_per_second" in rates
            ]
            parts.append(f"{_clock(per_step * (self._total - step))} left")
        self._last = step, now
        if jax.process_index() == 0:
            print("  ".join(parts), file=self._file or sys.stderr, flush=True)
        return rates


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
