"""How far floats lie on a grid, as those of a checkpoint that was trained on one."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.exact import compute_dtype
from cage_jax.core.quantized_array import QuantizedArray, decoded, grid_of
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer

_FINE = ("bfloat16", "float16")  # dtypes of scales that round a scale only a little
_MOST_LEVELS = 32  # of formats whose scales are found by trying each level
_MOST_TRIED = 2**20  # values whose scales are looked for in a measurement


class OnGrid(NamedTuple):
    """How far floats lie on a grid.

    Attributes:
      share: share of the values that are on the grid, within the rounding of their
        dtype and of the scales.
      by_chance: share that would be there of values spread evenly between the levels.
        It is near 1 where the dtype is too coarse to tell, as bfloat16 is for 8 bits;
        0 with a rotation, where it is not known.
      values: largest number of different values in a group; 0 with a rotation.
      levels: number of levels of the grid.
      recovered: share that is on a grid of the same levels with the scales of
        `recovered_grid`, of about a million values; None where they were not looked
        for, since all are on the grid or the quantizer has more than scales.
    """

    share: float
    by_chance: float
    values: int
    levels: int
    recovered: float | None = None

    def __str__(self) -> str:
        chance = f" ({self.by_chance:.1%} by chance)" if self.by_chance else ""
        held = f", at most {self.values} values in a group" if self.values else ""
        text = f"{_percent(self.share)} on the grid of {self.levels} levels"
        if self.recovered is not None:
            held += f"; {_percent(self.recovered)} with other scales"
        return f"{text}{chance}{held}"


def _percent(share):
    """Formats a share, never as 100% if a part is missing."""
    return f"{np.floor(1000 * share) / 10:g}%"


def on_grid(floats: Any, codes: QuantizedArray, dtype: Any = None) -> OnGrid:
    """Measures how far floats lie on the grid of codes.

    Floats that were rounded to a dtype give scales that are a little off, so that a
    value may be two roundings away from the level that it stands for.

    Args:
      floats: an array of the shape of the codes.
      codes: what floats are rounded to: their own codes, or those of a training.
      dtype: the dtype to which the floats were rounded; None for their own.

    Returns:
      The share of values on the grid, and how many different ones a group has.
    """
    x = np.asarray(floats).astype(np.float64)
    quantizer, blocks = codes.quantizer, codes.quantizer.blocks(codes.shape)
    wide = dataclasses.replace(codes, dtype=compute_dtype(codes.dtype))
    levels = np.asarray(decoded(wide), np.float64)
    dtype = dtype or floats.dtype
    rounded = _rounding(dtype, codes.scale.dtype)
    slack, grid = rounded * np.abs(x), grid_of(codes)
    if grid.offset is not None:
        slack += 2 * rounded * np.abs(np.asarray(blocks.spread(grid.offset)))
    share = np.mean(np.abs(x - levels) <= slack)
    known = quantizer.format.values
    if quantizer.hadamard is not None:
        return OnGrid(float(share), 0.0, 0, len(known))
    gaps = _gaps(known, np.asarray(quantizer.format.decode(codes.codes, jnp.float32)))
    gaps = gaps * np.abs(np.asarray(blocks.spread(grid.step), np.float64))
    chance = np.mean(np.minimum(2 * slack, gaps)) / max(np.mean(gaps), 1e-300)
    groups, recovered = _groups(x, blocks), None
    if share < 1 and _has_scales_alone(quantizer):
        some = groups[:: 1 + groups.size // _MOST_TRIED]
        recovered = _recovered(some, quantizer, _rounding(dtype, np.float32))[1]
    # Many values of a group are equal, if it lies on a grid.
    different = np.diff(np.sort(groups, axis=-1), axis=-1) != 0
    values = 1 + int(different.sum(axis=-1).max())
    return OnGrid(float(share), float(chance), values, len(known), recovered)


def recovered_grid(x: Any, quantizer: Quantizer) -> Grid:
    """Finds the grid on which floats lie that were trained on one and never rounded.

    The scale rule of a quantizer need not find again the scales that it gave: those of
    full range, of means and of quantiles change what lies on the grid. This function
    tries each level for the largest value of a group, and takes the scale with which
    most values are on a level, within the rounding of their dtype. With it,
    `quantize(x, quantizer, grid=grid)` finds the codes of the training again, and
    scales as exact as the dtype of the values allows.

    Args:
      x: an array of floats; those of bfloat16 and float16 are off by their rounding.
      quantizer: a quantizer of at most 5 bits with scales alone: without zero points,
        offsets and rotations.

    Returns:
      A grid of float32 scales, to be given to `quantize`. A group of zeros has 0.

    Raises:
      ValueError: for another quantizer.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantizer = cage.ct_w4a16(axis=-1, group_size=4)
      >>> x = jnp.array([[0.25, -0.5, 1.5, 0.75]])  # 0.25 times 1, -2, 6 and 3
      >>> found = cage.quantize(x, quantizer)
      >>> bool((cage.dequantize(found) == x).all())
      False
      >>> grid = cage.export.recovered_grid(x, quantizer)
      >>> found = cage.quantize(x, quantizer, grid=grid)
      >>> bool((cage.dequantize(found) == x).all())
      True
    """
    if not _has_scales_alone(quantizer):
        raise ValueError(
            f"`quantizer` must have scales alone and at most {_MOST_LEVELS} levels; "
            f"got {quantizer}. Use the rule's own grid, which quantize finds."
        )
    dtype = getattr(x, "dtype", np.dtype(np.float32))
    x = np.asarray(x).astype(np.float64)
    quantizer = quantizer.at(x.shape)
    blocks = quantizer.blocks(x.shape)
    scale, _ = _recovered(_groups(x, blocks), quantizer, _rounding(dtype, np.float32))
    return Grid(jnp.asarray(scale.reshape(blocks.scale_shape), jnp.float32))


def _has_scales_alone(quantizer):
    return (
        not quantizer.asymmetric
        and quantizer.hadamard is None
        and not quantizer.scale.has_offset
        and not quantizer.scale_type.has_tensor_divisor
        and len(quantizer.format.values) <= _MOST_LEVELS
    )


def _recovered(groups, quantizer, rounded):
    """Returns the scales with which most values are on a level, and their share."""
    known = quantizer.format.values
    middles = (known[1:] + known[:-1]) / 2
    place = np.argmax(np.abs(groups), axis=-1, keepdims=True)
    largest = np.take_along_axis(groups, place, -1)
    most, scale = np.full(largest.shape, -1), np.zeros(largest.shape)
    for level in sorted(known[known != 0], key=abs):  # the widest steps first
        tried = largest / level
        codes = known[np.searchsorted(middles, groups / np.where(tried, tried, 1))]
        # A least-squares fit to all codes averages the roundings of the values.
        squares = np.sum(codes**2, axis=-1, keepdims=True)
        fitted = np.sum(groups * codes, axis=-1, keepdims=True)
        fitted /= np.where(squares, squares, 1)
        fits = np.abs(groups - fitted * codes) <= rounded * np.abs(groups)
        count = np.sum(fits, axis=-1, keepdims=True)
        better = (count > most) & (quantizer.scale.signed | (tried >= 0))
        most, scale = np.where(better, count, most), np.where(better, fitted, scale)
    return scale, float(most.sum() / groups.size)


def _groups(x, blocks):
    """Puts the values of each group in a row."""
    last = range(-len(blocks.split_axes), 0)
    moved = np.moveaxis(blocks.split(x), blocks.split_axes, last)
    return moved.reshape(-1, blocks.count)


def _rounding(dtype, scale_dtype):
    """Returns how far a value may be from its level, relative to the value."""
    rounded = _eps(dtype) + 2 * _eps(np.float32)
    fine = np.dtype(scale_dtype).name in _FINE
    return rounded + (_eps(scale_dtype) if fine else 0)


def _eps(dtype):
    return float(jnp.finfo(dtype).eps)


def _gaps(levels, values):
    """Returns the distance from each value to the level that is nearest to it."""
    apart = np.diff(levels)
    nearest = np.minimum(np.append(apart, apart[-1]), np.insert(apart, 0, apart[0]))
    return nearest[np.searchsorted(levels, values)]
