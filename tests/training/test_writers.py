"""Everything written arrives, in order, and TensorFlow is never in the way."""

import io
import json
import logging
import math
import re
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dmd_jax.training import writers
from dmd_jax.training.writers import Progress, Writer


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Board:
    """Stands in for clu's writer; remembers what came and from which thread."""

    def __init__(self):
        self.calls = []
        self.threads = set()

    def _write(self, step, values):
        self.threads.add(threading.current_thread())
        self.calls += [(step, name) for name in values]

    write_scalars = write_images = write_texts = _write

    def flush(self):
        pass

    def close(self):
        self.calls.append("closed")


def test_json_lines_hold_the_numbers_to_the_last_bit(tmp_path):
    with Writer(tmp_path / "new" / "run", tensorboard=False) as writer:
        writer.scalars(1, {"loss": 0.1, "grad": np.float32(0.1)})
        writer.scalars(2, {"loss": math.nan, "grad": math.inf})
        assert lines(tmp_path / "new" / "run") == [  # at once, not at close: a kill may come
            {"step": 1, "loss": 0.1, "grad": float(np.float32(0.1))},
            {"step": 2, "loss": None, "grad": None},
        ]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_become_png_pixel_for_pixel(tmp_path, channels):
    grid = np.random.default_rng(0).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    with Writer(tmp_path, tensorboard=False) as writer:
        writer.images(300, "samples/student", grid)
    picture = np.asarray(Image.open(tmp_path / "images" / "samples" / "student_0000300.png"))
    np.testing.assert_array_equal(picture.reshape(grid.shape), grid)


@pytest.mark.parametrize(
    "grid", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)]
)
def test_what_is_no_image_is_refused_at_the_call(tmp_path, grid):
    with (
        Writer(tmp_path, tensorboard=False) as writer,
        pytest.raises(ValueError, match=r"samples: an image is uint8 \[H, W, C\]"),
    ):
        writer.images(1, "samples", grid)


def test_nothing_waits_for_tensorflow_and_nothing_is_lost(tmp_path, monkeypatch):
    board, imported = Board(), threading.Event()

    def slow_import(directory):
        assert imported.wait(timeout=30)
        return board

    monkeypatch.setattr(writers, "open_tensorboard", slow_import)
    writer = Writer(tmp_path)
    writer.scalars(1, {"loss": 1.0})
    writer.images(1, "grid", np.zeros((2, 2, 1), np.uint8))
    writer.texts(1, "config", "*text*")
    writer.scalars(2, {"loss": 0.5})
    assert board.calls == []  # and yet we are here
    imported.set()
    writer.close()
    assert board.calls == [(1, "loss"), (1, "grid"), (1, "config"), (2, "loss"), "closed"]
    assert threading.main_thread() not in board.threads


def test_importing_the_room_does_not_import_tensorflow():
    program = "import sys; import dmd_jax.training.writers; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_without_tensorflow_the_run_goes_on_after_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # makes its import fail
    with caplog.at_level(logging.WARNING), Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": 1.0})
            writer.images(step, "grid", np.zeros((2, 2, 1), np.uint8))
    assert len(lines(tmp_path)) == 2
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert len(caplog.records) == 1
    assert "No TensorBoard" in caplog.text and "install tensorflow" in caplog.text


def test_a_tensorboard_that_breaks_on_the_way_is_left_behind(tmp_path, monkeypatch, caplog):
    board = Board()
    board.write_scalars = lambda step, values: 1 / 0
    monkeypatch.setattr(writers, "open_tensorboard", lambda directory: board)
    with caplog.at_level(logging.WARNING), Writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": 1.0})
    assert len(lines(tmp_path)) == 3
    assert len(caplog.records) == 1 and "from step 1 on" in caplog.text


def test_an_image_that_cannot_be_written_is_reported_not_raised(tmp_path, caplog):
    (tmp_path / "images").touch()
    with caplog.at_level(logging.WARNING), Writer(tmp_path, tensorboard=False) as writer:
        writer.images(1, "grid", np.zeros((2, 2, 1), np.uint8))
    assert "grid_0000001.png could not be written" in caplog.text


def test_rewind_leaves_one_clean_record(tmp_path):
    with Writer(tmp_path, tensorboard=False) as writer:
        for step in (10, 20, 30):
            writer.scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write("\udcff no line of ours\n5\n")  # a damaged disk
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    with Writer(tmp_path, tensorboard=False) as writer:
        writer.rewind(20)
        writer.scalars(30, {"loss": 31})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 10},
        {"step": 20, "loss": 20},
        {"step": 30, "loss": 31},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_of_nothing_is_nothing(tmp_path):
    with Writer(tmp_path, tensorboard=False) as writer:
        writer.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    out = io.StringIO()
    with Writer(tmp_path / "run") as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, "grid", np.zeros((2, 2, 1), np.uint8))
        writer.rewind(0)
    Progress(10, 1, file=out).report(1, {})
    assert not (tmp_path / "run").exists() and out.getvalue() == ""


