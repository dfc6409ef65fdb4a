"""Embedded prompts: what is read is what was written, interruptions, and sets that do not fit."""

import json
import zlib

import numpy as np
import pytest
from ml_dtypes import bfloat16

from dmd_jax.data import embeddings
from dmd_jax.data.embeddings import Embeddings, write

PROMPTS = [f"{'word ' * (i % 5)}prompt {i}" for i in range(11)]
NEGATIVE = "blurred"
LENGTH, DIM = 6, 3


def embedding(prompt):
    """Normal values that are a function of the prompt: float32 [words, DIM]."""
    words = len(prompt.split())
    return np.random.default_rng(zlib.crc32(prompt.encode())).normal(size=(words, DIM)).astype("f")


def encode(prompts):
    return [embedding(prompt) for prompt in prompts]


def padded(prompt):
    """What is to be read: bfloat16 [LENGTH, DIM]."""
    row = np.zeros((LENGTH, DIM), bfloat16)
    row[: len(embedding(prompt))] = embedding(prompt)
    return row


def make(path, encode_fn=encode, prompts=PROMPTS, negative=NEGATIVE, **changes):
    write(path, prompts, negative, encode_fn, **dict(length=LENGTH, dim=DIM, shard=4) | changes)


class Encoder:
    """`encode` that remembers what it was asked, and is killed at call number `until`."""

    def __init__(self, until=None):
        self.calls, self.until = [], until

    def __call__(self, prompts):
        if len(self.calls) == self.until:
            raise KeyboardInterrupt
        self.calls.append(prompts)
        return encode(prompts)


@pytest.fixture
def whole(tmp_path):
    """The folder of a complete set."""
    make(tmp_path / "set")
    return tmp_path / "set"


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("shard", [1, 4, 5, 6, 12, 64])
def test_rows_are_what_was_written(tmp_path, shard):
    make(tmp_path, shard=shard)
    found = Embeddings(tmp_path)
    assert len(found) == 11 and found.prompts == PROMPTS and found.shape == (LENGTH, DIM)
    for index in ([0], range(11), [10, 3, 3, 0]):
        rows = found.rows(index)
        assert rows.dtype == bfloat16
        np.testing.assert_array_equal(rows, [padded(PROMPTS[i]) for i in index])
    assert found.rows([]).shape == (0, LENGTH, DIM)
    np.testing.assert_array_equal(found.negative, padded(NEGATIVE))


def test_the_tail_is_zero_and_takes_no_room(whole):
    rows = Embeddings(whole).rows(range(11))
    words = np.array([len(prompt.split()) for prompt in PROMPTS])
    tail = np.arange(LENGTH) >= words[:, None]
    assert not rows[tail].astype("f").any() and rows[~tail].astype("f").any(axis=1).all()
    stored = sum(np.load(file).shape[0] for file in whole.glob("?????.npy"))
    assert stored == words.sum() + 1


def test_rows_are_copies_of_memory_maps(whole):
    found = Embeddings(whole)
    assert all(isinstance(tokens, np.memmap) for tokens, _ in found._shards)
    found.rows([0])[:] = 0
    np.testing.assert_array_equal(found.rows([0])[0], padded(PROMPTS[0]))


@pytest.mark.parametrize("until", [0, 1, 2])
def test_a_killed_call_goes_on_at_the_first_missing_shard(tmp_path, whole, until):
    path = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        make(path, Encoder(until))
    with pytest.raises(FileNotFoundError, match=f"not complete: 0000{until}.npy is missing"):
        Embeddings(path)
    again = Encoder()
    make(path, again)
    texts = [*PROMPTS, NEGATIVE]
    assert again.calls == [texts[i : i + 4] for i in range(4 * until, 12, 4)]
    assert files(path) == files(whole)


def test_a_file_that_was_being_written_does_not_count(tmp_path, whole, monkeypatch):
    path, save, saved = tmp_path / "killed", np.save, []

    def killed(file, array):
        saved.append(file)
        if len(saved) == 4:  # the tokens of the second shard
            file.write(b"half")
            raise KeyboardInterrupt
        save(file, array)

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        make(path)
    monkeypatch.undo()
    assert (path / "00001.npy.partial").exists()
    again = Encoder()
    make(path, again)
    assert len(again.calls) == 2 and files(path) == files(whole)


