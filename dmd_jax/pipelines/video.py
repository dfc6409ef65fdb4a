"""Files of videos and pictures: uint8 pixels in and out, MP4, GIF and PNG.

Imports no other room; PyAV, for all but writing GIF and PNG, only when it is needed. A file gets
its name when it is complete: a failure leaves the old file.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError

# Nearly lossless to the eye; mpeg4 is for builds of PyAV without x264.
ENCODERS = {"libx264": {"crf": "12"}, "mpeg4": {"qmin": "1", "qmax": "2"}}
BT709 = 1  # FFmpeg's number of the colour space that players expect; the file states it


def save_video(path: str | PathLike, frames: np.ndarray, fps: float = 16) -> None:
    """Writes a video; the ending is the format.

    Args:
        path: .mp4 (H.264, or MPEG-4 where PyAV lacks x264), .gif (its clock ticks in hundredths of
            a second), or .png (a contact sheet with one row).
        frames: uint8 [T, H, W, 3]; H and W even for .mp4.
        fps: frames per second; 16 is the rate of Wan.

    Raises:
        ValueError: another ending, shape, dtype or rate; odd sizes for .mp4.
        ImportError: .mp4 without PyAV.
    """
    _require_pixels("frames", frames, "THWC")
    if Path(path).suffix == ".png":
        return save_image(path, contact_sheet(frames[None]))
    with video_writer(path, fps) as write:
        write(frames)


@contextlib.contextmanager
def video_writer(path: str | PathLike, fps: float = 16) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a video piece by piece; .mp4 in constant memory.

        with video_writer("a.mp4") as write:
            for frames in pieces:
                write(frames)

    Args:
        path: .mp4 or .gif, as for `save_video`.
        fps: frames per second.

    Yields:
        A function of the next frames, uint8 [T, H, W, 3].

    Raises:
        ValueError, ImportError: as `save_video`.
    """
    path = Path(path)
    writers = {".mp4": _mp4_writer, ".gif": _gif_writer}
    if path.suffix not in writers:
        raise ValueError(f"{path}: the ending says the format, .mp4, .gif or .png")
    require_rate(fps)
    with _complete(path) as partial, writers[path.suffix](partial, fps) as append:
        written = 0

        def write(frames):
            nonlocal written
            _require_pixels("frames", frames, "THWC")
            append(frames)
            written += len(frames)

        yield write
        if not written:
            raise ValueError(f"{path}: no frame was written")


def save_image(path: str | PathLike, image: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], as PNG.

    Raises:
        ValueError: another ending, shape or dtype.
    """
    path = Path(path)
    _require_pixels("image", image, "HWC")
    if path.suffix != ".png":
        raise ValueError(f"{path}: pictures are written as .png")
    with _complete(path) as partial:
        Image.fromarray(image).save(partial, "PNG")


def contact_sheet(videos: np.ndarray, columns: int = 8) -> np.ndarray:
    """One picture of several videos: a row of evenly spaced frames for each.

    Args:
        videos: uint8 [N, T, H, W, 3].
        columns: frames of each, including the first and last; all T if T is smaller.

    Returns:
        uint8 [N H, min(columns, T) W, 3].

    Raises:
        ValueError: another shape or dtype; no column.
    """
    _require_pixels("videos", videos, "NTHWC")
    if columns < 1:
        raise ValueError(f"columns={columns} must be positive")
    length = videos.shape[1]
    shown = np.rint(np.linspace(0, length - 1, min(columns, length))).astype(int)
    return rearrange(videos[:, shown], "n t h w c -> (n h) (t w) c")


def read_video(
    path: str | PathLike,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
) -> np.ndarray:
    """Reads a video of any format of FFmpeg.

    Args:
        path: a local file.
        frames: number of frames to read from the start; all if None.
        height, width: every frame is scaled to cover this size and cropped in the middle; the
            size of the file if None.
        fps: rate to read at, by dropping or repeating frames; that of the file if None.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no video, it is damaged, or it has fewer frames; one of height and width
            without the other.
        ImportError: PyAV is missing.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height={height} and width={width}: give both or neither")
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames} must be positive")
    if fps is not None:
        require_rate(fps)
    read: list[np.ndarray] = []
    with _opened(path) as container:
        for frame in _at_rate(container, fps):
            if len(read) == frames:
                break
            picture = frame.to_image()
            read.append(np.asarray(_fit(picture, height, width) if height else picture))
    if not read or (frames is not None and len(read) < frames):
        at = "" if fps is None else f" at {fps} frames a second"
        raise ValueError(f"{path} has {len(read)} frames{at}, not {frames or 'one'}")
    return np.stack(read)


