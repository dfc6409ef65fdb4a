"""Judging a run: what cannot be judged is refused before it, and the best is selected on train."""

import dataclasses
import io
import json

import jax
import numpy as np
import programs
import pytest

from dmd_jax import data, weights
from dmd_jax.data import Images
from dmd_jax.devices import sharding
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.attention import Causal
from dmd_jax.models.wan import WanConfig
from dmd_jax.quality import evaluation, metrics
from dmd_jax.quality.evaluation import Evaluation, Progress
from dmd_jax.quality.evaluator import Evaluator, Measured, Preview
from dmd_jax.quality.features import load_features
from dmd_jax.rollouts import samplers
from dmd_jax.rollouts.samplers import CausalManyStep, FewStep, ManyStep, few_step
from dmd_jax.training.configuration import differences
from dmd_jax.training.run import build

SPEC = Evaluation(every=1, samples=80, num=100, steps=(1,))


def evaluator(data_dir, source=None, **changes):
    source = data.load("mnist5k", "train", data_dir) if source is None else source
    return Evaluator(dataclasses.replace(SPEC, **changes), source, [FewStep((1.0,))], [], 8)


def images(name, shape, classes, data_dir=None):
    return Images(
        [], name=name, split="train", data_dir=data_dir, image_shape=shape, classes=classes
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"every": 0}, "every=0 must be 1 or more"),
        ({"num": 0}, "num=0 must be 1 or more"),
        ({"samples": -1}, "samples=-1 must be 1 or more"),
        ({"steps": ()}, r"steps=\(\) must name one"),
        ({"steps": (4, 0)}, r"steps=\(4, 0\): 0 must be 1 or more"),
        ({"teacher_steps": (0,)}, r"teacher_steps=\(0,\): 0 must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **changes)


def test_data_that_the_feature_network_cannot_judge_are_refused(data_dir):
    colour = images("cifar10", (32, 32, 3), [str(i) for i in range(10)])
    with pytest.raises(ValueError, match=r"takes images of 1 channels, but .*'cifar10' has 3"):
        evaluator(data_dir, colour).check()
    fashion = images("fashion_mnist", (28, 28, 1), ["T-shirt", *"abcdefghi"])
    with pytest.raises(ValueError, match="is a classifier of '0', '1', '2'"):
        evaluator(data_dir, fashion).check()
    evaluator(data_dir, fashion, features="").check()


def test_a_split_that_is_not_there_or_too_small_is_refused(data_dir):
    with pytest.raises(ValueError, match=r"split='validation': .* has \['train', 'test'\]"):
        evaluator(data_dir, split="validation").check()
    with pytest.raises(
        ValueError, match=r"'test\[:50\]' of 'mnist5k' has 50 images, and 65.*features=''"
    ):
        evaluator(data_dir, split="test[:50]").check()
    with pytest.raises(ValueError, match=r"has 4000 images, and 5000 are needed.*lower num"):
        evaluator(data_dir, num=5000).check()
    evaluator(data_dir, split="train[90%:]").check()


@pytest.mark.parametrize(
    "path, changes, message",
    [
        ("configs/dmd.py", {"evaluate.split": "dev"}, r"config\.evaluate: .*split='dev'"),
        ("configs/dmd.py", {"evaluate.split": "train"}, r"split='train' is the split that the run"),
        (
            "configs/dmd.py",
            {"data.split": "test"},
            r"split='test' is the split that the run learns",
        ),
        ("configs/dmd.py", {"data.split": "dev"}, r"config\.data: cannot read split 'dev'"),
        ("configs/dmd.py", {"evaluate.guidance": 2.0}, r"guidance is 2\.0, but guidance is in the"),
        ("configs/dmd.py", {"evaluate.teacher_steps": ()}, r"teacher_steps is \(\): name"),
        ("configs/pretrain.py", {"evaluate.teacher_steps": (4,)}, "this run has no teacher"),
    ],
)
def test_what_a_run_cannot_judge_is_refused_before_it(path, changes, message, teacher, data_dir):
    config = programs.load_config(path)
    values = {"data.data_dir": data_dir} | changes
    if "teacher" in config:
        values["teacher.weights"] = str(teacher)
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        build(config, jax.devices()[:1])


def test_a_run_that_is_not_judged_needs_no_second_split(data_dir):
    evaluator(data_dir, features="", split="train").check()


def test_a_run_learns_from_one_split_and_is_reported_on_another(teacher, data_dir):
    splits = {"data.split": "train[:50%]", "evaluate.split": "train[50%:]"}
    run = build(programs.config(teacher, data_dir, **splits), jax.devices()[:1])
    assert len(run.source) == 2000
    assert run.evaluator.settings.split == "train[50%:]"


def test_a_run_of_a_config_that_named_neither_split_nor_class_goes_on():
    stored = {"data.name": "mnist5k", "evaluate.num": 2000}
    now = {**stored, "data.split": "train", "evaluate.cls": "Evaluation"}
    assert differences(stored, now) == ""
    assert "data.split" in differences(stored, now | {"data.split": "test"})


def test_the_best_is_selected_against_the_training_images(data_dir):
    judge = evaluator(data_dir)
    picture, score = judge.preview(programs.tiny())
    labels = np.arange(80, dtype=np.int32) % 10
    drawn = evaluation.draw_images(programs.tiny(), judge.samplers[0], labels, seed=0)
    extract = load_features().extract
    train, fake = (extract(x)[0] for x in (data.arrays(judge.source)[0], drawn))
    expected = metrics.frechet_distance(train, fake)
    assert score.numbers["fd"] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(picture[:28, :28], drawn[0])


def test_scores_of_other_samples_or_images_have_another_judge(data_dir):
    net = programs.tiny()
    first = evaluator(data_dir).preview(net)[1].judge
    assert evaluator(data_dir, num=200, split="train[90%:]").preview(net)[1].judge == first
    half = data.load("mnist5k", "train[:50%]", data_dir)
    assert evaluator(data_dir, half).preview(net)[1].judge != first
    assert evaluator(data_dir, samples=90).preview(net)[1].judge != first


def members(*protocols):
    """The names that protocols ask for."""
    names = {name for p in protocols for base in p.__mro__ for name in vars(base)}
    names |= {name for p in protocols for base in p.__mro__ for name in annotations(base)}
    return {name for name in names if not name.startswith("_")}


def annotations(cls):
    return vars(cls).get("__annotations__", {})


def test_sources_have_what_training_and_reports_read(data_dir):
    for source, protocols in (
        (data.load("mnist5k", "test", data_dir), (data.Source, Preview)),
        (data.Prompts("embeddings", (1, 2, 2, 4)), (data.Source, Preview)),
        (data.MovingDigits(), (data.Source, Measured)),
    ):
        assert members(*protocols) <= set(dir(source))
    assert {"examples", "columns", "measure"} <= members(data.Source, Measured)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_updated_in_place_on_a_terminal_and_one_line_elsewhere():
    for file, expected in (
        (Terminal(), "\rx: 0 of 4\rx: 3 of 4\rx: 4 of 4\rx: 4 of 4\n"),
        (io.StringIO(), "x: 4 of 4\n"),
    ):
        with Progress("x", 4, file=file) as progress:
            progress.advance(3)
            progress.advance(1)
        assert file.getvalue() == expected


def test_videos_are_measured_by_frame_beside_the_teacher_and_other_checkpoints(tmp_path):
    """A causal student far beyond the length of training; its teacher only as far as it goes."""
    source = data.BouncingDigits(frames=4)
    config = WanConfig(16, 16, 2, 1, **source.model_fields, freq_dim=8, reach=4)
    net = Denoiser(weights.build(config))
    causal = Causal(2, window=2)
    student, start = few_step((1.0,), 1, 1, 1.0, causal, name="self-forcing"), CausalManyStep(2)
    weights.save(tmp_path / "start.safetensors", net, **start.notes())
    path = str(tmp_path / "start.safetensors")
    spec = Evaluation(
        every=1,
        features="",
        num=20,
        steps=(1,),
        teacher_steps=(2,),
        frames=12,
        beside=(("start", path),),
    )
    judge = Evaluator(spec, source, [student], [ManyStep(2)], 8)
    judge.check()
    text = judge.report(tmp_path, "title", net, teacher=net)
    rows = json.loads((tmp_path / "report.json").read_text())
    assert {row["name"]: len(row["by_frame"]["digit"]) for row in rows} == {
        **{"real": 12, "teacher": 4, "start": 12, "self-forcing": 12}
    }
    for name in ("report.png", "by_frame.png", "videos.gif"):
        assert name in text and (tmp_path / name).stat().st_size

    def changed(own=(student,), **changes):
        return Evaluator(dataclasses.replace(spec, **changes), source, own, [ManyStep(2)], 8)

    for name in ("real", "teacher", "self-forcing"):
        with pytest.raises(ValueError, match=f"two rows of the report have the name '{name}'"):
            changed(beside=((name, path),)).check()
    with pytest.raises(ValueError, match="frames=13: 13 frames do not divide into blocks of 2"):
        changed(frames=13, beside=()).check()
    with pytest.raises(ValueError, match="frames=10: 10 frames do not divide into blocks of 3"):
        changed(frames=10).check()
    with pytest.raises(ValueError, match="is in reports by frame alone: set frames"):
        changed(frames=0).check()
    # A student whose videos are longer in training: its teacher's are not.
    longer = Evaluator(spec, data.BouncingDigits(frames=6), [student], [ManyStep(2)], 8)
    longer.report(tmp_path, "title", net, teacher=net)
    rows = json.loads((tmp_path / "report.json").read_text())
    assert {row["name"]: len(row["by_frame"]["digit"]) for row in rows}["teacher"] == 4
    # Fewer videos and frames than the figures show; the trained network in several steps.
    more = (student, dataclasses.replace(student, times=(1.0, 0.5)))
    few = changed(more, num=3, frames=6, beside=())
    few.check()
    few.report(tmp_path, "title", net)
    rows = json.loads((tmp_path / "report.json").read_text())
    names = ["real", "self-forcing, 1 step", "self-forcing, 2 steps"]
    assert [row["name"] for row in rows] == names


def test_by_frame_a_teacher_is_drawn_where_its_weights_are(tmp_path, monkeypatch):
    """Split over the devices, or with their host: it may be too large for one of them."""
    source, drawn = data.BouncingDigits(frames=4), []
    config = WanConfig(16, 16, 2, 1, **source.model_fields, freq_dim=8, reach=4)
    net = Denoiser(weights.build(config))
    weights.save(tmp_path / "other.safetensors", net, **CausalManyStep(2).notes())

    def draw(denoiser, sampler, cond, uncond, shape, seed, *, batch):
        drawn.append(denoiser)
        yield np.zeros((len(cond), *shape), np.float32)

    monkeypatch.setattr(samplers, "draw", draw)
    beside = (("other", str(tmp_path / "other.safetensors")),)
    spec = Evaluation(every=1, features="", num=8, steps=(1,), teacher_steps=(2,), frames=4)
    judge = Evaluator(dataclasses.replace(spec, beside=beside), source, [], [ManyStep(2)], 8)
    with jax.set_mesh(mesh := sharding.make_mesh()):
        judge.report(tmp_path, "title", net, teacher=net)
    teacher, other = drawn
    assert teacher is net
    devices = {frozenset(x.sharding.device_set) for x in jax.tree.leaves(other)}
    assert devices == {frozenset(mesh.devices.flat)}


def test_a_report_from_before_a_setting_existed_is_one_of_its_default(data_dir, tmp_path):
    """An upgrade of the library does not judge finished runs again."""
    now, path = evaluator(data_dir), tmp_path / "evaluation.json"
    assert not now.is_reported(tmp_path)
    stored = dataclasses.asdict(SPEC)
    for name in ("every", "samples", "frames", "beside"):
        del stored[name]
    path.write_text(json.dumps(stored))
    assert now.is_reported(tmp_path)
    assert not evaluator(data_dir, frames=12).is_reported(tmp_path)
    path.write_text(json.dumps(stored | {"num": 200}))
    assert not now.is_reported(tmp_path)


def test_what_cannot_be_measured_by_frame_is_refused_before_training(data_dir, tmp_path):
    with pytest.raises(ValueError, match="frames=12: 'mnist5k' is not measured by frame"):
        evaluator(data_dir, frames=12).check()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluator(data_dir, features="", beside=(("start", "nowhere.safetensors"),)).check()
