"""The base class of number formats."""

import abc
import functools
import itertools
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.exact import clamp


class Format(abc.ABC):
    """A finite grid of values and their codes.

    `round` maps a float to the nearest value of the grid and saturates at the ends. It
    clamps first, so that compilers divide and round in one pass.
    `encode` maps such a value to its code, and `decode` maps the code back exactly, so
    `decode(encode(round(x)))` equals `round(x)` to the bit.

    A new format is a frozen dataclass with `bits` and `values`. The methods of this
    class serve any values, by an operation for each of them, and the code of a value is
    its index minus `2**(bits - 1)`. A format with many values overrides them.

    Attributes:
      bits: width of a code.
      code_offset: the value of a code is `code + code_offset`; None if values are not 1
        apart.
    """

    bits: int
    code_offset: ClassVar[float | None] = None

    @property
    @abc.abstractmethod
    def values(self) -> np.ndarray:
        """All values of the grid, ascending, float64, of shape (levels,)."""

    @functools.cached_property
    def code_dtype(self) -> np.dtype:
        """The narrowest jax dtype that holds every code."""
        return jnp.dtype(f"int{next(n for n in (2, 4, 8) if self.bits <= n)}")

    def round(self, x):
        """Rounds to the nearest value of the grid, keeping the dtype; NaN stays NaN.

        A number halfway between two values is rounded to the lower one.
        """
        x = clamp(x, self.low, self.high)
        value = jnp.where(jnp.isnan(x), x, self.low)
        for middle, level in zip(self._middles(x.dtype), self.values[1:].tolist()):
            value = jnp.where(x > middle, level, value)
        return value.astype(x.dtype)

    def neighbours(self, x):
        """Returns the grid values next to `x`: one not above and one not below it.

        Beyond either end of the grid, the first is that end. A value on the grid is one
        of its own neighbours. NaN stays NaN.
        """
        below = above = jnp.where(jnp.isnan(x), x, self.low)
        levels = self.values.tolist()
        for lower, level in itertools.pairwise(levels):
            above = jnp.where(x > lower, level, above)
            below = jnp.where(x >= level, level, below)
        above = jnp.where(x == below, below, above)
        return below.astype(x.dtype), above.astype(x.dtype)

    def encode(self, value):
        """Returns the codes of grid values; NaN gets an unspecified but valid code."""
        code = jnp.full(value.shape, -(2 ** (self.bits - 1)), jnp.int8)
        for middle in self._middles(value.dtype):
            code += (value > middle).astype(jnp.int8)
        return code.astype(self.code_dtype)

    def decode(self, codes, dtype):
        """Returns the grid values of `codes`, as `dtype`."""
        index = codes.astype(jnp.int32) + 2 ** (self.bits - 1)
        value = jnp.full(index.shape, self.low, dtype)
        # Indexing would not fuse, and its result would not be sharded like `codes`.
        for number, level in enumerate(self.values[1:].tolist(), 1):
            value = jnp.where(index >= number, jnp.asarray(level, dtype), value)
        return value

    def _middles(self, dtype):
        """Returns the largest number of `dtype` that rounds down to each value."""
        exact = (self.values[1:] + self.values[:-1]) / 2
        middles = exact.astype(dtype)
        below = np.nextafter(middles, np.array(-np.inf, dtype))
        return np.where(middles > exact, below, middles)

    def to_index(self, codes):
        """Returns the bits of each code as a file stores them, one uint8 per code."""
        index = codes.astype(jnp.int32) + self._index_of_code_0
        return np.asarray((index & (2**self.bits - 1)).astype(jnp.uint8))

    def from_index(self, index):
        """Returns the codes that have the bits `index`; the inverse of `to_index`."""
        half = 2 ** (self.bits - 1)
        shifted = jnp.asarray(index, jnp.int32) - self._index_of_code_0 + half
        return ((shifted & (2**self.bits - 1)) - half).astype(self.code_dtype)

    @property
    def _index_of_code_0(self):
        # Signed integers have the bits of two's complement, in which 0 is 0.
        if self.code_offset is None:
            return 2 ** (self.bits - 1)
        return int(self.code_offset)

    @functools.cached_property
    def low(self) -> float:
        """The smallest value of the grid."""
        return float(self.values[0])

    @functools.cached_property
    def high(self) -> float:
        """The largest value of the grid."""
        return float(self.values[-1])

    @functools.cached_property
    def half_range(self) -> float:
        """Half the distance from `low` to `high`; the scale is a bound over it."""
        return (self.high - self.low) / 2

    @functools.cached_property
    def edge(self) -> float:
        """Distance beyond `high` up to which a value is rounded rather than clipped."""
        return float(self.values[-1] - self.values[-2]) / 2

    @functools.cached_property
    def step(self) -> float | None:
        """Largest of 1, 1/2, ... 1/16 that divides every value, or None."""
        steps = (2.0**-k for k in range(5))
        return next((s for s in steps if not (self.values % s).any()), None)

    @functools.cached_property
    def symmetric(self) -> bool:
        """Whether the grid holds `-v` for every value `v` it holds."""
        return bool(np.array_equal(self.values, -self.values[::-1]))

    @functools.cached_property
    def has_zero(self) -> bool:
        """Whether real zero is on the grid."""
        return bool((self.values == 0).any())

    @property
    def gaussian_clip(self) -> float:
        """Bound with the least squared error on N(0, 1), in standard deviations."""
        return _gaussian_clip(self)


def constant(values) -> np.ndarray:
    """Returns values as a float64 array that can be kept, because it is read-only."""
    array = np.asarray(values, np.float64)
    array.flags.writeable = False
    return array


@functools.cache
def _gaussian_clip(format: Format) -> float:
    """Minimizes the closed-form squared error on N(0, 1) by golden-section search."""
    values = format.values / format.half_range
    low, high = 0.05, 8.0
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _gaussian_error(values * left) < _gaussian_error(values * right):
            high = right
        else:
            low = left
    return (low + high) / 2


def _gaussian_error(values: np.ndarray) -> float:
    """Computes the mean squared error of rounding N(0, 1) to the nearest value."""
    edges = (values[1:] + values[:-1]) / 2
    density = np.concatenate(
        [[0], np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi), [0]]
    )
    mass = np.array([0, *(math.erfc(-e / math.sqrt(2)) / 2 for e in edges), 1])
    first = np.concatenate([[0], edges * density[1:-1], [0]])  # edge times density
    probability = np.diff(mass)
    mean = -np.diff(density)
    square = probability - np.diff(first)
    return float(np.sum(square - 2 * values * mean + values**2 * probability))
