"""Judging from files: the rows of a teacher are computed once, and again when anything differs."""

import json
from functools import partial

import numpy as np
import programs
import pytest

from dmd_jax import evaluate, weights
from dmd_jax.quality import evaluation
from dmd_jax.rollouts.samplers import FewStep, ManyStep

SAMPLERS = [ManyStep(2, 1.5), ManyStep(1, 1.5)]


class Count:
    """A judge that takes any samples, and remembers how often it was asked."""

    name, fingerprint = "FD-NONE", "a metric and its data"

    def __init__(self):
        self.recorded = []

    def __call__(self, images, labels):
        self.recorded.append((images, labels))
        return {"fd": float(len(self.recorded))}


@pytest.fixture
def judge():
    return Count()


@pytest.fixture
def file(tmp_path):
    """A teacher's file that a test may change."""
    return programs.save_tiny(tmp_path / "teacher.safetensors")


def test_a_row_says_what_was_judged_and_at_what_cost(judge):
    for number, sampler in enumerate([FewStep((1.0, 0.5)), ManyStep(2, 1.5)], 1):
        row, images = evaluation.judged(programs.tiny(), sampler, judge, 20)
        cost = {"steps": 2, "calls": 2 * number, "fd": float(number)}
        assert row == {"name": sampler.name, **cost}
        assert images.shape == (20, 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(judge.recorded[-1][1]), [2] * 10)


def test_stored_rows_of_the_same_teacher_and_metric_are_used_again(judge, file, tmp_path):
    store = tmp_path / "kept.json"
    first = evaluation.teacher_rows(file, SAMPLERS, judge, 10, store=store)
    assert evaluation.teacher_rows(file, SAMPLERS, judge, 10, store=store) == first
    assert len(judge.recorded) == len(SAMPLERS)


def test_the_rows_of_a_teacher_in_int8_are_its_own(judge, file, tmp_path):
    for int8 in (False, True, False, True):
        teacher = weights.denoiser(file, int8=int8)
        evaluation.teacher_rows(
            file, SAMPLERS, judge, 10, denoiser=teacher, store=tmp_path / "kept.json"
        )
    assert len(judge.recorded) == 2 * len(SAMPLERS)


def test_rows_beside_the_teacher_are_found_and_those_of_a_run_are_not_written_there(judge, file):
    store_path = file.with_suffix(".rows.json")
    evaluation.teacher_rows(file, SAMPLERS, judge, 10)
    assert not store_path.exists()
    first = evaluation.teacher_rows(file, SAMPLERS, judge, 10, store=store_path)
    assert evaluation.teacher_rows(file, SAMPLERS, judge, 10, store=file.parent / "other") == first
    assert len(judge.recorded) == 2 * len(SAMPLERS)


def other_metric(judge, **_):
    judge.fingerprint = "another metric, or other data"


def damaged_store(store, **_):
    store.write_text(store.read_text()[:-20])


def other_weights(file, **_):
    programs.save_tiny(file, seed=1)


@pytest.mark.parametrize(
    "change, arguments",
    [
        (other_metric, {}),
        (other_weights, {}),
        (damaged_store, {}),
        (None, {"num": 20}),
        (None, {"ways": [ManyStep(3, 1.5), ManyStep(2, 1.25)]}),
        (None, {"recompute": True}),
    ],
)
def test_rows_are_computed_anew_where_anything_differs(judge, file, tmp_path, change, arguments):
    store = tmp_path / "kept.json"
    asked = {"ways": SAMPLERS, "num": 10, "store": store}
    evaluation.teacher_rows(file, judge=judge, **asked)
    if change is not None:
        change(judge=judge, file=file, store=store)
    again = evaluation.teacher_rows(file, judge=judge, **asked | arguments)
    assert len(judge.recorded) == 2 * len(SAMPLERS)
    stored = json.loads(store.read_text()).values()
    assert all(row in stored for row in again)


def test_a_sampler_that_was_judged_before_is_not_judged_again(judge, file, tmp_path):
    asked = {"judge": judge, "num": 10, "store": tmp_path / "kept.json"}
    first = evaluation.teacher_rows(file, SAMPLERS, **asked)
    more = evaluation.teacher_rows(file, [ManyStep(3, 1.5), *SAMPLERS], **asked)
    assert more[1:] == first and len(judge.recorded) == len(SAMPLERS) + 1


