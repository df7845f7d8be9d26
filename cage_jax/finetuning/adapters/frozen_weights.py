"""A frozen weight with a low-rank adapter: its value, its gradient and its codes."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.exact import compute_dtype, divide, select, times, uncontracted
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.finetuning.adapters.stores import positions
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import dequantized

Units = Literal["steps", "weights"]
Scale = Literal["output", "grid"] | None
Adapter = dict[str, jax.Array]
_AT_ONCE = 16  # of the rank: one pass over more runs many times slower


class Layout(NamedTuple):
    """Axes of an array, each in one part: what numbers matrices, rows and columns."""

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


@functools.cache
def layout_of(quantizer: Quantizer, shape: tuple[int, ...]) -> Layout:
    """Returns the matrices of an array: its shared axes are their rows."""
    blocks = quantizer.blocks(shape)
    tensor = blocks.tensor_axes
    rows = tuple(axis for axis in tensor if axis in blocks.axes)
    if rows == tensor:  # one scale for all of a matrix
        rows = tensor[:-1]
    columns = tuple(axis for axis in tensor if axis not in rows)
    return Layout(tuple(range(tensor[0])), rows, columns)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("store", "grid"),
    meta_fields=("quantizer", "dtype", "factor", "units", "scale"),
)
@dataclasses.dataclass(frozen=True)
class FrozenWeight:
    """What is not trained of one weight; of `low_rank` and `only_scales`. A pytree.

    Attributes:
      store: the positions of the weight on its grid, or its codes.
      grid: the grid at the start; None for codes to whose values a product is added.
      quantizer: the quantizer (static).
      dtype: the dtype of the weight (static).
      factor: what the product of the adapters is multiplied by (static).
      units, scale: as in `low_rank` (static).
    """

    store: jax.Array | QuantizedArray
    grid: Grid | None
    quantizer: Quantizer
    dtype: jnp.dtype
    factor: float
    units: Units
    scale: Scale

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the weight."""
        return jax.ShapeDtypeStruct(self.store.shape, self.dtype)

    @property
    def layout(self) -> "Layout":
        """The axes of its matrices."""
        return layout_of(self.quantizer, self.store.shape)


@jax.custom_vjp
def weight(adapter: Adapter, frozen: FrozenWeight) -> jax.Array:
    """Returns one of the `weights`, with its gradient."""
    if frozen.grid is None:
        values = decoded(frozen.store)
        wide = compute_dtype(frozen.dtype)
        return (values.astype(wide) + _product(adapter, frozen)).astype(frozen.dtype)
    grid = _grid(adapter, frozen)
    codes = _code_values(adapter, frozen, grid)
    return dequantized(codes, frozen.quantizer, grid, frozen.like)


@jax.jit
def merged(adapter: Adapter, frozen: FrozenWeight) -> QuantizedArray:
    """Returns the codes of one weight."""
    grid, quantizer = _grid(adapter, frozen), frozen.quantizer
    format, dtype = quantizer.format, quantizer.scale_type.dtype or grid.scale.dtype
    return QuantizedArray(
        codes=format.encode(_code_values(adapter, frozen, grid)),
        scale=grid.scale.astype(dtype),
        zero_point=None if grid.zero_point is None else format.encode(grid.zero_point),
        offset=None if grid.offset is None else grid.offset.astype(dtype),
        tensor_divisor=grid.tensor_divisor,
        quantizer=quantizer,
        dtype=frozen.dtype,
    )


def trained_parts(grid: Grid) -> Adapter:
    """Returns what is trained of a grid; a copy is needed, as it may be donated."""
    parts = {"scale": grid.scale, "offset": grid.offset}
    return {name: x for name, x in parts.items() if x is not None}


def _grid(adapter, frozen):
    """Returns the grid as it is stored, with its trained parts."""
    grid, quantizer = frozen.grid, frozen.quantizer
    if frozen.scale is None:
        return grid
    parts = {name: adapter[name] for name in ("scale", "offset") if name in adapter}
    # A trained scale of the other sign has no meaning. NaN makes that visible.
    kept = jnp.sign(parts["scale"]) == jnp.sign(grid.scale)
    parts["scale"] = jnp.where(kept, parts["scale"], jnp.nan)
    axes = quantizer.blocks(frozen.store.shape).tensor_axes
    grid = grid._replace(**parts)
    return quantizer.scale_type.nearest(grid, quantizer.format, axes)


def _code_values(adapter, frozen, grid):
    format = frozen.quantizer.format
    if is_codes(frozen.store):
        return format.decode(frozen.store.codes, compute_dtype(frozen.dtype))
    return format.round(_position(adapter, frozen, grid))


def _position(adapter, frozen, grid):
    """Returns the positions of a weight on its grid."""
    quantizer, shape = frozen.quantizer, frozen.store.shape
    dtype, first = compute_dtype(frozen.dtype), frozen.grid
    blocks, low = quantizer.blocks(shape), _product(adapter, frozen)
    if frozen.units == "weights":
        low = quantizer.basis(shape).rotate(low)
        low = divide(low, blocks.spread(first.step))
    position = positions(frozen.store, quantizer.format, dtype) + low
    if frozen.scale != "grid":
        return position
    # Written so that nothing is added where the grid is still the first one.
    zero = 0.0 if grid.zero_point is None else blocks.spread(grid.zero_point)
    change = blocks.spread(divide(first.step, grid.step) - 1)
    moved = position + uncontracted((position - zero) * change)
    if grid.offset is not None:
        shift = divide(first.offset - grid.offset, grid.step)
        moved = moved + blocks.spread(shift)
    return moved


