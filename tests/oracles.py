"""What quantization has to find, in float64 NumPy. Written once, for all tests.

Nothing here calls the code under test: of quantizers it reads what they consist of.
"""

import types

import ml_dtypes
import numpy as np
import scipy.linalg

from cage_jax.quantizers.formats import Codebook, Float, Integer, MidRise
from cage_jax.quantizers.scale_types import Float8, Full, Narrow, PowerOfTwo
from cage_jax.quantizers.scales import (
    AbsMax,
    AbsMean,
    Fixed,
    Gaussian,
    MinMax,
    SignedMax,
)

EPS = float(np.finfo(np.float32).eps)

# QuEST's published clipping points, and the minimum for the three levels of int2.
GAUSSIAN_CLIP = {
    Integer(2): 1.2240063747,
    MidRise(1): 0.7978845587,
    MidRise(2): 1.4935346200,
    MidRise(3): 2.0510683541,
    MidRise(4): 2.5139305786,
}
_FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
# Half a step above the largest mantissa of a format.
_TURNS = {"e2m1": 1.75, "e3m2": 1.875}


def hadamard(size):
    """The orthonormal Hadamard matrix of Sylvester's construction, (size, size)."""
    return scipy.linalg.hadamard(size) / np.sqrt(size)


def rotate(x, block, axis=-2):
    """Rotates each block of an axis; a `block` of None leaves `x` as it is."""
    x = np.asarray(x, np.float64)
    if block is None:
        return x
    moved = np.moveaxis(x, axis, -1)
    turned = moved.reshape(*moved.shape[:-1], -1, block) @ hadamard(block)
    return np.moveaxis(turned.reshape(moved.shape), -1, axis)


def absmax_scale(x, top=7, group=None, axis=-2):
    """The symmetric absmax scale of each weight's group, in the shape of `x`.

    Args:
      x: weights.
      top: the largest code, 7 for int4.
      group: how many neighbours along `axis` share a scale; None for all of them.
      axis: along which weights share scales.
    """
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    group = group or moved.shape[-1]
    largest = np.abs(moved.reshape(*moved.shape[:-1], -1, group)).max(-1)
    return np.moveaxis(largest.repeat(group, -1) / top, -1, axis)


def absmax_round(x, top=7, group=None, axis=-2):
    """`x` rounded to the grid of `absmax_scale`, ties to even."""
    scale = absmax_scale(x, top, group, axis)
    return np.round(np.asarray(x, np.float64) / scale) * scale


def shared_axes(quantizer, ndim):
    """The axes that share a scale, from 0: by number, or the inputs of a matrix, or
    without any those of the matrices of a stack."""
    axes = quantizer.axis
    if axes == "contracted":
        assert ndim == 2
        axes = -2
    if axes is None:
        axes = range(max(ndim - 2, 0), ndim)
    axes = [axes] if isinstance(axes, int) else axes
    return [axis % ndim for axis in axes]


def rotated_axis(quantizer, ndim):
    """The axis of a rotation; any where there is none."""
    return -1 if quantizer.hadamard is None else shared_axes(quantizer, ndim)[-1]


