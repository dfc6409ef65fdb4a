"""The checkpoints of a run: asynchronous, with a fallback; the best in a series of its own.

    <workdir>/checkpoints/<step>/    the newest few, the whole state
    <workdir>/best/<step>/           the lowest metric so far
    <workdir>/damaged/               checkpoints that could not be read, for a person to inspect

docs/resume.md describes the behaviour for users. Imports jax, orbax and devices/.
"""

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dmd_jax.devices.disk import absolute, first_line
from dmd_jax.devices.paths import tree_bytes
from dmd_jax.training import checkpoint
from dmd_jax.training.checkpoint import CheckpointError, DamagedCheckpoint

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """How often a run saves its state, and how many checkpoints it keeps: `config.checkpoint`.

    Attributes:
        every: steps between two checkpoints.
        keep: number of newest checkpoints that are kept: two or more, so that a damaged newest one
            has a fallback.

    Raises:
        ValueError: a number out of its range.
    """

    every: int = 600
    keep: int = 2

    def __post_init__(self):
        if self.every < 1 or self.keep < 2:
            raise ValueError(f"every={self.every} must be 1 or more, keep={self.keep} 2 or more")


class _Series:
    """Checkpoints named by step in one directory, under one Orbax manager."""

    def __init__(self, directory: epath.Path, keep: int):
        checkpoint.mute_abandoned_io()
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,  # partial checkpoints of a killed process
                # Otherwise, on a full disk, threads wait five minutes for a directory and delay the
                # exit of the process.
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                # Two managers write at the same time, and barriers between hosts have names.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=directory.name
                ),
            ),
        )
        self._writing: int | None = None

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def save(self, step: int, tree: Any, extra: Mapping[str, Any] | None) -> None:
        self.wait()
        if step in self.steps():
            return
        items = checkpoint.items(tree, extra)
        self._writing = step
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def check(self) -> None:
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _failure(self, error: Exception) -> CheckpointError:
        self._manager.reload()  # a failed save leaves its list of steps out of date
        kept = ", ".join(map(str, self.steps()))
        return CheckpointError(
            f"{self.path(self._writing)} could not be written: {first_line(error)}\n"
            + (f"Intact in {self.directory}: step {kept}. " if kept else "")
            + "Make room (or keep fewer checkpoints) and start the same command again: it "
            + ("resumes from the newest of them." if kept else "starts from step 0.")
        )

    def restore(
        self, steps: Iterable[int], abstract: Any, without: str
    ) -> tuple[Any, int, dict] | None:
        """The first of `steps` that can be read; damaged ones before it are moved to damaged/.

        `without` is what a run does without the directory, for the error if none can be read.
        """
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                tree, extra = checkpoint.read(self.path(step), abstract)
            except DamagedCheckpoint as error:
                damaged[step] = f"{self.path(step)} is damaged: {error}"
                log.warning("%s. Falling back to the one before it.", damaged[step])
                continue
            for bad_step in damaged:
                self.set_aside(bad_step)
            return tree, step, extra
        if damaged:
            raise CheckpointError(
                f"No checkpoint in {self.directory} can be read:\n"
                + "\n".join(f"  {reason}" for reason in damaged.values())
                + f"\nRestore one from a copy, or move the directory away to {without}."
            )
        return None

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint to damaged/, so that its step can be saved again."""
        aside = self.directory.parent / "damaged" / f"{self.directory.name}_{step}"
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            aside.parent.mkdir(parents=True, exist_ok=True)
            self.path(step).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set_aside_{step}")
        self._manager.reload()
        log.warning("%s was moved to %s.", self.path(step), aside)


class Checkpointer:
    """The checkpoints of one training run: the newest few, and the best by a metric.

        with Checkpointer(workdir, keep=2) as checkpointer:
            checkpointer.check_space(abstract_state)
            restored = checkpointer.restore_latest(abstract_state)
            ...
            checkpointer.save(step, state, extra)    # returns while the files are being written

    Only for the process that trains: the constructor deletes partial checkpoints of a killed run.
    Other programs use `checkpoint.read`. In a run of many hosts every host makes every call.

    Args:
        workdir: an absolute or relative directory.
        keep: number of newest checkpoints that are kept, two or more (see `Checkpoints`).
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2):
        Checkpoints(keep=keep)
        workdir = absolute(workdir)
        self.keep = keep
        self._newest = _Series(workdir / "checkpoints", keep)
        self._best = _Series(workdir / "best", 1)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save the whole state; the arrays may be donated as soon as this returns.

        A step that is already saved is not written again. Waits for the save of the best first, so
        that a run that resumes from here finds every best that was chosen before.

        Args:
            step: the number of finished steps.
            state: a pytree of jax.Array.
            extra: state of the host as JSON, such as that of the log window and the monitor.

        Raises:
            CheckpointError: this save, or the one before it, could not be written.
            ValueError: a leaf is no jax array, or an empty one.
        """
        self._best.wait()
        self._newest.save(step, state, extra)

    def restore_latest(self, abstract_state: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """The newest checkpoint that is intact.

        Damaged ones are logged and skipped. Once an intact one is found they are moved to
        `<workdir>/damaged`, so that their steps can be saved again.

        Args:
            abstract_state: as in `read`.

        Returns:
            (state, step, extra), or None if there is no checkpoint.

        Raises:
            CheckpointError: all checkpoints are damaged.
            MismatchedCheckpoint: the newest intact one is of another state.
        """
        self.wait()
        steps = reversed(self._newest.steps())
        return self._newest.restore(steps, abstract_state, "start from step 0")

    def save_best(
        self,
        step: int,
        tree: Any,
        metric: float,
        extra: Mapping[str, Any] | None = None,
        *,
        judge: str | None = None,
    ) -> bool:
        """Keeps `tree` where its metric is lower than all earlier ones of the same judge.

        Args:
            step: as in `save`.
            tree: usually less than the state: what a user would sample from.
            metric: lower is better; NaN is never best. Stored in `extra`, with the judge and the
                number of bests before it.
            extra: as in `save`.
            judge: identifies what the metric was computed with. Metrics of different judges are not
                comparable: the first of a new judge is its best.

        Returns:
            Whether this was the best so far.
        """
        self._best.wait()
        bests = self._bests()
        alike = [best["metric"] for best in bests.values() if best.get("judge") == judge]
        if not metric < min(alike, default=math.inf):
            return False
        if step in self._best.steps():  # damaged, or from a run on another mesh
            self._best.set_aside(step)
        turn = 1 + max((best.get("turn", 0) for best in bests.values()), default=0)
        kept = {"metric": float(metric), "judge": judge, "turn": turn}
        self._best.save(step, tree, {**(extra or {}), **kept})
        return True

    def restore_best(self, abstract: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """(tree, step, extra) of the last best, or None; raises as `restore_latest`."""
        self.wait()
        return self._best.restore(self.bests(), abstract, "go on without a best network")

    def bests(self) -> list[int]:
        """Steps of the bests on disk, the last one first; a kill may have left two."""
        found = self._bests()
        # Of one judge, the last is the lowest; of several, only the last judge counts.
        return sorted(found, key=lambda step: (-found[step].get("turn", 0), found[step]["metric"]))

    def _bests(self) -> dict[int, dict[str, Any]]:
        """`extra` by step; {"metric": infinity} where damaged."""
        bests = {}
        for step in self._best.steps():
            try:
                bests[step] = checkpoint.read_manifest(self._best.path(step))["extra"]
            except DamagedCheckpoint as error:
                log.warning("%s is damaged: %s", self._best.path(step), error)
                bests[step] = {"metric": math.inf}
        return bests

    def check(self) -> None:
        """Raises CheckpointError if a save has failed by now; never blocks. Once per log line."""
        self._newest.check()
        self._best.check()

    def wait(self) -> None:
        """Blocks until everything is on disk. Raises CheckpointError if it is not."""
        self._best.wait()
        self._newest.wait()

    def close(self) -> None:
        """Waits, and frees the threads. Raises as `wait`."""
        try:
            self._best.close()
        finally:
            self._newest.close()

    def check_space(self, abstract_state: Any, abstract_best: Any = ()) -> None:
        """Refuses a run whose checkpoints do not fit on the disk.

        While one is written there are keep + 1 of the state and two of the best. Counts
        uncompressed bytes.

        Raises:
            ValueError: not enough room, with both numbers.
        """
        root = self._newest.directory.parent
        needed = (self.keep + 1) * tree_bytes(abstract_state) + 2 * tree_bytes(abstract_best)
        present = _disk_bytes(self._newest.directory, self._best.directory)
        room = shutil.disk_usage(root).free + present
        if room < needed:
            raise ValueError(
                f"{root}: checkpoints need up to {needed / 2**30:.3f} GiB ({self.keep} of the "
                f"state and one being written), the disk has {room / 2**30:.3f} GiB for them. "
                "Free some space, choose another workdir, or keep fewer checkpoints."
            )


def _disk_bytes(*directories: epath.Path) -> int:
    return sum(
        _file_bytes(os.path.join(folder, file))
        for directory in directories
        for folder, _, files in os.walk(directory)
        for file in files
    )


def _file_bytes(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:  # Orbax deletes partial checkpoints of a killed run at the same time
        return 0
