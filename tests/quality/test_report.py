"""The table, the grid and the figure, read back."""

import itertools

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dmd_jax.quality import report

NUMBERS = dict(
    fd=0.8251,
    kid=-0.05,
    precision=0.85,
    recall=0.0,
    accuracy=0.987,
    diversity=1.0,
    nearest_train=44,
)
ROWS = [
    dict(name="real images", steps=0, calls=0, **(NUMBERS | {"fd": 0.229})),
    dict(name="teacher", steps=50, calls=100, **NUMBERS),
    dict(name="teacher", steps=4, calls=8, **(NUMBERS | {"fd": 128.0})),
    dict(name="student", steps=1, calls=1, **NUMBERS),
]


def read(path):
    return np.asarray(Image.open(path))


def test_markdown_has_a_line_for_each_row_and_names_the_metric():
    lines = report.markdown(ROWS, "FD-TEST8").splitlines()
    assert "| FD-TEST8 ↓ |" in lines[0]
    assert lines[3] == (
        "| teacher | 50 | 100 | 0.825 | -0.05 | 0.850 | 0.000 | 98.7% | 1.00 | 44.0 |"
    )
    assert len({line.count("|") for line in lines[: 2 + len(ROWS)]}) == 1


def test_markdown_shows_a_missing_number_as_a_dash_and_zero_as_zero():
    row = {key: value for key, value in ROWS[0].items() if key != "accuracy"}
    line = report.markdown([row], "FD").splitlines()[2]
    assert line == "| real images | – | – | 0.229 | -0.05 | 0.850 | 0.000 | – | 1.00 | 44.0 |"


def test_legend_names_the_reference_and_tells_inception_from_other_networks():
    texts = (report.markdown(ROWS, name, "1,000 images") for name in ("FD-TEST8", "FID"))
    own, fid = (" ".join(text.split()) for text in texts)
    assert "FD-TEST8: Fréchet distance to 1,000 images, in the features of a network for" in own
    assert "not comparable" in own and "not comparable" not in fid


def test_a_page_ends_with_what_the_run_cost():
    page = report.page("A title", "the table\n", {"forward passes": "1.2 million"})
    assert page == (
        "# A title\n\n![samples](report.png)\n\nthe table\n\n- forward passes: 1.2 million\n"
    )


def test_grid_places_images_in_reading_order_on_a_light_ground():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 3, 1), np.uint8)
    whole = report.grid(images, 3)
    assert whole.shape == (4 + 2 + 4, 3 * 3 + 2 * 2, 1)
    assert whole[::6, ::5, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert (whole[4:6] == 255).all()


def test_saved_grid_is_enlarged_by_a_whole_factor_and_read_back_exactly(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), np.uint8)
    report.save_grid(tmp_path / "grid.png", images, 2)
    picture = read(tmp_path / "grid.png")
    assert picture.shape == (2 * 56 + 2, 2 * 56 + 2, 3)
    np.testing.assert_array_equal(picture[:56:2, 58::2], images[1])


def place(picture, colour):
    """(centre row, centre column, height, width) of all pixels of a colour."""
    where = np.argwhere((picture[..., :3] == colour).all(-1))
    return *where.mean(0), *(np.ptp(where, 0) + 1)


def test_figure_sorts_columns_by_label_and_keeps_the_order_of_rows(tmp_path):
    labels = np.array([2, 0, 1])
    # Colours that no antialiased letter has: the label in one channel, the row in another.
    tiles = np.zeros((3, 28, 28, 3), np.uint8)
    tiles[..., 0] = 60 + 20 * labels[:, None, None]
    images = {"real, test images": tiles, "student": tiles + np.uint8([0, 0, 77])}
    report.figure(tmp_path / "f.png", ROWS, images, labels, metric="FD-TEST8", title="A title")
    picture = read(tmp_path / "f.png")
    upper = [place(picture, (60 + 20 * label, 0, 0)) for label in range(3)]
    lower = [place(picture, (60 + 20 * label, 0, 77)) for label in range(3)]
    columns = [column for _, column, _, _ in upper]
    assert columns == sorted(columns) == [column for _, column, _, _ in lower]
    assert all(above[0] < below[0] for above, below in zip(upper, lower, strict=True))
    assert all(height > 28 and abs(height - width) <= 1 for _, _, height, width in upper)


