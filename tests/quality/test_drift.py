"""Quality by frame: right for real videos, and each number falls where its fault begins."""

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dmd_jax.data import BouncingDigits
from dmd_jax.quality import drift

SOURCE = BouncingDigits()
ROWS = np.arange(60) % 20
REAL = SOURCE.real(ROWS, 30)


def numbers(videos):
    return {k: np.array(v, float) for k, v in drift.by_frame(videos, ROWS, SOURCE).items()}


@pytest.fixture(scope="module")
def real():
    return numbers(REAL)


def test_real_videos_are_recognised_and_do_not_drift(real):
    assert real.keys() == drift.MEASURES.keys() and {len(v) for v in real.values()} == {30}
    assert real["digit"].min() > 0.9
    np.testing.assert_allclose(real["brightness"], real["brightness"][0], rtol=1e-6)
    # A digit at a wall has no edge towards it.
    np.testing.assert_allclose(real["sharpness"], real["sharpness"][0], rtol=0.05)
    # Diagonal moves are longer, and a digit that comes back has not moved.
    assert 0.8 < np.nanmean(real["speed"]) < 1.2
    assert np.isnan(real["speed"][:4]).all() and not np.nansum(real["jumps"])
    assert np.isnan(real["turns"][[*range(4), *range(-4, 0)]]).all()


def faded(videos):
    return (videos * 0.5).astype(np.uint8)


def blurred(videos):
    return ((videos.astype(int) + np.roll(videos, 1, 2) + np.roll(videos, 1, 3)) // 3).astype(
        np.uint8
    )


def still(videos):
    return np.repeat(videos[:, :1], videos.shape[1], 1)


def others(videos):
    return np.roll(videos, 2, 0)  # those of the next digit


@pytest.mark.parametrize(
    "fault, name",
    [(faded, "brightness"), (blurred, "sharpness"), (still, "speed"), (others, "digit")],
)
def test_a_fault_shows_in_its_number_and_from_its_frame_on(real, fault, name):
    broken = numbers(np.concatenate([REAL[:, :15], fault(REAL[:, 15:])], 1))
    np.testing.assert_array_equal(broken[name][:15], real[name][:15])
    assert np.all(broken[name][19:26] < 0.9 * real[name][19:26])


def test_a_digit_that_leaves_out_a_place_jumps():
    video = np.zeros((1, 4, 36, 36, 1), np.uint8)
    for frame, column in enumerate((2, 14, 26, 2)):
        video[0, frame, 2:10, column : column + 8] = 255
    assert drift.by_frame(video, [0], SOURCE)["jumps"] == [None, 0, 0, 1]


def test_turns_are_counted_where_the_direction_changes():
    """A digit that goes right for eight frames and then down."""
    video = np.zeros((1, 17, 36, 36, 1), np.uint8)
    corners = [(2, 2 + 2 * i) for i in range(9)] + [(4 + 2 * i, 18) for i in range(8)]
    for frame, (row, column) in enumerate(corners):
        video[0, frame, row : row + 8, column : column + 8] = 255
    # Over four frames each: within a frame of the corner, the directions differ by 63 degrees.
    turns = drift.by_frame(video, [0], SOURCE)["turns"]
    assert turns == [None] * 4 + [0] * 3 + [1] * 3 + [0] * 3 + [None] * 4


def test_the_table_has_a_line_for_each_stretch_that_a_row_reaches():
    table = [
        {"name": "real", "by_frame": drift.by_frame(REAL, ROWS, SOURCE)},
        {"name": "teacher", "by_frame": drift.by_frame(REAL[:, :12], ROWS, SOURCE)},
    ]
    lines = drift.markdown(table, 12).splitlines()
    names = [line.split(" | ")[:2] for line in lines if line.startswith(("| real", "| teacher"))]
    assert names == [
        *(["| real", stretch] for stretch in ("1 to 12", "13 to 24", "25 to 30")),
        ["| teacher", "1 to 12"],
    ]
    json.dumps(table, allow_nan=False)


def test_figures_and_videos_are_written(tmp_path):
    table = [{"name": "real", "by_frame": drift.by_frame(REAL, ROWS, SOURCE)}]
    drift.figure(tmp_path / "a.png", table, 12, title="title")
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    drift.save_gif(tmp_path / "a.gif", {"real": REAL[:3], "short": REAL[3:6, :12]}, zoom=2)
    with Image.open(tmp_path / "a.gif") as gif:
        # Equal frames in a row are stored as one that lasts longer.
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert sum(shown) == 30 * 120 and gif.size == (2 * (3 * 38 - 2), 2 * (2 * 38 - 2))
    strips = drift.strips({"real": REAL[:3]}, 10)["real"]
    np.testing.assert_array_equal(strips[:, :, 36:72], REAL[:3, 10])
