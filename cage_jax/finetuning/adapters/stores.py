"""Frozen weights as positions on their grid, in 8, 16 or 32 bits."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.exact import clamp, times
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.rounding import Rounding

Store = Literal["bfloat16", "int8", "float32"]
_COARSEST = 1 / 4  # of the distance between two codes


def stored(found: Rounding, store: Store) -> jax.Array:
    """Returns the positions of an array on its grid, in the dtype of a store.

    A position is rounded to the nearest number of the store. Where that one has another
    code, the next number towards the position is taken, so that codes stay.

    Args:
      found: the array on its way to the grid.
      store: the dtype; "int8" stands for fixed point, as in `positions`.

    Raises:
      ValueError: for "int8", if that is too coarse for the format.
    """
    format, position, codes = (
        found.quantizer.format,
        found.position(),
        found.code_values(),
    )
    if store == "int8":
        fraction, middle = _fixed_point(format)
        whole = jnp.round(times(position - middle, 2.0**fraction))
        nearest = clamp(whole, -128, 127).astype(jnp.int8)
        behind = positions(nearest, format, position.dtype) > position
        other = nearest + jnp.where(behind, jnp.int8(-1), jnp.int8(1))
    else:
        nearest = position.astype(store)
        end = jnp.where(nearest.astype(position.dtype) > position, -jnp.inf, jnp.inf)
        other = lax.nextafter(nearest, end.astype(store))
    same = format.round(positions(nearest, format, position.dtype)) == codes
    return jnp.where(same, nearest, other)


def positions(store: jax.Array, format: Format, dtype: np.dtype) -> jax.Array:
    """Returns the positions that a store holds, exactly.

    Bytes are fixed point around the middle of the grid, with as many bits for fractions
    as let them reach both of its ends.

    Args:
      store: the result of `stored`.
      format: the format of the codes.
      dtype: dtype of the result, float32 or float64.
    """
    if store.dtype != jnp.int8:
        return store.astype(dtype)
    fraction, middle = _fixed_point(format)
    return times(store.astype(dtype), 2.0**-fraction) + dtype.type(middle)


def _fixed_point(format):
    """Returns the bits for fractions, and the position of 0."""
    fraction = math.floor(math.log2(127 / format.half_range))
    if 2.0**-fraction > _COARSEST * float(np.diff(format.values).min()):
        raise ValueError(
            f"`store` 'int8' must divide the distance between two codes into at least "
            f"{1 / _COARSEST:g} steps; got the format {format}. Use store='bfloat16'."
        )
    return fraction, (format.low + format.high) / 2