def test_shipped_rows_are_those_that_the_shipped_configs_ask_for(real_judge, monkeypatch):
    monkeypatch.setattr(evaluation, "judged", None)  # nothing may be computed
    for variant in programs.load_module("configs/dmd.py").VARIANTS:
        config = programs.load_config("configs/dmd.py", variant)
        spec = config.evaluate
        if not spec.features:
            continue
        teachers = [ManyStep(n, spec.teacher_guidance) for n in spec.teacher_steps]
        found = evaluation.teacher_rows(config.teacher.weights, teachers, real_judge, spec.num)
        assert [row["steps"] for row in found] == list(spec.teacher_steps)


@pytest.fixture
def program(call, monkeypatch, real_judge, data_dir):
    """`call` of `python -m dmd_jax.evaluate`, on data that stand prepared."""
    monkeypatch.setattr(evaluate, "data_judge", lambda *_, **__: real_judge)
    return partial(call, evaluate, f"--data_dir={data_dir}")


def test_program_prints_a_table_beside_the_floor_and_writes_its_rows(
    program, file, capsys, tmp_path
):
    out = tmp_path / "rows.json"
    args = "--num=100", "--steps=2,1", "--guidance=1,1.5", f"--out={out}", "--store"
    assert program(f"--checkpoint={file}", *args) is None
    rows = json.loads(out.read_text())
    assert [(row["name"], row["steps"], row["calls"]) for row in rows] == [
        ("real images", 0, 0),
        ("teacher", 2, 2),
        ("teacher", 1, 1),
        ("teacher", 2, 4),
        ("teacher", 1, 2),
    ]
    printed = capsys.readouterr().out
    assert printed.count("| teacher |") == 4 and "FD-MNIST64" in printed
    stored = json.loads(file.with_suffix(".rows.json").read_text())
    assert list(stored.values()) == rows[1:]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint=nowhere"], "no checkpoint file at 'nowhere'"),
        (["--checkpoint={file}", "--steps=four"], "--steps=four"),
        (["--checkpoint={file}", "--steps=2,0"], "steps=0 must be 1 or more"),
        (["--checkpoint={file}", "--guidance=much"], "--guidance=much"),
        (["--checkpoint={file}", "--num=101"], "cannot take 101 images, equally many"),
        (["--checkpoint={file}", "--num=50"], "against 50 samples in 64 dimensions"),
        (["--checkpoint={small}"], "(14, 14, 1)"),
        (["--checkpoint={student}", "--guidance=2"], "guidance is in its weights already"),
        (["--checkpoint={file}", "--out={file}/a.json"], "cannot be written to"),
        (["--checkpoint={file}", "--out=/"], "/ is a folder: name a file"),
        (["--checkpoint={file}", "--split=validation"], "split 'validation' of 'mnist5k'"),
        (["--checkpoint={file}", "4"], "unknown argument '4'"),
        (["--checkpoint=moving_digits_teacher"], "is a WanConfig network, which does not generate"),
    ],
)
def test_program_refuses_with_one_message_before_it_samples(
    program, file, tmp_path, monkeypatch, args, message
):
    small = programs.save_tiny(tmp_path / "small.safetensors", image_size=14, patch=7)
    student = tmp_path / "student.safetensors"
    weights.save(student, programs.tiny(), times=(1.0,), shift=1.0)
    monkeypatch.setattr(evaluation, "draw_images", None)
    output = program(*(arg.format(file=file, small=small, student=student) for arg in args))
    assert str(output).startswith("error: ") and message in output


def test_rows_that_could_not_be_kept_are_not_computed(program, file, monkeypatch):
    def refuse(directory):
        raise ValueError(f"{directory} cannot be written to")

    monkeypatch.setattr(evaluate, "check_writable", refuse)
    monkeypatch.setattr(evaluation, "draw_images", None)
    output = program(f"--checkpoint={file}", "--store")
    assert output == f"error: {file.parent} cannot be written to"
