"""What a kernel has to find, in float64 NumPy: all groups of an array at once."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles

import cage_jax as cage
from cage_jax import scale_types, scales


class Oracle:
    """What the kernel has to find, in float64.

    Attributes:
      values: of the array.
      step: the distance between two levels, for each element.
      margin: of each element, how far it is from where it would be rounded otherwise,
        in steps.
      passes: where the gradient passes.
      edge: how far each element is from where that changes, in steps.
    """

    def __init__(self, x, quantizer):
        x = np.float64(x)
        (axis,) = oracles.shared_axes(quantizer, x.ndim)
        (size,) = quantizer.blocks(x.shape).sizes
        rotated = rotate(x, quantizer)
        groups = in_groups(rotated, axis, size)
        format = quantizer.format
        stored = self._scales(groups, quantizer)
        step = out_of_groups(np.broadcast_to(stored, groups.shape), axis, x.shape)
        zero = 0.0
        if isinstance(quantizer.scale, scales.MinMax):
            lowest = np.minimum(groups.min(-1, keepdims=True), 0)
            zero = np.round(format.low - lowest / stored)
            zero = np.clip(zero, format.low, format.high)
            zero = out_of_groups(np.broadcast_to(zero, groups.shape), axis, x.shape)
        position = rotated / step + zero
        levels = format.values
        middles = (levels[1:] + levels[:-1]) / 2
        index = np.searchsorted(middles, position)
        self.margin = np.abs(position[..., None] - middles).min(-1)
        self.values = rotate((levels[index] - zero) * step, quantizer)
        self.step = step
        slack = format.edge if quantizer.gradient == "trust" else 0
        low, high = format.low - slack, format.high + slack
        self.passes = (low <= position) & (position <= high)
        self.edge = np.minimum(np.abs(position - low), np.abs(position - high))

    @staticmethod
    def _scales(groups, quantizer):
        format, rule = quantizer.format, quantizer.scale
        size = np.abs(groups)
        if isinstance(rule, scales.AbsMax):
            scale = size.max(-1) * rule.clip / ((format.high - format.low) / 2)
        elif isinstance(rule, scales.MinMax):
            ends = np.maximum(groups.max(-1), 0), np.minimum(groups.min(-1), 0)
            scale = (ends[0] - ends[1]) / (format.high - format.low)
        elif isinstance(rule, scales.AbsMean):
            scale = size.mean(-1) / format.values[format.values > 0][0]
        else:
            half = (format.high - format.low) / 2
            scale = np.sqrt((size**2).mean(-1)) * format.gaussian_clip / half
        kind = quantizer.scale_type
        if isinstance(kind, scale_types.PowerOfTwo):
            power = np.floor(np.log2(size.max(-1)))
            scale = 2.0 ** (power - np.floor(np.log2(format.high)))
        elif isinstance(kind, scale_types.Float8):
            divisor = 1.0
            if kind.has_tensor_divisor:  # one for each of the last two axes
                axes = tuple(range(groups.ndim - 3, groups.ndim - 1))
                divisor = 448 / scale.max(axes, keepdims=True)
            scale = np.float32(scale * divisor).astype(ml_dtypes.float8_e4m3fn)
            scale = np.maximum(np.float64(scale), 2.0**-9) / divisor
        return scale[..., None]


def rotate(x, quantizer):
    """`x` in the basis of a quantizer of one axis, or back."""
    return oracles.rotate(
        x, quantizer.hadamard, oracles.rotated_axis(quantizer, x.ndim)
    )


def in_groups(x, axis, size):
    """`x` with the elements of each group along the last axis."""
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, size)


def out_of_groups(groups, axis, shape):
    """The array of `shape` that has these groups."""
    moved = list(shape)
    moved.append(moved.pop(axis))
    return np.moveaxis(groups.reshape(moved), -1, axis)


def checked(x, quantizer, values, mask):
    """The same values and mask, if they are what the quantizer makes of `x`."""
    assert values.dtype == x.dtype and mask.dtype == jnp.int8
    oracle = Oracle(x, quantizer)
    # A sum of 128 float32 numbers, thrice in three parts: where an element is nearer
    # than that to a tie, any neighbour will do.
    decided = oracle.margin > 1e-5
    assert decided.mean() > 0.95
    error = np.abs(rotate(np.float64(values) - oracle.values, quantizer))
    dtype = 2.0**-8 if x.dtype == jnp.bfloat16 else 2.0**-22
    room = dtype * np.abs(oracle.values).max() * (12 if quantizer.hadamard else 1)
    wrong = error > room + 1e-5 * oracle.step
    assert not (wrong & decided).any()
    assert (error <= 1.01 * np.diff(quantizer.format.values).max() * oracle.step
            + room).all()  # fmt: skip
    clear = oracle.edge > 1e-4
    np.testing.assert_array_equal((mask != 0)[clear], oracle.passes[clear])
    return values, mask


def check_kernel(kernel, x, quantizer):
    """Compares a kernel with float64 NumPy, and to the bit with the form of XLA.

    Sums are in another order in a kernel: without them both forms are the same. The
    kernel is called with `x`, with three numbers that are not finite, and with zeros.

    Args:
      kernel: from an array like `x` to values and a mask.
      x: NumPy numbers (..., 32 rows or more, 32 columns or more).
      quantizer: of one axis.
    """
    values, mask = checked(x, quantizer, *map(np.asarray, kernel(jnp.asarray(x))))
    sums = isinstance(quantizer.scale, scales.Gaussian | scales.AbsMean)
    if x.dtype == np.float32 and not sums and quantizer.hadamard is None:

        @jax.jit
        def default(x):
            values, back = jax.vjp(
                lambda x: cage.fake_quant(x, quantizer, implementation="xla"), x
            )
            return values, *back(jnp.ones_like(x))

        expected, passed = default(x)
        np.testing.assert_array_equal(values, expected)
        if quantizer.gradient != "identity":
            np.testing.assert_array_equal(mask, passed)
    spoilt, (rows, columns) = x.copy(), x.shape[-2:]
    places = (rows // 4, 5), (rows // 3, columns // 2), (rows - 9, columns - 7)
    for place, number in zip(places, (np.nan, np.inf, -np.inf)):
        spoilt.reshape(-1, rows, columns)[-1][place] = number
    found = np.isnan(np.float32(kernel(jnp.asarray(spoilt))[0]))
    # A rotation spreads one over its block, and so over all groups of the block.
    size = math.lcm(*quantizer.blocks(x.shape).sizes, quantizer.hadamard or 1)
    (axis,) = oracles.shared_axes(quantizer, x.ndim)
    groups = in_groups(~np.isfinite(np.float32(spoilt)), axis, size)
    nan = np.broadcast_to(groups.any(-1, keepdims=True), groups.shape)
    nan = out_of_groups(nan, axis, x.shape)
    assert nan.sum() == 3 * size
    np.testing.assert_array_equal(found, nan)
    zeros = np.float32(kernel(jnp.zeros(x.shape, x.dtype))[0])
    assert not zeros.any() and not np.signbit(zeros).any()
