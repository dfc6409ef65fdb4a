"""The health of a run: metrics fetched one step late, and a monitor that stops a diverged run.

Imports no other room. Nothing here reads the clock or the training state. The state of both classes
is a few numbers that go into the checkpoint's `extra`: a resumed run is judged exactly as one that
was never stopped.

    window, monitor = Window(every=50), Monitor()
    for step in range(first, last + 1):
        state, metrics = train_step(...)
        if record := window.add(step, metrics):  # of the step before: the device is not waited for
            monitor.update(*record)  # raises Diverged
        if time_to_save(step):
            if record := window.flush():  # now it is
                monitor.update(*record)
            extra = {"window": window.state, "monitor": monitor.state}
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import jax

Record = tuple[int, dict[str, float]]
SHOWN = 10  # judged distances in a message, which all processes of a job must be able to send


class Window:
    """Means of the step metrics over `every` steps, fetched from the device one step late.

    A value is fetched after the next step has been dispatched, so that the device never idles.
    NaN means "no sample" (an empty noise band, a network that was not updated) and is left out of
    the mean, as are infinities: an update that is not finite is skipped and counted in `skipped`. A
    key without any finite value in the window has mean NaN.

    Args:
        every: a record is returned at each multiple of it, over the steps since the record before.
        state: `state` of an earlier window, to continue from it.
    """

    def __init__(self, every: int, state: Mapping[str, Any] | None = None):
        if every < 1:
            raise ValueError(f"every = {every} must be 1 or more")
        self._every = every
        self._sums = {key: tuple(value) for key, value in (state or {}).items()}
        self._queued: tuple[int, Mapping[str, jax.Array]] | None = None

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> Record | None:
        """Queues the device scalars of `step`; returns the record that the step before completed.

        Returns:
            (step, means) or None.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        record = self.flush()
        self._queued = step, metrics
        return record

    def flush(self, *, end: bool = False) -> Record | None:
        """Waits for the queued step; returns its record if it completes one.

        Args:
            end: return the record of an incomplete window too: no more steps follow.
        """
        if self._queued is None:
            return None
        step, metrics = self._queued
        self._queued = None
        for key, value in jax.device_get(dict(metrics)).items():
            total, count = self._sums.get(key, (0.0, 0))
            counts = bool(math.isfinite(value))
            self._sums[key] = total + float(value) if counts else total, count + counts
        if step % self._every and not end:
            return None
        sums, self._sums = self._sums, {}
        return step, {key: total / n if n else math.nan for key, (total, n) in sums.items()}

    @property
    def state(self) -> dict[str, Any]:
        """The unfinished window, as JSON; after `flush`, or the queued step would be lost."""
        if self._queued is not None:
            raise ValueError(f"step {self._queued[0]} is still queued: call flush() first")
        return dict(self._sums)


class Diverged(RuntimeError):
    """The run has diverged. The message states the symptom, its numbers, its start, and remedies.

    Attributes:
        well_until: the step of the last record without the symptom; 0 if there was none.
    """

    def __init__(self, message: str, well_until: int):
        super().__init__(message)
        self.well_until = well_until


ADVICE = {
    "non-finite": "lower the learning rates, clip gradients harder, or compute in float32",
    "exploding": "lower this network's learning rate or clip its gradients harder; let the critic "
    "learn more often than the generator",
    "saturating": "lower the guidance or the generator's learning rate",
    "worsening": "take best.safetensors, of that step; lower the learning rates or let them decay",
    "collapsing": "let the critic learn more often, lower the guidance, or enlarge the batch",
}


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """When a `Monitor` stops a run: `config.health`. A healthy run of digits stays far from these.

    Attributes:
        patience: records in a row that must show a symptom; of worsening, judgements.
        explosion: factor over the running median of a loss.
        saturation: fraction of |x| > 1.05. Set it to 1.0 for latents, which are not bounded: a
            fraction never exceeds 1.
        collapse: fraction of the diversity at the start.
        worsening: factor over the best distance that was judged (`worsening`), 1 or more; 1e9
            stops no run.
        largest_update, least_gap, largest_gap, contrast: of `alarms`, which warn and stop nothing.

    Raises:
        ValueError: `patience` or `worsening` is below 1.
    """

    patience: int = 3
    explosion: float = 10.0
    saturation: float = 0.6
    collapse: float = 0.25
    worsening: float = 2.0
    largest_update: float = 0.01
    least_gap: float = 0.01
    largest_gap: float = 0.3
    contrast: float = 1.3

    def __post_init__(self):
        if self.patience < 1 or self.worsening < 1.0:
            raise ValueError(
                f"patience={self.patience} and worsening={self.worsening} must be 1 or more; large "
                "numbers stop no run"
            )


def worsening(distances: Mapping[int, float | None], thresholds: Thresholds) -> tuple[str, int]:
    """What there is to say of a run whose samples get worse with time: a method past its best.

    Args:
        distances: {step: Fréchet distance of a judgement}, in the order of the steps; lower is
            better. None, a distance that is not finite, is as bad as any.
        thresholds: its `patience` last judgements must all be above `worsening` times the best.

    Returns:
        (message, step of the best); ("", 0) of a run that is well.
    """
    known = {step: value for step, value in distances.items() if value is not None}
    last = list(distances)[-thresholds.patience :]
    if not known or len(last) < thresholds.patience:
        return "", 0
    best = min(known, key=known.get)
    limit = thresholds.worsening * known[best]
    if any(step in known and known[step] <= limit for step in last):
        return "", 0
    last = last[-SHOWN:]
    found = ", ".join(f"{known[step]:.3g}" if step in known else "NaN" for step in last)
    return (
        f"The run has diverged at step {last[-1]}, worsening samples: judged distances {found}; "
        f"the best was {known[best]:.3g}, at step {best}. What may help: {ADVICE['worsening']}; "
        "then start in a new directory."
    ), best


