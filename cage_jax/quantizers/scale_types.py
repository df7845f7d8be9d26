"""Scale types: the numbers that a stored scale can be.

A scale rule finds the bound of each group, and the scale type turns the bound into the
scale that a file holds. Like the rules, a type is an immutable, hashable description.
It never turns a finite bound into an infinity or NaN: large scales saturate, and scales
that would underflow become its smallest number.
"""

import abc
import dataclasses
import functools
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_choice
from cage_jax.arrays.exact import clamp, divide, finite, power_below, select, times
from cage_jax.quantizers.formats import Float, Format
from cage_jax.quantizers.grid import Grid

PowerRounding = Literal["down", "nearest", "up"]


@dataclasses.dataclass(frozen=True)
class ScaleType(abc.ABC):
    """Turns the bound of each group into its stored scale.

    Attributes:
      dtype: dtype of the stored scales; None for the dtype of computation.
      has_tensor_divisor: whether each tensor has one more float32 scale for all of its
        groups.
      rounds_by: type of the scales that values are rounded by; None for this one.
      signed: whether a scale can be negative.
    """

    dtype: ClassVar[np.dtype | None] = None
    has_tensor_divisor = False
    rounds_by: ClassVar["ScaleType | None"] = None
    signed = True

    def idempotent(self, format: Format) -> bool:
        """Returns whether the bound of quantized values gives the same scale again."""
        return True

    @abc.abstractmethod
    def store(
        self,
        bound: jax.Array,
        range: float,
        format: Format,
        axes: tuple[int, ...],
        largest: jax.Array | None = None,
    ) -> Grid:
        """Returns the stored scale of each group, as a grid.

        Args:
          bound: the value at the end of each group's grid; may be 0, an infinity or
            NaN, and negative where the grid is reversed.
          range: the end of the grid in units of the scale.
          format: the format of the codes.
          axes: the axes that a tensor spans.
          largest: the largest finite bound of each tensor, if it is known.
        """

    def nearest(self, grid: Grid, format: Format, axes: tuple[int, ...]) -> Grid:
        """Returns a given grid with the nearest scales that can be stored.

        Scales that can be stored, as `store` returns them, stay as they are.

        Args:
          grid: a learned or calibrated grid, of positive scales or NaN.
          format: the format of the codes.
          axes: the axes that a tensor spans.
        """
        return grid._replace(scale=self.store(grid.scale, 1.0, format, axes).scale)


@dataclasses.dataclass(frozen=True)
class Full(ScaleType):
    """Scales as they are computed: float32, or float64 for float64 arrays."""

    def store(self, bound, range, format, axes, largest=None):
        return Grid(_usable_scale(bound, range, format))

    def nearest(self, grid, format, axes):
        return grid

    def __str__(self):
        return ""


FULL = Full()


@dataclasses.dataclass(frozen=True)
class Narrow(ScaleType):
    """Scales rounded to float16 or bfloat16.

    Args:
      name: "float16" or "bfloat16".
      unrounded: round values by the scale before it is rounded, and let small scales
        underflow to 0, as the programs that write GGUF files do.
    """

    name: Literal["float16", "bfloat16"] = "float16"
    unrounded: bool = False

    def __post_init__(self):
        names = "float16", "bfloat16"
        check_choice("name", self.name, names, "Use Full() for float32.")

    @functools.cached_property
    def dtype(self):  # type: ignore[override]
        return jnp.dtype(self.name)

    @functools.cached_property
    def rounds_by(self):  # type: ignore[override]
        return _Unrounded(self) if self.unrounded else None

    def store(self, bound, range, format, axes, largest=None):
        limits = jnp.finfo(self.dtype)
        if self.unrounded:
            ideal = _quotient(bound, range)
        else:
            ideal = _usable_scale(bound, range, format)
            # Stop at the smallest normal number, since some processors flush smaller
            # ones to 0.
            tiny = float(limits.tiny)
            ideal = jnp.where(jnp.abs(ideal) < tiny, jnp.sign(ideal) * tiny, ideal)
        largest = float(limits.max)
        scale = jnp.clip(ideal, -largest, largest).astype(self.dtype)
        return Grid(jnp.where(jnp.isfinite(bound), scale.astype(bound.dtype), jnp.nan))

    def nearest(self, grid, format, axes):
        found = super().nearest(grid, format, axes)
        if grid.offset is None:
            return found
        largest = float(jnp.finfo(self.dtype).max)
        offset = clamp(grid.offset, -largest, largest).astype(self.dtype)
        return found._replace(offset=offset.astype(grid.offset.dtype))

    def __str__(self):
        return f"{self.name} scales"


