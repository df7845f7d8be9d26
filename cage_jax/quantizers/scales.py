"""Scale rules: how the grid of a group of values is found.

A rule reduces each group of an array to a `Grid`. It is an immutable, hashable
description, so that a `Quantizer` made of it can be static under `jit`.

A scale must be equal, to the bit, in every program that computes it: training,
evaluation, export. Constants are therefore folded here, to one operation each, because
a compiler may fold them in one program and not in another.
"""

import abc
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.exact import clamp, divide, finite, power_below, rounded
from cage_jax.quantizers.formats import Format, Integer
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.scale_types import FULL, Full, ScaleType


@dataclasses.dataclass(frozen=True)
class ScaleRule(abc.ABC):
    """Reduces groups of values to their grid."""

    @abc.abstractmethod
    def fit(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        format: Format,
        scale_type: ScaleType = FULL,
        tensor_axes: tuple[int, ...] = (),
    ) -> Grid:
        """Finds the grid of each group of `x`.

        Args:
          x: float32 or float64.
          axes: the axes that a group spans; they are kept with size 1.
          format: the format whose codes the groups will be rounded to.
          scale_type: which numbers a scale can be.
          tensor_axes: the axes that a tensor spans, for scale types with one more
            scale per tensor.

        Returns:
          A `Grid`. An all-zero group gets scale 1 (or the smallest normal number if
          the format has no zero, so that zeros stay close to zero). A group with a
          NaN or an infinity gets a NaN scale, so all of its values become NaN.
        """

    def check(self, format: Format, scale_type: ScaleType) -> None:
        """Raises ValueError if the rule does not suit the format or scale type."""

    @property
    def asymmetric(self) -> bool:
        """Whether the rule gives a zero point."""
        return False

    @property
    def has_offset(self) -> bool:
        """Whether the rule gives an offset."""
        return False

    @property
    def signed(self) -> bool:
        """Whether the scale takes the sign of the group."""
        return False

    @property
    def learned(self) -> bool:
        """Whether the grid is trained, starting from the one that the rule finds."""
        return False

    @property
    def needs_grid(self) -> bool:
        """Whether quantizing needs a grid that was found before."""
        return self.learned

    @property
    def ignores_zeros(self) -> bool:
        """Whether adding zeros to each group leaves the result of `fit` unchanged."""
        return False

    @property
    def finds_values(self) -> bool:
        """Whether the rule finds the quantized values and not a grid that can be kept.

        This is so for the quantizers of other libraries.
        """
        return False

    def merged(self, before: Grid, now: Grid, format: Format) -> Grid:
        """Combines the grids of two batches; a scale of 0 means no data.

        By default the first grid that has data is kept.
        """
        return _where(before.scale == 0, now, before)

    @abc.abstractmethod
    def clips(self, format: Format) -> bool:
        """Returns whether values of a group can lie beyond the ends of its grid."""

    @abc.abstractmethod
    def idempotent(self, format: Format) -> bool:
        """Returns whether fitting quantized values gives the same grid again."""


@dataclasses.dataclass(frozen=True)
class ReducedScale(ScaleRule):
    """A rule that reduces a group to one number, which can be computed in parts."""

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

    def bounds(self, x, axes):
        """Computes the value at `end` of the grid for each group of `x`."""
        count = _count(x, axes)
        return self.bound(self.part(x, axes, count), count)

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=(), largest=None):
        count = _count(x, axes)
        whole = self.part(x, axes, count)
        return self.stored(whole, count, format, scale_type, tensor_axes, largest)


@dataclasses.dataclass(frozen=True)
class AbsMax(ReducedScale):
    """scale = clip * max|x| / half the format's range; `clip` below 1 cuts outliers."""

    clip: float = 1.0

    def __post_init__(self):
        _check_positive(self.clip, "clip", "Use 1.0 to keep every value in range.")

    def part(self, x, axes, count):
        return _largest(x, axes)

    def joined(self, one, other):
        return lax.max(one, other)

    def bound(self, whole, count):
        return whole

    def end(self, format):
        return format.half_range / self.clip

    def clips(self, format):
        return self.clip < 1 or format.high < format.half_range

    def idempotent(self, format):
        return self.clip == 1 and format.low == -format.high

    def __str__(self):
        return "absmax" if self.clip == 1 else f"absmax clip {self.clip:g}"


