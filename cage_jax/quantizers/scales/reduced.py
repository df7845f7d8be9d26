"""AbsMax, AbsMean and Gaussian: a group becomes one number, computed in parts."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_number, make_plain
from cage_jax.arrays.exact import clamp, finite
from cage_jax.arrays.folding import FOLDS, fold_axis, in_short_axes
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.scale_types import FULL
from cage_jax.quantizers.scales.rule import ScaleRule


@dataclasses.dataclass(frozen=True)
class ReducedScale(ScaleRule):
    """A rule that reduces a group to one number, which can be computed in parts.

    Attributes:
      part_on_cpu: another form of `part`, which is faster on a CPU; or None.
    """

    part_on_cpu: ClassVar[Callable | None] = None

    @abc.abstractmethod
    def part(self, x: jax.Array, axes: tuple[int, ...], count: int) -> jax.Array:
        """Computes the number for a part of each group of `count` values."""

    @abc.abstractmethod
    def joined(self, one: jax.Array, other: jax.Array) -> jax.Array:
        """Combines the numbers of two parts."""

    @abc.abstractmethod
    def bound(self, whole: jax.Array, count: int) -> jax.Array:
        """Computes the value at `end` of the grid from the number of whole groups."""

    @abc.abstractmethod
    def end(self, format: Format) -> float:
        """Returns the end of the grid, in units of the scale."""

    def stored(
        self, whole, count, format, scale_type=FULL, tensor_axes=(), largest=None
    ) -> Grid:
        """Returns the grid of groups whose number is known.

        The arguments are those of `fit`, with `largest` as in `ScaleType.store`.
        """
        bound, end = self.bound(whole, count), self.end(format)
        return scale_type.store(bound, end, format, tensor_axes, largest)

    def bounds(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Computes the value at `end` of the grid for each group of `x`."""
        count = size_along(x, axes)
        return self.bound(self.part(x, axes, count), count)

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        count = size_along(x, axes)
        whole = self.part(x, axes, count)
        return self.stored(whole, count, format, scale_type, tensor_axes)

    def fit_groups(self, x, blocks, format, scale_type, largest=None):
        count, axes = blocks.count, blocks.tensor_axes
        part = functools.partial(self.part, count=count)
        whole = blocks.reduce(part, x, ignores_zeros=True, on_cpu=self.part_on_cpu)
        return self.stored(whole, count, format, scale_type, axes, largest)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Reads magnitudes as integers, which are in the same order; NaN is the largest."""
    return lax.bitcast_convert_type(lax.abs(x), np.dtype(f"int{8 * x.dtype.itemsize}"))


def from_magnitude_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the numbers of `magnitude_bits`, with infinity in place of NaN."""
    infinity = np.array(np.inf, dtype).view(bits.dtype)[()]
    return lax.bitcast_convert_type(clamp(bits, 0, infinity), dtype)


