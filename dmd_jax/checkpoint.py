"""Checkpoints that survive: asynchronous, verified, with a fall-back, and the best kept apart.

Floor 0: knows pytrees of arrays and nothing of diffusion.

    <workdir>/checkpoints/<step>/    the newest few, the whole state
    <workdir>/best/<step>/           the lowest metric so far
    <workdir>/damaged/               what could not be read, set aside for a human to look at

A checkpoint is two Orbax items. `state` holds nested dicts of plain arrays under readable names,
so it outlives the classes that wrote it. `manifest` is JSON: the shape, dtype and checksum of every
array, and the caller's `extra`. Orbax notices files that are cut or missing, but a flipped bit
inside a tensor comes back as a wrong weight without a word; the checksums notice that too.
docs/resume.md tells the user's side of it.
"""

import functools
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import traceback
import uuid
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dmd_jax.paths import named_leaves

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read; the message says what to do."""


class DamagedCheckpoint(CheckpointError):
    """One checkpoint cannot be read back as it was written."""


class MismatchedCheckpoint(ValueError):
    """A sound checkpoint of another state: other paths, shapes or dtypes."""


# --------------------------------------------------------------------------------------
# Trees by name


def _require_arrays(leaves: Mapping[str, Any]) -> None:
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or leaf.size == 0:
            found = _signature(leaf) if isinstance(leaf, jax.Array) else type(leaf).__name__
            raise ValueError(f"{path}: a checkpoint holds jax arrays with elements, not {found}.")


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _signature(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, concrete or abstract, over all devices and hosts."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """Sum of each array's bits, read as unsigned words of at most 32 bits.

    An integer sum is exact and needs no order, so it is the same on any mesh, and any one changed
    value changes it. Taken on the host: the bytes must come here to be saved anyway, and jax keeps
    the copy for Orbax.
    """
    for leaf in leaves.values():
        leaf.copy_to_host_async()
    sums = np.array([_local_sum(leaf) for leaf in leaves.values()], np.uint64)
    if jax.process_count() > 1:  # in halves, for jax has no 64 bits by default
        halves = multihost_utils.process_allgather(sums.view(np.uint32))
        sums = halves.view(np.uint64).sum(axis=0)
    return dict(zip(leaves, sums.tolist(), strict=True))


def _local_sum(array: jax.Array) -> int:
    shards = (s.data for s in array.addressable_shards if s.replica_id == 0)
    word = f"u{min(array.dtype.itemsize, 4)}"
    words = (np.asarray(shard).ravel("K").view(word) for shard in shards)
    return sum(int(x.sum(dtype=np.uint64)) for x in words)


# --------------------------------------------------------------------------------------
# One checkpoint


def _manifest(leaves: Mapping[str, jax.Array], extra: Mapping[str, Any] | None) -> dict[str, Any]:
    sums = _checksums(leaves)
    arrays = {path: [_signature(leaf), sums[path]] for path, leaf in leaves.items()}
    # Through JSON and back, so that the checksum sees what a reader will see.
    body = json.loads(json.dumps({"arrays": arrays, "extra": dict(extra or {})}))
    return body | {"crc32": _crc(body)}


def _crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read_item(path: epath.Path, **item: ocp.args.CheckpointArgs) -> Any:
    """One Orbax item; whatever goes wrong in the files is `DamagedCheckpoint`, on every host."""
    _mute_abandoned_io()
    (name,) = item
    # Every host reads for itself: one that fails must not leave the others at Orbax's barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    reason = None
    try:
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        ) as reader:
            content = reader.restore(path, args=ocp.args.Composite(**item))[name]
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # this machine's trouble, not the checkpoint's
    except Exception as error:  # Orbax raises a dozen types, bare Exception among them
        reason = error
    # A cut file may hold the shards of one host only; all must fall back, or none.
    if _any_host(reason is not None):
        detail = _first_line(reason) if reason else "another host cannot read its part"
        raise DamagedCheckpoint(f"{name} cannot be read: {detail}") from reason
    return content


def _any_host(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    manifest = _read_item(path, manifest=ocp.args.JsonRestore())
    body = {key: manifest.get(key) for key in ("arrays", "extra")}
    if manifest.get("crc32") != _crc(body):
        raise DamagedCheckpoint("its manifest does not match its own checksum")
    return body


def read(path: epath.PathLike, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Reads and verifies one checkpoint directory, and changes nothing in it. Every host calls it.

    Args:
        path: a directory `.../checkpoints/<step>`.
        abstract: the tree to fill, of jax.ShapeDtypeStruct (`jax.eval_shape`) or arrays. Leaves are
            placed by their `sharding`, on the first device where they have none: another mesh
            than the writer's is fine.

    Returns:
        The tree in the structure of `abstract`, and the `extra` it was saved with.

    Raises:
        DamagedCheckpoint: files are missing, cut or changed.
        MismatchedCheckpoint: sound, but of another tree; lists every differing path.
    """
    path = _absolute(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no checkpoint here. Give a directory named by a step.")
    manifest = _read_manifest(path)
    wanted = named_leaves(abstract)
    _require_same_tree(path, {k: v[0] for k, v in manifest["arrays"].items()}, wanted)
    target = {name: _target(leaf) for name, leaf in wanted.items()}
    state = _read_item(path, state=ocp.args.StandardRestore(_nest(target)))
    arrays = named_leaves(state)
    for name, checksum in _checksums(arrays).items():
        if checksum != manifest["arrays"][name][1]:
            raise DamagedCheckpoint(f"the values of {name} are not the ones that were saved")
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [arrays[name] for name in wanted]
    ), manifest["extra"]


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same_tree(path: epath.Path, saved: dict[str, str], wanted: dict[str, Any]) -> None:
    here = {name: _signature(leaf) for name, leaf in wanted.items()}
    differing = [
        f"  {name}: {saved.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    if differing:
        raise MismatchedCheckpoint(
            f"{path} is sound but holds another state; {len(differing)} paths differ:\n"
            + "\n".join(differing)
            + "\nResume with the configuration that wrote it, or choose another workdir."
        )


# --------------------------------------------------------------------------------------
# A directory of checkpoints


class _Series:
    """Checkpoints named by step in one directory, under one Orbax manager."""

    def __init__(self, directory: epath.Path, keep: int):
        _mute_abandoned_io()
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
        leaves = named_leaves(tree)
        _require_arrays(leaves)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_nest(leaves)),
            manifest=ocp.args.JsonSave(_manifest(leaves, extra)),
        )
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
            f"{self.path(self._writing)} could not be written: {_first_line(error)}\n"
            + (f"Intact in {self.directory}: step {kept}. " if kept else "")
            + "Make room (or keep fewer checkpoints) and start the same command again: it "
            + ("resumes from the newest of them." if kept else "starts from step 0.")
        )

    def restore(self, steps: Iterable[int], abstract: Any) -> tuple[Any, int, dict] | None:
        """The first of `steps` that can be read; the damaged ones before it are set aside."""
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                tree, extra = read(self.path(step), abstract)
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
        workdir = _absolute(workdir)
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
        self, step: int, tree: Any, metric: float, extra: Mapping[str, Any] | None = None
    ) -> bool:
        """Keeps `tree` where its metric is lower than that of every one before it.

        Args:
            step: as in `save`.
            tree: usually less than the state: what a user would sample from.
            metric: lower is better; NaN is never best. Stored in `extra['metric']`.
            extra: as in `save`.

        Returns:
            Whether this was the best so far.
        """
        self._best.wait()
        if not metric < min(self._best_metrics().values(), default=math.inf):
            return False
        if step in self._best.steps():  # damaged, or from a run on another mesh
            self._best.set_aside(step)
        self._best.save(step, tree, {**(extra or {}), "metric": float(metric)})
        return True

    def restore_best(self, abstract: Any) -> tuple[Any, int, dict[str, Any]] | None:
        """(tree, step, extra) of the lowest metric so far, or None; raises as `restore_latest`."""
        self.wait()
        metrics = self._best_metrics()
        return self._best.restore(sorted(metrics, key=metrics.get), abstract)

    def _best_metrics(self) -> dict[int, float]:
        """Metric by step, infinity where damaged. Two where a kill came before the old one went."""
        metrics = {}
        for step in self._best.steps():
            try:
                metrics[step] = _read_manifest(self._best.path(step))["extra"]["metric"]
            except DamagedCheckpoint as error:
                log.warning("%s is damaged: %s", self._best.path(step), error)
                metrics[step] = math.inf
        return metrics

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
        if _is_remote(root):
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