class Monitor:
    """Reads the records of a run and raises `Diverged` when the run has diverged.

    There are four symptoms, beside `worsening`. Each must appear in `patience` records in a row;
    records without its metric are skipped:

    - non-finite: all updates of a network were skipped (`<network>/skipped` is 1), or none had a
      finite `loss` and `grad_norm`; or half the samples or more are not finite
      (`samples/nonfinite`).
    - exploding: |`<network>/loss`| above `explosion` times its running median over the last 50
      records without this symptom, once there are 5. A median below 0.1 counts as 0.1: these losses
      are means over elements of order one, and one that starts near 0 (a critic that still equals
      the teacher) may grow tenfold in a healthy run. A discriminator's counts as 2 log 2, its loss
      where it cannot tell samples from data: what every generator aims at.
    - saturating: `samples/saturation`, the fraction of |x| > 1.05, above `saturation`.
    - collapsing: `samples/diversity` below `collapse` times its median over the first 5 records.

    A healthy run of the embedded digits stays far from all of them: no update skipped, critic loss
    0.1 to 0.3, saturation from 0.07 to 0.25. The gap between teacher and fake score per noise band
    and the contrast stop no run, because no threshold of them is known to hold for all data sets:
    `alarms` warns of them. The tracking of the critic is logged only.

    Args:
        thresholds: the limits of the symptoms.
        state: `state` of an earlier monitor, to continue from it.
    """

    networks = ("generator", "fake_score", "discriminator")
    history = 50
    warm_up = 5
    least_median = 0.1

    def __init__(
        self, thresholds: Thresholds = Thresholds(), state: Mapping[str, Any] | None = None
    ):
        self.thresholds = thresholds
        state = state or {"step": 0, "past": {}, "showing": {}}
        self._step: int = state["step"]
        self._past = {key: list(values) for key, values in state["past"].items()}
        self._showing = {symptom: tuple(shown) for symptom, shown in state["showing"].items()}

    @property
    def state(self) -> dict[str, Any]:
        """The state of the monitor as JSON: a few hundred numbers at most."""
        return {"step": self._step, "past": self._past, "showing": self._showing}

    @property
    def suspicious(self) -> bool:
        """Whether there is a symptom: the last good checkpoint must not be replaced now."""
        return bool(self._showing)

    def update(self, step: int, record: Mapping[str, float]) -> None:
        """Takes the record of one window.

        Args:
            step: the last step of the window.
            record: means by metric name; absent ones are fine.

        Raises:
            Diverged: a symptom has shown in `patience` records in a row.
        """
        numbers = {key: value for key, value in record.items() if math.isfinite(value)}
        for symptom, evidence in self._examine(record, numbers):
            if evidence is None:
                self._showing.pop(symptom, None)
                continue
            well_until, times = self._showing.get(symptom, (self._step, 0))
            self._showing[symptom] = well_until, times + 1
            if times + 1 >= self.thresholds.patience:
                raise Diverged(
                    f"The run has diverged at step {step}, {symptom}: {evidence}; {times + 1} "
                    f"records in a row, all was well until step {well_until}. What may help: "
                    f"{ADVICE[symptom.split()[0]]}; then start in a new directory.",
                    well_until,
                )
        self._step = step

    def _examine(
        self, record: Mapping[str, float], numbers: Mapping[str, float]
    ) -> Iterator[tuple[str, str | None]]:
        """Each symptom whose metric is in this record, with the evidence or None."""
        for network in self.networks:
            if f"{network}/loss" in record:
                yield f"non-finite {network}", self._non_finite(network, record)
            if f"{network}/loss" in numbers:
                yield f"exploding {network}", self._exploding(f"{network}/loss", numbers)
        if (key := "samples/nonfinite") in numbers:
            bad = numbers[key] >= 0.5
            yield "non-finite samples", f"{key} is {numbers[key]:.3g}" if bad else None
        if (key := "samples/saturation") in numbers:
            bad = numbers[key] > self.thresholds.saturation
            yield "saturating samples", f"{key} is {numbers[key]:.3g}" if bad else None
        if (key := "samples/diversity") in numbers:
            yield "collapsing samples", self._collapsing(key, numbers)

    def _non_finite(self, network: str, record: Mapping[str, float]) -> str | None:
        values = [record.get(f"{network}/{key}", 0.0) for key in ("loss", "grad_norm")]
        broken = not all(map(math.isfinite, values))
        # Without a number and without a skip, the network was not updated in this window.
        skipped = record.get(f"{network}/skipped", float(broken))
        if skipped >= 1 or (skipped > 0 and broken):
            return f"none of its updates in this window was finite (loss {values[0]:.3g})"
        return None

    def _exploding(self, key: str, numbers: Mapping[str, float]) -> str | None:
        past = self._past.setdefault(key, [])
        size = abs(numbers[key])
        if len(past) >= self.warm_up:
            least = 2 * math.log(2) if key.startswith("discriminator") else self.least_median
            usual = max(statistics.median(past), least)
            if size > self.thresholds.explosion * usual:
                return (
                    f"{key} is {numbers[key]:.3g}, {size / usual:.0f} times its usual {usual:.3g}"
                )
        self._past[key] = [*past, size][-self.history :]
        return None

    def _collapsing(self, key: str, numbers: Mapping[str, float]) -> str | None:
        start = self._past.setdefault(key, [])
        if len(start) < self.warm_up:
            start.append(numbers[key])
            return None
        usual = statistics.median(start)
        bad = numbers[key] < self.thresholds.collapse * usual
        return f"{key} is {numbers[key]:.3g}, at the start it was {usual:.3g}" if bad else None