def test_figure_of_two_columns_a_label_draws_the_first_of_each(tmp_path):
    labels = np.repeat(np.arange(10), 2)
    tiles = np.zeros((20, 8, 8, 3), np.uint8)
    tiles[::2, ..., 0], tiles[1::2, ..., 1] = 200, 200
    report.figure(tmp_path / "f.png", ROWS, {"real": tiles}, labels, metric="FD", title="")
    picture = read(tmp_path / "f.png")[..., :3]
    assert (picture == (200, 0, 0)).all(-1).any()
    assert not (picture == (0, 200, 0)).all(-1).any()


def test_figure_takes_grey_images_and_a_single_model(tmp_path):
    images = {"real": np.zeros((2, 8, 8, 1), np.uint8)}
    report.figure(tmp_path / "f.png", ROWS[-1:], images, np.arange(2), metric="FD", title="")
    assert place(read(tmp_path / "f.png"), (0, 0, 0))[2] > 28


def quality(rows, width):
    """(drawing, axes) of the quality of rows, in axes of that width."""
    drawing = Figure()
    axes = drawing.add_axes((0.1, 0.1, width, 0.8))
    report._draw_quality(axes, rows, "FD")
    drawing.draw_without_rendering()
    return drawing, axes


def test_the_name_of_a_model_with_the_most_calls_alone_stays_in_the_figure():
    drawing, axes = quality([ROWS[1], ROWS[3]], 0.89)
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert names.keys() == {"teacher", "student"}
    assert all(0 < box.x0 < box.x1 < drawing.bbox.x1 for box in names.values())


def test_the_last_value_of_a_model_is_beside_its_line_and_in_the_figure():
    drawing, axes = quality(ROWS[1:], 0.8)
    line = next(line for line in axes.lines if len(line.get_xdata()) == 2)
    ends = line.get_transform().transform(line.get_xydata())
    (box,) = (t.get_window_extent() for t in axes.texts if t.get_text() == "0.825")
    assert not any(box.contains(*point) for point in np.linspace(*ends, 1000))
    assert box.x1 < drawing.bbox.x1


def test_gallery_shows_every_sampler_in_a_column_of_its_own(tmp_path):
    dark, bright = (np.full((4, 8, 24, 1), grey, np.uint8) for grey in (60, 200))
    images = {"teacher, 50 steps": dark, "student, 1 step": bright}
    report.gallery(tmp_path / "a.png", images, 1, title="Samples of two networks, side by side")
    levels = read(tmp_path / "a.png")[..., 0]
    assert levels.shape[1] == 5 * 160
    left, right = np.array_split(levels, 2, axis=1)
    # Letters have greys of their own.
    assert np.mean(left == 60) > 0.1 > 0.01 > np.mean(left == 200)
    assert np.mean(right == 200) > 0.1 > 0.01 > np.mean(right == 60)


def test_a_gallery_of_two_classes_is_no_tower(tmp_path):
    images = {"student, 1 step": np.zeros((16, 8, 8, 3), np.uint8)}
    report.gallery(tmp_path / "a.png", images, 2, title="Samples of two classes")
    height, width, _ = read(tmp_path / "a.png").shape
    assert height < 2 * width


def test_titles_of_many_samplers_do_not_overlap(tmp_path, monkeypatch):
    drawn = []

    class Kept(Figure):
        def __init__(self, **how):
            super().__init__(**how)
            drawn.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    names = [f"teacher, {n} steps" for n in (50, 16, 8, 4)]
    names += [f"student, {n} steps" for n in (4, 2, 1)]
    images = {name: np.zeros((4, 8, 8, 1), np.uint8) for name in names}
    report.gallery(tmp_path / "a.png", images, 2, title="Samples of seven samplers")
    boxes = [axes.title.get_window_extent() for axes in drawn[0].axes]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