def largest_magnitude(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns max|x| along `axes`, kept with size 1; infinity for NaN."""
    # Of floats, XLA for CPU drops NaN from large maxima.
    bits = magnitude_bits(x)
    initial = 0 if 0 in bits.shape else None
    bits = jnp.max(bits, axis=axes, keepdims=True, initial=initial)
    return from_magnitude_bits(bits, x.dtype)


def largest_magnitude_on_cpu(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes `largest_magnitude` of a large array in one read, storing little."""
    if x.ndim - 1 in axes:
        kept = [1 if axis in axes else length for axis, length in enumerate(x.shape)]
        return largest_magnitude(*in_short_axes(x, axes)).reshape(kept)
    axis = max(axes, key=lambda axis: x.shape[axis])
    if x.shape[axis] % FOLDS or x.shape[axis] < FOLDS**2:
        return largest_magnitude(x, axes)
    sizes = infinite_if_nan(fold_axis(lax.max, lax.abs(x), axis))
    return jnp.max(sizes, axis=axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class AbsMax(ReducedScale):
    """scale = clip * max|x| / half the format's range; `clip` below 1 cuts outliers."""

    clip: float = 1.0
    part_on_cpu = staticmethod(largest_magnitude_on_cpu)

    def __post_init__(self):
        make_plain(self)
        check_number("clip", self.clip, "Use 1.0 to keep all values in range.", above=0)

    def part(self, x, axes, count):
        return largest_magnitude(x, axes)

    def joined(self, one, other):
        return lax.max(one, other)

    def bound(self, whole, count):
        return whole

    def end(self, format):
        return format.half_range / self.clip

    def clips(self, format):
        return self.clip < 1 or format.high < format.half_range

    def idempotent(self, format, scale_type=FULL):
        return self.clip == 1 and format.low == -format.high

    def __str__(self):
        return "absmax" if self.clip == 1 else f"absmax clip {self.clip:g}"


@dataclasses.dataclass(frozen=True)
class _Mean(ReducedScale):
    """A rule that needs the sum of a group."""

    def joined(self, one, other):
        return lax.add(one, other)

    def bound(self, whole, count):
        return lax.div(whole, whole.dtype.type(count))


@dataclasses.dataclass(frozen=True)
class AbsMean(_Mean):
    """scale = mean|x| / smallest positive value of the format.

    Ternary weights (BitNet b1.58, arXiv 2402.17764) and binary weights (XNOR-Net,
    arXiv 1603.05279) use this scale.
    """

    def check(self, format, scale_type):
        if format.high <= 0:
            raise ValueError(
                f"`scale` AbsMean needs a format with positive values; got {format}. "
                f"Use Integer(2) or MidRise(1)."
            )

    def part(self, x, axes, count):
        return _sum(lax.abs(x), x, axes, count)

    def end(self, format):
        return float(format.values[format.values > 0][0])

    def idempotent(self, format, scale_type=FULL):
        # With two levels, all values have one magnitude. With more, zeros lower the
        # mean.
        return len(format.values) == 2

    def __str__(self):
        return "absmean"


@dataclasses.dataclass(frozen=True)
class Gaussian(_Mean):
    """The scale with the least squared error if a group were normal with mean 0.

    scale = c * rms(x) / half the format's range, where `c` is the format's
    `gaussian_clip`: QuEST's published constants for its mid-rise grid
    (arXiv 2502.05003), and the minimizer of the closed-form error for other formats.
    """

    def part(self, x, axes, count):
        # `_sum` clamps the squares, which keeps compilers from contracting them with
        # the sum in one program and not in another.
        return _sum(lax.mul(x, x), x, axes, count)

    def bound(self, whole, count):
        return lax.sqrt(super().bound(whole, count))

    def end(self, format):
        return format.half_range / format.gaussian_clip

    def idempotent(self, format, scale_type=FULL):
        return False

    def __str__(self):
        return "gaussian"


def size_along(x: jax.Array, axes: tuple[int, ...]) -> int:
    """Returns the number of values in a group that spans `axes`."""
    return math.prod(x.shape[axis] for axis in axes)


def infinite_if_nan(x: jax.Array) -> jax.Array:
    """Turns NaN into infinity, because XLA for CPU drops NaN from large maxima.

    It does so without an infinity per element, which XLA would pass to a loop as an
    array.
    """
    magnitudes = from_magnitude_bits(magnitude_bits(x), x.dtype)
    return lax.select(lax.ne(x, x), magnitudes, x)


def _sum(sizes, x, axes, count):
    """Sums `sizes` over a part of `count` values; NaN where `x` is not finite."""
    if not isinstance(count, int):
        raise ValueError(
            f"`scale` must not be a mean over an axis of unknown length; got x.shape="
            f"{x.shape} and a mean over {count} values. Give the program a fixed "
            f"shape, or use AbsMax()."
        )
    most = float(jnp.finfo(x.dtype).max) / max(count, 1)
    # Clamping keeps the sum of huge values finite.
    sizes = finite(clamp(sizes, 0, most), x)
    return lax.expand_dims(lax.reduce_sum(sizes, axes), axes)
