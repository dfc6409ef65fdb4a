"""Quality by frame: right for real videos, and each number falls where its fault begins."""

import json

import numpy as np
import pytest
from PIL import Image

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
    assert np.isnan(real["speed"][:2]).all() and np.isnan(real["turns"][[0, 1, -2, -1]]).all()


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
    assert np.all(broken[name][17:28] < 0.8 * real[name][17:28])


def test_turns_are_counted_where_the_direction_changes():
    """A digit that goes right for four steps and then down."""
    video = np.zeros((1, 9, 40, 40, 1), np.uint8)
    corners = [(2, 2 + 4 * i) for i in range(5)] + [(6 + 4 * i, 18) for i in range(4)]
    for frame, (row, column) in enumerate(corners):
        video[0, frame, row : row + 8, column : column + 8] = 255
    # Over two frames each: the directions before and after frame 3 differ by 45 degrees.
    turns = drift.by_frame(video, [0], SOURCE)["turns"]
    assert turns == [None, None, 0, 0, 1, 0, 0, None, None]


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
        assert gif.n_frames == 30 and gif.size == (2 * (3 * 42 - 2), 2 * (2 * 42 - 2))
    strips = drift.strips({"real": REAL[:3]}, 10)["real"]
    np.testing.assert_array_equal(strips[:, :, 40:80], REAL[:3, 10])
