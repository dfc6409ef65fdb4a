"""What cannot run is refused with one clear message, before anything is loaded or compiled."""

import functools
import importlib.util
import operator

import programs
import pytest

from dmd_jax.training import loop
from dmd_jax.training.run import Run, build


@pytest.fixture
def refusal(start, monkeypatch, capsys, teacher, data_dir, tmp_path):
    """What the program says when it refuses a tiny run of configs/dmd.py with these overrides."""

    def compute(*_, **__):
        raise AssertionError("weights were loaded, or something compiled")

    monkeypatch.setattr(Run, "start", compute)
    monkeypatch.setattr(loop, "compile_steps", compute)

    def call(*args, workdir=tmp_path / "run", **overrides):
        values = programs.short(teacher, data_dir, **overrides)
        code = start(*programs.flags(workdir, values), *args)
        assert code not in (0, None)
        return capsys.readouterr().err if isinstance(code, int) else code

    return call


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("method.guidanc", 2, 'Did you mean "guidance"'),
        ("batchsize", 2, 'Did you mean "batch_size"'),
        ("methd.guidance", 2, "there is no entry 'methd'. Did you mean \"method\""),
        ("method.alpha", 2, "there is no entry 'alpha'"),
        (
            "method.cls",
            "Pretrain",
            "config.method.cls is DMD, and 'Pretrain' cannot take its place",
        ),
        ("steps", "many", "config.steps=many"),
        (
            "fake_score.optimizer",
            "Muon",
            "set its entries, as in --config.fake_score.optimizer.cls=Muon",
        ),
        ("steps", 0, "config.steps is 0; it must be 1 or more"),
        ("log.every", 0, "config.log: every=0 must be 1 or more"),
        ("checkpoint.every", 0, "config.checkpoint: every=0 must be 1 or more"),
        ("log.every", 6, "do not reach back over config.log.every=6 steps"),
        ("evaluate.every", -1, "config.evaluate: every=-1 must be 1 or more"),
        ("checkpoint.keep", 1, "config.checkpoint: every=4 must be 1 or more, keep=1 2 or more"),
        ("seed", -1, "config.seed is -1; it must be 0 or more and below 2**32"),
        ("seed", 2**32, "config.seed is 4294967296; it must be 0 or more and below 2**32"),
        ("generator.weights", "random", "weights='random' needs config.generator.model"),
        ("teacher.weights", "random", "weights='random', but the teacher is not trained"),
        ("generator.optimizer.decayed", "(", "config.generator.optimizer: decayed='('"),
        ("generator.optimizer.clip", "much", "config.generator.optimizer.clip is 'much'"),
        ("method.regression", "Speed", "config.method.regression is 'Speed'"),
        ("mesh.data", 0, "must be 1 or more, or -1"),
        ("method.times", "('one',)", "config.method.times"),
        ("method.strides", "(3,)", "config.method: strides=(3,) must divide"),
        ("method.last_step_share", 1.5, "config.method: last_step_share=1.5 must be in [0, 1]"),
        ("method.frames_per_block", 2, "config.method: frames_per_block=2, but images (28, 28, 1)"),
        ("generator.optimizer.decay", "never", "config.generator.optimizer: decay='never'"),
        ("generator.optimizer.end_value", 1, "generator.optimizer: end_value=1.0 must be in [0, "),
        ("ema.more_decays", "(1.5,)", "config.ema: decay=0.98 and more_decays=(1.5,) must be in"),
        ("fake_score.optimizer.warmup", -1, "config.fake_score.optimizer: warmup=-1 must be 0"),
        ("evaluate.steps", "()", "config.evaluate: steps=() must name one number of steps"),
        ("evaluate.teacher_steps", "(0,)", "config.evaluate: teacher_steps=(0,): 0 must be"),
        (
            "evaluate.features",
            "nowhere",
            "config.evaluate: features: no checkpoint file at",
        ),
        (
            "evaluate.samples",
            60,
            "config.evaluate: samples=60 must be a multiple of the 10",
        ),
        ("generator.compute.dtype", "float33", "config.generator: dtype='float33'"),
        ("fake_score.compute.remat", "some", "config.fake_score: remat='some'"),
        ("batch_size", 12, "config.batch_size=12 does not divide into 8 parts"),
        ("accumulate", 2, "config.batch_size=8 does not divide into 16 parts"),
        ("mesh.fsdp", 3, "fsdp=3, context=1, tensor=1) does not fit 8 devices"),
        ("data.name", "mnist5l", "there is no data set 'mnist5l'. Did you mean"),
        ("teacher.weights", "mnist_teachr", "no checkpoint file at 'mnist_teachr'; shipped are"),
    ],
)
def test_a_bad_override_is_refused_by_its_path(refusal, name, value, message):
    output = refusal(**{name: value})
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "missing",
    [
        *("seed", "data", "method", "ema", "log", "health", "checkpoint", "generator", "teacher"),
        *("generator.weights", "fake_score.optimizer", "data.name", "method.cls", "log.cls"),
        *("generator.optimizer.cls", "ema.cls"),
    ],
)
def test_a_config_that_lacks_an_entry_is_refused_by_its_path(missing, teacher, data_dir):
    config = programs.config(teacher, data_dir)
    *parents, name = missing.split(".")
    section = functools.reduce(operator.getitem, parents, config)
    with config.unlocked():
        del section[name]
    path = missing.removesuffix(".cls")
    with pytest.raises(ValueError, match=rf"config\.{path} names no class|config lacks .*{path}"):
        build(config)


