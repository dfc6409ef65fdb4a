"""Directories and files: whether they can be written, and how they are written whole. No jax."""

import os
import uuid
from pathlib import Path

from etils import epath


def check_writable(directory: epath.PathLike) -> None:
    """Writes and removes a small file, making the directory where there is none.

    Raises:
        ValueError: that failed, with the reason.
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
            "Choose another workdir, or mend its permissions or its disk."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: what a kill leaves is the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is that of a bucket (gs://...)."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root; that of a bucket as it is."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def first_line(error: BaseException, limit: int = 140) -> str:
    """TensorStore's messages run over pages; the cause is in the first words, or it is ENOSPC."""
    if "No space left" in str(error):
        return "no space left on device"
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= limit else line[:limit] + "..."


def local_path(path: str | os.PathLike) -> Path:
    """The path of a local file or directory, `~` resolved.

    Raises:
        ValueError: it is an address, such as that of a bucket (gs://...).
    """
    if "://" in os.fspath(path):
        raise ValueError(
            f"{path}: only local paths are read and written; mount the bucket, or copy the files"
        )
    return Path(path).expanduser()
