"""Rounding one array to its grid and back: rotate, fit each group's grid, round, scale.

There is one route for values, codes, errors and gradients::

    array -> rounding(x, quantizer) -> code_values -> dequantized, or the format's codes
                                    -> gradient_mask

Codes and values must be equal, to the bit, in every program. In one program and not in
another, compilers contract a product and a sum into one operation, turn division by a
broadcast into a product, and gather constants. So this module takes divisions by a
scale and sums after a product from `exact`, except where a product is exact anyway.

Only `fit` divides an array into groups. The other functions keep its shape and spread
the grid instead, so that they fuse with the operations around them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.exact import clamp, divide, times, uncontracted
from cage_jax.quantizers.codeless import CodelessQuantizer
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer

# Rounded values, rotated back, pass from the reductions to the elementwise part of an
# error in this dtype.
_NARROW = jnp.dtype("int16")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rotated", "grid", "rounding_grid"),
    meta_fields=("quantizer",),
)
@dataclasses.dataclass(frozen=True)
class Rounding:
    """An array on its way to the grid; made by `rounding`.

    Attributes:
      rotated: the array in the basis of its quantizer, without the basis's factor.
      grid: the grid of its groups.
      rounding_grid: the grid that values are rounded by, where it is not `grid` (GGUF);
        otherwise None.
      quantizer: the quantizer.
    """

    rotated: jax.Array
    grid: Grid
    rounding_grid: Grid | None
    quantizer: Quantizer

    def code_values(self, noise: jax.Array | None = None) -> jax.Array:
        """Rounds to values of the format, the nearest ones if there is no `noise`."""
        if not self.quantizer.has_codes:
            # `fit` made each quantized value the offset, the value of code value 0.
            return self.rotated * 0
        format = self.quantizer.format
        if noise is None:
            return format.round(self._position())
        position = self.position()
        below, above = format.neighbours(position)
        up = noise * (above - below) < position - below
        return jnp.where(up, above, below)

    def position(self) -> jax.Array:
        """Converts to units of the grid, in which the values of the format lie."""
        # This changes no value, but lets compilers divide and go on in one pass.
        return uncontracted(self._position())

    def _position(self):
        spread, factor = self._spread, self._factor
        if self.rounding_grid is None:
            step = self._step if factor == 1 else self._step / factor
            position = divide(self._from_offset(), spread(step))
        else:
            inverse = 1 / self.rounding_grid.scale
            position = self._from_offset() * spread(inverse * factor)
        if self.grid.zero_point is None:
            return position
        return uncontracted(position) + spread(self.grid.zero_point)

    def gradient_mask(self) -> jax.Array:
        """Returns the mask of the values that receive a gradient: "clip" and "trust".

        With "identity" all receive it, and `straight_through` asks for no mask.
        """
        format = self.quantizer.format
        # With absmax each group has a value at the very end of the grid. It must not
        # fall off the grid because the division by the scale rounds.
        widest = max(abs(format.low), format.high)
        slack = 4 * float(jnp.finfo(self.rotated.dtype).eps) * widest
        if self.quantizer.gradient == "trust":
            slack += format.edge
        return self.is_inside(slack)

    def is_inside(self, beyond: float) -> jax.Array:
        """Returns the mask of values at most `beyond` units outside the grid.

        It avoids the division where it can: a compiler would not compute this in one
        pass with the rounding if both shared the quotient.
        """
        format, spread = self.quantizer.format, self._spread
        ends = format.low - beyond, format.high + beyond
        if self.rounding_grid is not None:
            position = self.position()
            return lax.eq(clamp(position, *ends), position)
        x, step = self._from_offset(), times(self._step, 1 / self._factor)
        zero = self.grid.zero_point
        if ends[0] == -ends[1] and zero is None:
            return lax.le(lax.abs(x), spread(lax.abs(times(step, ends[1]))))
        one, other = ((end - (0 if zero is None else zero)) * step for end in ends)
        low, high = spread(jnp.minimum(one, other)), spread(jnp.maximum(one, other))
        return lax.le(low, x) & lax.le(x, high)

    def _from_offset(self):
        grid = self.grid if self.rounding_grid is None else self.rounding_grid
        if grid.offset is None:
            return self.rotated
        return self.rotated - self._spread(grid.offset / self._factor)

    @functools.cached_property
    def _step(self):
        return self.grid.step

    @property
    def _spread(self):
        return self.quantizer.blocks(self.rotated.shape).spread

    @property
    def _factor(self):
        return self.quantizer.basis(self.rotated.shape).factor


def rounding(x: jax.Array, quantizer: Quantizer, grid: Grid | None = None) -> Rounding:
    """Rotates an array into the basis of its quantizer and fits the grid of its groups.

    Args:
      x: an array of real floats.
      quantizer: how it is quantized.
      grid: a grid to keep wherever its scale is not 0 and the group is finite.
    """
    return fit(quantizer.basis(x.shape).transform(x), quantizer, grid)


def fit(
    rotated: jax.Array, quantizer: Quantizer, grid: Grid | None = None, **known: Any
) -> Rounding:
    """Fits the grid of an array in the basis; `known` goes on to the scale rule."""
    if isinstance(quantizer, CodelessQuantizer):
        ones = jnp.ones([1] * rotated.ndim, rotated.dtype)
        values = quantizer.fake_quant(rotated)
        return Rounding(rotated, Grid(ones, offset=values), None, quantizer)
    blocks, scale = quantizer.blocks(rotated.shape), quantizer.scale
    if scale.needs_grid and grid is not None:
        # A learned scale that is not positive has no meaning. NaN makes that visible.
        grid = jax.tree.map(lambda part: part.astype(rotated.dtype), grid)
        grid = grid._replace(scale=jnp.where(grid.scale > 0, grid.scale, jnp.nan))
        grid = quantizer.scale_type.nearest(grid, quantizer.format, blocks.tensor_axes)
        return Rounding(rotated, grid, None, quantizer)
    sized = times(rotated, quantizer.basis(rotated.shape).factor)
    fitted: Callable[..., Grid] = functools.partial(
        scale.fit_groups, sized, blocks, quantizer.format, **known
    )
    found, rounding_grid = fitted(quantizer.scale_type), None
    if quantizer.scale_type.rounds_by is not None:
        rounding_grid = fitted(quantizer.scale_type.rounds_by)
    if grid is not None:
        # A given grid replaces the fitted one for rounding, too.
        if rounding_grid is not None:
            rounding_grid = _kept(grid, found, rounding_grid, blocks)
        found = _kept(grid, found, found, blocks)
    return Rounding(rotated, found, rounding_grid, quantizer)


def _kept(grid, fitted, instead, blocks):
    """Returns `grid`, but `instead` where the scale is 0 or `fitted` has a NaN."""
    unknown = (grid.scale == 0) | jnp.isnan(fitted.scale)
    # The divisor of a tensor is replaced only together with all of its scales.
    each = enumerate(zip(blocks.scale_shape, blocks.tensor_shape))
    axes = [axis for axis, (groups, tensors) in each if groups != tensors]
    all_unknown = jnp.all(unknown, axis=axes, keepdims=True)
    return instead._replace(
        **{
            name: jnp.where(
                all_unknown if name == "tensor_divisor" else unknown,
                found,
                getattr(grid, name).astype(found.dtype),
            )
            for name, found in instead._asdict().items()
            if found is not None
        }
    )


@functools.partial(jax.jit, static_argnums=1)
def fit_grid(x: jax.Array, quantizer: Quantizer) -> Grid:
    """Finds the grid of `x` by the scale rule, in the dtype of computation."""
    return rounding(x, quantizer).grid


# --- back from the grid ---------------------------------------------------------------


def dequantized(
    code_values: jax.Array, quantizer: Quantizer, grid: Grid, like: Any
) -> jax.Array:
    """Returns the values of code values, in the shape and dtype of `like`."""
    unrotated = unrotated_codes(code_values, quantizer, grid)
    return scaled(unrotated, quantizer, grid, like)


def unrotated_codes(
    code_values: jax.Array,
    quantizer: Quantizer,
    grid: Grid,
    transpose: Callable | None = None,
) -> jax.Array:
    """Rotates code values back, without the basis's factor; `scaled` does the rest.

    Args:
      code_values: values of the format.
      quantizer: their quantizer.
      grid: their grid.
      transpose: None, or what to use in place of `Basis.transpose`.
    """
    shape = code_values.shape
    spread, basis = quantizer.blocks(shape).spread, quantizer.basis(shape)
    if grid.zero_point is not None:
        code_values = code_values - spread(grid.zero_point)
    if basis.block is None:
        return code_values
    if not scaled_last(quantizer, shape):
        code_values = uncontracted(code_values * spread(grid.step))
        if grid.offset is not None:
            code_values = code_values + spread(grid.offset)
    return (transpose or basis.transpose)(code_values)


def scaled(
    unrotated: jax.Array, quantizer: Quantizer, grid: Grid, like: Any
) -> jax.Array:
    """Scales the result of `unrotated_codes` and casts it to the dtype of `like`.

    The levels above the largest number of this dtype become that number.
    """
    factor = quantizer.basis(like.shape).factor
    if not scaled_last(quantizer, like.shape):
        return uncontracted(times(unrotated, factor), like.dtype).astype(like.dtype)
    spread = quantizer.blocks(like.shape).spread
    product = lax.mul(unrotated, spread(times(grid.step, factor)))
    if grid.offset is not None:
        product = uncontracted(product) + spread(grid.offset)
    return uncontracted(product, like.dtype).astype(like.dtype)


def scaled_last(quantizer: Quantizer, shape: tuple[int, ...]) -> bool:
    """Returns whether codes are rotated back before they are scaled.

    The rotation then adds small integers, and is exact.
    """
    block = quantizer.hadamard
    if block is None:
        return True
    whole = all(size % block == 0 for size in quantizer.blocks(shape).sizes)
    return whole and not quantizer.scale.has_offset


# --- the error, in two parts ----------------------------------------------------------


class ErrorReductions(NamedTuple):
    """The part of an error that is not elementwise in the array.

    Attributes:
      grid: the grid of the array.
      rounding_grid: as in `Rounding`.
      unrotated_codes: with a rotation, the code values rotated back, not yet scaled, in
        the narrowest dtype that is exact; otherwise None.
      code_bytes: the codes, int8, one byte each, if they were asked for.
    """

    grid: Grid
    rounding_grid: Grid | None
    unrotated_codes: jax.Array | None
    code_bytes: jax.Array | None


@functools.partial(jax.jit, static_argnums=(1, 3))
def error_reductions(
    x: jax.Array,
    quantizer: Quantizer,
    grid: Grid | None = None,
    with_codes: bool = False,
) -> ErrorReductions:
    """Computes the part of `x - fake_quant(x)` that is not elementwise in `x`."""
    found = rounding(lax.stop_gradient(x), quantizer, grid)
    codes = code_bytes = None
    if with_codes:
        code_bytes = bytes_of_codes(quantizer.format.encode(found.code_values()))
    if quantizer.hadamard is not None:
        codes = unrotated_codes(found.code_values(), quantizer, found.grid)
        if step := _narrow_step(quantizer, x.shape):
            codes = (codes / step).astype(_NARROW)
    return ErrorReductions(found.grid, found.rounding_grid, codes, code_bytes)


def bytes_of_codes(codes: jax.Array) -> jax.Array:
    """Returns codes in one byte each, int8; equal codes have equal bytes."""
    if not jnp.issubdtype(codes.dtype, jnp.floating):
        return codes.astype(jnp.int8)
    narrow = jnp.finfo(codes.dtype).bits < 8
    wide = jnp.float8_e4m3fn if narrow else codes.dtype
    return lax.bitcast_convert_type(codes.astype(wide), jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def error_elementwise(
    x: jax.Array, quantizer: Quantizer, reductions: ErrorReductions
) -> jax.Array:
    """Computes `x - fake_quant(x)` elementwise from its `error_reductions`."""
    x, (grid, rounding_grid, codes, code_bytes) = lax.stop_gradient((x, reductions))
    if codes is None:
        if code_bytes is not None and quantizer.format.code_offset is not None:
            values = quantizer.format.decode(code_bytes, x.dtype)  # not rounded again
        else:
            found = Rounding(x, grid, rounding_grid, quantizer)
            values = found.code_values()
        codes = unrotated_codes(values, quantizer, grid)
    elif step := _narrow_step(quantizer, x.shape):
        codes = codes.astype(x.dtype) * step
    # Written as `x - x * (code / t)` with `t = x / step`, XLA for GPU would make one
    # kernel of this and the fit where groups lie in the last axis, but only in a
    # program that does nothing else. A norm or an optimizer step fuses with the form
    # used here, and would move one to five more copies of the array with the other.
    return x - scaled(codes, quantizer, grid, x)


def _narrow_step(quantizer, shape):
    """Returns the step whose multiples `_NARROW` holds after rotating back, or None."""
    format, block = quantizer.format, quantizer.hadamard
    if format.step is None or not scaled_last(quantizer, shape):
        return None
    widest = max(-format.low, format.high)
    if quantizer.asymmetric:
        widest = format.high - format.low
    fits = block * widest / format.step <= jnp.iinfo(_NARROW).max
    return format.step if fits else None