@pytest.mark.parametrize(
    "path, variant, role, weights, message",
    [
        ("dmd.py", "", "teacher", "moving_digits_teacher", "config.teacher is a Wan"),
        ("pretrain.py", "", "generator", "moving_digits_teacher", "holds a Wan network"),
        ("dmd.py", "wan_tiny", "teacher", "mnist_teacher", "config.teacher is a DiT"),
        ("pretrain.py", "wan_teacher", "generator", "mnist_teacher", "holds a DiT network"),
    ],
)
def test_a_network_of_another_family_than_the_data_s_is_refused(
    path, variant, role, weights, message, data_dir, tmp_path
):
    config = programs.load_config(f"configs/{path}", variant)
    config[role].weights = weights
    if variant:
        config.data.embeddings, config.data.latents = (
            f"{data_dir}/moving_{part}" for part in ("embeddings", "latents")
        )
    else:
        config.data.data_dir = data_dir
    with pytest.raises(ValueError, match=message):
        build(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 14, "patch": 7}, "(14, 14, 1) of 10 classes, but .*(28, 28, 1) of 10"),
        ({"channels": 3}, "(28, 28, 3) of 10 classes, but .*(28, 28, 1) of 10"),
        ({"num_classes": 5}, "(28, 28, 1) of 5 classes, but .*(28, 28, 1) of 10"),
    ],
)
def test_a_teacher_of_other_data_is_refused_with_both_shapes(refusal, tmp_path, changes, message):
    other = programs.save_tiny(tmp_path / "other.safetensors", **changes)
    output = refusal(**{"teacher.weights": other})
    for part in message.split(".*"):
        assert part in output


