"""Alarms: what the metrics of a run show before its samples do. They warn, and stop nothing.

    alarms = Alarms()
    for step, record in records:  # of `health.Window`
        for line in alarms.update(step, record):
            log.warning(line)

The limits come from runs that fail on purpose (`benchmarks/alarms.py`, docs/training.md). Imports
`health`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dmd_jax.training.health import Thresholds

LIMITS = Thresholds()


class Alarm(NamedTuple):
    """Two metrics whose quotient has a limit.

    Attributes:
        metric, over: the quotient's parts; `over` is None for the metric's own first record.
        limit: the field of `Thresholds` with the limit.
        least: whether the quotient must stay above the limit, not below.
        meaning: what it says, and what may help.
    """

    metric: str
    over: str | None
    limit: str
    least: bool
    meaning: str


ALARMS = (
    Alarm(
        "generator/update_norm",
        "generator/weight_norm",
        "largest_update",
        False,
        "each step changes too much of the generator: lower its learning rate",
    ),
    Alarm(
        "gap/0",
        "samples/contrast",
        "least_gap",
        True,
        "at low noise the fake score is still its start: raise its learning rate, or let it learn "
        "more often (config.generator_every)",
    ),
    Alarm(
        "gap/3",
        "samples/contrast",
        "largest_gap",
        False,
        "at high noise the teacher asks for other samples than these: lower config.method.guidance",
    ),
    Alarm(
        "samples/contrast",
        None,
        "contrast",
        False,
        "samples become stronger and stronger: lower the guidance, or let the fake score learn "
        "more often",
    ),
)


class Alarms:
    """Reads the records of a run and warns of what is beyond its limit.

    An alarm rings when its quotient is beyond the limit in `Thresholds.patience` records in a row,
    and again only after a record within the limit. Runs without a fake score have no alarms: the
    limits are of students that start as a good model and learn slowly.

    Args:
        thresholds: the limits.
        state: `state` of an earlier object, to continue from it.
    """

    def __init__(self, thresholds: Thresholds = LIMITS, state: Mapping[str, Any] | None = None):
        state = state or {"first": {}, "beyond": {}}
        self._thresholds = thresholds
        self._first, self._beyond = dict(state["first"]), dict(state["beyond"])

    @property
    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON."""
        return {"first": self._first, "beyond": self._beyond}

    def update(self, step: int, record: Mapping[str, float]) -> list[str]:
        """Takes the record of one window; returns the warnings that it completes.

        Args:
            step: the last step of the window.
            record: means by metric name; those that are absent or not finite are passed over.
        """
        numbers = {key: value for key, value in record.items() if math.isfinite(value)}
        if "critic/tracking" not in numbers:
            return []
        warnings = []
        for alarm in ALARMS:
            quotient = self._quotient(alarm, numbers)
            if quotient is None:
                continue
            limit = getattr(self._thresholds, alarm.limit)
            bad = quotient < limit if alarm.least else quotient > limit
            count = self._beyond[alarm.limit] = self._beyond.get(alarm.limit, 0) + 1 if bad else 0
            if count == self._thresholds.patience:
                over = alarm.over or "its first value"
                side = "below" if alarm.least else "above"
                warnings.append(
                    f"step {step}: {alarm.metric} over {over} is {quotient:.2g}, {side} {limit:g} "
                    f"in {count} records in a row (config.health.{alarm.limit}): {alarm.meaning}"
                )
        return warnings

    def _quotient(self, alarm, numbers):
        """None where it is not known."""
        if alarm.metric not in numbers or (alarm.over or alarm.metric) not in numbers:
            return None
        if alarm.over is None:
            below = self._first.setdefault(alarm.metric, numbers[alarm.metric])
        else:
            below = numbers[alarm.over]
        return numbers[alarm.metric] / below if below > 0 else None