def check_writable(directory: epath.PathLike) -> None:
    """Writes and removes a small file, making the directory where there is none.

    Raises:
        ValueError: that failed, with the reason.
    """
    directory = _absolute(directory)
    probe = directory / f".write_probe_{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0" * 65536)
        probe.unlink()
    except Exception as error:
        raise ValueError(
            f"{directory} cannot be written to: {_first_line(error)}. "
            "Choose another workdir, or mend its permissions or its disk."
        ) from error


# --------------------------------------------------------------------------------------
# Being asked to stop


class Preemption:
    """Turns SIGTERM and the first Ctrl-C into a question that the training loop asks every step.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.requested(step): save and leave

    A second Ctrl-C raises KeyboardInterrupt as usual. In a run of many hosts the signal reaches
    them at different steps; there JAX's own notice of preemption is asked instead, which names
    one step for all, and must be asked at every step by every host.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to save and leave after `step`: the same answer on every host."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __enter__(self) -> "Preemption":
        # JAX's notice owns SIGTERM where there are many hosts; Python allows handlers in the main
        # thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
        # Not print or logging: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: saving, then leaving.\n".encode())

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


# --------------------------------------------------------------------------------------
# Files and noise


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


def _absolute(path: epath.PathLike) -> epath.Path:
    return epath.Path(path if _is_remote(path) else os.path.abspath(path))


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


def _first_line(error: BaseException, limit: int = 140) -> str:
    """TensorStore's messages run over pages; the cause is in the first words, or it is ENOSPC."""
    if "No space left" in str(error):
        return "no space left on device"
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= limit else line[:limit] + "..."


@functools.cache
def _mute_abandoned_io() -> None:
    """Keeps one failed read or write from printing hundreds of tracebacks.

    When one array fails, Orbax raises and abandons the others. Each then reports for itself, by
    way of the interpreter or of asyncio, whichever comes first. The one error that counts is raised
    all the same.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _of_abandoned_io(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(_not_of_abandoned_io)


def _not_of_abandoned_io(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _of_abandoned_io(record.exc_info[1]))


def _of_abandoned_io(error: BaseException | None) -> bool:
    if any(word in str(error) for word in ("Event loop is closed", "TensorStore")):
        return True
    frames = traceback.walk_tb(getattr(error, "__traceback__", None))
    return any(frame.f_globals.get("__name__", "").startswith("orbax.") for frame, _ in frames)
