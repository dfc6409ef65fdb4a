"""Files of videos and pictures: round trips, sizes and rates, and nothing lost where it fails."""

import contextlib
import math
import sys

import numpy as np
import pytest
from PIL import Image

from dmd_jax.pipelines import video
from dmd_jax.pipelines.video import (
    contact_sheet,
    read_image,
    read_video,
    save_image,
    save_video,
    video_writer,
)

pytestmark = pytest.mark.wan


def soft_frames(count=12, height=48, width=64):
    """A smooth colourful pattern that moves: uint8 [T, H, W, 3]."""
    t, y, x = np.meshgrid(*map(np.arange, (count, height, width)), indexing="ij")
    grey = 80 * np.sin(x / 9 + t / 3)
    colour = [np.cos(y / 17 - t / 4), np.sin(x / 21), np.cos((x + y) / 19)]
    return np.rint(127.5 + grey[..., None] + 40 * np.stack(colour, -1)).astype(np.uint8)


def mean_error(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def rate_of(path):
    import av

    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_mp4_round_trip_is_near(tmp_path, monkeypatch, encoder):
    av = pytest.importorskip("av")
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV lacks {encoder}")
    monkeypatch.setattr(video, "ENCODERS", {encoder: video.ENCODERS[encoder]})
    frames, path = soft_frames(), tmp_path / "new" / "video.mp4"
    save_video(path, frames)
    read = read_video(path)
    assert read.dtype == np.uint8 and read.shape == frames.shape
    assert mean_error(read, frames) < 2.5  # chroma has a quarter of the pixels
    # The order is right: each frame is nearest to itself.
    nearest = [np.argmin([mean_error(a, b) for b in frames]) for a in read]
    assert nearest == list(range(12)) and rate_of(path) == 16


def test_mp4_has_the_rate_and_the_colours_that_were_given(tmp_path):
    pytest.importorskip("av")
    flat = np.broadcast_to(np.uint8([220, 40, 90]), (6, 32, 32, 3))
    save_video(tmp_path / "video.mp4", flat, fps=7.5)
    assert rate_of(tmp_path / "video.mp4") == 7.5
    assert np.abs(read_video(tmp_path / "video.mp4").astype(int) - flat).max() <= 3


def test_gif_has_all_frames_at_nearly_the_rate(tmp_path):
    frames = soft_frames()
    save_video(tmp_path / "video.gif", frames, fps=16)
    with Image.open(tmp_path / "video.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (12, (64, 48), 0)
        assert gif.info["duration"] == 60  # of 62.5 ms
        gif.seek(7)
        assert mean_error(np.asarray(gif.convert("RGB")), frames[7]) < 8  # 256 colours


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_a_video_in_pieces_is_the_file_of_the_whole(tmp_path, name):
    pytest.importorskip("av")
    whole, pieces, frames = tmp_path / name, tmp_path / "pieces" / name, soft_frames()
    save_video(whole, frames, fps=12)
    with video_writer(pieces, fps=12) as write:
        for piece in (frames[:1], frames[1:8], frames[8:]):
            write(piece)
        assert not pieces.exists()  # until it is complete
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_a_video_without_frames_is_refused(tmp_path, name):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="no frame was written"), video_writer(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


def test_gif_can_be_read_too(tmp_path):
    pytest.importorskip("av")
    save_video(tmp_path / "video.gif", soft_frames())
    assert mean_error(read_video(tmp_path / "video.gif"), soft_frames()) < 8


def test_png_is_a_contact_sheet(tmp_path):
    frames = soft_frames()
    save_video(tmp_path / "video.png", frames)
    with Image.open(tmp_path / "video.png") as image:
        np.testing.assert_array_equal(np.asarray(image), contact_sheet(frames[None]))


def test_contact_sheet_has_a_row_a_video_and_its_evenly_spaced_frames():
    videos = np.stack([soft_frames(9), 255 - soft_frames(9)])
    sheet = contact_sheet(videos, columns=3)
    assert sheet.shape == (2 * 48, 3 * 64, 3)
    for row in range(2):
        for column, frame in enumerate((0, 4, 8)):
            tile = sheet[48 * row : 48 * (row + 1), 64 * column : 64 * (column + 1)]
            np.testing.assert_array_equal(tile, videos[row, frame])
    np.testing.assert_array_equal(contact_sheet(videos[:, :2]), contact_sheet(videos[:, :2], 2))
    np.testing.assert_array_equal(contact_sheet(videos[:1, :1]), videos[0, 0])


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "video.png"])
def test_a_failure_loses_nothing_and_leaves_nothing(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"before")

    def fail(image, partial, *args, **kw):
        partial.write_bytes(b"half")
        raise OSError("no space left")

    @contextlib.contextmanager
    def failing_writer(partial, fps):
        yield lambda frames: fail(None, partial)

    monkeypatch.setattr(video, "_mp4_writer", failing_writer)
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_video(path, soft_frames())
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize(
    "name, frames, fps, complaint",
    [
        ("a.avi", soft_frames(), 16, r"the ending says the format, \.mp4"),
        ("a.mp4", soft_frames(height=47), 16, "47 x 64 do not fit"),
        ("a.mp4", soft_frames().astype(np.float32), 16, "must be uint8"),
        ("a.gif", soft_frames()[0], 16, r"uint8 \[T, H, W, 3\], not uint8 \[48, 64, 3\]"),
        ("a.gif", soft_frames()[:0], 16, r"not uint8 \[0, 48, 64, 3\]"),
        ("a.gif", soft_frames(), 0, "fps=0"),
        ("a.gif", soft_frames(), math.nan, "fps=nan must be above 0, and 1,000 at most"),
        ("a.mp4", soft_frames(), math.inf, "fps=inf must be"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, frames, fps, complaint):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=complaint):
        save_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_frames_are_taken_at_another_rate(tmp_path):
    pytest.importorskip("av")
    levels = np.arange(0, 240, 20)
    frames = np.broadcast_to(levels[:, None, None, None], (12, 32, 32, 3)).astype(np.uint8)
    save_video(tmp_path / "video.mp4", frames, fps=24)

    def read(**settings):
        result = read_video(tmp_path / "video.mp4", **settings)
        return np.rint(result.mean((1, 2, 3)) / 20).astype(int).tolist()

    assert read() == list(range(12))
    assert read(frames=5) == [0, 1, 2, 3, 4]
    assert read(fps=12) == [0, 2, 4, 6, 8, 10]
    assert read(fps=16) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert read(fps=48, frames=5) == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="has 6 frames at 12 frames a second, not 7"):
        read(fps=12, frames=7)


