"""The checkpoints of a run: asynchronous, with a fall-back, and the best kept apart.

    <workdir>/checkpoints/<step>/    the newest few, the whole state
    <workdir>/best/<step>/           the lowest metric so far
    <workdir>/damaged/               what could not be read, set aside for a human to look at

docs/resume.md tells the user's side of it.
"""

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

from dmd_jax.devices.disk import absolute, first_line, is_remote
from dmd_jax.devices.paths import tree_bytes
from dmd_jax.training import checkpoint
from dmd_jax.training.checkpoint import CheckpointError, DamagedCheckpoint

log = logging.getLogger(__name__)


class _Series:
    """Checkpoints named by step in one directory, under one Orbax manager."""

    def __init__(self, directory: epath.Path, keep: int):
        checkpoint.mute_abandoned_io()
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,  # what a killed process left half-written
                # Otherwise a full disk leaves threads that wait for a directory, and with them
                # the exit of the process, for five minutes.
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                # Two managers write at once, and hosts meet at barriers that have names.
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

    def restore(self, steps: Iterable[int], abstract: Any) -> tuple[Any, int, dict] | None:
        """The first of `steps` that can be read; the damaged ones before it are set aside."""
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
                + "\nBring one back from a copy, or move the directory away to do without."
            )
        return None

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint out of the way of a later save at the same step."""
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

    For the process that trains only: opening one cleans up what a killed run left half-written.
    Others read with `read`. In a run of many hosts every host makes every call.

    Args:
        workdir: an absolute or relative directory, or a bucket (gs://...).
        keep: how many of the newest are kept. Two or more, or a damaged newest has no fall-back.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep = {keep} must be 2 or more: a damaged newest needs a next")
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

        A step that is already there is not written again. The best is waited for first, so that
        whoever resumes from here finds every best that was chosen before.

        Args:
            step: the number of finished steps.
            state: a pytree of jax.Array.
            extra: what else to keep, as JSON: the host's small state.

        Raises:
            CheckpointError: this save, or the one before it, could not be written.
            ValueError: a leaf is no jax array, or an empty one.
        """
        self._best.wait()
        self._newest.save(step, state, extra)

    def restore_latest(self, abstract_state: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """The newest checkpoint that is whole.

        Damaged ones are reported, passed over and, once a whole one is found, moved to
        `<workdir>/damaged`, so that a later save at their step has room.

        Args:
            abstract_state: as in `read`.

        Returns:
            (state, step, extra), or None where nothing was ever saved.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
            MismatchedCheckpoint: the newest whole one is of another state.
        """
        self.wait()
        return self._newest.restore(reversed(self._newest.steps()), abstract_state)

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
        bests = self._bests()
        # Of one judge, the last is the lowest; of several, only the last judge counts.
        order = sorted(bests, key=lambda step: (-bests[step].get("turn", 0), bests[step]["metric"]))
        return self._best.restore(order, abstract)

    def _bests(self) -> dict[int, dict[str, Any]]:
        """`extra` by step; {"metric": infinity} where damaged. A kill may have left two."""
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
        """Refuses to start a run whose checkpoints the disk cannot hold.

        While one is written there are keep + 1 of the state and two of the best. Counts
        uncompressed bytes; buckets are taken to be endless.

        Raises:
            ValueError: not enough room, with both numbers.
        """
        root = self._newest.directory.parent
        if is_remote(root):
            return
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
    except FileNotFoundError:  # Orbax is removing, beside us, what a killed run left half-written
        return 0
