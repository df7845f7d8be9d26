"""Axes of an array that share a scale, by number or by their part in a product."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from cage_jax.quantizers.quantizer import Quantizer

Axis = int | tuple[int, ...] | Literal["contracted"] | None
CONTRACTED: Literal["contracted"] = "contracted"


class WeightAxes(NamedTuple):
    """The part that each axis of a parameter has in its product.

    Attributes:
      contracted: axes that the product sums over, ascending, from 0; empty if they are
        not known.
      stack: axes that number matrices of their own, such as layers or experts.
    """

    contracted: tuple[int, ...]
    stack: tuple[int, ...] = ()


class UnknownAxesError(ValueError):
    """The contracted axes of an array are not known."""


def numbered(
    quantizer: "Quantizer", shape: tuple[int, ...], known: WeightAxes | None = None
) -> "Quantizer":
    """Returns the quantizer with axes by number, for an array of a given shape.

    Args:
      quantizer: any quantizer; one with axes by number is returned as it is.
      shape: shape of the array.
      known: what is known about its axes, or None.

    Raises:
      ValueError: for contracted axes that are not known, of an array that is no matrix,
        and for groups that do not divide them.
    """
    ndim = len(shape)
    if quantizer.axis == CONTRACTED:
        axes = known.contracted if known else ()
        if not axes and ndim == 2:
            axes = (0,)
        if not axes:
            raise UnknownAxesError(_unknown_text(quantizer, shape))
    elif quantizer.axis is None and ndim > 2:
        stack = known.stack if known else range(ndim - 2)
        axes = tuple(axis for axis in range(ndim) if axis not in stack)
    else:
        return quantizer
    size = quantizer.group_size
    from_end = tuple(axis - ndim for axis in axes)
    if len(axes) == 1:
        return dataclasses.replace(quantizer, axis=from_end[0])
    if size is not None:
        size = _divided(quantizer, shape, axes)
    return dataclasses.replace(quantizer, axis=from_end, group_size=size)


def from_the_end(quantizer: "Quantizer", ndim: int) -> "Quantizer":
    """Returns the quantizer with axes that are the same in a row of a stack."""
    axes = quantizer.axis
    if isinstance(axes, tuple):
        axes = tuple(axis % ndim - ndim for axis in axes)
    elif isinstance(axes, int):
        axes = axes % ndim - ndim
    return dataclasses.replace(quantizer, axis=axes)


def dividing_size(size: int, lengths: tuple[int, ...]) -> int:
    """Returns the largest size up to `size` that divides axes as if they were one."""
    return next(n for n in range(size, 0, -1) if _sizes(n, lengths))


def _divided(quantizer, shape, axes):
    """Divides a group among several axes: neighbours as if the axes were one."""
    lengths, size = tuple(shape[axis] for axis in axes), quantizer.group_size
    if found := _sizes(size, lengths):
        return found
    raise ValueError(
        f"`group_size` must divide axis {axes[-1]} of `x`, or be a number of whole "
        f"rows along it that divides the axis before, and so on; got group_size="
        f"{size}, x.shape={shape}, axes {axes}. Use {dividing_size(size, lengths)}, "
        f"or None for one scale per channel."
    )


def _sizes(size, lengths):
    """Returns the length of a group along each axis, or None if it does not divide."""
    found = []
    for length in reversed(lengths):
        part = math.gcd(size, length)
        if part not in (size, length):
            return None
        found.append(part)
        size //= part
    return tuple(reversed(found)) if size == 1 else None


def _unknown_text(quantizer, shape):
    if len(shape) < 2:
        return (
            f"`axis` must be within the dimensions of the array; got axis='contracted' "
            f"(the default of most presets) and shape {shape}. Leave the parameter "
            f"alone by a line such as (r'.*bias', None) before this rule, or use "
            f"axis=-1 or axis=None for one scale."
        )
    return (
        f"`axis` must be known for an array of more than two dimensions; got axis="
        f"'contracted' (the default of most presets), shape {shape}. Find the axes "
        f"that its product sums over with rules = cage.resolve(rules, function, "
        f"params, x), or name them, such as axis=-2 for a stack of (in, out) matrices "
        f"and axis=(0, 1, 2) for a convolution."
    )
