"""Captions of toy videos as one vector a word."""

import numpy as np
import pytest

from dmd_jax.data import word_vectors
from dmd_jax.data.word_vectors import DIM, WordVectors, embed, padded


def test_embeddings_are_a_vector_a_word():
    one, two, none = embed(["three moves left", "three moves up and left", ""])
    np.testing.assert_array_equal(one[:2], two[:2])
    np.testing.assert_array_equal(one[2], two[4])
    assert one.shape == (3, DIM) and two.shape == (5, DIM)
    assert none.shape == (1, DIM) and not none.any()


def test_padding_is_zero_and_a_longer_prompt_is_refused():
    out = padded(["one moves"], 3)
    np.testing.assert_array_equal(out[0, :2], embed(["one moves"])[0])
    assert not out[0, 2].any()
    with pytest.raises(ValueError, match="'one moves up and left' has more than 3 words"):
        padded(["one moves up and left"], 3)


def test_prompts_in_memory_read_as_those_on_disk():
    texts = WordVectors(["one moves", "two"], 2)
    assert len(texts) == 2 and texts.shape == (2, word_vectors.DIM)
    np.testing.assert_array_equal(texts.rows([1, 0]), padded(["two", "one moves"], 2))
    assert not texts.negative.any()
