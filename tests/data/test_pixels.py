import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.data import to_float, to_uint8

BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)


def test_bytes_map_onto_minus_one_to_one():
    floats = to_float(BYTES)
    assert floats.dtype == np.float32 and floats.shape == BYTES.shape
    assert floats.min() == -1 and floats.max() == 1
    np.testing.assert_allclose(floats, BYTES / 127.5 - 1, atol=1e-7)


def test_every_byte_survives_the_round_trip():
    np.testing.assert_array_equal(to_uint8(to_float(BYTES)), BYTES)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(to_float(BYTES))), BYTES)


def test_floats_are_rounded_to_the_nearest_byte_and_clipped():
    levels = np.array([-9.0, -0.4, 0.4, 0.6, 254.4, 254.6, 300.0])
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), [0, 0, 0, 1, 254, 255, 255])


def test_low_precision_is_computed_in_float32():
    # 0.5 is exact in bfloat16, (0.5 + 1) * 127.5 = 191.25 is not.
    assert to_uint8(jnp.asarray(0.5, jnp.bfloat16)) == 191


def test_floats_are_not_converted_twice():
    with pytest.raises(ValueError, match=r"uint8 pixels .* not float32"):
        to_float(to_float(BYTES))
