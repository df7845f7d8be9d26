"""Quantizers: a format, the rule for its scales, and the gradient it passes."""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cage_jax.arrays.blocks import Blocks
from cage_jax.arrays.checks import check_choice, check_int, make_plain
from cage_jax.quantizers.axes import (
    CONTRACTED,
    Axis,
    WeightAxes,
    dividing_size,
    numbered,
)
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.scale_types import FULL, ScaleType
from cage_jax.quantizers.scales import AbsMax, ScaleRule

Gradient = Literal["identity", "clip", "trust"]
RoundingMode = Literal["nearest", "stochastic"]

_PARTS = {
    "format": (Format, "Integer(4)", "Use one of `cage_jax.formats`, or a preset."),
    "scale": (
        ScaleRule,
        "AbsMax()",
        "Use one of `cage_jax.scales`; a known scale is Fixed(value).",
    ),
    "scale_type": (ScaleType, "PowerOfTwo()", "Use one of `cage_jax.scale_types`."),
}


@dataclasses.dataclass(frozen=True, repr=False)
class Quantizer:
    """An immutable, hashable description of how an array is quantized.

    It holds no state and is not callable, so it is static under `jax.jit`, and
    `optax.inject_hyperparams` leaves it alone. Change a field with
    `dataclasses.replace`.

    Args:
      format: the values a code can take, such as `Integer(4)`.
      scale: where the grid lies in each group, such as `AbsMax()`. Scales are
        computed in float32 (float64 for float64 arrays) and are constants under
        differentiation.
      axis: the axis or axes that share a scale. "contracted" stands for those that the
        array's product sums over, which gives one scale per output channel: axis -2 of
        a matrix, such as the kernel (in, out) of a Dense layer; of more dimensions,
        those that `resolve` finds for a table of rules. None gives one scale per
        tensor: of more than two dimensions, one for each matrix of a stack, which the
        last two axes make unless `resolve` found other ones.
      group_size: how many neighbours along `axis` share a scale; None for all. For
        several axes, a tuple with one entry (or None) per axis. Contracted axes are
        divided as if they were one.
      scale_type: which numbers a scale can be, such as `PowerOfTwo()`.
      hadamard: block size of the Hadamard rotation, a power of two, or None for no
        rotation. Values are rotated along `axis`, the last of several, before
        quantization and rotated back afterwards.
      hadamard_seed: seed of random signs that multiply the values before the rotation,
        or None for no signs. The signs also spread a row that happens to look like a
        row of the Hadamard matrix.
      rounding: "nearest", or "stochastic", which rounds to one of the two neighbours
        so that the mean is the value. With "stochastic", `fake_quant` and `quantize`
        need a `key`. The error that CAGE uses is always that of rounding to nearest.
      gradient: which values pass their gradient straight through: "identity" all,
        "clip" those that lie within the grid (after the rotation, if any), "trust"
        also those at most half a step beyond it (the trust rule of QuEST).

    Attributes:
      has_codes: whether it has a grid and codes; only a `CodelessQuantizer` has none.

    Raises:
      TypeError, ValueError: if the arguments do not fit together.

    Example:
      >>> import cage_jax as cage
      >>> format, scale = cage.formats.Integer(4), cage.scales.AbsMax()
      >>> print(cage.Quantizer(format, scale, axis=0, group_size=32))
      int4 absmax, group 32 of axis 0, identity
    """

    format: Format
    scale: ScaleRule = AbsMax()
    _: dataclasses.KW_ONLY
    axis: Axis = CONTRACTED
    group_size: int | tuple[int | None, ...] | None = None
    scale_type: ScaleType = FULL
    hadamard: int | None = None
    hadamard_seed: int | None = None
    rounding: RoundingMode = "nearest"
    gradient: Gradient = "identity"
    has_codes = True

    def __post_init__(self):
        make_plain(self)
        for name, (kind, example, remedy) in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` must be a {kind.__name__} such as {example}; got "
                    f"{value!r}. {remedy}"
                )
        self._check_rotation()
        self._check_groups()
        check_choice("rounding", self.rounding, get_args(RoundingMode))
        remedy = "Use 'clip' where the scale cuts outliers."
        check_choice("gradient", self.gradient, get_args(Gradient), remedy)
        self.scale.check(self.format, self.scale_type)

    def _check_groups(self):
        axes, sizes = self._axes, self.group_sizes
        remedy = (
            "Use -2 for one scale per output channel of a (in, out) kernel, a tuple of "
            "ints for several axes, None for one scale per tensor, or 'contracted'."
        )
        for axis in () if self.axis == CONTRACTED else axes:
            check_int("axis", axis, remedy)
        if len(sizes) != len(axes):
            size = sizes[-1] if sizes else 128
            example = f"axis=-2, group_size={size}"
            if axes:
                example = f"group_size={(None,) * (len(axes) - 1) + (size,)}"
                example += ", where None is the whole axis"
            raise ValueError(
                f"`group_size` must have one entry for each axis; got group_size="
                f"{self.group_size}, axis={self.axis}. Use {example}, or "
                f"group_size=None for one scale per channel."
            )
        remedy = (
            "Use a divisor of the axis such as 128, or None for a scale per channel."
        )
        for size in sizes:
            if size is not None:
                check_int("group_size", size, remedy, least=1)

    def _check_rotation(self):
        block, seed = self.hadamard, self.hadamard_seed
        if block is None:
            if seed is not None:
                raise ValueError(
                    f"`hadamard_seed` has no effect without a rotation; got "
                    f"hadamard_seed={seed}, hadamard=None. Set `hadamard`, or leave "
                    f"the seed out."
                )
            return
        remedy = "Use a power of two such as 32, 64 or 128, or None for no rotation."
        check_int("hadamard", block, remedy, least=2)
        if block & (block - 1):
            raise ValueError(
                f"`hadamard` must be a power of two; got {block}. {remedy}"
            )
        if not self._axes:
            raise ValueError(
                f"`hadamard` rotates one axis; got axis={self.axis}. Name the "
                f"contracted axis, or use hadamard=None."
            )
        if seed is not None:
            check_int("hadamard_seed", seed, "Use 0.", least=0)

    @property
    def _axes(self) -> tuple:
        if self.axis is None:
            return ()
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    @property
    def group_sizes(self) -> tuple[int | None, ...]:
        """`group_size` of each axis in `axis`; empty if `axis` is None."""
        if isinstance(self.group_size, tuple):
            return self.group_size
        if self.group_size is None:
            return (None,) * len(self._axes)
        return (self.group_size,)

    @property
    def bits(self) -> int:
        """Width of one code."""
        return self.format.bits

    @property
    def asymmetric(self) -> bool:
        """Whether the grid has a zero point."""
        return self.scale.asymmetric

    @property
    def levels(self) -> int:
        """Number of values that a code can take."""
        return len(self.format.values)

    @property
    def symmetric(self) -> bool:
        """Whether quantizing `-x` gives the negative of quantizing `x`."""
        affine = self.scale.asymmetric or self.scale.has_offset
        return (self.format.symmetric or self.scale.signed) and not affine

    @property
    def idempotent(self) -> bool:
        """Whether quantizing quantized values again leaves them as they are.

        This holds up to rounding. If a quantizer is not idempotent, the weights drift
        under a long correction: see the norm drift in the statistics of
        `coupled`, and its `freeze_scale`.
        """
        if self.rounding != "nearest" or not self.scale_type.idempotent(self.format):
            return False
        return self.scale.idempotent(self.format, self.scale_type)

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def at(
        self, shape: tuple[int, ...], known: WeightAxes | None = None
    ) -> "Quantizer":
        """Returns this quantizer with axes by number, for an array of a given shape.

        Args:
          shape: shape of the array.
          known: the part of its axes in a product, or None.

        Raises:
          ValueError: if contracted axes are not known, and the array is no matrix.
        """
        return numbered(self, shape, known)

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def blocks(self, shape: tuple[int, ...]) -> Blocks:
        """Divides an array of a given shape into groups.

        Args:
          shape: shape of the array to quantize.

        Returns:
          `Blocks`, the same object for the same quantizer and shape.

        Raises:
          ValueError: if an axis is out of range, or a group or Hadamard block does not
            divide its axis.
        """
        quantizer = self.at(shape)
        if quantizer is not self:
            return quantizer.blocks(shape)
        sizes = self._sizes(shape)
        # A stack has leading axes, before both the shared axes and the last two. A
        # tensor spans all axes but these.
        first = min([*sizes, max(len(shape) - 2, 0)])
        tensor_axes, pieces = tuple(range(first, len(shape))), sizes
        if self.scale_type.has_tensor_divisor:
            pieces = {axis: shape[axis] for axis in tensor_axes}
        elif self.hadamard is not None:
            last = max(sizes)
            pieces = {**sizes, last: math.lcm(sizes[last], self.hadamard)}
        return Blocks(
            shape=shape,
            axes=tuple(sizes),
            sizes=tuple(sizes.values()),
            tensor_axes=tensor_axes,
            pieces=tuple(pieces.items()),
            rotated=self.hadamard is not None,
        )

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def basis(self, shape: tuple[int, ...]) -> Basis:
        """Returns the basis in which an array of a given shape is rounded."""
        if self.hadamard is None:
            return Basis()
        return Basis(self.hadamard, self.blocks(shape).axes[-1], self.hadamard_seed)

    def _sizes(self, shape):
        """Returns the length of a group along each shared axis, by ascending axis."""
        ndim = len(shape)
        if self.axis is None:
            return dict(enumerate(shape))
        groups = {}
        for axis, size in zip(self._axes, self.group_sizes):
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"`axis` must be within the dimensions of the array; got axis="
                    f"{axis} and shape {shape}. Scales are shared along it: "
                    f"use an axis from {-ndim} to {ndim - 1}, or axis=None for one "
                    f"scale per tensor. To leave parameters alone, put a line such as "
                    f"(r'.*bias', None) before this rule."
                )
            length = shape[axis]
            if axis % ndim in groups:
                raise ValueError(
                    f"`axis` must name each axis once; got axis={self.axis}, x.shape="
                    f"{shape}. Leave the repeated one out."
                )
            if size is not None and length % size:
                raise ValueError(
                    f"`group_size` must divide axis {axis} of `x`; got group_size="
                    f"{size}, x.shape={shape}. Use {dividing_size(size, (length,))}, "
                    f"or None for one scale per channel; where another axis is summed "
                    f"over, name that one, such as axis=(0, 1, 2) for a convolution."
                )
            rotated = axis % ndim == max(each % ndim for each in self._axes)
            if self.hadamard is not None and rotated and length % self.hadamard:
                largest = length & -length
                remedy = f"Use {largest} or less" if largest > 1 else "Use None"
                raise ValueError(
                    f"`hadamard` must divide axis {axis} of `x`; got hadamard="
                    f"{self.hadamard}, x.shape={shape}. {remedy}."
                )
            groups[axis % ndim] = length if size is None else size
        return dict(sorted(groups.items()))

    def storage_bits(
        self, shape: tuple[int, ...], scale_dtype: jax.typing.DTypeLike = jnp.float32
    ) -> int:
        """Counts the bits that store an array: its codes and everything in its grid.

        Args:
          shape: shape of the array.
          scale_dtype: dtype of scales that are stored as they are computed.
        """
        scale_bits = 8 * jnp.dtype(self.scale_type.dtype or scale_dtype).itemsize
        per_group = scale_bits * (2 if self.scale.has_offset else 1)
        per_group += self.bits if self.asymmetric else 0
        blocks = self.blocks(tuple(shape))
        bits = self.bits * math.prod(shape)
        bits += per_group * math.prod(blocks.scale_shape)
        if self.scale_type.has_tensor_divisor:
            wide = 8 * jnp.dtype(scale_dtype).itemsize
            bits += wide * math.prod(blocks.tensor_shape)
        return bits

    def __str__(self):
        parts = [f"{self.format} {self.scale}"]
        if self.axis is None:
            parts.append("per tensor")
        else:
            told = [] if self.group_size is None else [f"group {self.group_size}"]
            if self.axis != CONTRACTED:  # the default, which goes without saying
                told.append(f"axis {self.axis}")
            if told:
                parts.append(" of ".join(told))
        if str(self.scale_type):
            parts.append(str(self.scale_type))
        if self.hadamard is not None:
            signs = "" if self.hadamard_seed is None else " with random signs"
            parts.append(f"hadamard {self.hadamard}{signs}")
        if self.rounding != "nearest":
            parts.append(self.rounding)
        return ", ".join([*parts, self.gradient])

    def __repr__(self):
        return f"{type(self).__name__}({self})"


def check_has_codes(quantizer: Quantizer, name: str) -> None:
    """Raises ValueError for a quantizer without the codes that `name` needs."""
    if not quantizer.has_codes:
        raise ValueError(
            f"`{name}` needs a quantizer with a grid and codes of its own; got "
            f"{quantizer}. Use a preset of cage_jax, such as int4(), or do without "
            f"`{name}`."
        )
