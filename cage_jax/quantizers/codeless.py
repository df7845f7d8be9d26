"""Quantizers without a grid and codes, such as those of other libraries."""

import abc
import dataclasses
from typing import Any

import jax

from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scales import ScaleRule


@dataclasses.dataclass(frozen=True)
class NoScale(ScaleRule):
    """The scale rule of a `CodelessQuantizer`, which fits no grid."""

    def fit(self, x, axes, format, *args):
        """Raises `TypeError`: there is no grid."""
        raise TypeError("a quantizer without codes fits no grid; use its `fake_quant`")


@dataclasses.dataclass(frozen=True, repr=False)
class CodelessQuantizer(Quantizer, abc.ABC):
    """A quantizer that finds the quantized values itself, without a grid and codes.

    Rules, `fake_quant`, the error and the correction work with it. What needs a grid or
    codes asks `check_has_codes`. A subclass is a frozen dataclass with these methods;
    its format is None, and its axes mean nothing.
    """

    format: Any = None
    scale: ScaleRule = NoScale()
    axis: tuple[int, ...] = ()
    has_codes = False

    def __post_init__(self):
        """Checks nothing: all fields of `Quantizer` have their defaults."""

    @abc.abstractmethod
    def fake_quant(self, x: jax.Array) -> jax.Array:
        """Returns the quantized values of `x`, in its dtype, float32 or float64."""

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Width of one code where the values are stored at last."""

    @property
    @abc.abstractmethod
    def idempotent(self) -> bool:
        """Whether quantizing quantized values again leaves them as they are."""

    @abc.abstractmethod
    def storage_bits(self, shape, scale_dtype=None) -> int:
        """Counts the bits that store an array, with all scales."""

    @abc.abstractmethod
    def __str__(self) -> str: ...
