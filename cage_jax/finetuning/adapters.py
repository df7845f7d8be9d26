"""Low-rank adapters that are trained through the rounding of frozen weights."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_choice, check_int, check_number, is_traced
from cage_jax.arrays.exact import (
    compute_dtype,
    divide,
    power_below,
    select,
    times,
    uncontracted,
)
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, key_at, path_in_errors
from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.finetuning.stores import Store, positions, stored
from cage_jax.program.tracing import split_grids
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer, check_has_codes
from cage_jax.quantizers.rounding import dequantized, rounding

Units = Literal["steps", "weights"]
Scale = Literal["output", "grid"] | None
Adapter = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("store", "grid"),
    meta_fields=("quantizer", "dtype", "factor", "units", "scale"),
)
@dataclasses.dataclass(frozen=True)
class FrozenWeight:
    """What is not trained of one weight; made by `low_rank`. A pytree.

    Attributes:
      store: the positions of the weight on its grid, or its codes as they were given.
      grid: the grid at the start; None beside codes.
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


@names_checked
def low_rank(
    params: Any,
    rules: Rules,
    *,
    rank: int = 4,
    alpha: float | None = None,
    store: Store = "bfloat16",
    units: Units = "steps",
    scale: Scale = "output",
    key: jax.Array | None = None,
) -> tuple[dict[str, Adapter], Any]:
    """Freezes the weights that rules name, and gives each a low-rank adapter.

    A weight becomes `scale * clip(round(position + alpha / rank * (a @ b)))`, where the
    position `w / scale0` on the grid found in the weight at the start is frozen in few
    bits. As `b` starts at zero, the weights start as `fake_quant` gives them, to the
    bit. Rounding is to the nearest. A rotated weight is rounded in its basis.

    | method | arguments |
    |---|---|
    | LR-QAT | the defaults, or `store="int8"` |
    | L4Q | `units="weights", scale="grid"` |
    | DL-QAT, as its abstract tells it | `units="weights", store="float32"` |
    | QLoRA | parameters that are codes already, the result of `quantize` |

    Codes are taken as they are, and the product is added to their values, unrounded.

    Args:
      params: a tree of parameters, of any framework; or the result of `with_grids`,
        whose grids are then the start. Others than those that rules name are frozen.
      rules: which parameters are adapted, and their quantizers. The axes that share a
        scale are the rows of a matrix, axes before them a stack of matrices, and all
        others its columns, so that the kernel of a convolution with `axis=(0, 1, 2)` is
        one matrix.
      rank: at least 1, and at most the shorter side of each matrix.
      alpha: the product of `a` and `b` is multiplied by `alpha / rank`; None for
        `alpha = rank`.
      store: how positions are frozen. "int8" is fixed point with as many bits for
        fractions as the grid leaves, 4 for 4-bit integers, and clips beyond the grid.
        A position that would round to another code goes to the nearest number that does
        not.
      units: whether the product counts steps of the grid, in its basis, or is added to
        the weight itself.
      scale: "output" trains the scale that multiplies codes; "grid" trains it, as LSQ
        does, where it divides the weight too; None trains none. Scales of every type
        are trained in float32 and rounded to what is stored. An offset is trained with
        them, a zero point never.
      key: a `jax.random` key for `a`; None for that of 0.

    Returns:
      Two trees. The adapters, to be trained: by path a dict of `a` (stack..., rows...,
      rank), normal with variance `1 / rank` in steps and `1 / rows` in weights, and `b`
      (stack..., rank, columns...), zeros, both float32, and `scale` (and `offset`) as
      in the grid. And the frozen parameters, as the other functions take them.

    Raises:
      TypeError: for anything but `Rules`, and as in `fake_quant`.
      ValueError: for arguments out of range, rules that match nothing, a quantizer
        without codes, a store that is too coarse for the format, and weights that are
        not finite.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules, store="int8")
      >>> jax.tree.map(jnp.shape, adapters)
      {'kernel': {'a': (16, 4), 'b': (4, 8), 'scale': (1, 8)}}
      >>> start = cage.finetuning.weights(adapters, frozen)["kernel"]
      >>> bool((start == cage.fake_quant(params, rules)["kernel"]).all())
      True

    Source: LR-QAT, arXiv 2406.06385; L4Q, arXiv 2402.04902; DL-QAT, arXiv 2504.09223;
    QLoRA, arXiv 2305.14314.
    """
    check_rules(rules)
    check_int("rank", rank, "Use 4.", least=1)
    if alpha is not None:
        check_number("alpha", alpha, "Use None for the rank.", above=0)
    check_choice("store", store, ("bfloat16", "int8", "float32"))
    check_choice("units", units, ("steps", "weights"))
    check_choice("scale", scale, ("output", "grid", None))
    key = jax.random.key(0) if key is None else key
    factor = 1.0 if alpha is None else alpha / rank
    params, grids = split_grids(params)
    shapes = jax.tree.map(_shape_of_codes, params, is_leaf=_is_codes)
    adapters: dict[str, Adapter] = {}

    def freeze(path, quantizer, _, x):
        if _is_codes(x):
            frozen = FrozenWeight(
                x, None, x.quantizer, x.dtype, factor, "weights", None
            )
        else:
            grid = grids.get(path)
            check_has_codes(quantizer, "low_rank")
            if not is_traced(x):
                check_finite({path: x}, "params")
            positions, grid = _frozen_parts(x, quantizer, grid, store)
            frozen = FrozenWeight(
                positions, grid, quantizer, x.dtype, factor, units, scale
            )
        adapters[path] = _first_adapter(frozen, rank, key_at(key, path))
        return frozen

    frozen = rules.map(freeze, shapes, params)
    if not adapters:
        raise ValueError(nothing_quantized(rules, shapes))
    return adapters, frozen


