"""Benchmarks still run. What they measure is nothing for a test."""

import re

import jax
import numpy as np
import programs
import pytest

from dmd_jax.diffusion.denoiser import Denoiser

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


def test_without_a_clone_the_comparison_with_self_forcing_says_how_to_get_one(tmp_path):
    script = "benchmarks/self_forcing_parity.py", f"--self_forcing={tmp_path}"
    result = programs.python(*script)
    assert result.returncode != 0
    assert f"{tmp_path} is no clone" in result.stderr and "git clone https://" in result.stderr


@pytest.mark.slow
def test_our_half_of_the_comparison_with_self_forcing_runs():
    parity = programs.load_module("benchmarks/self_forcing_parity.py")
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