@pytest.mark.slow
def test_tensorboard_reads_back_what_was_written(tmp_path):
    program = f"""
import numpy as np
from dmd_jax.training.writers import Writer
with Writer({str(tmp_path)!r}) as writer:
    writer.scalars(5, {{"loss": 0.25}})
    writer.images(5, "grid", np.full((4, 4, 3), 7, np.uint8))
    writer.texts(5, "config", "**bold**")
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0 and child.stderr == ""  # its chatter is off
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,), (grid,), (text,) = (events.Tensors(tag) for tag in ("loss", "grid", "config"))
    assert loss.step == 5 and make_ndarray(loss.tensor_proto) == 0.25
    assert list(grid.tensor_proto.string_val[:2]) == [b"4", b"4"]  # width and height
    assert list(text.tensor_proto.string_val) == [b"**bold**"]


# Weights & Biases


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")  # seconds, on a busy machine
    grid = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for step in (5, 10):
        with Writer(tmp_path, tensorboard=False, wandb="digits", config={"seed": 77}) as writer:
            writer.scalars(step, {"generator/loss": 0.25, "gap/0": math.nan})
            writer.images(step, "grid", grid)
            writer.texts(step, "report", "**bold** <b>")
    assert wandb.run is None  # both are finished
    wandb.teardown()  # its service writes the last of its files when it ends
    identity = (tmp_path / "wandb_id.txt").read_text()
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(parts) == 2
    for part in parts:
        record = (part / f"run-{identity}.wandb").read_bytes()
        for text in (b"digits", b"seed", b"generator/loss", b"0.25"):
            assert text in record
        (picture,) = part.rglob("grid*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(picture)), grid)
        (page,) = part.rglob("report*.html")
        assert "**bold** &lt;b&gt;" in page.read_text()


@pytest.mark.slow
def test_a_run_that_weights_and_biases_refuses_is_one_error_that_says_what_to_do(
    tmp_path, monkeypatch
):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ValueError, match=r"config.log.wandb='digits' cannot be started: No API key"
    ):
        Writer(tmp_path, tensorboard=False, wandb="digits")


def test_a_board_that_breaks_takes_no_other_with_it(tmp_path, monkeypatch, caplog):
    broken, sound = Board(), Board()
    broken.write_scalars = lambda step, values: 1 / 0
    monkeypatch.setattr(writers, "open_wandb", lambda *_: broken)
    monkeypatch.setattr(writers, "open_tensorboard", lambda directory: sound)
    with caplog.at_level(logging.WARNING), Writer(tmp_path, wandb="digits") as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": 1.0})
    assert sound.calls == [(1, "loss"), (2, "loss"), "closed"] and broken.calls == []
    assert len(caplog.records) == 1 and "Weights & Biases is off from step 1 on" in caplog.text


# Progress


def test_progress_shows_place_losses_rates_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(2000, 128, file=out)
    assert progress.report(1, {"generator/loss": 0.5}) == {}
    now[0] += 10
    rates = progress.report(101, {"generator/loss": 0.21423, "fake_score/loss": 0.1, "gap/0": 1})
    assert rates == {"steps_per_second": 10.0, "samples_per_second": 1280.0}
    now[0] += 30  # an evaluation: this rate is low, the time left goes by the mean
    progress.report(201, {"fake_score/loss": 0.1})
    first, second, third = out.getvalue().splitlines()
    assert first == "step    1/2000  generator/loss 0.5"
    assert second == (
        "step  101/2000  generator/loss 0.2142  fake_score/loss 0.1  10 steps/s  1280 samples/s"
        "  3:10 left"
    )
    assert third.endswith("3.33 steps/s  426.7 samples/s  6:00 left")


def test_progress_counts_the_frames_of_samples_that_have_some(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(10, 4, frames_per_sample=21, file=out)
    progress.report(1, {})
    now[0] += 2
    rates = progress.report(2, {})
    assert rates == {"steps_per_second": 0.5, "samples_per_second": 2, "frames_per_second": 42}
    assert "0.5 steps/s  2 samples/s  42 frames/s  0:16 left" in out.getvalue()


def test_progress_counts_hours(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(10_001, 1, file=out)
    progress.report(1, {})
    now[0] += 1
    progress.report(2, {})
    assert re.search(r"2:46:39 left$", out.getvalue())
