"""Latents on disk: what is written is read, a stopped write resumes, errors are reported."""

import json

import numpy as np
import pytest

from dmd_jax.data import latents
from dmd_jax.data.latents import Latents

SHAPE = (2, 3, 4, 5)


def videos(count):
    """Pairs of a video, whose pixels are its number, and a prompt."""
    return [(np.full((1, 2, 2, 3), i, np.uint8), 100 - i) for i in range(count)]


def encode(video):
    return np.full(SHAPE, video[0, 0, 0, 0] / 8, np.float32)


def write(path, count=7, encode=encode, shape=SHAPE, **settings):
    latents.write(path, videos(count), encode, shape, **(dict(shard=3, source="test") | settings))


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "new" / "folder")
    result = Latents(tmp_path / "new" / "folder")
    assert (len(result), result.shape, result.source) == (7, SHAPE, "test")
    np.testing.assert_array_equal(result.prompt, 100 - np.arange(7))
    assert result.prompt.dtype == np.int32
    rows = result.rows([6, 0, 3, 3])
    assert rows.dtype == np.float32 and rows.shape == (4, *SHAPE)
    np.testing.assert_array_equal(rows[:, 0, 0, 0, 0], np.array([6, 0, 3, 3]) / 8)
    assert result.rows([]).shape == (0, *SHAPE)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_latent_that_is_not_finite_is_refused_when_it_is_read(tmp_path, broken):
    write(tmp_path)
    stored = np.load(tmp_path / "00001.npy")
    stored[2, 1, 0, 3, 0] = broken
    np.save(tmp_path / "00001.npy", stored)
    found = Latents(tmp_path)
    found.rows([4, 6])
    with pytest.raises(ValueError, match=r"00001.npy is damaged: latent 2 in it has numbers"):
        found.rows([4, 5])


@pytest.mark.parametrize("bad", [-1, 7])
def test_rows_that_are_not_there_are_refused(tmp_path, bad):
    write(tmp_path)
    with pytest.raises(IndexError, match=f"no latent {bad} among 7"):
        Latents(tmp_path).rows([0, bad])


def test_a_folder_of_another_source_is_refused_by_what_differs(tmp_path):
    write(tmp_path, source={"seed": 1, "text": None})
    with pytest.raises(ValueError, match=r"source = \{'text': None\}, not \{'steps': 4\}\. Name"):
        write(tmp_path, source={"seed": 1, "steps": 4})


def test_float16_keeps_eleven_bits(tmp_path):
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    write(tmp_path, count=1, encode=lambda video: values)
    np.testing.assert_allclose(Latents(tmp_path).rows([0])[0], values, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("stop_at, again", [(0, 7), (2, 7), (3, 4), (5, 4), (6, 1)])
def test_a_stopped_run_goes_on_after_its_whole_shards(tmp_path, stop_at, again):
    encoded = []

    def stopping(video):
        if video[0, 0, 0, 0] == stop_at:
            raise KeyboardInterrupt
        return encode(video)

    def counting(video):
        encoded.append(video)
        return encode(video)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, encode=stopping)
    with pytest.raises(ValueError, match="stopped"):
        Latents(tmp_path)
    write(tmp_path, encode=counting)
    assert len(encoded) == again
    result = Latents(tmp_path)
    np.testing.assert_array_equal(result.rows(range(7))[:, 0, 0, 0, 0], np.arange(7) / 8)
    np.testing.assert_array_equal(result.prompt, 100 - np.arange(7))
    # And a third time there is nothing to do.
    write(tmp_path, encode=counting)
    assert len(encoded) == again and not list(tmp_path.glob("*.partial"))


def test_a_number_of_videos_that_fills_its_shards(tmp_path):
    write(tmp_path, count=6)
    assert len(Latents(tmp_path)) == 6


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (dict(source=["other", 1]), r"source = test, not \['other', 1\]"),
        (dict(shape=(2, 3, 4, 6)), r"shape = \[2, 3, 4, 5\], not \[2, 3, 4, 6\]"),
        (dict(shard=4), "shard = 3, not 4"),
    ],
)
def test_other_latents_are_not_mixed_in(tmp_path, settings, complaint):
    write(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        write(tmp_path, **settings)


def test_fewer_videos_than_before_are_refused(tmp_path):
    def stopping(video):
        if video[0, 0, 0, 0] == 6:
            raise KeyboardInterrupt
        return encode(video)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, encode=stopping)
    for count in (2, 3, 5):
        with pytest.raises(ValueError, match=f"{count} videos came"):
            write(tmp_path, count=count)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (dict(encode=lambda video: np.zeros((2, 3, 4))), r"encoded to \[2, 3, 4\], not"),
        (dict(encode=lambda video: np.full(SHAPE, np.nan)), "not finite"),
        (dict(encode=lambda video: np.full(SHAPE, 1e5)), "beyond float16"),
        (dict(count=0), "0 videos came"),
        (dict(shape=(3, 4, 5)), r"must be \[F, H, W, C\]"),
        (dict(shard=0), "shard=0"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        write(tmp_path, **settings)


def truncate(path):
    file = path / "00001.npy"
    file.write_bytes(file.read_bytes()[:-8])


def empty(path):
    (path / "00000.npy").write_bytes(b"")


def swap(path):
    (path / "00002.npy").replace(path / "00000.npy")


def damage(path):
    (path / latents.MANIFEST).write_text("{")


def edit(key, value):
    """Sets an entry of the manifest."""

    def harm(path):
        manifest = json.loads((path / latents.MANIFEST).read_text())
        (path / latents.MANIFEST).write_text(json.dumps(manifest | {key: value}))

    return harm


def foreign(path):
    (path / latents.MANIFEST).write_text(json.dumps({"format": "another"}))


@pytest.mark.parametrize(
    "harm, error, complaint",
    [
        (truncate, ValueError, "00001.npy is damaged"),
        (empty, ValueError, "00000.npy is damaged"),
        (swap, ValueError, "belongs to other latents"),
        (lambda path: (path / "00001.npy").unlink(), FileNotFoundError, "00001.npy is missing"),
        (
            lambda path: (path / "00001.prompts.npy").unlink(),
            FileNotFoundError,
            "00001.prompts.npy is missing",
        ),
        (damage, ValueError, "latents.json is damaged"),
        (foreign, ValueError, "not of the format"),
        (edit("count", "many"), ValueError, "latents.json is damaged .*count is 'many'"),
        (edit("shape", [3]), ValueError, r"latents.json is damaged .*shape=\[3\] must be"),
        (edit("shard", None), ValueError, "latents.json is damaged"),
        (
            lambda path: (path / latents.MANIFEST).unlink(),
            FileNotFoundError,
            "there are no latents. Make",
        ),
    ],
)
def test_what_is_missing_damaged_or_foreign_is_told(tmp_path, harm, error, complaint):
    write(tmp_path)
    harm(tmp_path)
    with pytest.raises(error, match=complaint):
        Latents(tmp_path)


def test_no_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no latents"):
        Latents(tmp_path / "nowhere")


def test_what_else_a_folder_holds_is_not_overwritten(tmp_path):
    np.save(tmp_path / "00000.npy", np.arange(3))
    with pytest.raises(ValueError, match="holds arrays that are no latents"):
        write(tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "00000.npy"), [0, 1, 2])
