"""Rules with a zero point or an offset."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.exact import clamp, divide
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scale_types import FULL
from cage_jax.quantizers.scales.reduced import infinite_if_nan
from cage_jax.quantizers.scales.rule import ScaleRule


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

    @functools.cached_property
    def asymmetric(self):  # type: ignore[override]
        return self.zero_point

    @functools.cached_property
    def has_offset(self):  # type: ignore[override]
        return not self.zero_point

    @functools.cached_property
    def ignores_zeros(self):  # type: ignore[override]
        return self.zero_point

    def part(self, x, axes, count=None):
        """Computes the ends of a part of each group, the upper one first."""
        # The range of a float offset need not hold zero.
        initial = 0 if self.zero_point else None
        top = jnp.max(infinite_if_nan(x), axis=axes, keepdims=True, initial=initial)
        return top, jnp.min(x, axis=axes, keepdims=True, initial=initial)

    def joined(self, one, other):
        """Combines the ends of two parts."""
        return lax.max(one[0], other[0]), lax.min(one[1], other[1])

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        return self.stored(self.part(x, axes), None, format, scale_type, tensor_axes)

    def stored(self, whole, count, format, scale_type=FULL, tensor_axes=()):
        """Returns the grid of groups whose ends are known."""
        top, bottom = whole
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
        offset = jnp.where(jnp.isfinite(bottom), offset.astype(bottom.dtype), jnp.nan)
        return stored._replace(offset=offset)

    def clips(self, format):
        return False

    def __str__(self):
        return "minmax" if self.zero_point else "minmax with an offset"
