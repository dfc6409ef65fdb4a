"""One checkpoint: a tree of arrays under readable names, verified when it is read.

A checkpoint is two Orbax items. `state` holds nested dicts of plain arrays under readable names, so
it can be read without the classes that wrote it. `manifest` is JSON: the shape, dtype and checksum
of every array, and the caller's `extra`. Orbax detects files that are truncated or missing, but it
restores a flipped bit inside a tensor as a wrong weight; the checksums detect that too.
`checkpoints` manages the series of a run. Imports jax, orbax and devices/.
"""

import functools
import json
import logging
import sys
import traceback
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dmd_jax.devices.disk import absolute, first_line
from dmd_jax.devices.paths import named_leaves

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read; the message says what to do."""


class DamagedCheckpoint(CheckpointError):
    """One checkpoint cannot be read back as it was written."""


class MismatchedCheckpoint(ValueError):
    """An intact checkpoint of another state: other paths, shapes or dtypes."""


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


def _checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """Sum of each array's bits, read as unsigned words of at most 32 bits.

    An integer sum is exact and independent of order, so it is the same on any mesh, and one changed
    value always changes it. It is computed on the host: the bytes are copied here to be saved
    anyway, and jax caches the copy for Orbax.
    """
    for leaf in leaves.values():
        leaf.copy_to_host_async()
    sums = np.array([_local_sum(leaf) for leaf in leaves.values()], np.uint64)
    if jax.process_count() > 1:  # in halves, because jax has no 64-bit integers by default
        halves = multihost_utils.process_allgather(sums.view(np.uint32))
        sums = halves.view(np.uint64).sum(axis=0)
    return dict(zip(leaves, sums.tolist(), strict=True))


def _local_sum(array: jax.Array) -> int:
    shards = (s.data for s in array.addressable_shards if s.replica_id == 0)
    word = f"u{min(array.dtype.itemsize, 4)}"
    words = (np.asarray(shard).ravel("K").view(word) for shard in shards)
    return sum(int(x.sum(dtype=np.uint64)) for x in words)


def _manifest(leaves: Mapping[str, jax.Array], extra: Mapping[str, Any] | None) -> dict[str, Any]:
    sums = _checksums(leaves)
    arrays = {path: [_signature(leaf), sums[path]] for path, leaf in leaves.items()}
    # Through JSON and back, so that the checksum sees what a reader will see.
    body = json.loads(json.dumps({"arrays": arrays, "extra": dict(extra or {})}))
    return body | {"crc32": _crc(body)}


def items(tree: Any, extra: Mapping[str, Any] | None) -> ocp.args.Composite:
    """The two items for Orbax to save.

    Raises:
        ValueError: a leaf is not a jax array, or is empty.
    """
    leaves = named_leaves(tree)
    _require_arrays(leaves)
    return ocp.args.Composite(
        state=ocp.args.StandardSave(_nest(leaves)),
        manifest=ocp.args.JsonSave(_manifest(leaves, extra)),
    )


def _crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read_item(path: epath.Path, **item: ocp.args.CheckpointArgs) -> Any:
    """One Orbax item; any error in the files is raised as `DamagedCheckpoint`, on every host."""
    mute_abandoned_io()
    (name,) = item
    # Every host reads on its own: one that fails must not leave the others at Orbax's barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    reason = None
    try:
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        ) as reader:
            content = reader.restore(path, args=ocp.args.Composite(**item))[name]
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # an error of this machine, not of the checkpoint
    except Exception as error:  # Orbax raises a dozen types, plain Exception among them
        reason = error
    # A truncated file may hold the shards of one host only; all hosts must fall back, or none.
    if _any_host(reason is not None):
        detail = first_line(reason) if reason else "another host cannot read its part"
        raise DamagedCheckpoint(f"{name} cannot be read: {detail}") from reason
    return content


def _any_host(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def read_manifest(path: epath.Path) -> dict[str, Any]:
    manifest = _read_item(path, manifest=ocp.args.JsonRestore())
    body = {key: manifest.get(key) for key in ("arrays", "extra")}
    if manifest.get("crc32") != _crc(body):
        raise DamagedCheckpoint("its manifest does not match its own checksum")
    return body


def read(path: epath.PathLike, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Reads and verifies one checkpoint directory without changing it. Every host must call it.

    Args:
        path: a directory `.../checkpoints/<step>`.
        abstract: the tree to fill, of jax.ShapeDtypeStruct (`jax.eval_shape`) or arrays. Leaves are
            placed by their `sharding`, or on the first device if they have none. The mesh may
            differ from the one that the checkpoint was saved on.

    Returns:
        The tree in the structure of `abstract`, and the `extra` that was saved with it.

    Raises:
        DamagedCheckpoint: files are missing, truncated or changed.
        MismatchedCheckpoint: the checkpoint is intact, but of another tree; lists all differing
            paths.
    """
    path = absolute(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no checkpoint here. Give a directory named by a step.")
    manifest = read_manifest(path)
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
            f"{path} is intact but holds another state; {len(differing)} paths differ:\n"
            + "\n".join(differing)
            + "\nResume with the configuration that wrote it, or choose another workdir."
        )


@functools.cache
def mute_abandoned_io() -> None:
    """Suppresses the hundreds of tracebacks that one failed read or write would print.

    When one array fails, Orbax raises and abandons the others. Each of these then reports its own
    error, through the interpreter or asyncio. The error of the first one is raised as before.
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
