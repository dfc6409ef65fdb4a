"""Videos with captions as training data: a folder of files, each with a text file of its name.

    clips/waves.mp4     a video; sub-folders are read too
    clips/waves.txt     its caption

Imports `video`.
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from dmd_jax.devices.disk import local_path
from dmd_jax.pipelines.video import video_size

ENDINGS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
NAMED = 10  # files that an error names


def captioned(folder: str | PathLike) -> list[tuple[Path, str]]:
    """The videos of a folder and their captions, sorted by path.

    Raises:
        FileNotFoundError: there is no such folder, or no video in it.
        ValueError: captions are missing, empty, or not UTF-8; the first of them are named.
    """
    folder = local_path(folder)
    paths = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise FileNotFoundError(f"there is no video in {folder}: they end in {', '.join(ENDINGS)}")
    captions = [_caption(path.with_suffix(".txt")) for path in paths]
    _refuse(
        f"write its caption into {path.with_suffix('.txt')}, in UTF-8"
        for path, caption in zip(paths, captions, strict=True)
        if not caption
    )
    return list(zip(paths, captions, strict=True))


def require_clips(
    paths: Iterable[str | PathLike], *, frames: int, height: int, width: int, fps: float
) -> None:
    """Checks the headers of videos before clips of them are read; decodes nothing.

    Args:
        paths: local files.
        frames: T of a clip at `fps`.
        height, width: of a clip; smaller videos are refused, not enlarged.

    Raises:
        ValueError: files are no videos, too short or too small; the first of them are named.
        ImportError: PyAV is missing.
    """
    wanted = frames, height, width
    _refuse(filter(None, (_complaint(path, wanted, fps) for path in paths)))


def _caption(path: Path) -> str:
    """The text of a file, white space joined; '' if it is missing, empty or not UTF-8."""
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _complaint(path: str | PathLike, wanted: tuple[int, int, int], fps: float) -> str | None:
    try:
        found = video_size(path, fps=fps)
    except ValueError as error:
        return str(error)
    if all(have >= want for have, want in zip(found, wanted, strict=True)):
        return None
    has, want = ("{} frames of {}x{}".format(*size) for size in (found, wanted))
    return f"{path} has {has} at {fps:g} frames a second, less than {want}"


def _refuse(complaints: Iterable[str]) -> None:
    if lines := list(complaints):
        more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
        raise ValueError(
            "these videos cannot be used; correct or remove them:\n"
            + "\n".join(lines[:NAMED] + more)
        )
