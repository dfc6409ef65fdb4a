"""A profile holds the steps that were asked for, and the run around it is what it was."""

import json

import jax
import jax.numpy as jnp
import programs
import pytest
import toys

from dmd_jax import weights
from dmd_jax.training import checkpoint, loop
from dmd_jax.training.profiling import Profiler, parse_steps, warn_of_taken
from dmd_jax.training.run import build


def traced_steps(workdir):
    """The numbers of the annotated steps in a run's profile."""
    (path,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train_step")


def test_steps_are_read_from_their_first_and_their_count():
    assert parse_steps("10:3", 12) == range(10, 13)
    with pytest.raises(ValueError, match="--profile=10:3: the steps of this run are 1 to 11"):
        parse_steps("10:3", 11)
    with pytest.raises(ValueError, match="--profile=ten: use FIRST:COUNT"):
        parse_steps("ten", 11)


def test_only_the_named_steps_are_traced_and_all_are_taken(tmp_path):
    step = jax.jit(lambda x: x + 1)
    x = jnp.zeros(())
    with Profiler(tmp_path, range(3, 5)) as profiler:
        for number in range(1, 7):
            x = profiler.call(number, step, x)
    assert x == 6 and traced_steps(tmp_path) == [3, 4]


def test_a_run_that_ends_within_the_steps_leaves_what_was_traced(tmp_path):
    with pytest.raises(KeyboardInterrupt), Profiler(tmp_path, range(2, 9)) as profiler:
        profiler.call(2, jnp.sin, jnp.zeros(()))
        raise KeyboardInterrupt
    assert traced_steps(tmp_path) == [2]


def test_without_steps_nothing_is_written(tmp_path):
    with Profiler(tmp_path) as profiler:
        assert profiler.call(1, max, 3, 4) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "done, words",
    [
        (10, "10 steps: of the 3 of --profile=8:3, none will be traced"),
        (9, "9 steps: of the 3 of --profile=8:3, only the last 1 will be traced"),
        (7, ""),
    ],
)
def test_steps_that_a_resumed_run_has_taken_are_told_to_stay_untraced(done, words, caplog):
    warn_of_taken(range(8, 11), done)
    assert words in caplog.text and bool(words) == bool(caplog.text)


@pytest.mark.slow
def test_a_run_is_profiled_logged_and_exported_with_all_its_averages(
    teacher, data_dir, tmp_path, monkeypatch
):
    overrides = {"ema.more_decays": (0.5,), "ema.warmup": True, "evaluate.every": 100}
    config = programs.config(teacher, data_dir, steps=4, **overrides, **{"log.every": 2})
    run = build(config, jax.devices()[:1])
    monkeypatch.setattr(loop, "_report", lambda *_: "no report")
    with jax.set_mesh(run.mesh):
        loop.train(run, tmp_path, range(2, 4))
    assert traced_steps(tmp_path) == [2, 3]
    state, _ = checkpoint.read(tmp_path / "checkpoints" / "4", run.state_shape())
    for name, average in {"": state.ema, ".ema-0.5": state.more_ema["0.5"]}.items():
        exported = weights.denoiser(tmp_path / f"generator{name}.safetensors")
        toys.assert_same(jax.tree.leaves(exported), jax.tree.leaves(average))
    lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    for line in lines:
        assert line["fake_score/learning_rate"] == pytest.approx(4e-4)
        for name in ("update_norm", "weight_norm", "grad_norm"):
            assert line[f"generator/{name}"] > 0
    # Linear, of two updates: the whole rate at the first, half of it at the second.
    rates = [line["generator/learning_rate"] for line in lines]
    rate = config.generator.optimizer.learning_rate
    assert rates == pytest.approx([rate, rate / 2])