def video_size(path: str | PathLike, *, fps: float | None = None) -> tuple[int, int, int]:
    """(frames, height, width) that `read_video` would read, from the headers of the file.

    Nothing is decoded, so damaged frames are not noticed.

    Args:
        path: a local file.
        fps: the rate to read at; the file's own if None.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_video`.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        # Some formats do not store the number of frames; the last packet is empty.
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return math.ceil(count / _step(stream, fps)), stream.height, stream.width


def read_image(path: str | PathLike, height: int, width: int) -> np.ndarray:
    """Reads a picture, upright, scaled to cover `height` x `width` and cropped in the middle.

    Returns:
        uint8 [height, width, 3].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or damaged.
    """
    path = _existing(path)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a picture, it is damaged or something else: {error}"
        ) from error
    return np.asarray(_fit(upright, height, width))


@contextlib.contextmanager
def _mp4_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    av = import_av()
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(encoder, rate, options=ENCODERS[encoder])

        def begin(height: int, width: int) -> None:
            if height % 2 or width % 2:
                raise ValueError(
                    f"MP4 has one colour for 2 x 2 pixels: frames of {height} x {width} do not "
                    "fit. Crop or pad them to even sizes, or write a .gif."
                )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            coder = stream.codec_context
            coder.colorspace = coder.color_primaries = coder.color_trc = BT709

        def append(frames: np.ndarray) -> None:
            if not stream.codec_context.is_open:
                begin(*frames.shape[1:3])
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=BT709)))

        yield append
        container.mux(stream.encode())


@contextlib.contextmanager
def _gif_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    images: list[Image.Image] = []
    yield lambda frames: images.extend(map(Image.fromarray, frames))
    first, *rest = images
    first.save(path, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def _at_rate(container: Any, fps: float | None) -> Iterator[Any]:
    """The frames of a file at `fps`; assumes that its own rate is constant."""
    stream = container.streams.video[0]
    step, taken = _step(stream, fps), 0
    for i, frame in enumerate(container.decode(stream)):
        while taken * step // 1 == i:
            yield frame
            taken += 1


def _step(stream: Any, fps: float | None) -> Fraction:
    """Frames of the file per frame at `fps`."""
    if fps is None:
        return Fraction(1)
    require_rate(fps)
    return stream.average_rate / Fraction(fps).limit_denominator(1001)


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def _opened(path: str | PathLike) -> Iterator[Any]:
    """The container of a file with a video; errors of PyAV are raised as ValueError."""
    path, av = _existing(path), import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video in it")
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read as a video, it is damaged or something else: {error}"
        ) from error


def import_av() -> Any:
    """PyAV, for MP4 and for reading videos. Raises ImportError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'dmd_jax[wan]'") from error
    return av


def require_rate(fps: float) -> None:
    """Raises ValueError for a number of frames per second that no video has."""
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps} must be above 0, and 1,000 at most")


def _existing(path: str | PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    return path


def _require_pixels(name: str, pixels: np.ndarray, axes: str) -> None:
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != len(axes)
        or pixels.shape[-1] != 3
        or not pixels.size
    ):
        wanted = ", ".join(axes).replace("C", "3")
        raise ValueError(
            f"{name} must be uint8 [{wanted}], not {pixels.dtype} {list(pixels.shape)}"
        )


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A temporary file next to `path`; renamed to it at the end, or removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