@names_checked
def weights(adapters: Mapping[str, Adapter], frozen: Any) -> Any:
    """Returns the parameters that adapters and frozen weights make.

    The gradient goes to the adapters alone. That of `a` and `b` passes straight through
    the rounding, where the rounded position is not clipped (with the quantizer's
    gradient "clip": where the position itself is within the grid). That of the scale
    and the offset is exact in all else: LSQ's with `scale="grid"`, but without its
    factor for the size of a group. The backward pass computes the rounding again and
    keeps no array of the weight's size for it; `adapted` keeps no weight either.

    Args:
      adapters: the trained tree of `low_rank`.
      frozen: its frozen tree. Under `jax.jit`, make it an argument: as a constant it
        would be copied into the program.

    Returns:
      A tree like the parameters given to `low_rank`, in their dtypes. Codes that have
      no adapter are dequantized.

    Raises:
      ValueError: for adapters that belong to other frozen weights.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> params = {"kernel": jnp.linspace(-1, 1, 128).reshape(16, 8)}
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules, rank=2)
      >>> def loss(adapters, frozen):
      ...     kernel = cage.finetuning.weights(adapters, frozen)["kernel"]
      ...     return jnp.sum((jnp.ones(16) @ kernel) ** 2)
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(adapters, frozen))
      {'kernel': {'a': (16, 2), 'b': (2, 8), 'scale': (1, 8)}}
    """
    return map_pairs(weight, decoded, adapters, frozen)


