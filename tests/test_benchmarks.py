"""Benchmarks still run. What they measure is nothing for a test."""

import json
import re
import types

import jax
import numpy as np
import programs
import pytest

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.training.run import build

BOTH = ("ours", "PyTorch, eager")


@pytest.mark.slow
def test_the_parts_of_a_train_step_are_timed(teacher, data_dir, tmp_path):
    values = programs.short(teacher, data_dir)
    _, *overrides = programs.flags(tmp_path, values)
    config = [flag for flag in overrides if not flag.startswith("--workdir")]
    script = "benchmarks/train_step.py", "--config=configs/dmd.py", "--rounds=1"
    result = programs.python(*script, *config)
    assert result.returncode == 0, result.stderr
    for part in ("teacher, guided", "critic, forward and backward", "whole step without"):
        assert f"{part} " in result.stdout


@pytest.mark.slow
def test_the_gradient_of_a_teacher_in_int8_is_compared(teacher, data_dir, tmp_path):
    overrides = programs.flags(tmp_path, programs.short(teacher, data_dir))
    config = [flag for flag in overrides if not flag.startswith("--workdir")]
    result = programs.python("benchmarks/int8.py", *config)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("flo", "bfl"))]
    assert [row[:2] for row in rows] == [
        ["float32", "int8"],
        ["bfloat16", "bfloat16"],
        ["bfloat16", "int8"],
    ]
    assert all(float(error) > 0.0 for row in rows for error in row[2:])


@pytest.mark.slow
def test_the_ways_of_the_replay_are_timed_after_their_gradients_agree():
    config = "--config.data.frames=12", "--config.batch_size=2"
    result = programs.python("benchmarks/replay.py", "--rounds=1", *config)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^small network, .* from one by one: ", result.stdout, re.M)) == 4
    rows = re.findall(
        r"^(one by one|stacked|packed) +(\S+) (G|M)( +[\d.]+){7}$", result.stdout, re.M
    )
    assert [row[0] for row in rows] == ["one by one", "stacked", "packed"]


@pytest.mark.parametrize("factor", [1.0 + 1e-4, np.nan])
def test_ways_of_the_replay_that_differ_are_not_measured(factor, monkeypatch):
    replay = programs.load_module("benchmarks/replay.py")

    def packed(causal, net, given):
        """Another gradient than that of one by one, in the last of the weights."""
        *leaves, last = jax.tree.leaves(net)
        return jax.tree.unflatten(jax.tree.structure(net), [*leaves, factor * last])

    ways = {"one by one": lambda causal, net, given: net, "packed": packed}
    monkeypatch.setattr(replay, "WAYS", ways)
    with pytest.raises(SystemExit, match="error: the gradients differ by"):
        replay.check()


@pytest.mark.slow
def test_trajectories_of_bouncing_digits_are_written_and_trained_on(tmp_path):
    script = "benchmarks/ode_start.py", f"--out={tmp_path}", "--num=8", "--steps=4"
    result = programs.python(*script)
    assert result.returncode == 0, result.stderr
    config = programs.load_module("benchmarks/ode_start.py").get_config(tmp_path)
    config.batch_size = 8
    batch = next(build(config).batches(0))
    assert {0.0, 1.0} < set(batch["trajectory"])
    # Each block goes on after the real ones: its end is nearer to its own video than to the next.
    ends, videos = np.float32(batch["trajectory"][0.0])[:, 3:], np.float32(batch["data"])[:, 3:]
    own, other = (np.std(ends - x, axis=(1, 2, 3, 4)) for x in (videos, np.roll(videos, 1, 0)))
    assert np.all(own < other), (own, other)


@pytest.mark.slow
def test_mistakes_are_refused_in_a_sentence_or_accepted():
    """A few of those that benchmarks/faults.py makes; its kills and damages take minutes."""
    script = "benchmarks/faults.py", "--kills=0", "--nodamage", "--inputs=40", "--seed=1"
    result = programs.python(*script)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing is wrong" in result.stdout and "refused: " in result.stdout


@pytest.mark.slow
@pytest.mark.torch
def test_the_benchmark_of_a_gpu_runs_without_one_and_times_nothing():
    """At toy size; the other parts take longer."""
    parts = "attention,forward,critic,stream"
    result = programs.python("benchmarks/gpu.py", "--rounds=1", f"--only={parts}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "DRY RUN: there is no GPU" in result.stdout and "nothing is wrong" in result.stdout
    assert len(re.findall(r"^attention, .* at most", result.stdout, re.MULTILINE)) == 14
    ran = re.findall(r"^(\w+) +(ours|PyTorch, eager) +runs$", result.stdout, re.MULTILINE)
    both = [(name, who) for name in ("forward", "critic") for who in BOTH]
    assert sorted(ran) == sorted([*both, ("stream", "ours")])
    assert " ms" not in result.stdout


def test_a_run_that_fails_on_purpose_is_compared_with_the_healthy_one(
    monkeypatch, tmp_path, capsys
):
    alarms, ran = programs.load_module("benchmarks/alarms.py"), []

    def train(name, steps, folder, more):
        ran.append(name)
        (folder / name).mkdir()
        records = []
        for step in range(25, steps + 1, 25):
            losses = {"generator/loss": 1.0, "critic/tracking": 0.9, "generator/weight_norm": 10.0}
            update = 0.02 if name == "healthy" else 0.5
            records.append({"step": step, **losses, "generator/update_norm": update})
            records.append({"step": step, "quality/fd": 9.0 if name != "healthy" else 2.0})
        (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))

    monkeypatch.setattr(alarms, "train", train)
    monkeypatch.setattr("sys.argv", ["alarms.py", f"--out={tmp_path}", "--only=rate"])
    alarms.main()
    assert ran == ["healthy", "rate"]
    row = capsys.readouterr().out.splitlines()[-1]
    assert "75: generator/update_norm over generator/weight_norm" in row
    assert "| never | 25 | 25: `generator/update_norm` 0.5 (0.02) | 9.00 |" in row


