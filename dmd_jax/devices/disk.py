"""Directories and files: permission, exclusive use, atomic writes. Imports no jax."""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)


def check_writable(directory: epath.PathLike) -> None:
    """Writes and removes a small file; creates the directory if it does not exist.

    Raises:
        ValueError: the write failed, with the reason.
    """
    directory = absolute(directory)
    probe = directory / f".write_probe_{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0" * 65536)
        probe.unlink()
    except Exception as error:
        raise ValueError(
            f"{directory} cannot be written to: {first_line(error)}. "
            "Choose another workdir, or correct its permissions or its disk."
        ) from error


def check_file(path: Path) -> None:
    """Checks that a file can be written where it is asked for.

    Raises:
        ValueError: the path is a folder, or its folder cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    check_writable(path.parent)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Locks a directory for this process by a file `lock` in it, while the context is open.

    The kernel releases the lock when the process ends, however it ends. On a system or file
    system without locks, a warning is logged and nothing is locked.

    Raises:
        ValueError: another process has locked the directory.
    """
    if fcntl is None:
        log.warning("%s cannot be locked on this system: start no second run in it", directory)
        yield
        return
    with (directory / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"{directory} is in use by process {file.read() or 'unknown'}; wait for its end, "
                "stop it, or choose another directory"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no second run in it", directory, error)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: if the process is killed, the old content is still there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path."""
    return epath.Path(os.path.abspath(path))


def first_line(error: BaseException, limit: int = 140) -> str:
    """The first line of an error, at most `limit` characters; ENOSPC as a sentence.

    TensorStore's messages fill pages, and the cause is in their first words.
    """
    if "No space left" in str(error):
        return "no space left on device"
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= limit else line[:limit] + "..."


def local_path(path: str | os.PathLike) -> Path:
    """The path of a local file or directory, `~` resolved.

    Raises:
        ValueError: it is empty, or an address, such as that of a bucket (gs://...).
    """
    if not os.fspath(path):
        raise ValueError("the path is empty: name a file or a folder")
    if "://" in os.fspath(path):
        raise ValueError(
            f"{path}: only local paths are read and written; mount the bucket, or copy the files"
        )
    return Path(path).expanduser()
