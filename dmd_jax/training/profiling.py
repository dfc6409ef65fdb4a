"""A profile of a few training steps, for TensorBoard's profile plugin (xprof) and Perfetto.

Imports only jax.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)


def parse_steps(text: str, total: int) -> range:
    """The steps that `--profile=FIRST:COUNT` names, counted from 1 as in the log.

    Args:
        text: "FIRST:COUNT".
        total: the last step of the run.

    Raises:
        ValueError: it is not of this form, or a step is not one of the run.
    """
    try:
        first, count = map(int, text.split(":"))
    except ValueError:
        raise ValueError(f"--profile={text}: use FIRST:COUNT, as in 10:3") from None
    if first < 1 or count < 1 or first + count - 1 > total:
        raise ValueError(f"--profile={text}: the steps of this run are 1 to {total}")
    return range(first, first + count)


def warn_of_taken(steps: range, done: int) -> None:
    """Logs which of the steps to trace a resumed run, of `done` steps, has already taken."""
    taken = sum(step <= done for step in steps)
    if taken:
        traced = f"only the last {len(steps) - taken}" if taken < len(steps) else "none"
        log.warning(
            "this run has already taken %d steps: of the %d of --profile=%d:%d, %s will be traced",
            *(done, len(steps), steps.start, len(steps), traced),
        )


class Profiler:
    """Traces the given steps with `jax.profiler`; calls all others without tracing.

    <workdir>/profile/plugins/profile/<time>/<host>.xplane.pb, a file for each process. Each step is
    annotated as "train_step" with its number, from which the plugin computes step times.

    Args:
        workdir: the directory of the run.
        steps: which steps to trace; empty for none.
    """

    def __init__(self, workdir: Path, steps: range = range(0)):
        self._directory = Path(workdir) / "profile"
        self._steps = steps
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()  # a signal or an error ended the run within the steps

    def call(self, number: int, step: Callable[..., Any], *args: Any) -> Any:
        """`step(*args)`, the step of this number, traced if it is one of the steps to trace."""
        if number not in self._steps:
            return step(*args)
        if not self._tracing:
            jax.block_until_ready(args)  # earlier steps that are still running stay out
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train_step", step_num=number):
            result = step(*args)
        if number == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
