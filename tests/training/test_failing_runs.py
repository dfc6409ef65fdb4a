"""Runs that fail, diverge or are refused."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import programs
import pytest
from jax.experimental import multihost_utils
from tiny_runs import final, records, start

from dmd_jax import weights
from dmd_jax.quality import features
from dmd_jax.quality.evaluator import Evaluator
from dmd_jax.training import health, loop
from dmd_jax.training.run import Run
from dmd_jax.training.run import build as resolve


def test_a_run_that_saved_nothing_does_not_claim_its_directory(build, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_loop", kill)
    for seed in (0, 1):  # two configs
        with pytest.raises(KeyboardInterrupt):
            start(build(seed=seed), tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["seed"] == seed


@pytest.mark.parametrize("content", ["", "{", "7"])
def test_a_run_whose_config_is_damaged_is_refused_by_name(build, tmp_path, content):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged, so that nothing says which"):
        start(build(), tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_a_run_that_dies_before_it_is_accepted_writes_no_config(build, tmp_path, monkeypatch):
    def fail(self):
        raise OSError("the weights cannot be read")

    monkeypatch.setattr(Run, "start", fail)
    monkeypatch.setattr(loop, "Writer", None)  # opens no run of Weights & Biases either
    with pytest.raises(OSError, match="cannot be read"):
        start(build(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_failure_while_judging_costs_the_judgement_and_not_the_run(
    build, no_report, tmp_path, monkeypatch, caplog
):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Evaluator, "preview", fail)
    start(build(), tmp_path / "run")
    assert "step 8 could not be judged, the run goes on: RuntimeError: RESOURCE" in caplog.text
    assert (tmp_path / "run" / "generator.safetensors").exists()
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_a_failure_while_judging_on_another_process_ends_the_judgement_here(monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda flag: np.array([flag, True]))
    judging = SimpleNamespace(
        bind=SimpleNamespace(network=lambda *_: None),
        evaluator=SimpleNamespace(preview=lambda generator: (None, None)),
    )
    loop._judge(judging, None, {}, 8, checkpoints=None, writer=None)  # nothing is written
    assert "step 8 could not be judged, the run goes on: RuntimeError: process 1" in caplog.text


def test_a_failure_of_the_report_costs_the_report_and_the_same_command_tries_it_again(
    build, tmp_path, monkeypatch, caplog, capsys
):
    def fail(*_, **__):
        raise ValueError("no images")

    few = {"evaluate.every": 100}
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "report", fail)
        assert start(build(**few), tmp_path / "run") is None
    assert "its report failed: ValueError: no images" in caplog.text
    assert (tmp_path / "run" / "generator.safetensors").exists()
    monkeypatch.setattr(Evaluator, "report", lambda *_, **__: "a report")
    assert start(build(**few), tmp_path / "run") == tmp_path / "run" / "report.md"
    assert capsys.readouterr().out.endswith("a report\n")


def test_a_teacher_that_says_nothing_finite_stops_the_run_at_its_last_good_checkpoint(
    build, no_report, tmp_path, monkeypatch
):
    often = {"log.every": 1, "generator_every": 1, "evaluate.every": 100, "checkpoint.every": 2}
    often["generator.optimizer.decay"] = "constant"  # or other steps would be other learning rates
    run, workdir = build(steps=4, **often), tmp_path / "run"
    start(run, workdir)
    load = Run.load_frozen
    monkeypatch.setattr(Run, "load_frozen", lambda self: programs.poisoned(load(self)))
    with pytest.raises(health.Diverged, match=r"all was well until step 4\. What may help"):
        start(build(**often), workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    final(run, workdir, step=4)


def test_a_huge_learning_rate_stops_the_run(build, no_report, tmp_path):
    rates = {f"{role}.optimizer.learning_rate": 1e6 for role in ("generator", "fake_score")}
    often = {"log.every": 1, "generator_every": 1, "evaluate.every": 100, "steps": 40}
    with pytest.raises(health.Diverged, match="lower"):
        start(build(**rates, **often), tmp_path / "run")


@pytest.mark.parametrize("number", ["samples", "num"])
def test_numbers_of_samples_that_cannot_be_judged_are_refused_before_anything_starts(build, number):
    for value in (60, 101):  # the metric network has 64 features; there are 10 classes
        with pytest.raises(ValueError, match=rf"config\.evaluate: {number}={value} must be"):
            build(**{f"evaluate.{number}": value})


def test_images_are_not_judged_where_the_data_are_no_images(data_dir):
    config = programs.load_config("configs/dmd.py", "wan_tiny")
    config.evaluate.features = features.SHIPPED
    with pytest.raises(ValueError, match=r"config\.evaluate: features='mnist_metric' judges"):
        resolve(config, jax.devices()[:1], files=False)


OFTEN = {"evaluate.every": 2, "health.patience": 2}


@pytest.fixture
def judge(monkeypatch):
    """Makes these the judged distances, and letters the names of their judges."""

    def call(distances, judges="aaaaaa"):
        left = zip(distances, judges, strict=False)

        def preview(*_):
            fd, name = next(left)
            return np.zeros((8, 8, 1), np.uint8), SimpleNamespace(numbers={"fd": fd}, judge=name)

        monkeypatch.setattr(Evaluator, "preview", preview)

    return call


def test_a_run_that_is_past_its_best_stops_and_leaves_the_best(build, no_report, tmp_path, judge):
    judge([2.0, 1.0, 2.5, 3.0])
    for _ in range(2):  # started again, it takes no step
        with pytest.raises(health.Diverged, match=r"step 8, worsening samples: judged distances 2"):
            start(build(**OFTEN), tmp_path / "run")
    assert max(record["step"] for record in records(tmp_path / "run")) == 8
    assert weights.notes(tmp_path / "run" / "best.safetensors")["step"] == 4


def test_distances_of_another_judge_are_not_compared(build, no_report, tmp_path, judge):
    """As where `config.evaluate` has changed within a run."""
    judge([1.0, 1.1, 2.5, 3.0, 2.6, 2.7], "aabbbb")
    start(build(**OFTEN), tmp_path / "run")
    assert weights.notes(tmp_path / "run" / "best.safetensors")["step"] == 6


def test_a_run_that_has_taken_all_its_steps_is_finished_even_past_its_best(
    build, no_report, tmp_path, judge
):
    judge([1.0, 2.5, 3.0])
    start(build(**OFTEN | {"evaluate.every": 4}), tmp_path / "run")
    assert weights.notes(tmp_path / "run" / "best.safetensors")["step"] == 4
    assert weights.notes(tmp_path / "run" / "generator.safetensors")["step"] == 12
