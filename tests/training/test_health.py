"""The monitor lets healthy runs live, ends lost ones, and forgets nothing at a resume."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.devices.processes import LONGEST
from dmd_jax.training.health import Diverged, Monitor, Thresholds, Window, worsening


def scalars(**metrics: float) -> dict:
    return {key: jnp.float32(value) for key, value in metrics.items()}


def records(window: Window, steps: range, metrics) -> list:
    """What a loop over `steps` gets to see."""
    found = [window.add(step, metrics(step)) for step in steps]
    return [record for record in [*found, window.flush()] if record]


# Window


def test_a_record_holds_the_means_of_exactly_its_steps():
    found = records(Window(every=3), range(1, 8), lambda step: scalars(loss=step))
    assert found == [(3, {"loss": 2.0}), (6, {"loss": 5.0})]


class Queued:
    """A device scalar that remembers whether anybody waited for it."""

    def __init__(self):
        self.fetched = self.copying = False

    def copy_to_host_async(self):
        self.copying = True

    def __array__(self, dtype=None, copy=None):
        self.fetched = True
        return np.float32(1)


def test_the_newest_step_is_never_waited_for():
    window = Window(every=1)
    steps = [Queued() for _ in range(3)]
    for step, value in enumerate(steps, start=1):
        record = window.add(step, {"loss": value})
        assert value.copying and not value.fetched
        assert record == ((step - 1, {"loss": 1.0}) if step > 1 else None)
    assert window.flush() == (3, {"loss": 1.0})
    assert window.flush() is None


def test_what_is_not_a_number_does_not_count_but_is_not_hidden():
    values = {1: 1.0, 2: math.nan, 3: 3.0, 4: math.inf}
    found = records(
        Window(every=4), range(1, 5), lambda step: scalars(band=values[step], empty=math.nan)
    )
    ((step, means),) = found
    assert step == 4 and means["band"] == 2.0 and math.isnan(means["empty"])


def test_a_metric_that_is_absent_in_some_steps_is_averaged_over_the_others():
    def metrics(step):
        return scalars(critic=1) | (scalars(generator=step) if step % 5 == 0 else {})

    assert records(Window(every=10), range(1, 11), metrics) == [
        (10, {"critic": 1.0, "generator": 7.5})
    ]


def test_a_resumed_window_makes_the_same_record_to_the_last_bit():
    def metrics(step):
        return scalars(loss=math.sin(step))

    whole = records(Window(every=10), range(1, 11), metrics)
    window = Window(every=10)
    assert records(window, range(1, 5), metrics) == []
    resumed = Window(every=10, state=json.loads(json.dumps(window.state)))
    assert records(resumed, range(5, 11), metrics) == whole


def test_state_refuses_to_lose_a_queued_step():
    window = Window(every=10)
    window.add(1, scalars(loss=1))
    with pytest.raises(ValueError, match="step 1 is still queued"):
        _ = window.state


# Monitor


def healthy(i: int) -> dict[str, float]:
    """Like the embedded digits: everything moves, nothing is wrong."""
    wobble = 1 + 0.3 * math.sin(i)
    return {
        "generator/loss": 0.4 * wobble,
        "generator/grad_norm": 1.5 * wobble,
        "generator/skipped": 0.0,
        "fake_score/loss": (0.1 + 0.2 * math.exp(-i / 10)) * wobble,
        "fake_score/grad_norm": 0.5 * wobble,
        "fake_score/skipped": 0.0,
        "samples/nonfinite": 0.0,
        "samples/saturation": 0.25 - 0.18 * math.exp(-i / 20),
        "samples/contrast": 1.0 * wobble,
        "samples/diversity": 0.9 - 0.2 * math.exp(-i / 20),
        "gap/0": math.nan,
        "gap/3": 0.5 * wobble,
        "critic/tracking": 0.7,
    }


def watch(monitor: Monitor, sick: dict[str, float], *, first: int = 20, count: int = 10) -> int:
    """Feeds `count` records, sick from number `first` + 1 on; how many sick ones it took."""
    for i in range(1, first + 1):
        monitor.update(50 * i, healthy(i))
    for i in range(first + 1, first + count + 1):
        try:
            monitor.update(50 * i, healthy(i) | sick)
        except Diverged:
            return i - first
    return 0


def test_a_healthy_run_lives():
    monitor = Monitor()
    for i in range(1, 500):
        monitor.update(50 * i, healthy(i))
        assert not monitor.suspicious


def test_a_run_without_a_critic_lives():
    monitor = Monitor()
    for i in range(1, 100):
        monitor.update(i, {"generator/loss": 1 / i, "generator/skipped": 0.0})


def test_losses_that_grow_from_nothing_are_no_explosion():
    monitor = Monitor()
    for i in range(1, 100):
        monitor.update(i, healthy(i) | {"generator/loss": 0.5 * (1 - math.exp(-((i / 50) ** 4)))})


SICK = {
    "all updates skipped": {"generator/skipped": 1.0, "generator/loss": math.nan},
    "critic skipped": {"fake_score/skipped": 1.0},
    "no finite loss, skips spread over steps": {
        "generator/loss": math.nan,
        "generator/skipped": 0.2,
    },
    "samples not finite": {"samples/nonfinite": 0.6},
    "critic explodes": {"fake_score/loss": 7.0},
    "generator explodes": {"generator/loss": 40.0},
    "negative loss explodes": {"generator/loss": -40.0},
    "saturation": {"samples/saturation": 0.8},
    "mode collapse": {"samples/diversity": 0.1},
}


@pytest.mark.parametrize("sickness", SICK)
def test_each_sickness_ends_the_run_after_three_records_and_not_before(sickness):
    assert watch(Monitor(), SICK[sickness]) == 3


@pytest.mark.parametrize("sickness", ["all updates skipped", "samples not finite", "saturation"])
def test_a_run_that_is_sick_from_the_start_ends_too(sickness):
    assert watch(Monitor(), SICK[sickness], first=0) == 3


def test_one_bad_record_now_and_then_is_forgiven():
    monitor = Monitor()
    sick = {key: value for sickness in SICK.values() for key, value in sickness.items()}
    for i in range(1, 200):
        monitor.update(i, healthy(i) | (sick if i % 5 in (0, 1) else {}))


def test_a_network_that_was_not_due_is_not_sick():
    idle = {f"generator/{key}": math.nan for key in ("loss", "grad_norm", "skipped")}
    assert watch(Monitor(), idle) == 0


def test_records_without_the_metric_are_passed_over_not_counted_as_well():
    monitor = Monitor()
    for i in range(1, 6):
        monitor.update(i, healthy(i))
    with pytest.raises(Diverged):
        for i in range(6, 12):  # the samples are looked at in every second record
            monitor.update(i, {"samples/saturation": 0.9} if i % 2 else {})
    assert i == 11


def test_the_message_says_what_since_when_in_numbers_and_what_to_try():
    monitor = Monitor()
    for i in range(1, 21):
        monitor.update(50 * i, healthy(i))
    with pytest.raises(Diverged) as raised:
        for i in range(21, 30):
            monitor.update(50 * i, healthy(i) | {"fake_score/loss": 7.0})
            assert monitor.suspicious
    assert raised.value.well_until == 1000
    for part in (
        "at step 1150",
        "exploding fake_score",
        "fake_score/loss is 7",
        "times its usual 0.1",
        "3 records in a row",
        "well until step 1000",
        "learning rate",
    ):
        assert part in str(raised.value)


def test_a_resumed_monitor_judges_as_one_that_never_stopped():
    stream = [healthy(i) for i in range(20)]
    stream += [healthy(i) | SICK["critic explodes"] for i in range(20, 24)]

    def ends_at(stop: int | None) -> int:
        monitor = Monitor()
        for i, record in enumerate(stream):
            if i == stop:
                monitor = Monitor(state=json.loads(json.dumps(monitor.state)))
            try:
                monitor.update(i, record)
            except Diverged:
                return i
        return -1

    assert {ends_at(stop) for stop in (None, 1, 3, 19, 20, 21, 22)} == {22}


def test_what_is_remembered_stays_small():
    monitor = Monitor()
    for i in range(1, 1000):
        monitor.update(i, healthy(i))
    assert len(json.dumps(monitor.state)) < 4096


def test_thresholds_are_arguments():
    assert watch(Monitor(Thresholds(patience=5)), SICK["saturation"]) == 5
    assert watch(Monitor(Thresholds(saturation=1.0)), SICK["saturation"]) == 0
    assert watch(Monitor(Thresholds(explosion=100)), SICK["critic explodes"]) == 0
    assert watch(Monitor(Thresholds(collapse=0.0)), SICK["mode collapse"]) == 0


# Worsening


def test_samples_that_have_got_worse_for_good_end_a_run():
    healthy = {100: 2.0, 200: 0.9, 300: 0.5, 400: 0.95, 500: 1.2, 600: 0.7}
    assert worsening(healthy, Thresholds()) == ("", 0)
    lost = healthy | {700: 1.1, 800: None}
    assert worsening(lost, Thresholds()) == ("", 0)  # two in a row are not three
    message, best = worsening(lost | {900: 1.3}, Thresholds())
    assert best == 300
    assert "at step 900, worsening samples: judged distances 1.1, NaN, 1.3" in message
    assert "the best was 0.5, at step 300" in message and "best.safetensors" in message
    assert worsening(lost | {900: 1.3}, Thresholds(worsening=3.0)) == ("", 0)
    assert worsening({}, Thresholds()) == ("", 0)
    many = {0: 0.1} | dict.fromkeys(range(1, 1001), 1.0)
    message, _ = worsening(many, Thresholds(patience=1000))
    assert len(message) < LONGEST  # or one process could not send it to the others
    for wrong in ({"patience": 0}, {"worsening": 0.5}):
        with pytest.raises(ValueError, match="must be 1 or more; large numbers stop no run"):
            Thresholds(**wrong)