@dataclasses.dataclass(frozen=True)
class SignedMax(ScaleRule):
    """scale = value of largest magnitude / lowest value of the format.

    The value of largest magnitude, whatever its sign, gets the code without a
    counterpart, such as -8 for 4 bits. The scale is negative if that value is positive.
    If two values have the largest magnitude and opposite signs, the first one counts.
    GGUF's Q4_0 uses this rule.
    """

    def check(self, format, scale_type):
        if format.low >= 0:
            raise ValueError(
                f"`scale` SignedMax needs a format with negative values; got format "
                f"{format}. Use Integer(bits, narrow=False)."
            )
        if not scale_type.signed:
            raise ValueError(
                f"`scale` SignedMax needs a scale type with a sign; got scale_type "
                f"{scale_type}. Use Narrow() or Full()."
            )

    @property
    def signed(self):
        return True

    @property
    def ignores_zeros(self):
        return True

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        size = _largest(x, axes)
        place = functools.reduce(
            lambda outer, axis: (
                outer * x.shape[axis] + lax.broadcasted_iota(jnp.int32, x.shape, axis)
            ),
            axes,
            jnp.zeros(x.shape, jnp.int32),
        )
        never = jnp.int32(_count(x, axes))

        def first(sign):
            found = jnp.where(x == sign * size, place, never)
            return jnp.min(found, axis=axes, keepdims=True, initial=never)

        bound = jnp.where(first(-1) < first(1), size, -size)
        return scale_type.store(bound, -format.low, format, tensor_axes)

    def clips(self, format):
        return True

    def idempotent(self, format):
        return True

    def __str__(self):
        return "signed max"


@dataclasses.dataclass(frozen=True)
class AbsMean(ReducedScale):
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

    def joined(self, one, other):
        return lax.add(one, other)

    def bound(self, whole, count):
        return _mean(whole, count)

    def end(self, format):
        return float(format.values[format.values > 0][0])

    def clips(self, format):
        return True

    def idempotent(self, format):
        # With two levels, all values have one magnitude. With more, zeros lower the
        # mean.
        return len(format.values) == 2

    def __str__(self):
        return "absmean"


@dataclasses.dataclass(frozen=True)
class Percentile(ScaleRule):
    """AbsMax with the smallest bound that `percent` % of the values do not exceed."""

    percent: float = 99.9

    def __post_init__(self):
        _check_positive(self.percent, "percent", "Use 99.9.")
        if self.percent > 100:
            raise ValueError(
                f"`percent` must be at most 100; got {self.percent}. Use AbsMax() to "
                f"keep every value in range."
            )

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        bound = jnp.percentile(
            jnp.abs(x), self.percent, axis=axes, keepdims=True, method="higher"
        )
        bound = jnp.where(jnp.isfinite(_largest(x, axes)), bound, jnp.nan)
        bound = bound.astype(x.dtype)
        return scale_type.store(bound, format.half_range, format, tensor_axes)

    def clips(self, format):
        return self.percent < 100 or format.high < format.half_range

    def idempotent(self, format):
        return self.percent == 100 and format.low == -format.high

    def __str__(self):
        return f"percentile {self.percent:g}"


