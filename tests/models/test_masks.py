"""The masks of attention: their words, their pictures, their formulas; what they refuse."""

import re

import jax
import numpy as np
import pytest
from masks_in_words import plain

from dmd_jax.models.attention import BlockCausal, Causal, TeacherForcing

MASKS = [
    BlockCausal(Causal(1), 1),
    BlockCausal(Causal(1), 4),
    BlockCausal(Causal(2), 3),
    BlockCausal(Causal(2, first_alone=True), 3),
    BlockCausal(Causal(3, window=3), 2),
    BlockCausal(Causal(3, window=4, sink=1), 2),
    BlockCausal(Causal(2, first_alone=True, window=3, sink=2), 3),
    BlockCausal(Causal(1, window=1, sink=1), 1),
    BlockCausal(Causal(100), 2),
]


@pytest.mark.parametrize("length", [1, 24, 29])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_causal_mask_is_what_its_words_say(mask, length):
    index = np.arange(length)
    wanted = plain(mask, length)
    np.testing.assert_array_equal(mask.allows(index[:, None], index), wanted)
    traced = jax.jit(lambda index: mask.allows(index[:, None], index))(index)
    np.testing.assert_array_equal(traced, wanted)


@pytest.mark.parametrize("half", [12, 17])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_teacher_forcing_is_what_its_words_say(mask, half):
    mask = TeacherForcing(mask, half)
    index = np.arange(2 * half)
    wanted = plain(mask, 2 * half)
    assert wanted.any(axis=1).all()
    np.testing.assert_array_equal(mask.allows(index[:, None], index), wanted)
    traced = jax.jit(lambda index: mask.allows(index[:, None], index))(index)
    np.testing.assert_array_equal(traced, wanted)


def pictures(cls):
    """The pictures in a docstring, from left to right: bool [queries, keys] each."""
    lines = [line for line in cls.__doc__.splitlines() if re.fullmatch(r"[ #.|]*[#.]", line)]
    rows = [re.split(r" {4,}", line.replace(" | ", " ").strip()) for line in lines]
    return [
        np.array([[c == "#" for c in row.split()] for row in column])
        for column in zip(*rows, strict=True)
    ]


WITH_WINDOW = Causal(2, window=3, sink=1)


@pytest.mark.parametrize(
    ("cls", "masks"),
    [
        (Causal, [BlockCausal(c) for c in (Causal(2), Causal(2, first_alone=True), WITH_WINDOW)]),
        (TeacherForcing, [TeacherForcing(BlockCausal(c), 6) for c in (Causal(2), WITH_WINDOW)]),
    ],
)
def test_the_pictures_show_the_masks(cls, masks):
    for picture, mask in zip(pictures(cls), masks, strict=True):
        index = np.arange(len(picture))
        np.testing.assert_array_equal(mask.allows(index[:, None], index), picture)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockCausal(Causal(), 0), "tokens_per_frame=0 must be at least 1"),
        (lambda: Causal(frames_per_block=0), "frames_per_block=0 must be at least 1"),
        (lambda: Causal(sink=-1), "sink=-1 at least 0"),
        (lambda: Causal(frames_per_block=3, window=2), "window=2 is smaller"),
    ],
)
def test_a_mask_of_impossible_sizes_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
