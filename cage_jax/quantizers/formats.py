"""Number formats: the values that codes can take, in units of the scale.

A format knows nothing about array shapes, scales or gradients. Every method acts
elementwise on values that were already divided by the scale.
"""

import abc
import dataclasses
import functools
import itertools
import math
from typing import Literal, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from cage_jax.arrays.exact import clamp, power_below, select

Ties = Literal["even", "away", "up"]
FloatName = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]


class Format(abc.ABC):
    """A finite grid of values and their codes.

    `round` maps a float to the nearest value of the grid and saturates at the ends.
    `encode` maps such a value to its code, and `decode` maps the code back exactly, so
    `decode(encode(round(x)))` equals `round(x)` to the bit.

    Attributes:
      bits: width of a code.
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
        """Rounds to the nearest value of the grid, keeping the dtype; NaN stays NaN."""

    @abc.abstractmethod
    def neighbours(self, x):
        """Returns the grid values next to `x`: one not above and one not below it.

        Beyond either end of the grid, the first is that end. A value on the grid is one
        of its own neighbours. NaN stays NaN.
        """

    @abc.abstractmethod
    def encode(self, value):
        """Returns the codes of grid values; NaN gets an unspecified but valid code."""

    @abc.abstractmethod
    def decode(self, codes, dtype):
        """Returns the grid values of `codes`, as `dtype`."""

    @abc.abstractmethod
    def to_index(self, codes):
        """Returns the bits of each code as a file stores them, one uint8 per code."""

    @abc.abstractmethod
    def from_index(self, index):
        """Returns the codes that have the bits `index`; the inverse of `to_index`."""

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
        """Half the distance from `low` to `high`; the scale is a bound over it."""
        return (self.high - self.low) / 2

    @property
    def edge(self) -> float:
        """Distance beyond `high` up to which a value is rounded rather than clipped."""
        return float(self.values[-1] - self.values[-2]) / 2

    @property
    def step(self) -> float | None:
        """Largest of 1, 1/2, ... 1/16 that divides every value, or None."""
        steps = (2.0**-k for k in range(5))
        return next((s for s in steps if not (self.values % s).any()), None)

    @property
    def of_zero_code(self) -> float | None:
        """Value of code 0 where values grow by 1 from code to code, otherwise None."""
        return None

    @property
    def symmetric(self) -> bool:
        """Whether the grid holds `-v` for every value `v` it holds."""
        return bool(np.array_equal(self.values, -self.values[::-1]))

    @property
    def has_zero(self) -> bool:
        """Whether real zero is on the grid."""
        return bool((self.values == 0).any())

    @property
    def gaussian_clip(self) -> float:
        """Bound with the least squared error on N(0, 1), in standard deviations."""
        return _gaussian_clip(self)


@dataclasses.dataclass(frozen=True)
class Integer(Format):
    """Integers of 2 to 8 bits.

    Args:
      bits: width of a code.
      narrow: leave out the most negative code, so that the grid is symmetric:
        -7..7 for 4 bits. False uses the full range: -8..7.
      signed: False gives the values 0..15 for 4 bits and requires `narrow=False`.
        The codes are then the values minus 8, because not every program that stores
        arrays supports unsigned 4-bit integers.
      ties: where a value halfway between two integers goes: to the "even" one, "away"
        from zero, or "up". "up" adds a half in floating point, as GGUF's code does, so
        a value just below a half rounds up too.
    """

    bits: int
    narrow: bool = True
    _: dataclasses.KW_ONLY
    signed: bool = True
    ties: Ties = "even"

    def __post_init__(self):
        _check_bits(self.bits, 2, 8, "Integer")
        if self.ties not in get_args(Ties):
            raise ValueError(
                f"`ties` must be one of {get_args(Ties)}; got {self.ties!r}. Use "
                f"'even' unless a file format rounds otherwise."
            )
        if self.narrow and not self.signed:
            raise ValueError(
                f"`narrow` must be False for unsigned integers; got narrow=True, "
                f"signed=False. Use Integer({self.bits}, narrow=False, signed=False)."
            )

    @property
    def values(self) -> np.ndarray:
        if not self.signed:
            return np.arange(2**self.bits, dtype=np.float64)
        top = 2 ** (self.bits - 1)
        return np.arange(-top + self.narrow, top, dtype=np.float64)

    @property
    def code_dtype(self) -> np.dtype:
        return _code_dtype(self.bits)

    def round(self, x):
        if self.ties == "even":
            rounded = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
        elif self.ties == "away":
            size = jnp.abs(x)
            whole = jnp.floor(size)
            rounded = whole + jnp.floor(2 * (size - whole))
            rounded = select(lax.lt(x, x.dtype.type(0)), -rounded, rounded)
        else:
            x = clamp(x, self.low - 1, self.high + 1)
            # The sum counts from 0, as codes in the file do. Clamping `x` first keeps
            # compilers from contracting the sum with the product that `x` comes from.
            rounded = jnp.floor(x + (0.5 - self.low)) + self.low
        # Codes have no -0.
        rounded = select(lax.eq(rounded, x.dtype.type(0)), lax.abs(rounded), rounded)
        return clamp(rounded, self.low, self.high)

    def neighbours(self, x):
        below = clamp(jnp.floor(x), self.low, self.high)
        below = select(below == 0, 0, below)
        return below, jnp.minimum(below + 1, self.high)

    def encode(self, value):
        return _whole(value - self.of_zero_code).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(jnp.int8).astype(dtype) + self.of_zero_code

    def to_index(self, codes):
        return _low_bits(codes, self.bits, self.of_zero_code)

    def from_index(self, index):
        return _from_low_bits(index, self.bits, self.of_zero_code).astype(
            self.code_dtype
        )

    @property
    def of_zero_code(self) -> int:
        return 0 if self.signed else 2 ** (self.bits - 1)

    def __str__(self):
        ends = "" if self.narrow else " full range"
        return f"int{self.bits}{ends}" if self.signed else f"uint{self.bits}"


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

    QuEST uses this grid (arXiv 2502.05003). For a bound `b` on the values, the step is
    `2 b / (2**bits - 1)`. The code of level `k + 1/2` is `k`.
    """

    bits: int

    def __post_init__(self):
        _check_bits(self.bits, 1, 8, "MidRise")

    @property
    def values(self) -> np.ndarray:
        top = 2 ** (self.bits - 1)
        return np.arange(-top, top) + 0.5

    @property
    def code_dtype(self) -> np.dtype:
        return _code_dtype(self.bits)

    def round(self, x):
        # This is round(x + 1/2) - 1/2, half to even, as in QuEST's own code. It avoids
        # that sum, which compilers contract with the product that `x` comes from.
        half = lax.mul(x, x.dtype.type(0.5))
        even = lax.convert_element_type(lax.eq(lax.floor(half), half), x.dtype)
        level = lax.add(lax.floor(x), lax.sub(x.dtype.type(0.5), even))
        return clamp(level, self.low, self.high)

    def neighbours(self, x):
        whole = jnp.floor(x)
        below = jnp.where(x >= whole + 0.5, whole + 0.5, whole - 0.5)
        below = jnp.clip(below, self.low, self.high)
        return below, jnp.minimum(below + 1, self.high)

    def encode(self, value):
        return _whole(value - self.of_zero_code).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(jnp.int8).astype(dtype) + self.of_zero_code

    def to_index(self, codes):
        return _low_bits(codes, self.bits)

    def from_index(self, index):
        return _from_low_bits(index, self.bits).astype(self.code_dtype)

    @property
    def of_zero_code(self) -> float:
        return 0.5

    @property
    def gaussian_clip(self) -> float:
        return _QUEST_CLIP[self.bits]

    def __str__(self):
        return f"midrise{self.bits}"


_FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


@dataclasses.dataclass(frozen=True)
class Float(Format):
    """Floating-point numbers of 4, 6 or 8 bits, defined by the Open Compute Project.

    Values beyond the largest saturate; infinities and NaN have no code. 6-bit codes are
    held in float8_e4m3fn, because JAX has no narrower dtype for them.

    Args:
      name: the numbers of exponent and mantissa bits: "e2m1" (FP4), "e2m3" or "e3m2"
        (FP6), "e4m3" or "e5m2" (FP8).
    """

    name: FloatName

    def __post_init__(self):
        if self.name not in _FLOATS:
            raise ValueError(
                f"`name` must be one of {list(_FLOATS)}; got {self.name!r}. Use "
                f"'e4m3' for FP8."
            )

    @property
    def _type(self) -> np.dtype:
        return np.dtype(_FLOATS[self.name])

    @property
    def bits(self) -> int:  # type: ignore[override]
        return ml_dtypes.finfo(self._type).bits

    @property
    def values(self) -> np.ndarray:
        every = np.arange(2**self.bits, dtype=np.uint8).view(self._type)
        every = every.astype(np.float64)
        return np.unique(every[np.isfinite(every)])

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(jnp.float8_e4m3fn) if self.bits == 6 else self._type

    def round(self, x):
        x = clamp(x, self.low, self.high)
        step = self._step(x)
        return jnp.round(x / step) * step

    def neighbours(self, x):
        x = jnp.clip(x, self.low, self.high)
        step = self._step(x)
        below = jnp.floor(x / step) * step
        return below, jnp.minimum(below + step, self.high)

    def _step(self, x):
        """Returns the distance between grid values around `x`, a power of two."""
        own = ml_dtypes.finfo(self._type)
        return jnp.maximum(power_below(x), 2.0 ** int(own.minexp)) * 2.0**-own.nmant

    def encode(self, value):
        return jnp.where(jnp.isnan(value), 0, value).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(dtype)

    def to_index(self, codes):
        values = np.asarray(codes).astype(np.float32)
        return values.astype(self._type).view(np.uint8)

    def from_index(self, index):
        index = jnp.asarray(index, jnp.uint8)
        if self.bits != 6:
            word = index.astype(f"uint{self.bits}")
            return lax.bitcast_convert_type(word, self._type)
        # Read the bits as E4M3, then rescale, because its exponents begin lower.
        own, wide = ml_dtypes.finfo(self._type), ml_dtypes.finfo(self.code_dtype)
        sign, size = index >> 5 << 7, (index & 31) << (wide.nmant - own.nmant)
        values = lax.bitcast_convert_type(sign | size, self.code_dtype)
        factor = 2.0 ** (int(own.minexp) - int(wide.minexp))
        return (values.astype(jnp.float32) * factor).astype(self.code_dtype)

    def __str__(self):
        return f"fp{self.bits} {self.name}"


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """Any 2 to 256 values; the code of a value is its index minus `2**(bits - 1)`.

    A number halfway between two levels rounds to the lower one.

    Args:
      levels: the values, ascending.
      name: the codebook's name, shown when it is printed.
    """

    levels: tuple[float, ...]
    name: str = "codebook"

    def __post_init__(self):
        levels = self.levels
        if not isinstance(levels, tuple) or not 2 <= len(levels) <= 256:
            raise ValueError(
                f"`levels` must be a tuple of 2 to 256 numbers; got {levels!r}. Use "
                f"tuple(values)."
            )
        if not all(a < b < math.inf for a, b in itertools.pairwise(levels)):
            raise ValueError(
                f"`levels` must be finite and ascending; got {levels}. Use "
                f"tuple(sorted(set(values)))."
            )

    @property
    def bits(self) -> int:  # type: ignore[override]
        return (len(self.levels) - 1).bit_length()

    @property
    def values(self) -> np.ndarray:
        return np.array(self.levels, np.float64)

    @property
    def code_dtype(self) -> np.dtype:
        return _code_dtype(self.bits)

    def round(self, x):
        value = jnp.where(jnp.isnan(x), x, self.low)
        for middle, level in zip(self._middles(x.dtype), self.levels[1:]):
            value = jnp.where(x > middle, level, value)
        return value.astype(x.dtype)

    def neighbours(self, x):
        below = above = jnp.where(jnp.isnan(x), x, self.low)
        for lower, level in zip(self.levels, self.levels[1:]):
            above = jnp.where(x > lower, level, above)
            below = jnp.where(x >= level, level, below)
        above = jnp.where(x == below, below, above)
        return below.astype(x.dtype), above.astype(x.dtype)

    def _middles(self, dtype):
        """Returns the largest number of `dtype` that rounds down to each level."""
        exact = (self.values[1:] + self.values[:-1]) / 2
        middles = exact.astype(dtype)
        below = np.nextafter(middles, np.array(-np.inf, dtype))
        return np.where(middles > exact, below, middles)

    def encode(self, value):
        code = jnp.full(value.shape, -self._middle, jnp.int8)
        for middle in self._middles(value.dtype):
            code += (value > middle).astype(jnp.int8)
        return code.astype(self.code_dtype)

    def decode(self, codes, dtype):
        place = codes.astype(jnp.int32) + self._middle
        value = jnp.full(place.shape, self.low, dtype)
        # Indexing would not fuse, and its result would not be sharded like `codes`.
        for number, level in enumerate(self.levels[1:], 1):
            value = jnp.where(place >= number, jnp.asarray(level, dtype), value)
        return value

    def to_index(self, codes):
        return _low_bits(codes, self.bits, self._middle)

    def from_index(self, index):
        return _from_low_bits(index, self.bits, self._middle).astype(self.code_dtype)

    @property
    def _middle(self):
        """Index of the level whose code is 0."""
        return 2 ** (self.bits - 1)

    def __str__(self):
        return self.name


# QLoRA (arXiv 2305.14314), appendix E: quantiles of N(0, 1), with a zero.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "nf4",
)


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


def _code_dtype(bits):
    return jnp.dtype(f"int{next(width for width in (2, 4, 8) if bits <= width)}")


def _whole(value):
    # The integer of NaN depends on the backend, so NaN gets code 0 on all of them. Its
    # scale is NaN too, so it never becomes a number again.
    return jnp.where(jnp.isnan(value), 0, value).astype(jnp.int8)


def _low_bits(codes, bits, middle=0):
    """Returns the low bits of codes, counted so that code 0 has the index `middle`."""
    wide = (codes.astype(jnp.int32) + middle) & (2**bits - 1)
    return np.asarray(wide.astype(jnp.uint8))


def _from_low_bits(index, bits, middle=0):
    wide = jnp.asarray(index, jnp.int32)
    if middle:
        return wide - middle
    return jnp.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide)


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
