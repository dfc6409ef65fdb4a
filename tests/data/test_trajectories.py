"""Trajectories on disk: what is written is read as a batch, and foreign folders are refused."""

import jax
import numpy as np
import pytest

from dmd_jax.data import (
    Batches,
    ImagePairs,
    OdePairs,
    Prompts,
    embeddings,
    latents,
    trajectories,
)

SHAPE, LEVELS = (2, 4, 4, 3), (1.0, 0.9375, 0.625)


def solve(number):
    """The points of trajectory n are n + .0, .1, ..."""
    points = number + np.arange(5) / 8
    return np.broadcast_to(points[:, None, None, None, None], (5, *SHAPE))


def write(path, count=18, solve=solve, levels=LEVELS, **source):
    videos = ((i, i % 2) for i in range(count))
    trajectories.write(path, videos, solve, SHAPE, levels=levels, source=source)
    return path


@pytest.fixture
def texts(tmp_path):
    rows = {prompt: np.full((2, 8), i) for i, prompt in enumerate(["a", "b", ""])}
    path = tmp_path / "texts"
    embeddings.write(path, ["a", "b"], "", lambda asked: [rows[p] for p in asked], 4, 8)
    return str(path)


def test_a_batch_has_the_points_by_their_times_and_the_real_video(texts, tmp_path):
    source = OdePairs(texts, SHAPE, str(write(tmp_path / "pairs")))
    source.open()
    assert len(source) == 18
    result = source.examples([17, 4])
    assert set(result["trajectory"]) == {*LEVELS, 0.0}
    for i, time in enumerate((*LEVELS, 0.0)):
        points = result["trajectory"][time]
        assert points.shape == (2, *SHAPE) and points.dtype == np.float32
        np.testing.assert_array_equal(points[:, 0, 0, 0, 0], np.array([17, 4]) + i / 8)
    np.testing.assert_array_equal(result["data"][:, 0, 0, 0, 0], [17.5, 4.5])
    np.testing.assert_array_equal(result["cond"][:, 0, 0], [1, 0])
    batch = next(Batches(source, 6, seed=0).iterate(3))
    assert jax.tree.map(np.shape, batch["trajectory"]) == {t: (6, *SHAPE) for t in (*LEVELS, 0.0)}


def test_a_stopped_run_goes_on(texts, tmp_path):
    solved = []

    def stopping(number):
        if number == 17:
            raise KeyboardInterrupt
        return solve(number)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "pairs", solve=stopping)
    with pytest.raises(ValueError, match=r"`python -m dmd_jax.ode_pairs` was stopped"):
        OdePairs(texts, SHAPE, str(tmp_path / "pairs")).open()
    write(tmp_path / "pairs", solve=lambda n: solved.append(n) or solve(n))
    assert solved == [16, 17]


def test_other_trajectories_are_not_mixed_in(tmp_path):
    write(tmp_path / "pairs", teacher="one")
    for change in (dict(teacher="two"), dict(levels=(1.0, 0.9, 0.625), teacher="one")):
        with pytest.raises(ValueError, match="has latents with source = "):
            write(tmp_path / "pairs", **change)


def test_what_is_foreign_or_truncated_is_told(texts, tmp_path):
    plain = tmp_path / "latents"
    latents.write(plain, [(0, 0)], lambda n: np.zeros(SHAPE), SHAPE)
    with pytest.raises(ValueError, match="and no trajectories: make these from it with"):
        OdePairs(texts, SHAPE, str(plain)).open()
    pairs = write(tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"holds latents \(5, 2, 4, 4, 3\), but sample_shape"):
        Prompts(texts, SHAPE, str(pairs)).open()
    with pytest.raises(ValueError, match=r"holds latents \(2, 4, 4, 3\), but sample_shape"):
        OdePairs(texts, (3, 4, 4, 3), str(pairs)).open()
    with pytest.raises(FileNotFoundError, match=r"python -m dmd_jax.ode_pairs --out="):
        OdePairs(texts, SHAPE, str(tmp_path / "nowhere")).open()
    manifest = pairs / latents.MANIFEST
    before = manifest.read_text()
    manifest.write_text(before.replace('"levels"', '"level"'))
    with pytest.raises(ValueError, match=r"holds 3 points of each .* and their times are None"):
        OdePairs(texts, SHAPE, str(pairs)).open()
    manifest.write_text(before)
    shard = pairs / "00001.npy"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"00001.npy is damaged"):
        OdePairs(texts, SHAPE, str(pairs)).open()


DIGIT = (28, 28, 1)


def write_images(path, count=12, shape=DIGIT, labels=10, levels=(1.0, 0.5)):
    """Point i of trajectory n is n + i / 8; the labels take turns."""

    def solve(number):
        points = number + np.arange(len(levels) + 1) / 8
        return np.broadcast_to(points[:, None, None, None], (len(points), *shape))

    numbered = ((i, i % labels) for i in range(count))
    trajectories.write(path, numbered, solve, shape, levels=levels, source={})
    return str(path)


def test_a_batch_of_images_has_the_points_by_their_times_and_labels(tmp_path, data_dir):
    source = ImagePairs(write_images(tmp_path / "pairs"), data_dir=data_dir)
    source.open()
    assert len(source) == 12 and source.sample_shape == DIGIT and len(source.images) == 4000
    batch = source.examples([11, 4])
    assert set(batch) == {"trajectory", "cond", "uncond"}
    assert set(batch["trajectory"]) == {1.0, 0.5, 0.0}
    for i, time in enumerate((1.0, 0.5, 0.0)):
        points = batch["trajectory"][time]
        assert points.shape == (2, *DIGIT) and points.dtype == np.float32
        np.testing.assert_array_equal(points[:, 3, 4, 0], np.array([11, 4]) + i / 8)
    np.testing.assert_array_equal(batch["cond"], [1, 4])
    np.testing.assert_array_equal(batch["uncond"], [10, 10])
    first = Batches(source, 6, seed=0)[0]
    assert first["cond"].dtype == np.int32 and first["trajectory"][0.0].shape == (6, *DIGIT)


def test_pairs_of_other_images_are_refused(tmp_path, data_dir):
    def opened(name, **changes):
        ImagePairs(write_images(tmp_path / name, **changes), data_dir=data_dir).open()

    with pytest.raises(
        ValueError, match=r"trajectories of \(8, 8, 1\), but the images of 'mnist5k'"
    ):
        opened("small", shape=(8, 8, 1))
    with pytest.raises(ValueError, match="has the label 10, but 'mnist5k' has 10 classes"):
        opened("more", labels=11)
    made = r"there are no trajectories. Make them with `python -m dmd_jax.ode_pairs --out="
    with pytest.raises(FileNotFoundError, match=made):
        ImagePairs(str(tmp_path / "nowhere"), data_dir=data_dir).open()
