"""Rounding one array to its grid and back: rotate, fit each group's grid, round, scale.

Codes and values must be equal, to the bit, in every program. In one program and not in
another, compilers contract a product and a sum into one operation, turn division by a
broadcast into a product, and gather constants. So this module takes divisions by a
scale and sums after a product from `exact`, except where a product is exact anyway.

Only `fit_grid` divides an array into groups. The other functions keep its shape and
spread the grid instead, so that they fuse with the operations around them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.exact import clamp, divide, rounded, times
from cage_jax.arrays.hadamard import transform
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scales import Grid, ReducedScale, compute_dtype

# Rounded values, rotated back, pass from `fit_for_error` to `error_from` in this dtype.
_WHOLE = jnp.dtype("int16")


@functools.partial(jax.jit, static_argnums=1)
def fit_grid(x: jax.Array, quantizer: Quantizer, grid: Grid | None = None) -> Grid:
    """Finds the grid of `x` by the scale rule; its arrays have the shape of the scales.

    Args:
      x: an array of real floats.
      quantizer: how it is quantized.
      grid: a grid to keep wherever its scale is not 0 and the group is finite.

    Returns:
      A `Grid` in the dtype of computation.
    """
    return fit_in_basis(in_basis(x, quantizer), quantizer, grid)


def fit_for_error(
    x: jax.Array, quantizer: Quantizer, grid: Grid | None = None
) -> tuple[Grid, jax.Array | None]:
    """Computes the part of `x - fake_quant(x)` that is not elementwise in `x`.

    Returns:
      The grid, which keeps `grid` as in `fit_grid`. With a rotation, also the rounded
      values rotated back, not yet scaled, in the narrowest dtype that is exact;
      otherwise None.
    """
    x = lax.stop_gradient(x)
    if quantizer.hadamard is None:
        return fit_grid(x, quantizer, grid), None
    values, _, grid = fit_and_round(x, quantizer, grid)
    turned_back = turn_back(values, quantizer, grid, x.shape)
    if step := _whole_step(quantizer, x.shape):
        turned_back = (turned_back / step).astype(_WHOLE)
    return grid, turned_back


@functools.partial(jax.jit, static_argnums=1)
def error_from(
    x: jax.Array, quantizer: Quantizer, grid: Grid, turned_back: jax.Array | None
) -> jax.Array:
    """Computes `x - fake_quant(x)` elementwise from the results of `fit_for_error`."""
    x, grid = lax.stop_gradient((x, grid))
    if turned_back is None:
        values = round_in_basis(x, quantizer, grid)
        turned_back = turn_back(values, quantizer, grid, x.shape)
    elif step := _whole_step(quantizer, x.shape):
        turned_back = turned_back.astype(x.dtype) * step
    # Written as `x - x * (code / t)` with `t = x / step`, XLA for GPU would make one
    # kernel of this and the fit where groups lie in the last axis, but only in a
    # program that does nothing else. A norm or an optimizer step fuses with the form
    # used here, and would move one to five more copies of the array with the other.
    return x - apply_scale(turned_back, quantizer, grid, x)


def fit_and_round(x, quantizer, grid, noise=None):
    """Returns the rounded values of `x`, `x` in their basis, and their grid."""
    transformed = in_basis(x, quantizer)
    grid = fit_in_basis(transformed, quantizer, grid)
    return round_in_basis(transformed, quantizer, grid, noise), transformed, grid


def in_basis(x, quantizer):
    """Casts `x` to the dtype of computation and rotates it, up to `basis_factor`."""
    x = x.astype(compute_dtype(x.dtype))
    if quantizer.hadamard is None:
        return x
    (axis,) = quantizer.blocks(x.shape).axes
    return transform(_signed(x, quantizer, axis), quantizer.hadamard, axis)


def back_from_basis(x, quantizer):
    """Applies the transpose of `in_basis`, its inverse up to `basis_factor` squared."""
    if quantizer.hadamard is None:
        return x
    (axis,) = quantizer.blocks(x.shape).axes
    return _signed(transform(x, quantizer.hadamard, axis), quantizer, axis)


def _signed(x, quantizer, axis):
    """Multiplies by the random signs, if any, which vary along `axis` alone."""
    if quantizer.hadamard_seed is None:
        return x
    drawn = np.random.default_rng(quantizer.hadamard_seed).integers(0, 2, x.shape[axis])
    along = [1] * x.ndim
    along[axis] = -1
    signs = jnp.asarray(2 * drawn.reshape(along) - 1, x.dtype)
    return x * jnp.broadcast_to(signs, x.shape)


def basis_factor(quantizer):
    """Returns the factor that makes the unscaled transform a rotation."""
    return 1.0 if quantizer.hadamard is None else quantizer.hadamard**-0.5


def fit_in_basis(transformed, quantizer, grid, **known):
    """Does `fit_grid` for the result of `in_basis`; `known` goes on to the rule."""
    blocks = quantizer.blocks(transformed.shape)
    if quantizer.scale.needs_grid and grid is not None:
        # A learned scale that is not positive has no meaning. NaN makes that visible.
        grid = jax.tree.map(lambda part: part.astype(transformed.dtype), grid)
        return grid._replace(scale=jnp.where(grid.scale > 0, grid.scale, jnp.nan))
    scale, format, scale_type = quantizer.scale, quantizer.format, quantizer.scale_type
    sized = times(transformed, basis_factor(quantizer))
    if isinstance(scale, ReducedScale):
        part = functools.partial(scale.part, count=blocks.count)
        whole = blocks.reduce(part, sized, ignores_zeros=True)
        axes = blocks.tensor_axes
        fitted = scale.stored(whole, blocks.count, format, scale_type, axes, **known)
    else:
        axes = blocks.split_tensor_axes
        fitted = blocks.reduce(
            lambda x, groups: scale.fit(x, groups, format, scale_type, axes),
            sized,
            ignores_zeros=scale.ignores_zeros and not scale_type.has_tensor_divisor,
        )
    return fitted if grid is None else _kept(grid, fitted, blocks)


def _kept(grid, fitted, blocks):
    """Returns `grid`, but `fitted` where the scale is 0 and in groups with a NaN."""
    unknown = (grid.scale == 0) | jnp.isnan(fitted.scale)
    # The divisor of a tensor is replaced only together with all of its scales.
    each = enumerate(zip(blocks.scale_shape, blocks.tensor_shape))
    axes = [axis for axis, (groups, tensors) in each if groups != tensors]
    all_unknown = jnp.all(unknown, axis=axes, keepdims=True)
    # A given grid may lack these; then it rounds by the numbers it stores.
    grid = grid._replace(
        inverse=1 / grid.step if grid.inverse is None else grid.inverse,
        origin=grid.offset if grid.origin is None else grid.origin,
    )
    return fitted._replace(
        **{
            name: jnp.where(
                all_unknown if name == "tensor_divisor" else unknown,
                found,
                getattr(grid, name).astype(found.dtype),
            )
            for name, found in fitted._asdict().items()
            if found is not None
        }
    )


def round_in_basis(transformed, quantizer, grid, noise=None):
    """Rounds the result of `in_basis` to values of the grid, in units of the grid."""
    format, position = quantizer.format, position_of(transformed, quantizer, grid)
    if noise is None:
        return format.round(position)
    below, above = format.neighbours(position)
    up = noise * (above - below) < position - below
    return jnp.where(up, above, below)


def position_of(transformed, quantizer, grid):
    """Converts the result of `in_basis` to units of the grid."""
    spread = quantizer.blocks(transformed.shape).spread
    transformed = _from_origin(transformed, quantizer, grid)
    if grid.inverse is None:
        position = divide(transformed, spread(grid.step / basis_factor(quantizer)))
        # This changes no value, but lets compilers divide and round in one pass.
        position = rounded(position)
    else:
        position = rounded(transformed * spread(grid.inverse * basis_factor(quantizer)))
    if grid.zero_point is not None:
        position = position + spread(grid.zero_point)
    return position


def passes(transformed, quantizer, grid):
    """Returns the mask of the values that receive a gradient."""
    format = quantizer.format
    # With absmax each group has a value at the very end of the grid. It must not fall
    # off the grid because the division by the scale rounds.
    widest = max(abs(format.low), format.high)
    slack = 4 * float(jnp.finfo(transformed.dtype).eps) * widest
    if quantizer.gradient == "trust":
        slack += format.edge
    return is_inside(transformed, quantizer, grid, slack)


def is_inside(transformed, quantizer, grid, beyond):
    """Returns the mask of values within the grid, or at most `beyond` units outside.

    It avoids the division where it can: a compiler would not compute this in one pass
    with the rounding if both shared the quotient.
    """
    spread = quantizer.blocks(transformed.shape).spread
    ends = quantizer.format.low - beyond, quantizer.format.high + beyond
    if grid.inverse is not None:
        position = position_of(transformed, quantizer, grid)
        return lax.eq(clamp(position, *ends), position)
    transformed = _from_origin(transformed, quantizer, grid)
    step = times(grid.step, 1 / basis_factor(quantizer))
    if ends[0] == -ends[1] and grid.zero_point is None:
        return lax.le(lax.abs(transformed), spread(lax.abs(times(step, ends[1]))))
    zero = 0 if grid.zero_point is None else grid.zero_point
    one, other = ((end - zero) * step for end in ends)
    low, high = spread(jnp.minimum(one, other)), spread(jnp.maximum(one, other))
    return lax.le(low, transformed) & lax.le(transformed, high)


def _from_origin(transformed, quantizer, grid):
    origin = grid.offset if grid.origin is None else grid.origin
    if origin is None:
        return transformed
    origin = origin / basis_factor(quantizer)
    return transformed - quantizer.blocks(transformed.shape).spread(origin)


def restore(values, quantizer, grid, like):
    """Dequantizes rounded values to the shape and dtype of `like`."""
    return apply_scale(
        turn_back(values, quantizer, grid, like.shape), quantizer, grid, like
    )


def turn_back(values, quantizer, grid, shape, back=None):
    """Rotates rounded values back to the basis of `x`; `apply_scale` does the rest.

    A function `back` can replace `back_from_basis`.
    """
    back = back or back_from_basis
    spread = quantizer.blocks(shape).spread
    if grid.zero_point is not None:
        values = values - spread(grid.zero_point)
    if quantizer.hadamard is None:
        return values
    if scaled_last(quantizer, shape):
        return back(values, quantizer)
    product = rounded(values * spread(grid.step))
    if grid.offset is not None:
        product = product + spread(grid.offset)
    return back(product, quantizer)


def apply_scale(turned_back, quantizer, grid, like):
    """Scales the result of `turn_back` and casts it to the dtype of `like`."""
    factor = basis_factor(quantizer)
    if not scaled_last(quantizer, like.shape):
        return rounded(times(turned_back, factor)).astype(like.dtype)
    spread = quantizer.blocks(like.shape).spread
    product = rounded(lax.mul(turned_back, spread(times(grid.step, factor))))
    if grid.offset is not None:
        product = product + spread(grid.offset)
    return product.astype(like.dtype)


def scaled_last(quantizer, shape):
    """Returns whether small integers are rotated back, exactly, and then scaled."""
    block = quantizer.hadamard
    if block is None:
        return True
    whole = all(size % block == 0 for size in quantizer.blocks(shape).sizes)
    return whole and not quantizer.scale.has_offset


def _whole_step(quantizer, shape):
    """Returns the step whose multiples `_WHOLE` holds after rotating back, or None."""
    format, block = quantizer.format, quantizer.hadamard
    if format.step is None or not scaled_last(quantizer, shape):
        return None
    widest = max(-format.low, format.high)
    if quantizer.asymmetric:
        widest = format.high - format.low
    fits = block * widest / format.step <= jnp.iinfo(_WHOLE).max
    return format.step if fits else None
