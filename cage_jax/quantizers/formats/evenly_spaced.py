"""Formats whose values are 1 apart: integers, and the mid-rise grid."""

import dataclasses
import functools
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_choice, check_int, make_plain
from cage_jax.arrays.exact import clamp, select, to_int8
from cage_jax.quantizers.formats.base import Format, constant

Ties = Literal["even", "away", "up"]
_REMEDY = (
    "Use a whole number of bits up to 8, or leave the parameter unquantized (None in "
    "`Rules`)."
)


class EvenlySpaced(Format):
    """A format with a `code_offset`."""

    edge = 0.5

    def encode(self, value):
        code = value - self.code_offset
        # The integer of NaN depends on the backend, so NaN gets code 0 on all of them.
        # Its scale is NaN too, so it never becomes a number again.
        code = jnp.where(jnp.isnan(code), 0, code)
        return to_int8(code).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(jnp.int8).astype(dtype) + self.code_offset


@dataclasses.dataclass(frozen=True)
class Integer(EvenlySpaced):
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
    has_zero = True

    def __post_init__(self):
        make_plain(self)
        check_int("bits", self.bits, _REMEDY, least=2, most=8)
        remedy = "Use 'even' unless a file format rounds otherwise."
        check_choice("ties", self.ties, get_args(Ties), remedy)
        if self.narrow and not self.signed:
            raise ValueError(
                f"`narrow` must be False for unsigned integers; got narrow=True, "
                f"signed=False. Use Integer({self.bits}, narrow=False, signed=False)."
            )

    @functools.cached_property
    def code_offset(self) -> int:  # type: ignore[override]
        return 0 if self.signed else 2 ** (self.bits - 1)

    @functools.cached_property
    def values(self) -> np.ndarray:
        top = 2 ** (self.bits - 1)
        return constant(np.arange(-top + self.narrow, top) + self.code_offset)

    def round(self, x):
        x = clamp(x, self.low, self.high)
        if self.ties == "even":
            rounded = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
        elif self.ties == "away":
            size = jnp.abs(x)
            whole = jnp.floor(size)
            rounded = whole + jnp.floor(2 * (size - whole))
            rounded = select(lax.lt(x, x.dtype.type(0)), -rounded, rounded)
        else:
            # The sum counts from 0, as codes in the file do. Compilers do not contract
            # it with the product that `x` was clamped from.
            rounded = jnp.floor(x + (0.5 - self.low)) + self.low
        # Codes have no -0.
        return select(lax.eq(rounded, x.dtype.type(0)), lax.abs(rounded), rounded)

    def neighbours(self, x):
        below = clamp(jnp.floor(x), self.low, self.high)
        below = select(below == 0, 0, below)
        return below, jnp.minimum(below + 1, self.high)

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
class MidRise(EvenlySpaced):
    """The 2**bits levels `k + 1/2`, symmetric and without a zero; 1 to 8 bits.

    QuEST uses this grid (arXiv 2502.05003). For a bound `b` on the values, the step is
    `2 b / (2**bits - 1)`. The code of level `k + 1/2` is `k`.
    """

    bits: int
    code_offset = 0.5
    has_zero = False

    def __post_init__(self):
        make_plain(self)
        check_int("bits", self.bits, _REMEDY, least=1, most=8)

    @functools.cached_property
    def values(self) -> np.ndarray:
        top = 2 ** (self.bits - 1)
        return constant(np.arange(-top, top) + 0.5)

    @property
    def gaussian_clip(self) -> float:
        return _QUEST_CLIP[self.bits]

    def round(self, x):
        # This is round(x + 1/2) - 1/2, half to even, as in QuEST's own code. It avoids
        # that sum, which compilers contract with the product that `x` comes from.
        x = clamp(x, self.low, self.high)
        half = lax.mul(x, x.dtype.type(0.5))
        even = lax.convert_element_type(lax.eq(lax.floor(half), half), x.dtype)
        return lax.add(lax.floor(x), lax.sub(x.dtype.type(0.5), even))

    def neighbours(self, x):
        whole = jnp.floor(x)
        below = jnp.where(x >= whole + 0.5, whole + 0.5, whole - 0.5)
        below = jnp.clip(below, self.low, self.high)
        return below, jnp.minimum(below + 1, self.high)

    def __str__(self):
        return f"midrise{self.bits}"
