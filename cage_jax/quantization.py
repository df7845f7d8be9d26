"""Quantizing arrays, and trees of them by path, with straight-through gradients."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.hadamard import transform
from cage_jax.paths import flatten_with_paths, path_in_errors
from cage_jax.quantizers import Quantizer
from cage_jax.rules import Rules
from cage_jax.scales import Grid, compute_dtype

_WHOLE = jnp.dtype("int16")  # rounded values turned back, between the two halves of e
_ALLOWED_FLOATS = "float32, bfloat16, float16 or float64"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale", "zero_point"),
    meta_fields=("quantizer", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """The codes and scales of an array: what is shipped. A pytree.

    Attributes:
      codes: of the array's shape, in the narrowest integer dtype jax has.
      scale: float32 (float64 for a float64 array); of the array's shape with each
        shared axis counting its groups.
      zero_point: the code of real zero, shaped as `scale`; None when symmetric.
      quantizer: what made it (static).
      dtype: of the array before and after (static).

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> kernel = jnp.linspace(-1, 1, 64, dtype=jnp.float32).reshape(32, 2)
      >>> quantized = cage.quantize(kernel, cage.int4(group_size=16))
      >>> quantized.codes.dtype, quantized.scale.shape, quantized.nbytes
      (dtype(int4), (2, 2), 48)
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    quantizer: Quantizer
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.codes.shape

    @property
    def bits(self) -> int:
        """Width of one code."""
        return self.quantizer.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, packed, with scales and zero points."""
        return -(-self.quantizer.storage_bits(self.shape, self.scale.dtype) // 8)


@overload
def fake_quant(
    x: jax.Array, quantizer: Quantizer, *, grid: Grid | None = None
) -> jax.Array: ...
@overload
def fake_quant(
    x: Any, quantizer: Rules, *, grid: Mapping[str, Grid] | None = None
) -> Any: ...
def fake_quant(x, quantizer, *, grid=None):
    """Quantizes and dequantizes `x`, with a straight-through gradient.

    Computed in float32 (float64 for float64); the dtype is kept. The gradient goes to
    `x` as the quantizer's `gradient` says (identity, clip, trust; in the rotated basis
    where there is a rotation), never to the scale: the gradient of
    `loss(fake_quant(params, rules))` is exactly the gradient of the loss at the
    quantized parameters, under that mask. It can be differentiated in reverse any
    number of times; forward mode (`jax.jvp`) is not defined.

    An all-zero group gives zeros (tiny numbers where the grid has no zero). A NaN or
    an infinity makes its whole group NaN.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree: each parameter that a
        rule names is quantized, the others are left as they are.
      grid: where the grid lies, instead of what the scale rule finds in `x`: a `Grid`
        for an array, a dict from path to `Grid` for a tree (such as the `grids` in
        the state of `cage(..., freeze_scale=True)`). Where its scale is 0 the grid is
        found in `x`.

    Returns:
      An array, or a tree, like `x`.

    Raises:
      TypeError: for integers, complex numbers, and a quantizer of the wrong kind.
      ValueError: for an axis out of range, a group or a Hadamard block that does not
        divide, a grid of the wrong shape; with the parameter's path in a tree.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [-3.5], [1.3]])
      >>> cage.fake_quant(x, cage.int4()).ravel().tolist()
      [0.5, -3.5, 1.5]
      >>> jax.grad(lambda x: (3 * cage.fake_quant(x, cage.int4())).sum())(x).ravel()
      Array([3., 3., 3.], dtype=float32)

    Source: Bengio et al., arXiv 1308.3432 (straight through); QuEST, arXiv 2502.05003.
    """
    return _apply(_fake_quant_array, x, quantizer, grid)


def quantize(x, quantizer, *, grid=None):
    """The codes and scales of `x`.

    `dequantize(quantize(x, quantizer))` equals `fake_quant(x, quantizer)` to the bit,
    with the same `grid` for both. Codes have no gradient, and to differentiate through
    their scales is an error: `fake_quant` has the straight-through gradient.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree.
      grid: as in `fake_quant`.

    Returns:
      A `QuantizedArray`, or a tree like `x` with one in place of each parameter that a
      rule names.

    Raises:
      TypeError, ValueError: as `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantized = cage.quantize(jnp.array([[0.5], [-3.5], [1.3]]), cage.int4())
      >>> quantized.codes.ravel().tolist(), quantized.scale.ravel().tolist()
      ([1, -7, 3], [0.5])
    """
    return _apply(_quantize_array, x, quantizer, grid)


def dequantize(x, quantizer=None):
    """The values that codes stand for.

    Args:
      x: a `QuantizedArray`, or a tree with some of them among its leaves.
      quantizer: None, or the `Quantizer` or `Rules` that made `x`, to have them
        checked: codes know their quantizer.

    Returns:
      An array in the dtype of the original, or a tree like `x`.

    Raises:
      TypeError: for an array that is not quantized.
      ValueError: for codes that another quantizer made.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantized = cage.quantize(jnp.array([[0.5], [-3.5], [1.3]]), cage.int4())
      >>> cage.dequantize(quantized).ravel().tolist()
      [0.5, -3.5, 1.5]
    """
    paths, leaves, structure = flatten_with_paths(x, is_leaf=_is_quantized)
    if not any(map(_is_quantized, leaves)):
        raise TypeError(
            f"`x` must be a QuantizedArray, or a tree with some; got "
            f"{type(x).__name__} without any. Use `quantize` first, or `fake_quant` "
            f"for both in turn."
        )
    values = []
    for path, leaf in zip(paths, leaves):
        if _is_quantized(leaf):
            with path_in_errors(path):
                _check_maker(leaf, quantizer, path)
            leaf = _dequantize_array(leaf)
        values.append(leaf)
    return structure.unflatten(values)


def quantization_error(x, quantizer, *, grid=None):
    """`x - fake_quant(x)`: what CAGE pulls on. A constant for differentiation.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree.
      grid: as in `fake_quant`.

    Returns:
      An array like `x`, or a tree with zeros for the parameters that are left alone.

    Raises:
      TypeError, ValueError: as `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [-3.5], [1.3]])
      >>> error = cage.quantization_error(x, cage.int4())
      >>> error.ravel().tolist()
      [0.0, 0.0, -0.20000004768371582]
    """
    if isinstance(quantizer, Rules):
        zeros = jax.tree.map(jnp.zeros_like, x)
        return quantizer.map(
            lambda path, q, leaf, _: _error_array(leaf, q, _grid_at(grid, path)),
            x,
            zeros,
        )
    return _apply(_error_array, x, quantizer, grid)


def _apply(function, x, quantizer, grid):
    if isinstance(quantizer, Rules):
        if quantizer.misses(x):
            warnings.warn(
                f"no parameter is quantized by {quantizer}. Print rules.report(params) "
                f"to see the paths; a part of a tree has shorter ones.",
                stacklevel=3,
            )
        return quantizer.map(
            lambda path, q, leaf: function(leaf, q, _grid_at(grid, path)), x
        )
    if not isinstance(quantizer, Quantizer):
        name = getattr(quantizer, "__name__", "int4")
        called = f" Call the preset: {name}(...)." if callable(quantizer) else ""
        raise TypeError(
            f"`quantizer` must be a Quantizer, or Rules for a tree; got {quantizer!r}."
            f"{called} Use a preset such as int4(), or Rules([(pattern, int4())])."
        )
    if isinstance(x, Mapping) or any(
        hasattr(leaf, "shape") and leaf is not x for leaf in jax.tree.leaves(x)
    ):
        raise TypeError(
            f"`x` must be an array where `quantizer` is a Quantizer; got a tree "
            f"({type(x).__name__}). Use Rules([('.*', quantizer)]) for a tree."
        )
    return function(x, quantizer, grid)


def _grid_at(grid, path):
    if grid is None:
        return None
    if not isinstance(grid, Mapping):
        raise TypeError(
            f"`grid` must map each path to its Grid; got {type(grid).__name__}. Use "
            f"the `grids` of the state, or a dict."
        )
    if path not in grid:
        raise ValueError(
            f"`grid` must have an entry for each quantized parameter; got the paths "
            f"{list(grid)}. Add this one, with scale 0 for a grid found in the array."
        )
    return grid[path]


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


# --- one array ---------------------------------------------------------------------


def fit_grid(x: jax.Array, quantizer: Quantizer, grid: Grid | None = None) -> Grid:
    """The grid that the scale rule finds in `x`, with the shape of the scales.

    Args:
      x: an array of real floats.
      quantizer: how it is quantized.
      grid: kept wherever its scale is not 0 and the group is finite.

    Returns:
      A `Grid` in the dtype of computation.
    """
    return _fit(_transformed(x, quantizer), quantizer, grid)


def fit_for_error(
    x: jax.Array, quantizer: Quantizer, grid: Grid | None = None
) -> tuple[Grid, jax.Array | None]:
    """All of `x - fake_quant(x)` that is not elementwise in `x`.

    Returns:
      The grid, of which `grid` is kept as in `fit_grid`, and with a rotation the
      rounded values turned back, without their scale and as narrow as is exact.
    """
    x = lax.stop_gradient(x)
    values, _, grid = _fit_and_round(x, quantizer, grid)
    if quantizer.hadamard is None:
        return grid, None
    turned_back = _turned_back(values, quantizer, grid, x.shape)
    if step := _whole_step(quantizer, x.shape):
        turned_back = (turned_back / step).astype(_WHOLE)
    return grid, turned_back


def error_from(
    x: jax.Array, quantizer: Quantizer, grid: Grid, turned_back: jax.Array | None
) -> jax.Array:
    """The elementwise rest of `x - fake_quant(x)`, from what `fit_for_error` gives."""
    x, grid = lax.stop_gradient((x, grid))
    if turned_back is None:
        values, _ = _round(x, quantizer, grid)
        turned_back = _turned_back(values, quantizer, grid, x.shape)
    elif step := _whole_step(quantizer, x.shape):
        turned_back = turned_back.astype(x.dtype) * step
    return x - _scaled(turned_back, quantizer, grid, x)


def _fake_quant_array(x, quantizer, grid):
    x = _checked(x, quantizer, grid)
    return _straight_through(quantizer, x, grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(quantizer, x, grid):
    values, _, grid = _fit_and_round(x, quantizer, grid)
    return _restore(values, quantizer, grid, x)


def _straight_through_forward(quantizer, x, grid):
    mask = None
    if quantizer.gradient != "identity":
        _, position, _ = _fit_and_round(x, quantizer, grid)
        mask = _passes(position, quantizer)
    # Calling the function itself, not its body, keeps the second derivative: reverse
    # over reverse differentiates this rule's own code.
    return _straight_through(quantizer, x, grid), (mask, grid)


def _straight_through_backward(quantizer, residuals, cotangent):
    mask, grid = residuals
    no_gradient = jax.tree.map(jnp.zeros_like, grid)
    if mask is None:
        return cotangent, no_gradient
    # The rotation is its own transpose and, but for the factor, its own inverse.
    gradient = _transformed(cotangent, quantizer)
    gradient = jnp.where(mask, gradient, jnp.zeros_like(gradient))
    gradient = _transformed(gradient, quantizer) * _factor(quantizer) ** 2
    return gradient.astype(cotangent.dtype), no_gradient


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def _quantize_array(x, quantizer, grid):
    x = _checked(x, quantizer, grid)
    values, _, grid = _fit_and_round(x, quantizer, grid)
    encode = quantizer.format.encode
    zero_point = None if grid.zero_point is None else encode(grid.zero_point)
    scale = _without_gradient(grid.scale)
    return QuantizedArray(encode(values), scale, zero_point, quantizer, x.dtype)


@jax.custom_vjp
def _without_gradient(scale):
    return scale


def _refuse_gradient(_, __):
    raise TypeError(
        "`quantize` has no gradient, but its result was differentiated. Use "
        "`fake_quant` in a loss."
    )


_without_gradient.defvjp(lambda scale: (scale, None), _refuse_gradient)


def _check_maker(quantized, quantizer, path):
    maker = quantizer.match(path) if isinstance(quantizer, Rules) else quantizer
    if quantizer is not None and maker != quantized.quantizer:
        raise ValueError(
            f"`quantizer` must be the one that made the codes, {quantized.quantizer}; "
            f"got {maker}. Leave it out: codes know their quantizer."
        )


def _dequantize_array(quantized):
    quantizer, dtype = quantized.quantizer, compute_dtype(quantized.dtype)
    values = quantizer.format.decode(quantized.codes, dtype)
    zero_point = quantized.zero_point
    if zero_point is not None:
        zero_point = quantizer.format.decode(zero_point, dtype)
    like = jax.ShapeDtypeStruct(quantized.shape, quantized.dtype)
    return _restore(values, quantizer, Grid(quantized.scale, zero_point), like)


def _error_array(x, quantizer, grid):
    x = lax.stop_gradient(_checked(x, quantizer, grid))
    return x - _straight_through(quantizer, x, grid)


# --- the way of the data: rotate, fit the grid of each group, round, and back --------
#
# Codes and values must come out the same, to the bit, in every program: compilers
# contract a product and a sum to one operation, turn the division by a broadcast into a
# product, and gather constants, in one program and not in another. So nothing here
# divides by a scale, and no sum follows a product that is not exact.
#
# Only `fit_grid` splits `x` into groups. The rest keeps its shape and spreads the grid
# instead, so that it fuses with what comes before and after.


def _fit_and_round(x, quantizer, grid):
    """The rounded values of `x`, their unrounded positions, and their grid."""
    transformed = _transformed(x, quantizer)
    grid = _fit(transformed, quantizer, grid)
    return *_round(transformed, quantizer, grid), grid


def _transformed(x, quantizer):
    """`x` in the dtype of computation and, up to `_factor`, rotated."""
    x = x.astype(compute_dtype(x.dtype))
    if quantizer.hadamard is None:
        return x
    (axis,) = quantizer.groups(x.shape)
    return transform(x, quantizer.hadamard, axis)


def _factor(quantizer):
    return 1.0 if quantizer.hadamard is None else quantizer.hadamard**-0.5


def _fit(transformed, quantizer, grid):
    shape = transformed.shape
    split, axes = _split(shape, quantizer)
    blocks = (transformed * _factor(quantizer)).reshape(split)
    fitted = quantizer.scale.fit(blocks, axes, quantizer.format)
    fitted = jax.tree.map(lambda g: g.reshape(quantizer.scale_shape(shape)), fitted)
    if grid is None:
        return fitted
    unknown = (grid.scale == 0) | jnp.isnan(fitted.scale)
    return jax.tree.map(
        lambda found, kept: jnp.where(unknown, found, kept.astype(found.dtype)),
        fitted,
        grid,
    )


def _round(transformed, quantizer, grid):
    shape = transformed.shape
    inverse = _factor(quantizer) / grid.scale
    position = transformed * _spread(inverse, quantizer, shape)
    if grid.zero_point is None:
        return quantizer.format.round(position), position
    zero_point = _spread(grid.zero_point, quantizer, shape)
    rounded = quantizer.format.round(jnp.round(position) + zero_point)
    return rounded, position + zero_point


def _restore(values, quantizer, grid, like):
    """Turns rounded values into an array such as `like`."""
    return _scaled(
        _turned_back(values, quantizer, grid, like.shape), quantizer, grid, like
    )


def _turned_back(values, quantizer, grid, shape):
    """Rounded values in the basis of `x`, but for what `_scaled` multiplies with."""
    if grid.zero_point is not None:
        values = values - _spread(grid.zero_point, quantizer, shape)
    if quantizer.hadamard is None:
        return values
    (axis,) = quantizer.groups(shape)
    if _scaled_last(quantizer, shape):
        return transform(values, quantizer.hadamard, axis)
    product = values * _spread(grid.scale, quantizer, shape)
    return transform(product, quantizer.hadamard, axis, additions=False)


def _scaled(turned_back, quantizer, grid, like):
    factor = _factor(quantizer)
    if _scaled_last(quantizer, like.shape):
        factor = _spread(grid.scale * factor, quantizer, like.shape)
    return (turned_back * factor).astype(like.dtype)


def _scaled_last(quantizer, shape):
    """Whether small whole numbers are turned back, exactly, and scaled afterwards."""
    block = quantizer.hadamard
    return block is None or all(
        size % block == 0 for size in quantizer.groups(shape).values()
    )


def _whole_step(quantizer, shape):
    """That of which turned-back values are multiples that `_WHOLE` holds, or None."""
    format, block = quantizer.format, quantizer.hadamard
    if format.step is None or not _scaled_last(quantizer, shape):
        return None
    widest = max(-format.low, format.high)
    if quantizer.asymmetric:
        widest = format.high - format.low
    fits = block * widest / format.step <= jnp.iinfo(_WHOLE).max
    return format.step if fits else None


def _split(shape, quantizer):
    """`shape` with each shared axis as (groups, group), and the axes of a group."""
    groups = quantizer.groups(shape)
    split, axes = [], []
    for axis, length in enumerate(shape):
        size = groups.get(axis)
        if size is not None and size != length:
            split.append(length // size)
            length = size
        if size is not None:
            axes.append(len(split))
        split.append(length)
    return split, tuple(axes)


def _spread(per_group, quantizer, shape):
    """What each group has once, for each element of an array of `shape`."""
    split, axes = _split(shape, quantizer)
    once = [1 if axis in axes else length for axis, length in enumerate(split)]
    return jnp.broadcast_to(per_group.reshape(once), split).reshape(shape)


def _passes(position, quantizer):
    """Where the gradient passes, from positions in units of the grid."""
    format = quantizer.format
    # A value at the very end of the grid, as absmax puts one into each group, must not
    # fall out of it because dividing by the scale rounds.
    slack = 4 * float(jnp.finfo(position.dtype).eps) * max(abs(format.low), format.high)
    if quantizer.gradient == "trust":
        slack += format.edge
    return (format.low - slack <= position) & (position <= format.high + slack)


def _checked(x, quantizer, grid):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`x` must be an array of real floats; got dtype {x.dtype}. Convert it to "
            f"{_ALLOWED_FLOATS}, or leave it unquantized."
        )
    scale_shape = quantizer.scale_shape(x.shape)
    if grid is not None:
        _check_grid(grid, quantizer, x.shape, scale_shape)
    return x


def _check_grid(grid, quantizer, shape, scale_shape):
    if not isinstance(grid, Grid):
        raise TypeError(
            f"`grid` must be a Grid; got {type(grid).__name__}. Use Grid(scale) or "
            f"Grid(scale, zero_point) of `cage_jax.scales`."
        )
    if (grid.zero_point is not None) != quantizer.asymmetric:
        raise ValueError(
            f"`grid` must have a zero point when the quantizer has one, and none "
            f"otherwise; got zero_point={grid.zero_point}, quantizer {quantizer}. Take "
            f"the grid from the state of the same rules."
        )
    for name, value in grid._asdict().items():
        if value is not None and jnp.shape(value) != scale_shape:
            raise ValueError(
                f"`grid` must have one {name} for each group, shape {scale_shape}; got "
                f"shape {jnp.shape(value)}, x.shape={shape}. Take the grid from the "
                f"state of the same rules."
            )
