"""Number formats: which values a code can take, in units of the scale.

A format knows nothing of arrays' shapes, scales or gradients. Every method acts
elementwise on values that were already divided by the scale.
"""

import abc
import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A finite grid of values and the codes that stand for them.

    `round` maps a float to the nearest value of the grid (and saturates), `encode`
    maps such a value to its code and `decode` maps the code back, exactly. So
    `decode(encode(round(x)))` equals `round(x)` to the bit.
    """

    bits: int

    @property
    @abc.abstractmethod
    def values(self) -> np.ndarray:
        """All values of the grid, ascending, float64, of shape (levels,)."""

    @property
    @abc.abstractmethod
    def code_dtype(self) -> np.dtype:
        """The narrowest jax dtype that holds every code."""

    @abc.abstractmethod
    def round(self, x):
        """The nearest value of the grid, in the dtype of `x`; NaN stays NaN."""

    @abc.abstractmethod
    def encode(self, value):
        """The codes of grid values; the code of NaN is unspecified but valid."""

    @abc.abstractmethod
    def decode(self, codes, dtype):
        """The grid values of `codes`, as `dtype`."""

    @property
    def low(self) -> float:
        """The smallest value of the grid."""
        return float(self.values[0])

    @property
    def high(self) -> float:
        """The largest value of the grid."""
        return float(self.values[-1])

    @property
    def half_range(self) -> float:
        """Half the distance from `low` to `high`: the scale is a bound over it."""
        return (self.high - self.low) / 2

    @property
    def edge(self) -> float:
        """How far beyond `high` a value may lie and still be rounded, not clipped."""
        return float(self.values[-1] - self.values[-2]) / 2

    @property
    def step(self) -> float | None:
        """The first of 1, 1/2, ... 1/16 that divides every value, or None."""
        steps = (2.0**-k for k in range(5))
        return next((s for s in steps if not (self.values % s).any()), None)

    @property
    def symmetric(self) -> bool:
        """Whether `-v` is on the grid for every value `v` of it."""
        return bool(np.array_equal(self.values, -self.values[::-1]))

    @property
    def has_zero(self) -> bool:
        """Whether real zero is on the grid."""
        return bool((self.values == 0).any())

    @property
    def gaussian_clip(self) -> float:
        """The bound, in deviations, with the least squared error on N(0, 1)."""
        return _gaussian_clip(self)


@dataclasses.dataclass(frozen=True)
class Integer(Format):
    """Signed integers of 2 to 8 bits.

    Args:
      bits: width of a code.
      narrow: leave the most negative code out, so that the grid is symmetric:
        -7..7 for 4 bits. Otherwise the full range is used: -8..7.
    """

    narrow: bool = True

    def __post_init__(self):
        _check_bits(self.bits, 2, 8, "Integer")

    @property
    def values(self) -> np.ndarray:
        top = 2 ** (self.bits - 1)
        return np.arange(-top + self.narrow, top, dtype=np.float64)

    @property
    def code_dtype(self) -> np.dtype:
        return _signed_dtype(self.bits)

    def round(self, x):
        return jnp.clip(jnp.round(x), self.low, self.high)

    def encode(self, value):
        return _to_integer(value).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(jnp.int8).astype(dtype)

    def __str__(self):
        return f"int{self.bits}" + ("" if self.narrow else " full range")


# QuEST's clipping points for its own grid (arXiv 2502.05003, published constants).
_QUEST_CLIP = {
    1: 0.7978845587,
    2: 1.4935346200,
    3: 2.0510683541,
    4: 2.5139305786,
    5: 2.9160938835,
    6: 3.2765972826,
    7: 3.6010497188,
    8: 3.8849386788,
}


@dataclasses.dataclass(frozen=True)
class MidRise(Format):
    """The 2**bits levels `k + 1/2`, symmetric and without a zero; 1 to 8 bits.

    The grid of QuEST (arXiv 2502.05003): with a bound `b` on the values, the step is
    `2 b / (2**bits - 1)`. The code of level `k + 1/2` is `k`.
    """

    def __post_init__(self):
        _check_bits(self.bits, 1, 8, "MidRise")

    @property
    def values(self) -> np.ndarray:
        top = 2 ** (self.bits - 1)
        return np.arange(-top, top) + 0.5

    @property
    def code_dtype(self) -> np.dtype:
        return _signed_dtype(self.bits)

    def round(self, x):
        # round(x + 1/2) - 1/2, as in QuEST's own code, half to even. Without the sum,
        # which compilers contract with a product that `x` comes from.
        below = jnp.floor(x)
        even = jnp.floor(below / 2) * 2 == below
        level = below + jnp.where((x == below) & even, -0.5, 0.5).astype(x.dtype)
        return jnp.clip(level, self.low, self.high)

    def encode(self, value):
        return _to_integer(value - 0.5).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(jnp.int8).astype(dtype) + 0.5

    @property
    def gaussian_clip(self) -> float:
        return _QUEST_CLIP[self.bits]

    def __str__(self):
        return f"midrise{self.bits}"


def _check_bits(bits, least, most, name):
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(
            f"`bits` must be an int; got {bits!r}. Use a whole number from {least} to "
            f"{most}."
        )
    if not least <= bits <= most:
        raise ValueError(
            f"`bits` must be from {least} to {most} for {name}; got {bits}. Leave the "
            f"parameter unquantized (None in `Rules`) for wider codes."
        )


def _signed_dtype(bits):
    return jnp.dtype(
        {1: jnp.int2, 2: jnp.int2, 3: jnp.int4, 4: jnp.int4}.get(bits, jnp.int8)
    )


def _to_integer(value):
    # A NaN has no integer: give it a code that is the same on every backend. Its
    # scale is NaN, so it never becomes a number again.
    return jnp.where(jnp.isnan(value), 0, value).astype(jnp.int8)


@functools.cache
def _gaussian_clip(format: Format) -> float:
    """Golden-section search of the closed-form squared error on N(0, 1), float64."""
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
    """Mean squared error of rounding N(0, 1) to the nearest of `values`."""
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