def test_a_complete_set_is_not_made_again(whole):
    before, again = files(whole), Encoder()
    make(whole, again)
    assert not again.calls and files(whole) == before


@pytest.mark.parametrize("name", ["00001.npy", "00001.lengths.npy"])
def test_a_damaged_shard_is_refused_and_made_again(whole, name):
    before, again = files(whole), Encoder()
    with (whole / name).open("r+b") as file:
        file.truncate(len(before[name]) - 5)
    with pytest.raises(ValueError, match=r"00001.npy .*damaged.*python -m dmd_jax\.embed"):
        Embeddings(whole)
    make(whole, again)
    assert len(again.calls) == 1 and files(whole) == before


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda lengths: lengths.astype(np.float32), r"float32 \(4,\), expected int32 \(4,\)"),
        (lambda lengths: lengths - 9, "prompts of -[0-9]* to"),
        (lambda lengths: lengths + LENGTH, "1 to 6 can be"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_training_reads_a_row(whole, change, complaint):
    path = whole / "00001.lengths.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(ValueError, match=rf"00001\.lengths\.npy is damaged: .*{complaint}"):
        Embeddings(whole)


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
def test_an_embedding_that_is_not_finite_is_refused_when_it_is_read(whole, broken):
    stored = np.load(whole / "00001.npy")
    stored[-1, 1] = np.array(broken, bfloat16).view(np.uint16)
    np.save(whole / "00001.npy", stored)
    found = Embeddings(whole)
    found.rows([0, 6])
    with pytest.raises(ValueError, match=r"00001.npy is damaged: prompt 3 in it has numbers"):
        found.rows([0, 7])


def test_a_shard_of_another_set_is_refused(whole, tmp_path):
    make(
        tmp_path / "other", dim=DIM + 1, encode_fn=lambda prompts: [np.ones((2, 4))] * len(prompts)
    )
    (tmp_path / "other" / "00000.npy").replace(whole / "00000.npy")
    with pytest.raises(ValueError, match=r"00000\.npy is damaged: uint16"):
        Embeddings(whole)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(prompts=[*PROMPTS[:-1], "another"]), "other prompts"),
        (dict(prompts=PROMPTS[:-1]), r"other prompts \(11, not 10"),
        (dict(negative="dull"), "negative 'blurred', not 'dull'"),
        (dict(source="another encoder"), "source '', not 'another encoder'"),
        (dict(length=7), "length 6, not 7"),
    ],
)
def test_another_set_is_not_continued(whole, change, complaint):
    before = files(whole)
    with pytest.raises(ValueError, match=complaint):
        make(whole, **change)
    assert files(whole) == before


def test_missing_and_foreign_folders_are_refused(tmp_path, whole):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no embeddings at .*python -m dmd_jax\.embed"):
            Embeddings(path)
    good = json.loads((whole / embeddings.META).read_text())
    wrong = (good | change for change in (dict(shard=0), dict(prompts=[1]), dict(dim="3")))
    for meta in ("{", "[]", "{}", json.dumps({"format": 0}), *map(json.dumps, wrong)):
        (whole / embeddings.META).write_text(meta)
        with pytest.raises(ValueError, match="not of embeddings of this version"):
            Embeddings(whole)
        with pytest.raises(ValueError, match="not of embeddings of this version"):
            make(whole)


@pytest.mark.parametrize(
    "tokens, complaint",
    [
        (np.ones((2, 4)), r"is \(2, 4\), which is not \[1 to 6, 3\]"),
        (np.ones((7, 3)), r"is \(7, 3\)"),
        (np.ones((0, 3)), r"is \(0, 3\)"),
        (np.full((2, 3), np.nan), "not finite"),
    ],
)
def test_wrong_embeddings_are_refused(tmp_path, tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(tmp_path, lambda prompts: [tokens] * len(prompts))


def test_there_must_be_prompts(tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        make(tmp_path, prompts=[])


@pytest.mark.parametrize("index", [[11], [-1], [0, 99]])
def test_an_index_out_of_range_is_refused(whole, index):
    with pytest.raises(IndexError, match=r"no prompt (11|-1|99) in 11"):
        Embeddings(whole).rows(index)


def test_what_else_a_folder_holds_is_not_overwritten(tmp_path):
    np.save(tmp_path / "00000.npy", np.arange(3))
    with pytest.raises(ValueError, match="holds arrays that are no embeddings"):
        make(tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "00000.npy"), [0, 1, 2])
