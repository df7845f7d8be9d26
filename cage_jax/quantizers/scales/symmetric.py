"""Rules without a zero point or an offset, other than those in `reduced.py`."""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_int, check_number, make_plain
from cage_jax.arrays.exact import divide, power_below, times, uncontracted
from cage_jax.quantizers.formats import Float
from cage_jax.quantizers.scale_types import FULL, largest_of
from cage_jax.quantizers.scales.reduced import largest_magnitude, size_along
from cage_jax.quantizers.scales.rule import ScaleRule


@dataclasses.dataclass(frozen=True)
class SignedMax(ScaleRule):
    """scale = value of largest magnitude / lowest value of the format.

    The value of largest magnitude, whatever its sign, gets the code without a
    counterpart, such as -8 for 4 bits. The scale is negative if that value is positive.
    If two values have the largest magnitude and opposite signs, the first one counts.
    GGUF's Q4_0 uses this rule.
    """

    signed = True
    ignores_zeros = True

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

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        size = largest_magnitude(x, axes)
        place = functools.reduce(
            lambda outer, axis: (
                outer * x.shape[axis] + lax.broadcasted_iota(jnp.int32, x.shape, axis)
            ),
            axes,
            jnp.zeros(x.shape, jnp.int32),
        )
        never = jnp.int32(size_along(x, axes))

        def first(sign):
            found = jnp.where(x == sign * size, place, never)
            return jnp.min(found, axis=axes, keepdims=True, initial=never)

        bound = jnp.where(first(-1) < first(1), size, -size)
        return scale_type.store(bound, -format.low, format, tensor_axes)

    def __str__(self):
        return "signed max"


@dataclasses.dataclass(frozen=True)
class Percentile(ScaleRule):
    """AbsMax with the smallest bound that `percent` % of the values do not exceed."""

    percent: float = 99.9

    def __post_init__(self):
        make_plain(self)
        remedy = "Use 99.9, or AbsMax() to keep all values in range."
        check_number("percent", self.percent, remedy, above=0, most=100)

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        bound = jnp.percentile(
            jnp.abs(x), self.percent, axis=axes, keepdims=True, method="higher"
        )
        bound = jnp.where(jnp.isfinite(largest_magnitude(x, axes)), bound, jnp.nan)
        bound = bound.astype(x.dtype)
        return scale_type.store(bound, format.half_range, format, tensor_axes)

    def clips(self, format):
        return self.percent < 100 or format.high < format.half_range

    def idempotent(self, format, scale_type=FULL):
        return self.percent == 100 and format.low == -format.high

    def __str__(self):
        return f"percentile {self.percent:g}"


class _LeastSquares(ScaleRule):
    """AbsMax with the clip of least squared error, the first one if several have it.

    Attributes:
      room: the largest bound of a tensor, in units of its largest magnitude, that must
        not saturate where a tensor has one more scale. This scale is the same for all
        clips, so that errors are those of the scales that are stored.
    """

    room: float

    @abc.abstractmethod
    def clips_tried(self, dtype: np.dtype) -> jax.Array:
        """Returns the clips to choose from."""

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        largest = largest_magnitude(x, axes)
        power = power_below(largest)
        power = jnp.where(jnp.isfinite(largest) & (power != 0), power, 1)
        # Errors are measured in units of this power of two, so no square overflows. `x`
        # itself is not scaled, because a tensor's divisor depends on all groups.
        unit = jnp.broadcast_to(power, x.shape)
        whole = None
        if scale_type.has_tensor_divisor:
            whole = uncontracted(times(largest_of(largest, tensor_axes), self.room))

        def stored(clip):
            end = format.half_range
            return scale_type.store(largest * clip, end, format, tensor_axes, whole)

        def error(clip):
            found = stored(clip)
            steps = jnp.broadcast_to(found.step, x.shape)
            value = uncontracted(format.round(divide(x, steps)) * steps)
            square = uncontracted(jnp.square(divide(x - value, unit)))
            return jnp.sum(square, axis=axes, keepdims=True)

        def better(best, clip):
            least, kept = best
            found = error(clip)
            return (
                jnp.where(found < least, found, least),
                jnp.where(found < least, clip, kept),
            ), None

        start = jnp.full_like(largest, jnp.inf), jnp.ones_like(largest)
        (_, clip), _ = lax.scan(better, start, self.clips_tried(x.dtype))
        return stored(clip)


@dataclasses.dataclass(frozen=True)
class Searched(_LeastSquares):
    """AbsMax with the clip of least squared error, searched for in each group.

    The clip is one of `count` numbers from `most` to `least`. Each group is quantized
    `count` times, so this is slow. It suits weights that are rounded after training,
    and grids that are found once. Errors are those of scales as they are stored: for
    E4M3 scales a count of 100 with `most=2` tries each that can be stored, down to 0.3
    times the one of absmax.
    """

    count: int = 40
    least: float = 0.2
    most: float = 1.0

    def __post_init__(self):
        make_plain(self)
        check_int("count", self.count, "Use 40.", least=2)
        check_number("least", self.least, "Use 0.2.", above=0, below=1)
        remedy = "Use 1.0, or 2.0 for floats, whose largest values lie far apart."
        check_number("most", self.most, remedy, least=1)

    @property
    def room(self):  # type: ignore[override]
        return self.most

    def clips_tried(self, dtype):
        return jnp.linspace(self.most, self.least, self.count, dtype=dtype)

    def idempotent(self, format, scale_type=FULL):
        # Clip 1 has no error on quantized values, unless the grid has uneven ends. The
        # largest values of a tensor may be clipped, and all of its scales change then.
        return format.low == -format.high and not scale_type.has_tensor_divisor

    def __str__(self):
        most = "" if self.most == 1 else f" up to {self.most:g}"
        return f"searched among {self.count}{most}"


@dataclasses.dataclass(frozen=True)
class FourOverSix(_LeastSquares):
    """AbsMax at 6 or at 4 of FP4, whichever has the smaller squared error in a group.

    Between 4 and 6 FP4 has no value, so groups with several large values prefer 4. The
    scale of a tensor's largest magnitude is stored as 256 or 384. With
    `nvfp4(scale=FourOverSix())` files and programs for NVFP4 take the result as it is.

    Source: Four Over Six, arXiv 2512.02010.
    """

    room = 1.75

    def check(self, format, scale_type):
        if format != Float("e2m1"):
            raise ValueError(
                f"`scale` FourOverSix needs the format Float('e2m1'), which has 4 and "
                f"6; got {format}. Use nvfp4(scale=FourOverSix()), or Searched()."
            )

    def clips_tried(self, dtype):
        return jnp.array([1, 1.5], dtype)

    def clips(self, format):
        return False

    def __str__(self):
        return "four over six"


@dataclasses.dataclass(frozen=True)
class Fixed(ScaleRule):
    """A given scale; dividing by a power of two is exact."""

    scale: float

    def __post_init__(self):
        make_plain(self)
        remedy = "Use the distance between two levels."
        check_number("scale", self.scale, remedy, above=0)

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        bound = jnp.where(jnp.isfinite(largest_magnitude(x, axes)), self.scale, jnp.nan)
        bound = bound.astype(x.dtype)
        return scale_type.store(bound, 1.0, format, tensor_axes)

    def __str__(self):
        return f"fixed {self.scale:g}"
