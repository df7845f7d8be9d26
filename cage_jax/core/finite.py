"""Whether parameters are finite, before they are written or judged."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.quantized_array import QuantizedArray

# Parts of a `QuantizedArray` that may hold floats, in words.
_PARTS = {
    "codes": "codes",
    "scale": "scales",
    "offset": "offsets",
    "tensor_divisor": "tensor divisors",
}


def not_finite(leaf: Any) -> dict[str, int]:
    """Counts NaN and infinities in the parts of a parameter that have any."""
    parts = {"values": leaf}
    if isinstance(leaf, QuantizedArray):
        parts = {words: getattr(leaf, name) for name, words in _PARTS.items()}
    counts = {what: _count(x) for what, x in parts.items() if x is not None}
    return {what: count for what, count in counts.items() if count}


def check_values(leaves: Mapping[str, Any], argument: str = "codes") -> None:
    """Raises TypeError, with the path, for shapes in the place of arrays."""
    for path, leaf in leaves.items():
        parts = jax.tree.leaves(leaf)
        if any(isinstance(part, jax.ShapeDtypeStruct) for part in parts):
            raise TypeError(
                f"`{path}`: `{argument}` must have values; got a shape. Load or "
                f"initialize the parameters first."
            )


def check_finite(leaves: Mapping[str, Any], argument: str = "codes") -> None:
    """Checks parameters.

    Args:
      leaves: arrays and `QuantizedArray`s by path. Their parts may be on devices of
        other processes, which then must call this too.
      argument: name of the argument, for errors.

    Raises:
      TypeError: for shapes in the place of arrays.
      ValueError: if there are NaN or infinities; the error names the parameters.
    """
    check_values(leaves, argument)
    found = {path: each for path, leaf in leaves.items() if (each := not_finite(leaf))}
    if not found:
        return
    path, counts = next(iter(found.items()))
    what = " and ".join(counts)
    more = f"; also {', '.join(list(found)[1:4])}" if found.keys() - {path} else ""
    raise ValueError(
        f"`{path}`: `{argument}` must have finite {what}; got NaN or infinity in "
        f"{sum(counts.values())} places{more}. Look at the last steps of the training, "
        f"or take an earlier checkpoint."
    )


def _count(array):
    dtype = np.dtype(array.dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return int(jnp.sum(~jnp.isfinite(array)))
    return int(np.sum(~np.isfinite(np.asarray(array))))
