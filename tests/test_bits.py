"""Codes without gaps, against whole numbers of Python."""

import jax
import numpy as np

from cage_jax.arrays.packing import pack_bits, unpack_bits


def test_bits_one_after_another(rng):
    numbers = {
        (bits, count): rng.integers(0, 2**bits, count, np.uint8)
        for bits in range(1, 9)
        for count in (0, 1, 7, 8, 61)
    }

    def both(numbers):
        packed = {key: pack_bits(each, key[0]) for key, each in numbers.items()}
        return packed, {key: unpack_bits(each, *key) for key, each in packed.items()}

    for library, (packed, again) in (
        (np.ndarray, both(numbers)),
        (jax.Array, jax.jit(both)(numbers)),
    ):
        for (bits, count), each in numbers.items():
            text = f"{bits} bits, {count} numbers, {library}"
            whole = sum(int(number) << (bits * i) for i, number in enumerate(each))
            expected = whole.to_bytes(-(-count * bits // 8), "little")
            found = packed[bits, count]
            assert isinstance(found, library), text
            assert np.asarray(found).tobytes() == expected, text
            assert again[bits, count].dtype == np.uint8, text
            np.testing.assert_array_equal(again[bits, count], each, text)