@names_checked
def merge(adapters: Mapping[str, Adapter], frozen: Any) -> Any:
    """Merges adapters into codes: what is shipped.

    `dequantize` of the result equals `weights`, to the bit.

    Args:
      adapters: the trained tree of `low_rank`.
      frozen: its frozen tree.

    Returns:
      A tree like the parameters given to `low_rank`, with a `QuantizedArray` in place
      of each adapted one, for `cage_jax.export.save`, `low_bit` and all that takes the
      result of `quantize`.

    Raises:
      ValueError: for adapters that belong to other frozen weights, and for those of
        weights that were codes (QLoRA), since a sum lies on no grid.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules)
      >>> cage.finetuning.merge(adapters, frozen)["kernel"]
      QuantizedArray((16, 8), float32, int4 absmax, axis -2, identity, 96 bytes)
    """

    def value(adapter, leaf):
        if _is_codes(leaf.store):
            raise ValueError(
                f"`adapters` must be of weights that `low_rank` put on a grid; got one "
                f"of codes, {leaf.store!r}, to which the product is added unrounded. "
                f"Ship codes and adapters, or train with low_rank(dequantize(codes), "
                f"rules)."
            )
        return _merged(adapter, leaf)

    return map_pairs(value, lambda codes: codes, adapters, frozen)


def map_pairs(
    function: Callable[[Adapter, FrozenWeight], Any],
    of_codes: Callable[[QuantizedArray], Any],
    adapters: Mapping[str, Adapter],
    frozen: Any,
) -> Any:
    """Calls `function(adapter, frozen weight)` on each pair, `of_codes` on codes."""
    paths, leaves, structure = flatten_with_paths(
        frozen, (FrozenWeight, QuantizedArray)
    )
    expected = [
        path for path, leaf in zip(paths, leaves) if isinstance(leaf, FrozenWeight)
    ]
    if set(expected) != set(adapters):
        raise ValueError(
            f"`adapters` must have an entry for each frozen weight, such as "
            f"{expected[:3]}; got {sorted(adapters)[:3]}. Take both from one call of "
            f"low_rank."
        )
    values = []
    for path, leaf in zip(paths, leaves):
        with path_in_errors(path):
            if isinstance(leaf, FrozenWeight):
                leaf = function(adapters[path], leaf)
            elif _is_codes(leaf):
                leaf = of_codes(leaf)
        values.append(leaf)
    return structure.unflatten(values)


# --- the start ------------------------------------------------------------------------


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


@functools.partial(jax.jit, static_argnums=(1, 3))
def _frozen_parts(x, quantizer, grid, store):
    found = rounding(x, quantizer, grid)
    grid, divisor = found.grid, found.grid.tensor_divisor
    if divisor is not None:
        # Scales of the size of weights, as an optimizer expects them, and of `Learned`.
        power = power_below(divisor)
        scale = grid.scale / jnp.broadcast_to(power, grid.scale.shape)
        grid = grid._replace(scale=scale, tensor_divisor=divisor / power)
    return stored(found, store), grid


def _first_adapter(frozen, rank, key):
    shape, (stack, rows, columns) = frozen.store.shape, frozen.layout
    lengths = [[shape[axis] for axis in part] for part in (stack, rows, columns)]
    inputs, outputs = math.prod(lengths[1]), math.prod(lengths[2])
    if rank > min(inputs, outputs):
        raise ValueError(
            f"`rank` must be at most the shorter side of each matrix; got {rank} for "
            f"{inputs} x {outputs}, shape {shape}. Use {min(inputs, outputs)} or less, "
            f"or leave the parameter alone by a rule with None."
        )
    size = (rank if frozen.units == "steps" else inputs) ** -0.5
    a = size * jax.random.normal(key, (*lengths[0], *lengths[1], rank), jnp.float32)
    adapter = {"a": a, "b": jnp.zeros((*lengths[0], rank, *lengths[2]), jnp.float32)}
    if frozen.scale is not None:  # copies, as what is trained may be donated
        parts = {"scale": frozen.grid.scale, "offset": frozen.grid.offset}
        adapter |= {name: jnp.copy(x) for name, x in parts.items() if x is not None}
    return adapter


# --- the weight and its gradient ------------------------------------------------------


