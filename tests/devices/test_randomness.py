"""Noise belongs to the sample's place in the global batch, not to how the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.devices import randomness

KEY = jax.random.key(0)


def test_noise_does_not_depend_on_how_the_batch_is_split():
    whole = randomness.normal(KEY, jnp.arange(6), (3, 2))
    for part in ([0, 1, 2], [5, 3], [4]):
        np.testing.assert_array_equal(
            randomness.normal(KEY, jnp.array(part), (3, 2)), whole[jnp.array(part)]
        )


def test_noise_is_standard_normal_and_differs_between_samples_and_keys():
    x = randomness.normal(KEY, jnp.arange(200), (100,))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x.mean(), 0.0, atol=4 / np.sqrt(x.size))
    np.testing.assert_allclose(x.std(), 1.0, atol=4 / np.sqrt(2 * x.size))
    correlation = np.corrcoef(x)[np.triu_indices(200, 1)]
    assert np.abs(correlation).max() < 0.5
    other = randomness.normal(jax.random.key(1), jnp.arange(200), (100,))
    assert abs(np.corrcoef(np.ravel(x), np.ravel(other))[0, 1]) < 4 / np.sqrt(x.size)


def test_per_sample_draws_from_the_key_of_each_index():
    index = jnp.array([4, 9])
    drawn = randomness.per_sample(lambda k: jax.random.uniform(k, (2,)), KEY, index)
    for row, i in zip(drawn, index, strict=True):
        np.testing.assert_array_equal(row, jax.random.uniform(jax.random.fold_in(KEY, i), (2,)))
