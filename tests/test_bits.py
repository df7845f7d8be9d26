"""Codes without gaps, against whole numbers of Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax.bits import pack_bits, unpack_bits


@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 61])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_one_after_another(bits, count, library, rng):
    numbers = rng.integers(0, 2**bits, count, np.uint8)
    whole = sum(int(number) << (bits * i) for i, number in enumerate(numbers))
    expected = whole.to_bytes(-(-count * bits // 8), "little")
    packed = pack_bits(library.asarray(numbers), bits)
    assert isinstance(packed, type(library.zeros(1)))
    assert np.asarray(packed).tobytes() == expected
    again = unpack_bits(packed, bits, count)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, numbers)
