"""The benchmark of the train step still runs. What it measures is nothing for a test."""

import programs
import pytest


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
