"""Scales of ternary weights: a threshold says which values are kept."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_number, make_plain
from cage_jax.arrays.exact import times
from cage_jax.quantizers.scale_types import FULL, Full
from cage_jax.quantizers.scales.reduced import AbsMean, size_along
from cage_jax.quantizers.scales.rule import ScaleRule


@dataclasses.dataclass(frozen=True)
class _TwiceThreshold(Full):
    """Twice the thresholds of `KeptMean`, the steps with which values are rounded."""


@dataclasses.dataclass(frozen=True)
class Thresholds(Full):
    """Scales as they are computed, where the thresholds of `KeptMean` round values."""

    rounds_by = _TwiceThreshold()


@dataclasses.dataclass(frozen=True)
class KeptMean(ScaleRule):
    """scale = mean of |x| over the values with |x| > threshold * mean|x|.

    Needs three levels, and `scale_type=Thresholds()`: all other values become zero.

    Args:
      threshold: in means of |x|.

    Source: Ternary Weight Networks, arXiv 1605.04711, equations 5 and 6.
    """

    threshold: float = 0.7

    def __post_init__(self):
        make_plain(self)
        check_number("threshold", self.threshold, "Use 0.7.", above=0, below=1)

    def check(self, format, scale_type):
        if format.values.tolist() != [-1, 0, 1] or not isinstance(
            scale_type, Thresholds
        ):
            raise ValueError(
                f"`scale` KeptMean needs the values -1, 0 and 1, and Thresholds as its "
                f"scale type; got {format}, {scale_type!r}. Use Quantizer(Integer(2), "
                f"KeptMean(), scale_type=Thresholds())."
            )

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        threshold = times(AbsMean().bounds(x, axes), self.threshold)
        if isinstance(scale_type, _TwiceThreshold):
            return scale_type.store(2 * threshold, 1.0, format, tensor_axes)
        kept = lax.abs(x) > threshold
        count = jnp.sum(kept, axes, x.dtype, keepdims=True)
        total = AbsMean().part(jnp.where(kept, x, 0), axes, size_along(x, axes))
        # Nothing is kept of zeros, nor of NaN, where the threshold is one.
        mean = total / jnp.maximum(count, 1)
        bound = jnp.where(jnp.isfinite(threshold), mean, jnp.nan)
        return scale_type.store(bound, 1.0, format, tensor_axes)

    def __str__(self):
        return f"mean of those above {self.threshold:g} mean"