def group_slices(shape, quantizer):
    """The index of each group's scale, and the slices of its values."""
    axes = shared_axes(quantizer, len(shape))
    sizes = quantizer.group_size
    sizes = sizes if isinstance(sizes, tuple) else [sizes] * len(axes)
    lengths = [1] * len(shape)
    for axis, size in zip(axes, sizes):
        lengths[axis] = shape[axis] if size is None else size
    for index in np.ndindex(*(n // k for n, k in zip(shape, lengths))):
        yield index, tuple(slice(i * k, i * k + k) for i, k in zip(index, lengths))


def spread(of_groups, shape, quantizer):
    """One entry a group, repeated over the values of the group."""
    of_groups, full = np.asarray(of_groups).astype(np.float64), np.zeros(shape)
    for index, part in group_slices(shape, quantizer):
        full[part] = of_groups[index]
    return full


def levels_of(format):
    """The values of a format in ascending order, and their codes."""
    top = 2 ** (format.bits - 1)
    match format:
        case MidRise():
            return np.arange(-top, top) + 0.5, np.arange(-top, top)
        case Integer(signed=False):
            return np.arange(2 * top) + 0.0, np.arange(-top, top)
        case Integer():
            levels = np.arange(-top + format.narrow, top)
            return levels + 0.0, levels
        case Float(name):
            every = np.arange(2 * top, dtype=np.uint8).view(_FLOATS[name])
            levels = np.unique(every.astype(np.float64))
            levels = levels[np.isfinite(levels)]
            return levels, levels
        case Codebook(levels):
            return np.array(levels), np.arange(len(levels)) - top


def quantized(x, quantizer):
    """What `x` is quantized to, group by group.

    Args:
      x: an array of finite numbers.
      quantizer: of any format and scale type; a rule that needs no grid.

    Returns:
      With these attributes, arrays in the shape of `x` unless said otherwise:
        nearest: the level each value goes to.
        levels, codes: of the format, see `levels_of`.
        tie: whether a value can go either way in float32.
        scale, zero_point, offset: as they are stored.
        tensor_divisor: a number.
        passes: where the gradient passes, in the rotated basis.
        value: a function from levels to values.
        size: the largest value, a number.
    """
    axis = rotated_axis(quantizer, np.ndim(x))
    x = rotate(x, quantizer.hadamard, axis)
    format, rule = quantizer.format, quantizer.scale
    levels, codes = levels_of(format)
    bounds = _tensor_bounds(x, quantizer)
    names = ("position", "nearest", "scale", "zero_point", "offset")
    parts = {name: np.zeros(x.shape) for name in names}
    gaps, tensor_divisor = np.zeros(x.shape), 1.0
    for _, part in group_slices(x.shape, quantizer):
        group = x[part]
        bound, end = _bound(group, rule, format, levels)
        ideal, scale, tensor_divisor = _stored(bound, end, quantizer, levels, bounds)
        zero = offset = origin = 0.0
        if rule == MinMax(zero_point=True):
            place = levels[0] - min(group.min(), 0) / scale
            zero = np.clip(np.round(place), levels[0], levels[-1])
        elif rule == MinMax(zero_point=False):
            origin = group.min()
            offset = np.float64(np.float16(origin))
        position = (group - origin) / ideal + zero
        distances = np.abs(position[..., None] - levels)
        two = np.sort(distances)[..., :2]
        gaps[part] = two[..., 1] - two[..., 0]
        if rule == MinMax(zero_point=True):  # which can be halfway itself
            gaps[part] = np.minimum(gaps[part], 2 * abs(abs(place - zero) - 0.5))
        values = position, levels[distances.argmin(-1)], scale, zero, offset
        for name, value in zip(names, values):
            parts[name][part] = value
    found = types.SimpleNamespace(**parts)
    # Ties are taken up to the rounding of a position in float32: that of the scale, of
    # a quotient, and of a rotation where there is one.
    top, last = 2 ** (format.bits - 1), np.abs(levels).max()
    reach = max(top, 4) if isinstance(format, (Integer, MidRise)) else last
    if isinstance(format, Float):
        reach = np.minimum(np.abs(found.position), last)
    edge = 0.5 if quantizer.gradient == "trust" else 0.0
    # An end of the grid belongs to it, however float32 rounds the position there.
    slack = 8 * EPS * top
    low, high = levels[0] - edge - slack, levels[-1] + edge + slack
    passes = (low <= found.position) & (found.position <= high)
    if quantizer.gradient == "identity":
        passes[:] = True

    def value(levels):
        steps = found.scale / tensor_divisor
        flat = (levels - found.zero_point) * steps + found.offset
        return rotate(flat, quantizer.hadamard, axis)

    found.levels, found.codes, found.tie = levels, codes, gaps < 40 * EPS * reach
    found.tensor_divisor, found.passes, found.value = tensor_divisor, passes, value
    found.size = np.abs(x).max()
    return found


def masked(tangent, passes, quantizer):
    """A gradient where it passes, in the basis of the quantizer."""
    block, axis = quantizer.hadamard, rotated_axis(quantizer, np.ndim(tangent))
    return rotate(passes * rotate(tangent, block, axis), block, axis)


def _bound(group, rule, format, levels):
    """What lies at the end of the grid, and that end in units of the scale."""
    half_range, sizes = (levels[-1] - levels[0]) / 2, np.abs(group)
    match rule:
        case AbsMax(clip):
            return clip * sizes.max(), half_range
        case Gaussian():
            return GAUSSIAN_CLIP[format] * np.sqrt(np.mean(group**2)), half_range
        case AbsMean():
            return sizes.mean(), levels[levels > 0][0]
        case SignedMax():
            return -group.ravel()[sizes.argmax()], -levels[0]
        case Fixed(scale):
            return scale, 1.0
        case MinMax(zero_point):
            low, high = group.min(), group.max()
            if zero_point:
                low, high = min(low, 0), max(high, 0)
            # Float32 as the rule takes the difference, for the sake of narrow scales.
            return np.float64(np.float32(high - low)), 2 * half_range


def _stored(bound, end, quantizer, levels, bounds):
    """The scale that values are rounded by, that which is stored, and the divisor."""
    ideal = bound / end
    match quantizer.scale_type:
        case Full():
            return ideal, ideal, 1.0
        case Narrow(name, unrounded):
            dtype = np.float16 if name == "float16" else ml_dtypes.bfloat16
            scale = np.float64(np.float32(ideal).astype(dtype))
            return (ideal if unrounded else scale), scale, 1.0
        case PowerOfTwo("up"):
            scale = 2.0 ** np.ceil(np.log2(ideal))
        case PowerOfTwo(rounding):
            power = np.floor(np.log2(bound))
            if rounding == "nearest":
                power += bound >= _TURNS[quantizer.format.name] * 2**power
            scale = 2.0 ** (power - np.floor(np.log2(levels[-1])))
        case Float8(tensor_divisor):
            divisor = 448 * end / max(bounds) if tensor_divisor else 1.0
            scale = np.float32(ideal * divisor).astype(ml_dtypes.float8_e4m3fn)
            scale = max(np.float64(scale), 2.0**-9)
            return scale / divisor, scale, divisor
    return scale, scale, 1.0


def _tensor_bounds(x, quantizer):
    """The bound of each group."""
    if not isinstance(quantizer.scale_type, Float8):
        return []
    return [np.abs(x[part]).max() for _, part in group_slices(x.shape, quantizer)]