@dataclasses.dataclass(frozen=True)
class Searched(ScaleRule):
    """AbsMax with the clip of least squared error, searched for in each group.

    The clip is one of `count` numbers between `least` and 1. Each group is quantized
    `count` times, so this is slow. It suits weights that are rounded after training,
    and grids that are found once.
    """

    count: int = 40
    least: float = 0.2

    def __post_init__(self):
        if isinstance(self.count, bool) or not isinstance(self.count, int):
            raise TypeError(f"`count` must be an int; got {self.count!r}. Use 40.")
        if self.count < 2:
            raise ValueError(f"`count` must be at least 2; got {self.count}. Use 40.")
        _check_positive(self.least, "least", "Use 0.2.")
        if self.least >= 1:
            raise ValueError(f"`least` must be below 1; got {self.least}. Use 0.2.")

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        largest = _largest(x, axes)
        power = jnp.where(jnp.isfinite(largest), _positive(power_below(largest)), 1)
        # Errors are measured in units of this power of two, so no square overflows. `x`
        # itself is not scaled, because a tensor's divisor depends on all groups.
        unit = jnp.broadcast_to(power, x.shape)

        def stored(clip):
            end = format.half_range
            return scale_type.store(largest * clip, end, format, tensor_axes)

        def error(clip):
            found = stored(clip)
            steps = jnp.broadcast_to(found.step, x.shape)
            value = rounded(format.round(divide(x, steps)) * steps)
            square = rounded(jnp.square(divide(x - value, unit)))
            return jnp.sum(square, axis=axes, keepdims=True)

        def better(best, clip):
            least, kept = best
            found = error(clip)
            return (
                jnp.where(found < least, found, least),
                jnp.where(found < least, clip, kept),
            ), None

        clips = jnp.linspace(1, self.least, self.count, dtype=x.dtype)
        start = jnp.full_like(largest, jnp.inf), jnp.ones_like(largest)
        (_, clip), _ = lax.scan(better, start, clips)
        return stored(clip)

    def clips(self, format):
        return True

    def idempotent(self, format):
        # Clip 1 has no error on quantized values, unless the grid has uneven ends.
        return format.low == -format.high

    def __str__(self):
        return f"searched among {self.count}"


@dataclasses.dataclass(frozen=True)
class Gaussian(ReducedScale):
    """The scale with the least squared error if a group were normal with mean 0.

    scale = c * rms(x) / half the format's range, where `c` is the format's
    `gaussian_clip`: QuEST's published constants for its mid-rise grid
    (arXiv 2502.05003), and the minimizer of the closed-form error for other formats.
    """

    def part(self, x, axes, count):
        # `_sum` clamps the squares, which keeps compilers from contracting them with
        # the sum in one program and not in another.
        return _sum(lax.mul(x, x), x, axes, count)

    def joined(self, one, other):
        return lax.add(one, other)

    def bound(self, whole, count):
        return lax.sqrt(_mean(whole, count))

    def end(self, format):
        return format.half_range / format.gaussian_clip

    def clips(self, format):
        return True

    def idempotent(self, format):
        return False

    def __str__(self):
        return "gaussian"


@dataclasses.dataclass(frozen=True)
class Fixed(ScaleRule):
    """A given scale; dividing by a power of two is exact."""

    scale: float

    def __post_init__(self):
        _check_positive(self.scale, "scale", "Use the distance between two levels.")

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        bound = jnp.where(jnp.isfinite(_largest(x, axes)), self.scale, jnp.nan)
        bound = bound.astype(x.dtype)
        return scale_type.store(bound, 1.0, format, tensor_axes)

    def clips(self, format):
        return True

    def idempotent(self, format):
        return True

    def __str__(self):
        return f"fixed {self.scale:g}"


