"""The training program from start to report, in this process: finished, stopped, gone on with."""

import json
import os
import shutil
import signal
import tarfile
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
import toys
from tiny_runs import STEPS, final, records, start

from dmd_jax import weights
from dmd_jax.devices.disk import exclusive
from dmd_jax.quality import evaluator
from dmd_jax.quality.evaluator import Evaluator
from dmd_jax.rollouts import samplers
from dmd_jax.training import loop, preemption
from dmd_jax.training.cost import cost
from dmd_jax.training.run import build as resolve


def signal_at(step, monkeypatch):
    """SIGTERM reaches this process while it takes that step."""
    requested = preemption.Preemption.requested

    def ask(self, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self, now)

    monkeypatch.setattr(preemption.Preemption, "requested", ask)


@pytest.fixture(scope="module")
def straight(build, tmp_path_factory):
    """The directory of a run that nothing disturbed, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return workdir, start(build(), workdir)


def assert_same_run(build, workdir, straight):
    """Same weights, moments, average, step, exports and record; bit for bit."""
    run = build()
    (state, extra), (wanted, wanted_extra) = final(run, workdir), final(run, straight[0])
    toys.assert_same(state, wanted)
    assert extra == wanted_extra
    for name in ("generator.safetensors", "best.safetensors"):
        assert (workdir / name).read_bytes() == (straight[0] / name).read_bytes()
    assert records(workdir) == records(straight[0])


def test_a_run_leaves_what_its_docstring_says(straight):
    workdir, report = straight
    assert report == workdir / "report.md"
    left = {str(path.relative_to(workdir)) for path in workdir.glob("*")}
    assert left == {
        *("config.json", "lock", "metrics.jsonl", "checkpoints", "best", "images"),
        *("generator.safetensors", "best.safetensors", "teacher.rows.json"),
        *("report.md", "report.png", "report.json", "evaluation.json"),
    }
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8", "12"}
    assert {path.name for path in (workdir / "images").iterdir()} == {"student_0000008.png"}


def test_the_resolved_config_is_kept_in_full(straight, teacher):
    kept = json.loads((straight[0] / "config.json").read_text())
    assert kept["teacher.weights"] == str(teacher)
    assert kept["method.cls"] == "DMD"
    assert kept["generator.optimizer.eps"] == 1e-8  # a default that no config names


def test_metrics_are_one_line_a_record(straight):
    lines = records(straight[0])
    assert [line["step"] for line in lines] == [3, 6, 8, 9, 12]
    judged = lines.pop(2)
    assert {"quality/fd", "quality/accuracy", "quality/recall"} <= judged.keys()
    for line in lines:
        assert line["generator/skipped"] == line["fake_score/skipped"] == 0
        assert line["generator/loss"] > 0 and line["fake_score/loss"] > 0
        assert {"gap/0", "critic/tracking", "samples/diversity"} <= line.keys()


def test_the_report_stands_everything_beside_the_floor(straight):
    workdir, report = straight
    rows = json.loads((workdir / "report.json").read_text())
    assert [(row["name"], row["steps"], row["calls"]) for row in rows] == [
        ("real images", 0, 0),
        ("teacher", 3, 6),
        ("student", 4, 4),
        ("student", 1, 1),
    ]
    text = report.read_text()
    assert text.startswith("# DMD on mnist5k, 12 steps") and text.count("| student |") == 2


def test_the_report_says_the_work_of_the_run(build, straight):
    text = straight[1].read_text()
    for name, words in cost(build()).lines().items():
        assert f"- {name}: {words}\n" in text


def test_the_export_is_the_average_and_samples_as_the_run_was_judged(build, straight):
    workdir, run = straight[0], build()
    exported = weights.denoiser(workdir / "generator.safetensors")
    state, _ = final(run, workdir)
    toys.assert_same(jax.tree.leaves(exported), jax.tree.leaves(state.ema))
    moved = jax.tree.map(np.array_equal, state.ema, state.nets["generator"])
    assert not any(jax.tree.leaves(moved))  # the average is not the generator
    assert samplers.sampler_for(workdir / "generator.safetensors") == run.evaluator.samplers[0]
    notes = weights.notes(workdir / "generator.safetensors")
    assert notes == {"step": 12, "method": "dmd", "times": list(run.method.times), "shift": 1.0}
    assert weights.notes(workdir / "best.safetensors")["step"] == 8


def test_a_finished_run_says_so_and_reprints_its_report(build, straight, monkeypatch, capsys):
    workdir, report = straight
    monkeypatch.setattr(loop, "compile_steps", None)
    monkeypatch.setattr(loop, "Writer", None)
    assert start(build(**{"log.every": 4, "evaluate.every": 5}), workdir) == report
    assert report.read_text() in capsys.readouterr().out


def test_a_finished_run_says_that_it_has_no_step_to_profile(build, straight, caplog):
    start(build(), straight[0], profile=range(2, 4))
    assert "already taken 12 steps: of the 2 of --profile=2:2, none will be traced" in caplog.text
    assert not (straight[0] / "profile").exists()


def test_another_config_is_refused_with_the_difference(build, straight, monkeypatch):
    monkeypatch.setattr(loop, "compile_steps", None)
    with pytest.raises(ValueError, match="another config") as error:
        start(build(**{"method.guidance": 3.0, "seed": 1, "log.every": 4}), straight[0])
    assert str(error.value).splitlines()[1:] == [
        "  method.guidance: the run here has 1.25, this command 3.0",
        "  seed: the run here has 0, this command 1",
    ]


def test_another_teacher_at_the_same_path_is_another_config(build, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "compile_steps", lambda run: {})
    monkeypatch.setattr(loop, "_loop", kill)
    file, workdir = tmp_path / "teacher.safetensors", tmp_path / "run"
    overrides = {"teacher.weights": str(programs.save_tiny(file))}
    with pytest.raises(KeyboardInterrupt):
        start(build(**overrides), workdir)
    (workdir / "checkpoints" / "1").mkdir()  # as if it had saved a step
    programs.save_tiny(file, seed=1)
    with pytest.raises(ValueError, match=r"teacher\.sha256"):
        start(build(**overrides), workdir)


def test_fewer_steps_than_were_taken_are_refused_and_leave_no_trace(build, straight):
    kept = (straight[0] / "config.json").read_text()
    with pytest.raises(ValueError, match=r"config\.steps=4, .* has taken 12: ask for as many"):
        start(build(steps=4), straight[0])
    assert (straight[0] / "config.json").read_text() == kept


def test_a_directory_in_use_is_refused_before_anything_is_computed(build, straight, monkeypatch):
    monkeypatch.setattr(loop, "compile_steps", None)
    in_use = rf"{straight[0]} is in use by process {os.getpid()}"
    with exclusive(straight[0]), pytest.raises(ValueError, match=in_use):
        start(build(steps=20), straight[0])


def test_a_run_of_an_earlier_version_goes_on_to_its_end(data_dir, no_report, tmp_path, monkeypatch):
    """Five steps of the commit before the rooms were folders, stopped inside a log window."""
    with tarfile.open(Path(__file__).with_name("earlier_run.tar.xz")) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    (tmp_path / "run" / "teacher.safetensors").rename(tmp_path / "teacher.safetensors")
    monkeypatch.chdir(tmp_path)  # the stored path of the teacher is relative
    values = {"steps": 8, "log.every": 2, "checkpoint.every": 5, "evaluate.every": 100}
    # The defaults of configs/dmd.py in that commit.
    values |= {"generator.optimizer.learning_rate": 2e-4, "ema.decay": 0.97}
    config = programs.config("teacher.safetensors", data_dir, **values)
    run = resolve(config, jax.devices()[:1])
    start(run, tmp_path / "run")
    assert [line["step"] for line in records(tmp_path / "run")] == [2, 4, 6, 8]
    state, _ = final(run, tmp_path / "run", 8)
    assert state.step == 8
    assert (tmp_path / "run" / "generator.safetensors").exists()


class Endless(Future):
    """A compilation that never ends; a signal arrives while it is waited for."""

    def result(self, timeout=None):
        signal.raise_signal(signal.SIGTERM)
        raise TimeoutError


@pytest.mark.parametrize("kind, saved", [(True, []), (False, ["1"])], ids=["first", "second"])
def test_a_signal_during_a_compilation_saves_and_leaves(kind, saved, build, tmp_path, monkeypatch):
    """The first step updates the generator; the second, which does not, is compiled later."""
    compile_steps = loop.compile_steps
    monkeypatch.setattr(loop, "compile_steps", lambda run: compile_steps(run) | {kind: Endless()})
    where = "and saved at step 1;" if saved else "before its first step;"
    with pytest.raises(preemption.Stopped, match=f"^stopped {where}"):
        start(build(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == saved


def test_the_last_log_window_is_recorded_though_it_is_incomplete(build, no_report, tmp_path):
    start(build(**{"log.every": 5, "evaluate.every": 100}), tmp_path)
    assert [line["step"] for line in records(tmp_path)] == [5, 10, STEPS]


def test_sigterm_saves_at_once_and_the_next_start_ends_bit_identical(
    build, straight, no_report, tmp_path, monkeypatch, caplog
):
    workdir = tmp_path / "run"
    stops = pytest.raises(preemption.Stopped, match=r"stopped and saved at step [56];")
    with monkeypatch.context() as patched, stops:
        signal_at(5, patched)
        start(build(), workdir)
    assert not (workdir / "generator.safetensors").exists()
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved in (5, 6)
    with caplog.at_level("INFO", "dmd_jax"):
        start(build(), workdir)
    assert f"going on from step {saved} in " in caplog.text
    assert_same_run(build, workdir, straight)


def test_a_signal_at_a_step_that_is_judged_costs_no_judgement(
    build, straight, no_report, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(preemption.Preemption, "requested", lambda self, step: step == 8)
        patched.setattr(loop, "_judge", None)  # it leaves at once
        with pytest.raises(preemption.Stopped, match="at step 8;"):
            start(build(), tmp_path / "run")
    start(build(), tmp_path / "run")
    assert_same_run(build, tmp_path / "run", straight)


def test_a_run_killed_while_judging_has_saved_its_steps_and_judges_when_it_goes_on(
    build, straight, no_report, tmp_path, monkeypatch
):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "preview", kill)
        with pytest.raises(KeyboardInterrupt):
            start(build(), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"4", "8"}
    start(build(), tmp_path / "run")
    assert_same_run(build, tmp_path / "run", straight)


def test_a_finished_run_is_judged_again_where_its_evaluation_has_changed(
    build, straight, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    monkeypatch.setattr(loop, "compile_steps", None)
    start(build(**{"evaluate.num": 80, "evaluate.steps": (1,)}), workdir)
    rows = json.loads((workdir / "report.json").read_text())
    assert [(row["name"], row["steps"]) for row in rows] == [
        ("real images", 0),
        ("teacher", 3),
        ("student", 1),
    ]


def test_a_damaged_newest_checkpoint_falls_back_says_so_and_ends_bit_identical(
    build, straight, no_report, tmp_path, monkeypatch, caplog
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(preemption.Preemption, "requested", lambda self, step: step == 10)
        with pytest.raises(preemption.Stopped):
            start(build(), workdir)
    for path in (workdir / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level("INFO", "dmd_jax"):
        start(build(), workdir)
    assert "checkpoints/10 is damaged" in caplog.text
    assert "going on from step 8 in " in caplog.text
    assert_same_run(build, workdir, straight)


def test_a_longer_run_goes_on_and_one_killed_before_its_report_reports_later(
    build, straight, no_report, tmp_path, monkeypatch
):
    workdir, steps = tmp_path / "run", {"checkpoint.every": 2, "evaluate.every": 100}
    steps["generator.optimizer.decay"] = "constant"  # or other steps would be other learning rates
    monkeypatch.setattr(loop, "_report", lambda *_: (workdir / evaluator.REPORT).write_text("old"))
    start(build(steps=2, **steps), workdir)

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_report", kill)
    with pytest.raises(KeyboardInterrupt):
        start(build(steps=4, **steps), workdir)
    monkeypatch.setattr(loop, "_report", lambda *_: "new")
    monkeypatch.setattr(loop, "compile_steps", None)  # all steps are taken
    start(build(steps=4, **steps), workdir)
    assert not (workdir / evaluator.REPORT).exists()  # the old report is not this run's


def test_pretraining_runs_to_its_report(data_dir, tmp_path, capsys, caplog):
    values = {name: v for name, v in programs.SHORT.items() if "teacher" not in name}
    values |= {"data.data_dir": data_dir, "generator_every": 1, "generator.model.depth": 1}
    values |= {"generator.model.patch": 14, "generator.model.dim": 16, "generator.model.heads": 2}
    values |= {"evaluate.steps": (2,), "steps": 6, "evaluate.every": 4}
    config = programs.load_config("configs/pretrain.py")
    config.update_from_flattened_dict(values)
    with caplog.at_level("INFO", "dmd_jax"):
        start(resolve(config, jax.devices()[:1]), tmp_path / "run")
    assert f"generator.safetensors are in {tmp_path / 'run'}" in caplog.text
    trained = tmp_path / "run" / "generator.safetensors"
    assert samplers.sampler_for(trained) == samplers.ManyStep(50)
    assert "times" not in weights.notes(trained)
    assert "| generator | 2 | 4 |" in capsys.readouterr().out


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_devices_change_a_run_by_rounding_only(mesh, build, no_report, tmp_path):
    # A large epsilon makes Adam's step a smooth function of the gradient: with a small one, the
    # sign of a gradient that is all rounding decides.
    smooth = {f"{role}.optimizer.eps": 1e-2 for role in ("generator", "fake_score")}
    few = {"steps": 3, "log.every": 1, "generator_every": 1, "evaluate.every": 100}
    split = {f"mesh.{axis}": n for axis, n in mesh.items()}
    runs = {
        1: build(**smooth, **few),
        8: build(devices=8, **smooth, **few, **split),
    }
    for devices, run in runs.items():
        start(run, tmp_path / str(devices))
    (one, _), (eight, _) = (final(run, tmp_path / str(n), 3) for n, run in runs.items())
    toys.assert_close(jax.device_get(eight.nets), jax.device_get(one.nets), rtol=1e-4, atol=1e-6)
    for a, b in zip(records(tmp_path / "8"), records(tmp_path / "1"), strict=True):
        # A noise band without a sample has no number, on one device as on eight.
        assert {k for k in a if a[k] is None} == {k for k in b if b[k] is None}
        numbers = {k: v for k, v in b.items() if v is not None}
        assert {k: a[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    if "fsdp" in mesh:
        kernel = eight.nets["generator"].net.blocks.qkv.kernel[...]
        assert kernel.addressable_shards[0].data.shape == (1, 4, 48)