def test_a_model_that_is_not_the_file_s_is_refused_path_by_path(start, teacher, data_dir, tmp_path):
    output = start(
        "--config=configs/pretrain.py",
        f"--config.generator.weights={teacher}",
        f"--config.data.data_dir={data_dir}",
        "--config.generator.model.patch=14",
        "--config.generator.model.dim=16",
        "--config.generator.model.heads=2",
        "--config.generator.model.hidden=8",
        f"--workdir={tmp_path}",
    )
    assert output.splitlines()[1:] == [
        f"  blocks/{name}: expected (6, {wanted}), found (1, {found})"
        for name, wanted, found in [
            ("down/bias", "16", "16"),
            ("down/kernel", "8, 16", "32, 16"),
            ("gate/bias", "8", "32"),
            ("gate/kernel", "16, 8", "16, 32"),
            ("key_norm/scale", "8", "8"),
            ("offset", "6, 16", "6, 16"),
            ("out/bias", "16", "16"),
            ("out/kernel", "16, 16", "16, 16"),
            ("qkv/bias", "48", "48"),
            ("qkv/kernel", "16, 48", "16, 48"),
            ("query_norm/scale", "8", "8"),
            ("up/bias", "8", "32"),
            ("up/kernel", "16, 8", "16, 32"),
        ]
    ]


def test_a_truncated_teacher_is_refused(refusal, teacher, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(teacher.read_bytes()[:-40])
    assert "config.teacher: " in (output := refusal(**{"teacher.weights": cut}))
    assert "cut.safetensors is damaged or not safetensors" in output


def test_a_role_whose_weights_are_a_teacher_that_is_not_there_is_refused(start, data_dir):
    output = start(
        "--config=configs/pretrain.py",
        "--config.generator.weights=teacher",
        f"--config.data.data_dir={data_dir}",
    )
    assert "config.generator.weights='teacher', but this run has no teacher" in output


@pytest.mark.parametrize(
    "program, message",
    [
        ("import dmdjax", "No module named 'dmdjax' ({path}, line 1)"),
        ("def get_config():\n    return batch", "name 'batch' is not defined ({path}, line 2)"),
        ("def get_config()\n    return 1", "expected ':' (program.py, line 1)"),
        ("def get_config():\n    return 1 / 0", "division by zero ({path}, line 2)"),
        ("def get_config():\n    return int('a')", "ValueError: invalid literal"),
        ("def get_config():\n    pass", "get_config returned None, and a ConfigDict is wanted"),
    ],
)
def test_an_error_in_a_config_program_is_told_with_its_line(start, tmp_path, program, message):
    path = tmp_path / "program.py"
    path.write_text(program + "\n")
    output = start(f"--config={path}")
    assert output.startswith("error: in the config")
    assert message.format(path=path) in output and len(output.splitlines()) == 1


def test_a_config_that_is_not_there_is_refused(start):
    assert "configs/dmc.py" in start("--config=configs/dmc.py")


def test_an_unknown_variant_is_refused_with_the_one_that_was_meant(start):
    output = start("--config=configs/dmd.py:one_stp")
    assert output.startswith("error: ") and len(output.splitlines()) == 1
    assert "unknown variant configs/dmd.py:one_stp: did you mean 'one_step'?" in output


def test_a_word_without_dashes_is_refused(start):
    assert "unknown argument 'steps=3'" in start("steps=3")


@pytest.mark.parametrize(
    "steps, message",
    [
        ("10", "--profile=10: use FIRST:COUNT, as in 10:3"),
        ("0:2", "--profile=0:2: the steps of this run are 1 to 12"),
        ("12:2", "--profile=12:2: the steps of this run are 1 to 12"),
    ],
)
def test_steps_to_profile_that_are_not_those_of_the_run_are_refused(refusal, steps, message):
    assert message in refusal(f"--profile={steps}")


def test_weights_and_biases_that_is_not_installed_is_refused(refusal, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else find(name)
    )
    output = refusal(**{"log.wandb": "digits"})
    assert "config.log: wandb='digits' needs the package wandb: pip install" in output


def test_a_bucket_is_refused(refusal):
    assert "--workdir=gs://bucket/run: mount the bucket" in refusal(workdir="gs://bucket/run")


def test_a_workdir_that_cannot_be_written_is_refused(refusal, tmp_path):
    (tmp_path / "file").touch()
    assert "file/run cannot be written to" in refusal(workdir=tmp_path / "file" / "run")
