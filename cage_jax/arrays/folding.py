"""Other shapes for a reduction, of which XLA for CPU stores less before it reduces.

It reduces an axis of up to 32 in one loop with whatever makes the values, and stores
the values of a longer one. Along columns such a loop is slow.
"""

from collections.abc import Callable

import jax
from jax import lax

# A power of two. With 16 slices of an array, XLA for CPU would store the array first.
FOLDS = 8
# Values that are joined are this near, where the axis is long.
_NEAR = 128
_SHORT = 32


def fold_axis(join: Callable, x: jax.Array, axis: int) -> jax.Array:
    """Joins eight values at a time along an axis; an eighth of its length is left.

    Args:
      join: makes one of two values, elementwise; the same in any order.
      x: an array.
      axis: the axis, whose length is a multiple of 8.
    """
    length = x.shape[axis]
    near = _NEAR if length % _NEAR == 0 else length
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, length // near, near, *after)
    parts = lax.split(x, [near // FOLDS] * FOLDS, axis + 1)
    while len(parts) > 1:
        parts = [join(one, other) for one, other in zip(parts[::2], parts[1::2])]
    return parts[0].reshape(*before, length // FOLDS, *after)


def in_short_axes(
    x: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Divides the given axes into short ones, if they have such factors.

    Returns:
      The reshaped array, and the axes in it. An axis of length 1 stays before them, or
      XLA would join them again.
    """
    shape: list[int] = []
    places: list[int] = []
    for axis, length in enumerate(x.shape):
        parts = _short_factors(length) if axis in axes else []
        shape.append(1 if axis in axes else length)
        places += range(len(shape), len(shape) + len(parts))
        shape += parts
    return x.reshape(shape), tuple(places)


def _short_factors(length: int) -> list[int]:
    """Divides a length into factors of at most 32, or larger primes."""
    factors = []
    while length > 1:
        divisors = (n for n in range(_SHORT, 1, -1) if length % n == 0)
        factors.append(next(divisors, length))
        length //= factors[-1]
    return factors