@dataclasses.dataclass(frozen=True)
class MinMax(ScaleRule):
    """An asymmetric rule: the format's range spans the range of the group.

    scale = (max - min) / (high - low).

    Args:
      zero_point: True widens the range to hold zero and rounds the zero point, so that
        zero is exact. False gives code 0 the minimum as a float offset (the rule of
        GGUF's Q4_1).
    """

    zero_point: bool = True

    def check(self, format, scale_type):
        if not self.zero_point:
            if not isinstance(format, Integer) or format.signed:
                raise ValueError(
                    f"`scale` MinMax(zero_point=False) needs unsigned integers; got "
                    f"format {format}. Use Integer(bits, narrow=False, signed=False)."
                )
        elif not isinstance(format, Integer) or format.symmetric:
            raise ValueError(
                f"`scale` MinMax needs an integer format of full range; got format "
                f"{format}. Use Integer(bits, narrow=False), or AbsMax()."
            )

    @property
    def asymmetric(self):
        return self.zero_point

    @property
    def has_offset(self):
        return not self.zero_point

    @property
    def ignores_zeros(self):
        return self.zero_point

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        # The range of a float offset need not hold zero.
        initial = 0 if self.zero_point else None
        top = jnp.max(_infinite_if_nan(x), axis=axes, keepdims=True, initial=initial)
        bottom = jnp.min(x, axis=axes, keepdims=True, initial=initial)
        end = 2 * format.half_range
        # Where the difference overflows, take the difference of the quotients.
        wide = jnp.isfinite(top) & jnp.isfinite(bottom) & jnp.isinf(top - bottom)
        ends = jnp.full_like(top, end)
        halves = divide(top, ends) - divide(bottom, ends)
        bound = jnp.where(wide, halves, divide(top - bottom, ends))
        stored = scale_type.store(bound, 1.0, format, tensor_axes)
        if self.zero_point:
            zero_point = format.low - divide(bottom, stored.step)
            zero_point = clamp(jnp.round(zero_point), format.low, format.high)
            return stored._replace(zero_point=zero_point)
        offset = bottom
        if scale_type.dtype is not None:
            largest = float(jnp.finfo(scale_type.dtype).max)
            offset = jnp.clip(bottom, -largest, largest).astype(scale_type.dtype)
        offset = jnp.where(jnp.isfinite(bottom), offset.astype(x.dtype), jnp.nan)
        return stored._replace(offset=offset)

    def clips(self, format):
        return False

    def idempotent(self, format):
        return True

    def __str__(self):
        return "minmax" if self.zero_point else "minmax with an offset"


@dataclasses.dataclass(frozen=True)
class Learned(ScaleRule):
    """A scale, and with `offset=True` an offset, trained beside the weights.

    In LSQ (arXiv 1902.08153), the gradient of the scale is that of
    `scale * round(x / scale)` with a straight-through round, times
    1 / sqrt(values in a group * highest value of the format). The scale starts at
    2 mean|x| / sqrt(highest value). LSQ+ (arXiv 2004.09576) adds an offset; scale and
    offset start so that the grid spans the values of the group.
    """

    offset: bool = False

    def check(self, format, scale_type):
        if format.high <= 0:
            raise ValueError(
                f"`scale` Learned needs a format with positive values; got {format}. "
                f"Use Integer(bits)."
            )
        if not isinstance(scale_type, Full):
            raise ValueError(
                f"`scale_type` of a learned scale must be Full(), since steps of an "
                f"optimizer are small; got {scale_type}. Round what is learned when it "
                f"is shipped."
            )

    @property
    def has_offset(self):
        return self.offset

    @property
    def learned(self):
        return True

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        if not self.offset:
            count = _count(x, axes)
            bound = 2 * _mean(_sum(lax.abs(x), x, axes, count), count)
            end = math.sqrt(format.high)
            return scale_type.store(bound, end, format, tensor_axes)
        span = MinMax(zero_point=False)
        found = span.fit(x, axes, format, scale_type, tensor_axes)
        low = rounded(format.low * found.scale)
        return found._replace(offset=found.offset - low)

    def clips(self, format):
        return True

    def idempotent(self, format):
        return True

    def __str__(self):
        return "learned" + (" with an offset" if self.offset else "")