def _product(adapter, frozen):
    """Returns `factor * a @ b` in the shape of the weight, the same in each program."""
    (stack, rows, columns), dtype = frozen.layout, compute_dtype(frozen.dtype)
    a, b = adapter["a"].astype(dtype), adapter["b"].astype(dtype)
    a = jnp.expand_dims(times(a, frozen.factor), [-2 - i for i in range(len(columns))])
    b = jnp.expand_dims(b, [len(stack) + i for i in range(len(rows))])
    a, b = jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, len(stack) + len(rows), 0)

    def more(total, factors):
        # A product of matrices sums in an order of the compiler's.
        for row, column in zip(*factors):
            product = uncontracted(row * column)
            total = product if total is None else total + product
        return total, None

    first = (len(a) - 1) % _AT_ONCE + 1
    total, _ = more(None, (a[:first], b[:first]))
    if len(a) > first:
        rest = [x[first:].reshape(-1, _AT_ONCE, *x.shape[1:]) for x in (a, b)]
        total, _ = lax.scan(more, total, rest)
    return jnp.transpose(total, np.argsort((*stack, *rows, *columns)).tolist())


def _forward(adapter, frozen):
    return weight(adapter, frozen), (adapter, frozen)


def _backward(saved, cotangent):
    # Without the barrier a compiler would keep what the forward pass has computed.
    (adapter, frozen), cotangent = lax.optimization_barrier((saved, cotangent))
    found = {}
    gradient = cotangent.astype(compute_dtype(frozen.dtype))
    if frozen.grid is not None:
        gradient, found = _through_rounding(adapter, frozen, gradient)
    if "a" in adapter:
        gradient = times(gradient, frozen.factor)
        found |= _product_gradient(adapter, frozen, gradient)
    return {name: found[name].astype(x.dtype) for name, x in adapter.items()}, None


weight.defvjp(_forward, _backward)


def _through_rounding(adapter, frozen, cotangent):
    """Returns the gradients of the product, and of the trained parts of the grid."""
    quantizer, grid = frozen.quantizer, _grid(adapter, frozen)
    blocks, basis = quantizer.blocks(cotangent.shape), quantizer.basis(cotangent.shape)
    gradient, codes = basis.rotate(cotangent), _code_values(adapter, frozen, grid)

    def of_grid(slope, of_offset=gradient):
        total = functools.partial(jnp.sum, keepdims=True)
        learned = {
            "scale": blocks.reduce(total, gradient * slope),
            "offset": blocks.reduce(total, of_offset),
        }
        if (divisor := frozen.grid.tensor_divisor) is not None:
            per_scale = jnp.broadcast_to(divisor, learned["scale"].shape)
            learned["scale"] = learned["scale"] / per_scale
        return learned

    zero = None if grid.zero_point is None else blocks.spread(grid.zero_point)
    above = codes if zero is None else codes - zero
    if is_codes(frozen.store):
        return None, of_grid(above)
    position = _position(adapter, frozen, grid)
    inside = _inside(quantizer, position)
    # In units of weights the steps cancel, where the scale divides too.
    step = blocks.spread((frozen.grid if frozen.scale == "grid" else grid).step)
    product = select(inside, gradient * step, 0)
    if frozen.units == "weights":
        product = basis.unrotate(product / blocks.spread(frozen.grid.step))
    if frozen.scale is None:
        return product, {}
    if frozen.scale == "output":
        return product, of_grid(above)
    slope = select(inside, codes - position, above)
    return product, of_grid(slope, select(inside, 0, gradient))


def _inside(quantizer, position):
    """Returns the mask of the positions that are not clipped; as papers, once rounded.

    With "clip" it is that of positions within the grid.
    """
    format = quantizer.format
    beyond = 4 * float(jnp.finfo(position.dtype).eps) * max(-format.low, format.high)
    if quantizer.gradient != "clip":
        beyond += format.edge
    return (position >= format.low - beyond) & (position <= format.high + beyond)


def _product_gradient(adapter, frozen, gradient):
    stack, rows, columns = frozen.layout
    rank = gradient.ndim  # the number of its axis in an einsum
    every = {"a": (*stack, *rows, rank), "b": (*stack, rank, *columns)}

    def of(name, other):
        like = jax.typeof(adapter[name]).sharding
        return jnp.einsum(
            gradient,
            range(rank),
            adapter[other].astype(gradient.dtype),
            every[other],
            every[name],
            out_sharding=None if like.mesh.empty else like,
        )

    return {"a": of("a", "b"), "b": of("b", "a")}


def is_codes(leaf: Any) -> bool:
    """Tells whether a leaf is a `QuantizedArray`."""
    return isinstance(leaf, QuantizedArray)