def test_programs_beside_pytorch_say_that_it_is_missing_before_anything_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(programs.ROOT / "benchmarks"))
    wan = programs.load_module("benchmarks/wan.py")
    monkeypatch.setattr(wan.importlib.util, "find_spec", lambda name: None)
    wan.require_pytorch([])
    with pytest.raises(SystemExit, match="error: forward, critic: pip install torch diffusers, or"):
        wan.require_pytorch(["forward", "critic"])


@pytest.fixture(scope="module")
def parity():
    return programs.load_module("benchmarks/self_forcing_parity.py")


def test_without_a_clone_the_comparison_with_self_forcing_says_how_to_get_one(
    parity, monkeypatch, tmp_path
):
    monkeypatch.setattr(parity, "FOLDER", types.SimpleNamespace(value=str(tmp_path)))
    with pytest.raises(SystemExit, match=f"{tmp_path} is no clone .*git clone https://"):
        parity.main([])


@pytest.mark.slow
def test_our_half_of_the_comparison_with_self_forcing_runs(parity):
    net = parity.random_network(0)
    clean, _ = parity.our_rollout(Denoiser(net), 0.0)
    published = Denoiser(net, prediction=parity.TimeZero())
    noisy, _ = parity.our_rollout(published, parity.LAST)
    # The noise of the context is all that differs, and the first block has no context.
    first, *others = zip(parity.to_blocks(clean), parity.to_blocks(noisy), strict=True)
    np.testing.assert_array_equal(*first)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in others)
    nets = dict.fromkeys(parity.ROLES, net)
    for tables in (True, False):
        losses = parity.our_losses(clean, nets, np.float32([0.5]), tables)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(losses))


@pytest.mark.slow
def test_a_comparison_of_methods_gives_each_the_same_passes(tmp_path):
    methods = programs.load_module("benchmarks/methods.py")
    works = {name: methods.work(name, 50_000) for name in ("dmd", "rcm")}
    for name, numbers in works.items():
        batch = methods.get_config(name).batch_size
        passes = numbers["steps"] * batch * numbers["passes"]
        assert passes == pytest.approx(50_000, rel=0.01)
    assert works["rcm"]["data"] and not works["dmd"]["data"]


def test_the_table_of_methods_is_of_the_reports_in_its_folder(tmp_path):
    methods = programs.load_module("benchmarks/methods.py")
    for seed, fd in enumerate((0.5, 0.7)):
        folder = tmp_path / f"dmd_{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 50, "steps_per_second": 2.0}\n')
        numbers = dict.fromkeys(methods.MEASURES, 0.9)
        rows = [
            {"name": "teacher", "steps": 50, **numbers},
            *({"name": "student", "steps": n, **numbers, "fd": fd} for n in (4, 2, 1)),
        ]
        (folder / "report.json").write_text(json.dumps(rows))
    rows = methods.results(tmp_path)
    assert "| DMD | 4 | 2 | 0.60 (0.50 to 0.70) | 0.900 |" in methods.quality_table(rows, 4)
    works = {"dmd": dict(steps=600, networks=3, passes=9.9, data=False)}
    assert "| DMD | 3 | no | 9.9 | 600 | 5.0 |" in methods.work_table(works, rows)
    methods.figure(rows).savefig(tmp_path / "methods.png")
    [axes] = methods.figure({("phased", 4): [{"fd": 0.5}]}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["4 steps"]


def test_first_signs_are_metrics_that_differ_from_the_healthy_run_in_three_records():
    alarms = programs.load_module("benchmarks/alarms.py")
    healthy = {step: {"step": step, "gap": 1.0, "spread": 0.5} for step in range(25, 176, 25)}
    failing = dict(healthy)
    failing[25] = {"step": 25, "gap": 5.0, "spread": 0.5}  # for once
    for step in (75, 100, 125):
        failing[step] = {"step": step, "gap": 3.0, "spread": 0.4}
    for step in (150, 175):  # two records are not enough
        failing[step] = {"step": step, "gap": 1.0, "spread": 0.1}
    assert alarms.first_signs(failing, healthy) == [(75, "gap", 3.0, 1.0)]
    assert alarms.first_signs(healthy, healthy) == []
    assert (
        alarms.spoiled(
            {50: 0.6, 100: 5.0, 150: 1.1, 200: 3.0}, dict.fromkeys(range(50, 201, 50), 0.5)
        )
        == 100
    )
    assert alarms.spoiled({50: 3.0, 100: 0.9}, {50: 0.5, 100: 0.5}) is None


def test_a_distance_that_is_not_finite_is_bad(tmp_path):
    alarms = programs.load_module("benchmarks/alarms.py")
    (tmp_path / "rate").mkdir()
    lines = '{"step": 50, "quality/fd": 0.6}\n{"step": 100, "quality/fd": null}\n'
    (tmp_path / "rate" / "metrics.jsonl").write_text(lines)
    _, distances = alarms.records(tmp_path, "rate")
    assert alarms.spoiled(distances, {50: 0.5, 100: 0.5}) == 100