@dataclasses.dataclass(frozen=True)
class _Unrounded(ScaleType):
    """The scales of a `Narrow` type before they are rounded.

    A scale that saturates, or whose reciprocal is not finite, cannot be used unrounded.
    In its place is the stored one, or an infinity if that is 0.
    """

    stored: Narrow

    def store(self, bound, range, format, axes, largest=None):
        ideal, largest = _quotient(bound, range), jnp.finfo(self.stored.dtype).max
        usable = (jnp.abs(ideal) <= float(largest)) & (jnp.abs(ideal) >= 2.0**-126)
        stored = self.stored.store(bound, range, format, axes).scale
        stored = jnp.where(stored == 0, jnp.inf, stored)
        return Grid(jnp.where(usable, ideal, stored))


# From which multiple of a power of two a bound rounds up to the next power.
# compressed-tensors uses the one of E2M1 for E4M3 too. For formats that it lacks, it
# is half a step above the largest value.
_TURNS = {"e2m1": 1.75, "e2m3": 1.9375, "e3m2": 1.875, "e4m3": 1.75, "e5m2": 1.875}


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(ScaleType):
    """Powers of two stored as 8 bits of exponent: E8M0, the scales of MX formats.

    Args:
      rounding: how the bound is rounded to a power of two: "down" as in the OCP
        specification (the largest values may be clipped), "nearest" as in
        compressed-tensors (up where the bound would round to the next power), or "up"
        as in qwix (nothing is clipped). A learned scale has no bound, and is rounded to
        the nearest power of two.
    """

    rounding: PowerRounding = "down"
    dtype = jnp.dtype(jnp.float8_e8m0fnu)
    signed = False

    def __post_init__(self):
        remedy = "Use 'down' for the OCP specification's rule."
        check_choice("rounding", self.rounding, get_args(PowerRounding), remedy)

    def idempotent(self, format):
        # The largest values become 448, which rounds up to the next power of two.
        return not (self.rounding == "nearest" and format == Float("e4m3"))

    def store(self, bound, range, format, axes, largest=None):
        if self.rounding == "up":
            ideal = _quotient(bound, range)
            power = power_below(ideal)
            scale = jnp.where(power == ideal, power, 2 * power)
        else:
            if self.rounding == "nearest":
                turn = _TURNS.get(getattr(format, "name", ""), 1.75)
                power = power_below(bound)
                bound_power = jnp.where(bound >= turn * power, 2 * power, power)
            else:
                bound_power = power_below(bound)
            scale = bound_power * 2.0 ** -np.floor(np.log2(format.high))
        # 2**-127 is not a normal float32, so some processors flush it to 0.
        scale = clamp(scale, 2.0**-126, 2.0**127)
        scale = select(bound == 0, 1.0, scale)
        return Grid(select(jnp.isfinite(bound), scale, jnp.nan).astype(bound.dtype))

    def nearest(self, grid, format, axes):
        power = power_below(grid.scale)
        scale = jnp.where(grid.scale >= 1.5 * power, 2 * power, power)
        scale = clamp(scale, 2.0**-126, 2.0**127)
        return grid._replace(scale=finite(scale, grid.scale))

    def __str__(self):
        return f"e8m0 scales {self.rounding}"