@dataclasses.dataclass(frozen=True)
class Calibrated(ScaleRule):
    """A grid that another rule finds once, in the data given to `calibrate`.

    Args:
      rule: the rule that finds the grid of each batch.
      decay: None keeps the widest grid of all batches. A number gives a moving average,
        in which the earlier batches have the weight `decay`.
    """

    rule: ScaleRule = dataclasses.field(default_factory=AbsMax)
    decay: float | None = None

    def __post_init__(self):
        if not isinstance(self.rule, ScaleRule) or self.rule.needs_grid:
            raise TypeError(
                f"`rule` must be a rule that finds a scale in data; got {self.rule!r}. "
                f"Use AbsMax() or Percentile(99.9)."
            )
        if self.decay is not None:
            _check_positive(self.decay, "decay", "Use 0.9, or None for the widest.")
            if self.decay >= 1:
                raise ValueError(
                    f"`decay` must be below 1; got {self.decay}. Use 0.9, or None for "
                    f"the widest."
                )

    def check(self, format, scale_type):
        self.rule.check(format, scale_type)

    @property
    def asymmetric(self):
        return self.rule.asymmetric

    @property
    def has_offset(self):
        return self.rule.has_offset

    @property
    def signed(self):
        return self.rule.signed

    @property
    def needs_grid(self):
        return True

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        return self.rule.fit(x, axes, format, scale_type, tensor_axes)

    def merged(self, before, now, format):
        if self.asymmetric or self.has_offset:
            ends = [
                self._of(widest, _value_of(before, end), _value_of(now, end))
                for widest, end in (
                    (jnp.minimum, format.low),
                    (jnp.maximum, format.high),
                )
            ]
            found = self.rule.fit(jnp.stack(ends), (0,), format)
            found = jax.tree.map(lambda entry: entry[0], found)
        else:
            scale = self._of(jnp.maximum, before.scale, now.scale)
            found = before._replace(scale=scale)
        known = _where(now.scale == 0, before, found)
        return _where(before.scale == 0, now, known)

    def _of(self, widest, before, now):
        if self.decay is None:
            return widest(before, now)
        return self.decay * before + (1 - self.decay) * now

    def clips(self, format):
        return True

    def idempotent(self, format):
        return True

    def __str__(self):
        average = "" if self.decay is None else f", average of decay {self.decay:g}"
        return f"calibrated {self.rule}{average}"


def _where(condition, grid, other):
    return jax.tree.map(functools.partial(jnp.where, condition), grid, other)


def _value_of(grid, code):
    """Returns the value of a code."""
    code = code if grid.zero_point is None else code - grid.zero_point
    value = code * grid.step
    return value if grid.offset is None else value + grid.offset


def _largest(x, axes):
    sizes = _infinite_if_nan(lax.abs(x))
    return jnp.max(sizes, axis=axes, keepdims=True, initial=0)


def _infinite_if_nan(x):
    """Turns NaN into infinity, because XLA for CPU drops NaN from large maxima.

    It does so without an infinity per element, which XLA would pass to a loop as an
    array.
    """
    word = np.dtype(f"int{8 * x.dtype.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(word)[()]
    # Read as integers, the bits of NaN are above those of infinity.
    bits = lax.clamp(word.type(0), lax.bitcast_convert_type(lax.abs(x), word), infinity)
    return lax.select(lax.ne(x, x), lax.bitcast_convert_type(bits, x.dtype), x)


def _positive(power):
    return jnp.where(power == 0, 1, power)


def _count(x, axes):
    return math.prod(x.shape[axis] for axis in axes)


def _sum(sizes, x, axes, count):
    """Sums `sizes` over a part of `count` values; NaN where `x` is not finite."""
    if not isinstance(count, int):
        raise ValueError(
            f"`scale` must be no mean over an axis of any length; got x.shape="
            f"{x.shape} and a mean over {count} values. Give the program a fixed "
            f"shape, or use AbsMax()."
        )
    most = float(jnp.finfo(x.dtype).max) / max(count, 1)
    # Clamping keeps the sum of huge values finite.
    sizes = finite(clamp(sizes, 0, most), x)
    return lax.expand_dims(lax.reduce_sum(sizes, axes), axes)


def _mean(total, count):
    return lax.div(total, total.dtype.type(count))


def _check_positive(value, name, remedy):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number; got {value!r}. {remedy}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite; got {value}. {remedy}")