@jax.custom_vjp
def weight(adapter: Adapter, frozen: FrozenWeight) -> jax.Array:
    """Returns one of the `weights`, with its gradient."""
    if _is_codes(frozen.store):
        values = decoded(frozen.store)
        wide = compute_dtype(frozen.dtype)
        return (values.astype(wide) + _product(adapter, frozen)).astype(frozen.dtype)
    grid = _grid(adapter, frozen)
    codes = frozen.quantizer.format.round(_position(adapter, frozen, grid))
    return dequantized(codes, frozen.quantizer, grid, frozen.like)


@jax.jit
def _merged(adapter, frozen):
    grid, quantizer = _grid(adapter, frozen), frozen.quantizer
    format, dtype = quantizer.format, quantizer.scale_type.dtype or grid.scale.dtype
    return QuantizedArray(
        codes=format.encode(format.round(_position(adapter, frozen, grid))),
        scale=grid.scale.astype(dtype),
        zero_point=None if grid.zero_point is None else format.encode(grid.zero_point),
        offset=None if grid.offset is None else grid.offset.astype(dtype),
        tensor_divisor=grid.tensor_divisor,
        quantizer=quantizer,
        dtype=frozen.dtype,
    )


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
    # A product of matrices sums in an order of the compiler's.
    b = jnp.moveaxis(b, len(stack) + len(rows), -1)
    total = uncontracted(a[..., 0] * b[..., 0])
    for each in range(1, a.shape[-1]):
        total = total + uncontracted(a[..., each] * b[..., each])
    return jnp.transpose(total, np.argsort((*stack, *rows, *columns)).tolist())


def _forward(adapter, frozen):
    return weight(adapter, frozen), (adapter, frozen)


def _backward(saved, cotangent):
    # Without the barrier a compiler would keep what the forward pass has computed.
    (adapter, frozen), cotangent = lax.optimization_barrier((saved, cotangent))
    learned = {}
    gradient = cotangent.astype(compute_dtype(frozen.dtype))
    if not _is_codes(frozen.store):
        gradient, learned = _through_rounding(adapter, frozen, gradient)
    gradient = times(gradient, frozen.factor)
    found = {**_product_gradient(adapter, frozen, gradient), **learned}
    return {name: found[name].astype(x.dtype) for name, x in adapter.items()}, None


weight.defvjp(_forward, _backward)


def _through_rounding(adapter, frozen, cotangent):
    """Returns the gradients of the product, and of the trained parts of the grid."""
    quantizer, grid = frozen.quantizer, _grid(adapter, frozen)
    blocks, basis = quantizer.blocks(cotangent.shape), quantizer.basis(cotangent.shape)
    position, gradient = _position(adapter, frozen, grid), basis.rotate(cotangent)
    inside, codes = _inside(quantizer, position), quantizer.format.round(position)
    # In units of weights the steps cancel, where the scale divides too.
    step = blocks.spread((frozen.grid if frozen.scale == "grid" else grid).step)
    product = select(inside, gradient * step, 0)
    if frozen.units == "weights":
        product = basis.unrotate(product / blocks.spread(frozen.grid.step))

    def of_group(parts):
        return blocks.reduce(functools.partial(jnp.sum, keepdims=True), parts)

    learned = {}
    if frozen.scale == "grid":
        slope = codes - select(inside, position, 0)
        if grid.zero_point is not None:
            slope = slope - select(inside, 0, blocks.spread(grid.zero_point))
        learned["scale"] = of_group(gradient * slope)
        learned["offset"] = of_group(select(inside, 0, gradient))
    elif frozen.scale == "output":
        if grid.zero_point is not None:
            codes = codes - blocks.spread(grid.zero_point)
        learned["scale"] = of_group(gradient * codes)
        learned["offset"] = of_group(gradient)
    divisor = frozen.grid.tensor_divisor
    if learned and divisor is not None:
        per_scale = jnp.broadcast_to(divisor, learned["scale"].shape)
        learned["scale"] = learned["scale"] / per_scale
    return product, learned


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


def _shape_of_codes(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_codes(leaf) else leaf


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)
