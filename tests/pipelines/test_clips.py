"""A folder of videos and captions: what is in it, and what is refused before anything is read."""

import numpy as np
import pytest

from dmd_jax.pipelines.clips import captioned, require_clips
from dmd_jax.pipelines.video import save_video

pytest.importorskip("av")
pytestmark = pytest.mark.wan
SIZE = dict(frames=5, height=32, width=48, fps=16)


def video(path, count=5, height=32, width=48):
    save_video(path, np.zeros((count, height, width, 3), np.uint8))
    return path


def folder(root, captions):
    """GIFs with these captions, {name: text}; None for no caption."""
    for name, caption in captions.items():
        video(root / f"{name}.gif")
        if caption is not None:
            (root / f"{name}.txt").write_text(caption, encoding="utf-8")
    return root


def test_videos_and_captions_come_in_the_order_of_their_paths(tmp_path):
    folder(tmp_path, {"b": " a wave,\nbreaking \n", "a": "Möwen", "sub/c": "a cat"})
    video(tmp_path / ".hidden.gif")
    (tmp_path / "notes.md").write_text("no video")
    result = captioned(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path, _ in result] == [
        "a.gif",
        "b.gif",
        "sub/c.gif",
    ]
    assert [caption for _, caption in result] == ["Möwen", "a wave, breaking", "a cat"]


def test_a_folder_without_videos_or_captions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no video in .*nowhere"):
        captioned(tmp_path / "nowhere")
    folder(tmp_path, {"a": "a cat", "b": None, "c": " \n", "d": "x"})
    (tmp_path / "d.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ValueError) as refused:
        captioned(tmp_path)
    for name in "bcd":
        assert f"write its caption into {tmp_path}/{name}.txt" in str(refused.value)
    assert "a.txt" not in str(refused.value)


def test_all_files_that_make_no_clip_are_named(tmp_path):
    good = [video(tmp_path / "a.mp4"), video(tmp_path / "a.gif", count=9, height=64)]
    require_clips(good, **SIZE)
    short, small = video(tmp_path / "short.mp4", 4), video(tmp_path / "small.mp4", 5, 30)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(good[0].read_bytes()[:100])
    with pytest.raises(ValueError) as refused:
        require_clips([*good, short, small, damaged], **SIZE)
    for complaint in (
        "short.mp4 has 4 frames of 32x48 at 16 frames a second, less than 5 frames of 32x48",
        "small.mp4 has 5 frames of 30x48",
        "damaged.mp4 cannot be read as a video",
    ):
        assert complaint in str(refused.value)
    assert "a.mp4" not in str(refused.value)
    with pytest.raises(ValueError, match=r"a\.mp4 has 3 frames .* at 8 frames a second"):
        require_clips(good[:1], **SIZE | dict(fps=8))


def test_of_many_the_first_are_named(tmp_path):
    paths = [tmp_path / f"{i:02}.mp4" for i in range(13)]
    for path in paths:
        path.write_text("no video")
    with pytest.raises(ValueError, match=r"(?s)09\.mp4.*and 3 more$") as refused:
        require_clips(paths, **SIZE)
    assert "10.mp4" not in str(refused.value)
