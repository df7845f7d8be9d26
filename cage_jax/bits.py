"""Codes of 1 to 8 bits one after another, without gaps: the lowest bit first."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pack_bits(numbers: Any, bits: int) -> Any:
    """Numbers of `bits` bits each in bytes, the last of which ends with zeros.

    Args:
      numbers: uint8 of shape (count,), below 2**bits; of NumPy or jax.
      bits: 1 to 8.

    Returns:
      uint8 of shape (ceil(count * bits / 8),), of NumPy or jax as `numbers`.

    Example:
      >>> import numpy as np
      >>> from cage_jax.bits import pack_bits, unpack_bits
      >>> data = pack_bits(np.array([1, 2, 7], np.uint8), 3)
      >>> [f"{byte:08b}" for byte in data], unpack_bits(data, 3, 3).tolist()
      (['11010001', '00000001'], [1, 2, 7])
    """
    count, width = _period(bits)
    xp = _library(numbers)
    size = numbers.shape[0]
    rows = xp.pad(numbers, (0, -size % count)).reshape(-1, count)

    def byte(place):
        found = xp.zeros_like(rows[:, 0])
        for i in range(count):
            shift = bits * i - 8 * place
            if 0 <= shift < 8:
                found = found | rows[:, i] << np.uint8(shift)
            elif -bits < shift < 0:
                found = found | rows[:, i] >> np.uint8(-shift)
        return found

    found = xp.stack([byte(place) for place in range(width)], axis=1)
    return found.reshape(-1)[: -(-size * bits // 8)]


def unpack_bits(data: Any, bits: int, count: int) -> Any:
    """The first `count` numbers that `pack_bits` put into bytes.

    Args:
      data: uint8 of shape (ceil(count * bits / 8),), of NumPy or jax.
      bits: 1 to 8.
      count: how many numbers.

    Returns:
      uint8 of shape (count,), of NumPy or jax as `data`.
    """
    together, width = _period(bits)
    xp = _library(data)
    rows = xp.pad(data, (0, -data.shape[0] % width)).reshape(-1, width)

    def number(i):
        place, shift = divmod(bits * i, 8)
        found = rows[:, place] >> np.uint8(shift)
        if shift + bits > 8:
            found = found | rows[:, place + 1] << np.uint8(8 - shift)
        return found & np.uint8(2**bits - 1)

    found = xp.stack([number(i) for i in range(together)], axis=1)
    return found.reshape(-1)[:count]


def _period(bits):
    """How many numbers fill how many whole bytes."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _library(array):
    return jnp if isinstance(array, jax.Array) else np
