import itertools

import numpy as np
import pytest

from dmd_jax import data


class Counting:
    """A source whose example i has the condition i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def examples(self, rows):
        return {"cond": np.array(rows, np.int32)}


def order(batches, steps):
    return np.concatenate([batches[step]["cond"] for step in steps])


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], expected[key])


def test_a_batch_holds_floats_in_minus_one_to_one_and_their_labels(data_dir):
    train = data.load("mnist5k", "train", data_dir)
    batch = data.Batches(train, 64, seed=0)[3]
    assert batch["data"].shape == (64, 28, 28, 1) and batch["data"].dtype == np.float32
    assert batch["data"].min() == -1 and batch["data"].max() == 1
    assert batch["cond"].shape == (64,) and batch["cond"].dtype == np.int32
    np.testing.assert_array_equal(batch["uncond"], np.full(64, 10))
    conditions = data.Batches(train, 64, seed=0, with_data=False)[3]
    assert_same(conditions, {key: batch[key] for key in ("cond", "uncond")})
    # Each image is found again in the split, under the same label.
    images, labels = data.arrays(train)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found = [known[image.tobytes()] for image in data.to_uint8(batch["data"])]
    assert found == batch["cond"].tolist()


@pytest.mark.parametrize("batch_size", [4, 5, 25])
def test_every_epoch_holds_every_example_once(batch_size):
    """Also where the batch does not divide the epoch, and where it is longer than one."""
    labels = order(data.Batches(Counting(10), batch_size, seed=0), range(100 // batch_size))
    for epoch in labels.reshape(10, 10):
        assert sorted(epoch) == list(range(10))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = order(data.Batches(Counting(100), 100, seed=0), range(2)).reshape(2, 100)
    (other,) = order(data.Batches(Counting(100), 100, seed=1), range(1)).reshape(1, 100)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(100))}) == 4


def test_the_order_is_the_one_that_earlier_versions_had():
    """Should this fail after an update of Grain, resumed runs no longer equal straight ones."""
    labels = order(data.Batches(Counting(4000), 4, seed=0), [0, 999, 1000, 10**6])
    assert labels[:8].tolist() == [1203, 3272, 1398, 141, 3831, 3871, 2101, 3064]
    assert labels[8:].tolist() == [473, 2331, 3975, 925, 204, 1124, 173, 3612]


def test_sample_j_of_step_s_does_not_depend_on_how_often_one_asks():
    batches = data.Batches(Counting(1000), 8, seed=0)
    late = batches[77]
    order(batches, range(5))
    assert_same(batches[77], late)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_hosts_together_hold_the_global_batch(data_dir, hosts):
    train = data.load("mnist5k", "train", data_dir)
    whole = data.Batches(train, 64, seed=5)
    shares = [
        data.Batches(train, 64, seed=5, process_index=index, process_count=hosts)
        for index in range(hosts)
    ]
    for step in (0, 61, 62, 63, 10**6):  # the first epoch ends within step 62
        parts = [share[step] for share in shares]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert_same(joined, whole[step])


@pytest.mark.parametrize("start", [0, 62, 12345])
def test_a_resumed_iterator_goes_on_where_a_straight_one_would_be(data_dir, start):
    batches = data.Batches(data.load("mnist5k", "test", data_dir), 16, seed=0)
    for step, batch in enumerate(itertools.islice(batches.iterate(start), 10), start):
        assert_same(batch, batches[step])


def test_a_batch_that_the_hosts_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"batch_size 6 must be a positive multiple .* 4"):
        data.Batches(Counting(10), 6, seed=0, process_count=4)


def test_a_host_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"process_index 2 is not in \[0, 2\)"):
        data.Batches(Counting(10), 4, seed=0, process_index=2, process_count=2)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        data.Batches(Counting(10), 4, seed=-1)


def test_a_step_before_the_first_is_refused():
    batches = data.Batches(Counting(10), 4, seed=0)
    with pytest.raises(IndexError, match="steps count from 0, got -1"):
        batches[-1]
    with pytest.raises(IndexError, match="steps count from 0, got -1"):
        next(batches.iterate(-1))
