"""Alarms ring for the runs that they were made from, and for no healthy one."""

import json

import pytest

from dmd_jax.training.alarms import Alarms
from dmd_jax.training.health import Thresholds

# Means of a healthy run of configs/dmd.py, and of the three that benchmarks/alarms.py spoils.
HEALTHY = {
    "critic/tracking": 0.91,
    "generator/update_norm": 0.19,
    "generator/weight_norm": 177.0,
    "gap/0": 0.029,
    "gap/3": 0.081,
    "samples/contrast": 0.60,
}
SPOILED = {
    "generator/update_norm over generator/weight_norm": {"generator/update_norm": 5.4},
    "gap/0 over samples/contrast": {"gap/0": 0.0037},
    "gap/3 over samples/contrast": {"gap/3": 0.52},
    "samples/contrast over its first value": {"samples/contrast": 0.96},
}


def rings(records, alarms=None):
    """{step: warnings} of records at the steps 25, 50, ..."""
    alarms = alarms or Alarms()
    found = {25 * i: alarms.update(25 * i, record) for i, record in enumerate(records, 1)}
    return {step: lines for step, lines in found.items() if lines}


def test_a_healthy_run_rings_nothing():
    assert rings([HEALTHY] * 30) == {}


@pytest.mark.parametrize("what", SPOILED)
def test_each_mistake_rings_once_after_three_records(what):
    found = rings([HEALTHY] * 2 + [HEALTHY | SPOILED[what]] * 6)
    assert list(found) == [125]
    [line] = found[125]
    assert line.startswith(f"step 125: {what} is ")
    assert "in 3 records in a row (config.health." in line


def test_an_alarm_rings_again_after_a_healthy_record_and_not_for_single_ones():
    sick = HEALTHY | SPOILED["gap/0 over samples/contrast"]
    assert rings([sick, sick, HEALTHY] * 3) == {}
    assert list(rings([sick] * 3 + [HEALTHY] + [sick] * 3)) == [75, 175]


def test_metrics_that_are_absent_or_not_finite_are_passed_over():
    sick = HEALTHY | SPOILED["gap/3 over samples/contrast"]
    without = {key: value for key, value in HEALTHY.items() if key != "gap/3"}
    records = [sick, without, HEALTHY | {"gap/3": float("nan")}, sick, sick]
    assert list(rings(records)) == [125]


def test_a_run_without_a_fake_score_is_not_heard():
    sick = {"generator/update_norm": 5.0, "generator/weight_norm": 10.0}
    assert rings([sick] * 5) == {}


def test_a_resumed_run_rings_when_it_would_have_rung():
    sick = HEALTHY | SPOILED["samples/contrast over its first value"]
    alarms = Alarms()
    assert rings([HEALTHY, sick, sick], alarms) == {}
    resumed = Alarms(state=json.loads(json.dumps(alarms.state)))
    assert list(rings([sick], resumed)) == [25]


def test_limits_are_settings():
    sick = HEALTHY | SPOILED["gap/3 over samples/contrast"]
    assert rings([sick] * 5, Alarms(Thresholds(largest_gap=1.0))) == {}
    assert list(rings([sick] * 5, Alarms(Thresholds(patience=1)))) == [25]