@dataclasses.dataclass(frozen=True)
class Float8(ScaleType):
    """E4M3 scales with one more float32 number per tensor: the scales of NVFP4.

    scale = stored scale / tensor_divisor, where tensor_divisor makes the largest stored
    scale of a tensor 448.

    The tensor_divisor of learned scales keeps its significand, and its power of two
    follows the largest scale, so that this one is stored as a number from 240 to 448.
    No scale saturates, however far the scales move, and each is rounded alone: what
    another one does changes it only if that is 2**13 times larger.

    Args:
      tensor_divisor: False for E4M3 scales alone.
    """

    tensor_divisor: bool = True
    dtype = jnp.dtype(jnp.float8_e4m3fn)
    signed = False

    @functools.cached_property
    def has_tensor_divisor(self):  # type: ignore[override]
        return self.tensor_divisor

    def store(self, bound, range, format, axes, largest=None):
        own = Float("e4m3")
        ideal, divisor = _quotient(bound, range), None
        if self.tensor_divisor:
            if largest is None:
                largest = largest_of(bound, axes)
            elif largest.size == 1:
                largest = largest.reshape([1] * bound.ndim)
            # Below this the smallest step would not be a normal number.
            largest = jnp.maximum(largest, 2.0**-105)
            # PyTorch divides a number by a tensor this way, so files agree to the bit.
            # The sixteenth keeps reciprocals of huge numbers normal.
            divisor = (own.high * range / 16) * (1 / (largest / 16))
            ideal = jnp.broadcast_to(divisor, ideal.shape) * ideal
        scale = _to_e4m3(ideal)
        # 1/8 is what compressed-tensors writes for a group of zeros.
        scale = select(bound == 0, 0.125, scale)
        scale = select(jnp.isfinite(bound), scale, jnp.nan)
        return Grid(scale.astype(bound.dtype), tensor_divisor=divisor)

    def nearest(self, grid, format, axes):
        scale, divisor = grid.scale, grid.tensor_divisor
        if divisor is None:
            return grid._replace(scale=_to_e4m3(scale))
        largest = largest_of(scale, axes)
        power = power_below(largest)
        # Up to 464 numbers are rounded to 448.
        factor = jnp.where(largest <= 464 / 256 * power, 256.0, 128.0) / power
        # So that the divisor stays finite, where a tensor has only zeros.
        factor = jnp.minimum(factor, 2.0**125 / power_below(divisor))
        # All factors are powers of two, which round nothing.
        scale = _to_e4m3(scale * jnp.broadcast_to(factor, scale.shape))
        return grid._replace(scale=scale, tensor_divisor=divisor * factor)

    def __str__(self):
        return "e4m3 scales" + (" and one a tensor" if self.tensor_divisor else "")


def largest_of(bound: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the largest finite bound along `axes`, kept with size 1; 0 if none is."""
    finite = jnp.where(jnp.isfinite(bound), bound, 0)
    return jnp.max(finite, axis=axes, keepdims=True, initial=0)


def of_the_size_of_weights(grid: Grid) -> Grid:
    """Returns the grid with the same steps that an optimizer should train.

    A tensor divisor becomes a number from 1 to 2. Powers of two change no step.
    """
    if grid.tensor_divisor is None:
        return grid
    power = power_below(grid.tensor_divisor)
    scale = grid.scale / jnp.broadcast_to(power, grid.scale.shape)
    return grid._replace(scale=scale, tensor_divisor=grid.tensor_divisor / power)


def _to_e4m3(scale):
    """Rounds to positive numbers of E4M3."""
    return jnp.maximum(Float("e4m3").round(scale), 2.0**-9)


def _quotient(bound, range):
    return divide(bound, bound.dtype.type(range))


def _usable_scale(bound, range, format):
    """Divides; infinity becomes NaN, and zero a scale that keeps zeros (almost) zero.

    A scale without a finite reciprocal counts as zero.
    """
    scale, tiny = _quotient(bound, range), jnp.finfo(bound.dtype).tiny
    # This changes no value, but lets compilers fuse the quotient with what follows.
    scale = clamp(scale, -jnp.inf, jnp.inf)
    normal = lax.convert_element_type(lax.ge(lax.abs(scale), tiny), scale.dtype)
    instead = times(1 - normal, 1.0 if format.has_zero else float(tiny))
    return finite(lax.add(lax.mul(scale, normal), instead), scale)
