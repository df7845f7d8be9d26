"""Rules whose grid is found once, and then learned or kept."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_number, make_plain
from cage_jax.arrays.exact import uncontracted
from cage_jax.quantizers.scale_types import (
    FULL,
    Full,
    Narrow,
    largest_of,
    of_the_size_of_weights,
)
from cage_jax.quantizers.scales.asymmetric import MinMax
from cage_jax.quantizers.scales.reduced import AbsMax, AbsMean
from cage_jax.quantizers.scales.rule import ScaleRule, where


@dataclasses.dataclass(frozen=True)
class Learned(ScaleRule):
    """A scale, and with `offset=True` an offset, trained beside the weights.

    In LSQ (arXiv 1902.08153), the gradient of the scale is that of
    `scale * round(x / scale)` with a straight-through round, times
    1 / sqrt(values in a group * highest value of the format). The scale starts at
    2 mean|x| / sqrt(highest value). LSQ+ (arXiv 2004.09576) adds an offset; scale and
    offset start so that the grid spans the values of the group.

    What is trained are float32 numbers, since steps of an optimizer are small. If the
    scale type is narrower, values are quantized with the nearest scale that it can
    store, and the gradient passes straight through this rounding.

    Args:
      offset: learn an offset too; scales are then float32, float16 or bfloat16.
      start: the rule whose scales are the first ones, such as `AbsMax()` or
        `Searched()`; None for those of the papers.
    """

    offset: bool = False
    start: ScaleRule | None = None
    learned = True
    needs_grid = True

    def __post_init__(self):
        make_plain(self)
        start = self.start
        if start is None:
            return
        if not isinstance(start, ScaleRule) or start.needs_grid:
            raise TypeError(
                f"`start` must be a rule that finds a scale in data; got {start!r}. "
                f"Use AbsMax() or Searched(), or None for the start of LSQ."
            )
        if self.offset or start.asymmetric or start.has_offset or start.signed:
            raise ValueError(
                f"`start` must give positive scales alone, and no offset is learned "
                f"with it; got start={start}, offset={self.offset}. Use AbsMax() or "
                f"Searched(), or None with an offset."
            )

    def check(self, format, scale_type):
        if format.high <= 0:
            raise ValueError(
                f"`scale` Learned needs a format with positive values; got {format}. "
                f"Use Integer(bits)."
            )
        if scale_type.rounds_by is not None:
            raise ValueError(
                f"`scale_type` of a learned scale must round values by the scale that "
                f"it stores; got {scale_type!r}. Use Narrow({scale_type.dtype.name!r})."
            )
        if self.offset and not isinstance(scale_type, Full | Narrow):
            raise ValueError(
                f"`scale_type` of a learned offset must hold numbers of both signs; "
                f"got {scale_type}. Use Full() or Narrow(), or learn a scale alone."
            )
        if self.start is not None:
            self.start.check(format, scale_type)

    @functools.cached_property
    def has_offset(self):  # type: ignore[override]
        return self.offset

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        if self.start is not None:
            return of_the_size_of_weights(
                self.start.fit(x, axes, format, scale_type, tensor_axes)
            )
        if not self.offset:
            bound = 2 * AbsMean().bounds(x, axes)
            found = FULL.store(bound, math.sqrt(format.high), format, tensor_axes)
            if not scale_type.has_tensor_divisor:
                return found
            one = jnp.ones_like(largest_of(found.scale, tensor_axes))
            return found._replace(tensor_divisor=one)
        span = MinMax(zero_point=False)
        found = span.fit(x, axes, format, FULL, tensor_axes)
        low = uncontracted(format.low * found.scale)
        return found._replace(offset=found.offset - low)

    def __str__(self):
        offset = " with an offset" if self.offset else ""
        return "learned" + offset + (f" from {self.start}" if self.start else "")


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
    needs_grid = True

    def __post_init__(self):
        make_plain(self)
        if not isinstance(self.rule, ScaleRule) or self.rule.needs_grid:
            raise TypeError(
                f"`rule` must be a rule that finds a scale in data; got {self.rule!r}. "
                f"Use AbsMax() or Percentile(99.9)."
            )
        if self.rule.signed:
            raise ValueError(
                f"`rule` must give positive scales, since batches differ in sign; got "
                f"{self.rule}. Use AbsMax()."
            )
        if self.decay is not None:
            remedy = "Use 0.9, or None for the widest."
            check_number("decay", self.decay, remedy, above=0, below=1)

    def check(self, format, scale_type):
        self.rule.check(format, scale_type)

    @functools.cached_property
    def asymmetric(self):  # type: ignore[override]
        return self.rule.asymmetric

    @functools.cached_property
    def has_offset(self):  # type: ignore[override]
        return self.rule.has_offset

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        return self.rule.fit(x, axes, format, scale_type, tensor_axes)

    def merged(self, before, now, format):
        if self.asymmetric or self.has_offset:
            ends = [
                self._combined(widest, _value_of(before, end), _value_of(now, end))
                for widest, end in (
                    (jnp.minimum, format.low),
                    (jnp.maximum, format.high),
                )
            ]
            found = self.rule.fit(jnp.stack(ends), (0,), format)
            found = jax.tree.map(lambda entry: entry[0], found)
        else:
            scale = self._combined(jnp.maximum, before.scale, now.scale)
            found = before._replace(scale=scale)
        known = where(now.scale == 0, before, found)
        return where(before.scale == 0, now, known)

    def _combined(self, widest, before, now):
        if self.decay is None:
            return widest(before, now)
        return self.decay * before + (1 - self.decay) * now

    def __str__(self):
        average = "" if self.decay is None else f", average of decay {self.decay:g}"
        return f"calibrated {self.rule}{average}"


def _value_of(grid, code):
    """Returns the value of a code."""
    code = code if grid.zero_point is None else code - grid.zero_point
    value = code * grid.step
    return value if grid.offset is None else value + grid.offset