def test_frames_are_scaled_to_cover_and_cropped_in_the_middle(tmp_path):
    """Of a frame twice as wide as high, a square shows the middle half."""
    pytest.importorskip("av")
    frames = np.zeros((2, 64, 128, 3), np.uint8)
    frames[:, :, :32], frames[:, :, 96:] = [255, 0, 0], [255, 0, 0]
    frames[:, :, 32:96] = [0, 0, 255]
    save_video(tmp_path / "video.mp4", frames)
    save_image(tmp_path / "image.png", frames[0])
    square = read_video(tmp_path / "video.mp4", height=32, width=32)
    assert square.shape == (2, 32, 32, 3)
    inner = np.s_[2:-2, 2:-2]
    assert np.abs(square[0][inner].astype(int) - [0, 0, 255]).max() <= 4
    image = read_image(tmp_path / "image.png", 32, 32)
    np.testing.assert_array_equal(image[inner], np.broadcast_to([0, 0, 255], (28, 28, 3)))
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", 64, 128), frames[0])


def test_a_picture_is_read_upright_and_in_three_colours(tmp_path):
    """EXIF's orientation 6: turn by a quarter to see it."""
    grey = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, 0).repeat(8, 1))  # 8 x 16
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(tmp_path / "photo.png", exif=exif)
    result = read_image(tmp_path / "photo.png", 16, 8)
    np.testing.assert_array_equal(result[:8], 0)
    np.testing.assert_array_equal(result[8:], 255)


@pytest.mark.parametrize("read", [read_video, lambda path: read_image(path, 8, 8)])
@pytest.mark.parametrize("content", [b"", b"no video at all" * 100], ids=["empty", "text"])
def test_unreadable_files_are_told(tmp_path, read, content):
    pytest.importorskip("av")
    path = tmp_path / "file.mp4"
    with pytest.raises(FileNotFoundError, match=r"file\.mp4: there is no such file"):
        read(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.mp4 cannot be read"):
        read(path)


def test_truncated_files_are_told(tmp_path):
    pytest.importorskip("av")
    save_video(tmp_path / "video.mp4", soft_frames())
    save_image(tmp_path / "image.png", soft_frames()[0])
    for name in ("video.mp4", "image.png"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"video\.mp4 cannot be read as a video"):
        read_video(tmp_path / "video.mp4")
    with pytest.raises(ValueError, match=r"image\.png cannot be read as a picture"):
        read_image(tmp_path / "image.png", 8, 8)


def test_a_file_of_sound_alone_is_told(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", 8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="no video in it"):
        read_video(tmp_path / "sound.wav")


@pytest.mark.parametrize(
    "settings, complaint",
    [(dict(height=8), "both or neither"), (dict(frames=0), "frames=0"), (dict(fps=-1), "fps=-1")],
)
def test_numbers_out_of_range_are_refused(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_video(tmp_path / "video.mp4", **settings)


def test_without_pyav_it_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'dmd_jax\[wan\]'"):
        save_video(tmp_path / "video.mp4", soft_frames())
    save_video(tmp_path / "video.gif", soft_frames())


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
@pytest.mark.parametrize("fps", [None, 25, 24, 16, 10, 7])
def test_the_headers_say_what_will_be_read(tmp_path, name, fps):
    pytest.importorskip("av")
    save_video(tmp_path / name, soft_frames(11), fps=25)
    frames = read_video(tmp_path / name, fps=fps)
    assert video.video_size(tmp_path / name, fps=fps) == frames.shape[:3]
