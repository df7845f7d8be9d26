"""Products of data with codes, without dequantizing the weights first.

With group `g` of the weights, its scale `s`, zero point `z` and offset `o`,

    x @ w = sum over g of s_g (x_g @ codes_g - z_g sum(x_g)) + o_g sum(x_g)

so that only the codes are read from memory. Compilers widen codes on their way into the
product, but would write weights that are scaled before it to memory. Kernels also widen
codes on the way, and read the scales as they are stored.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import is_int
from cage_jax.arrays.dispatch import Implementation, dispatch, no_kernel
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.core.inputs import arranged
from cage_jax.core.quantize import dequantize, quantize
from cage_jax.core.quantized_array import QuantizedArray, grid_of
from cage_jax.pallas.candidates import product_kernels
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.quantizer import Quantizer

DimensionNumbers = tuple[tuple, tuple]

# Elements that a matrix unit sums at a time: shorter groups are multiplied together.
_BLOCK = 128
# Per element of a group: with more, the partial sums cost more than the weights.
_MOST_TOKENS = 2


@names_checked
def low_bit_dot(
    inputs: jax.Array,
    weights: QuantizedArray,
    dimension_numbers: DimensionNumbers | None = None,
    *,
    inputs_quantizer: Quantizer | None = None,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies `inputs` with quantized weights, using their codes.

    The result equals the product with `dequantize(weights)` except for the order of
    float32 sums (float64 for float64 inputs). For a sum of n numbers the error is at
    most about `n * 2**-24 * sum(|x| (|scale| (|code| + |zero_point|) + |offset|))`. If
    the weights are rotated, the inputs are rotated instead. The effect of `precision`
    on floats is not included: by default a TPU rounds both factors to bfloat16, in
    which codes are exact.

    With groups shorter than half the rows of `inputs`, there would be more partial sums
    than weights. Then the weights are dequantized and rounded to the dtype of `inputs`.
    The same happens if a rotation is along an axis that is not summed over.

    On TPU there is a kernel for rows of bfloat16 or float32 numbers times a matrix of
    integers or floats that share scales in groups along its first axis. It dequantizes
    on the chip. By default it is used for codes of 4 or 8 bits in more than one group.

    The codes receive no gradient; `inputs` receive the gradient of the product.

    Args:
      inputs: an array of real floats, such as (..., in).
      weights: the codes, such as those of a kernel (in, out), of any format.
      dimension_numbers: as in `jax.lax.dot_general`; None contracts the last axis of
        `inputs` with the first of `weights`.
      inputs_quantizer: None, or a quantizer of the inputs along axis -1, 0 or None of
        the matrix of (tokens, features). Int8 codes are summed in int32 if the values
        of both formats have equal steps (integers, mid-rise, E2M1), the inputs have one
        scale for each sum and no zero point, and both have the same rotation or none.
      precision: as in `jax.lax.dot_general`, for products of floats.
      preferred_element_type: the dtype of the result; None for the dtype of `inputs`.
      implementation: "xla" or "pallas", as in `fake_quant`; None for the faster one.

    Returns:
      An array with its axes as in `jax.lax.dot_general`: the batch axes, the other axes
      of `inputs`, the other axes of `weights`.

    Raises:
      TypeError: for weights without codes and inputs that are not floats.
      ValueError: for axes that do not fit, for inputs that `inputs_quantizer` does not
        fit, and for "pallas" if no kernel can run.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> kernel = jnp.linspace(-1, 1, 64, dtype=jnp.float32).reshape(32, 2)
      >>> codes = cage.quantize(kernel, cage.int4(group_size=16))
      >>> x = jnp.ones((3, 32))
      >>> y = cage.low_bit_dot(x, codes)
      >>> bool(jnp.allclose(y, x @ cage.dequantize(codes), atol=1e-6))
      True
      >>> cage.low_bit_dot(x, codes, inputs_quantizer=cage.int8(axis=-1)).shape
      (3, 2)
    """
    inputs = jnp.asarray(inputs)
    if not isinstance(weights, QuantizedArray):
        raise TypeError(
            f"`weights` must be a QuantizedArray; got {type(weights).__name__}. Use "
            f"quantize(weights, quantizer) first."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"`inputs` must be an array of real floats; got dtype {inputs.dtype}. For "
            f"products of integers use floats and an `inputs_quantizer`."
        )
    numbers = _axes_from_0(dimension_numbers, inputs.shape, weights.shape)
    dtype = jnp.dtype(preferred_element_type or inputs.dtype)
    product = _Product(weights, inputs.shape, numbers, precision, dtype, implementation)
    if inputs_quantizer is not None:
        return _with_quantized_inputs(inputs, inputs_quantizer, product)
    return _with_floats(inputs, product)


def _axes_from_0(numbers, *shapes):
    """Returns dimension numbers whose axes count from 0; raises if they do not fit."""
    if numbers is None:
        numbers = (((-1,), (0,)), ((), ()))

    def from_0(axes, ndim):
        return [a % ndim for a in axes if is_int(a) and -ndim <= a < ndim]

    match numbers:
        case [[[*xs], [*ws]], [[*x_batch], [*w_batch]]]:
            given = [*xs, *x_batch], [*ws, *w_batch]
            found = [from_0(axes, len(shape)) for axes, shape in zip(given, shapes)]
            lengths = [[shape[a] for a in axes] for axes, shape in zip(found, shapes)]
            # An axis that does not exist, or comes twice, is missing from the set.
            complete = all(len({*f}) == len(g) for f, g in zip(found, given))
            if len(xs) == len(ws) > 0 and complete and lengths[0] == lengths[1]:
                summed = tuple(tuple(axes[: len(xs)]) for axes in found)
                return summed, tuple(tuple(axes[len(xs) :]) for axes in found)
    raise ValueError(
        f"`dimension_numbers` must pair axes of `inputs` and `weights` of the same "
        f"length, at least one to be summed over; got {numbers}, inputs.shape="
        f"{shapes[0]}, weights.shape={shapes[1]}. Use (((inputs axis,), (weights "
        f"axis,)), ((), ()))."
    )


class _Product(NamedTuple):
    """Weights and how they are multiplied; axes count from 0."""

    weights: QuantizedArray
    inputs_shape: tuple[int, ...]
    numbers: DimensionNumbers
    precision: Any
    dtype: jnp.dtype
    implementation: Implementation | None

    @property
    def tokens(self) -> int:
        """Number of rows of the inputs."""
        (contracted, _), (batch, _) = self.numbers
        lengths = enumerate(self.inputs_shape)
        return math.prod(n for axis, n in lengths if axis not in (*contracted, *batch))

    @property
    def group_sizes(self) -> list[int] | None:
        """Group size along each axis summed over; None if codes are not used."""
        (_, contracted), _ = self.numbers
        shape, quantizer = self.weights.shape, self.weights.quantizer
        groups = quantizer.blocks(shape).by_axis
        if quantizer.hadamard is not None and not {*groups} <= {*contracted}:
            return None
        sizes = [groups.get(axis, 1) for axis in contracted]
        several = sizes != [shape[axis] for axis in contracted]
        if several and self.tokens > _MOST_TOKENS * math.prod(sizes):
            return None
        return sizes


def _with_floats(inputs, product):
    """Multiplies floats with codes, or with dequantized weights."""
    weights, quantizer = product.weights, product.weights.quantizer
    if product.group_sizes is None:

        def with_values(inputs, weights):
            found = lax.dot_general(
                inputs,
                dequantize(weights).astype(inputs.dtype),
                product.numbers,
                precision=product.precision,
                preferred_element_type=compute_dtype(inputs.dtype),
            )
            return found.astype(product.dtype)

        return _dispatch(with_values, inputs, product, scaled=True)
    if quantizer.hadamard is not None:
        # x @ (H w) = (H x) @ w, whichever axis is rotated.
        axis = quantizer.basis(weights.shape).axis
        xs, ws = product.numbers[0]
        along = dataclasses.replace(quantizer, axis=xs[ws.index(axis)], group_size=None)
        inputs = along.basis(inputs.shape).rotate(inputs)
    dtype = inputs.dtype
    if quantizer.format.code_offset is None and not _holds(quantizer.format, dtype):
        dtype = _widest(dtype, compute_dtype(weights.dtype))

    def with_codes(inputs, weights):
        found = _by_groups(inputs, product._replace(weights=weights))
        return found.astype(product.dtype)

    return _dispatch(with_codes, inputs.astype(dtype), product, scaled=False)


def _dispatch(default, inputs, product, *, scaled):
    """Runs `default`, or a kernel for rows of floats with a matrix of codes."""
    weights = product.weights
    found = no_kernel("it is not a product of rows in bfloat16 with a matrix")
    rotated = weights.quantizer.hadamard is not None
    rows = product.numbers == (((inputs.ndim - 1,), (0,)), ((), ()))
    fits = compute_dtype(weights.dtype) == jnp.float32 and not (scaled and rotated)
    if rows and fits and _in_bfloat16(inputs.dtype, product.precision):
        found = product_kernels(
            weights.quantizer,
            weights.shape,
            inputs.shape,
            product.dtype,
            scaled=scaled,
        )
    return dispatch(
        default, found, inputs, weights, implementation=product.implementation
    )


def _in_bfloat16(dtype, precision):
    """Returns whether a TPU multiplies such inputs in bfloat16."""
    if dtype != jnp.float32:
        return dtype == jnp.bfloat16
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    each = precision if isinstance(precision, tuple) else (precision,)
    return all(one in (None, "default", lax.Precision.DEFAULT) for one in each)


def _with_quantized_inputs(inputs, quantizer, product):
    """Multiplies integers if both factors have some, else the inputs' values."""
    (contracted, _), (batch, _) = product.numbers
    x, quantizer, _, back = arranged(inputs, tuple(sorted(contracted)), quantizer, None)
    codes, unit = quantize(x, quantizer), _unit(quantizer.format)
    if unit is None or not _are_integers(codes, product):
        return _with_floats(back(dequantize(codes)), product)
    total = dispatch(
        lambda integers: _by_groups(integers, product),
        no_kernel("its inputs are quantized"),
        _in_units(codes, unit),
        implementation=product.implementation,
    )
    rest = [a for a in range(x.ndim) if a not in (*contracted, *batch)]
    step = jnp.transpose(grid_of(codes).step * unit, (*batch, *rest, *contracted))
    kept = step.shape[: len(batch) + len(rest)]
    step = step.reshape(*kept, *[1] * (total.ndim - len(kept)))
    return (total * step.astype(total.dtype)).astype(product.dtype)


def _are_integers(codes, product):
    """Tells whether sums of integer products are the product, up to one scale each."""
    (contracted, _), _ = product.numbers
    grid, mine, theirs = grid_of(codes), codes.quantizer, product.weights.quantizer
    return (
        product.group_sizes is not None
        and (theirs.format.code_offset, _unit(theirs.format)) != (None, None)
        and codes.shape == product.inputs_shape
        and all(grid.scale.shape[axis] == 1 for axis in contracted)
        and grid.zero_point is None
        and grid.offset is None
        and mine.hadamard == theirs.hadamard
        and mine.hadamard_seed == theirs.hadamard_seed
    )


def _by_groups(x, product):
    """Computes the product from the codes' numbers, in the dtype of `x`: float or int8.

    Each axis that is summed over is split into blocks, groups and elements, and a block
    is multiplied at once.
    """
    (xs, ws), (x_batch, w_batch) = product.numbers
    grid, shape = grid_of(product.weights), product.weights.shape
    exact = x.dtype == jnp.int8
    wide = grid.scale.dtype if exact else _widest(grid.scale.dtype, x.dtype)
    sum_dtype = jnp.int32 if exact else wide
    sizes = zip(ws, product.group_sizes)
    splits = [_split(shape[axis], size) for axis, size in sizes]
    numbers, unit, start = _numbers(product.weights, x.dtype)
    named = _Named.split(x, xs, x_batch, splits, "row")
    # A compiler gives one row no matrix unit, and would write the widened codes.
    alone = product.tokens == 1 and all(split["group"] == 1 for split in splits)
    alone = alone and any(split["block"] > 1 for split in splits)
    if alone:
        rows = jnp.stack([named.array, jnp.zeros_like(named.array)])
        named = _Named(rows, [("row", -1), *named.names])
    blocks = [
        {"block": split["block"], "element": split["group"] * split["element"]}
        for split in splits
    ]
    total = _multiply_blocks(
        named,
        _Named.split(numbers, ws, w_batch, blocks, "free"),
        precision=None if exact else product.precision,
        preferred_element_type=sum_dtype,
    )
    names, total = total.names, total.array.astype(wide) * unit

    def of_weights(per_group):
        """Spreads numbers of the weights' groups over `total`."""
        for axis, length in enumerate(shape):
            if axis not in ws and 1 < per_group.shape[axis] < length:
                times = length // per_group.shape[axis]
                per_group = jnp.repeat(per_group, times, axis=axis)
        groups = [{"block": s["block"], "group": s["group"]} for s in splits]
        per_group = per_group.astype(wide)
        return _Named.split(per_group, ws, w_batch, groups, "free").arranged(names)

    def sums():
        """Sums the inputs of each group."""
        found = named.sum("element", dtype=sum_dtype)
        return found.arranged(names).astype(wide)

    if grid.zero_point is not None:
        total = total - of_weights(grid.zero_point - start) * sums()
    elif start:
        total = total + start * sums()
    total = total * of_weights(grid.step)
    if grid.offset is not None:
        total = total + of_weights(grid.offset) * sums()
    total = _Named(total, names).sum("block", "group").array
    return lax.index_in_dim(total, 0, len(x_batch), keepdims=False) if alone else total


def _split(length, size):
    """Divides an axis into blocks of one group or several, up to `_BLOCK` elements."""
    groups, most = length // size, max(1, _BLOCK // size)
    in_block = max(n for n in range(1, most + 1) if groups % n == 0)
    return {"block": groups // in_block, "group": in_block, "element": size}


def _multiply_blocks(x, numbers, **options):
    """Multiplies each block, with a row for each of its groups.

    A row has the inputs of that group and zeros for the others, so that groups which
    are too short for a matrix unit share one.

    Args:
      x: the inputs; each axis that is summed over is split into "block", "group" and
        "element".
      numbers: the codes' numbers, split into "block" and "element" only.
      options: those of `lax.dot_general`.

    Returns:
      The products by batch, block, group, row and free axis, in this order.
    """
    lengths = dict(zip(x.names, x.array.shape))
    groups, rows = x.of("group"), x.of("batch", "group", "row")
    # The groups inside of a block, as part of its elements.
    inner = [("inner", i) if kind == "group" else (kind, i) for kind, i in x.names]
    x = _Named(x.array, inner)
    split = sorted(x.of("block", "inner", "element"), key=lambda name: name[1])
    left = x.arranged([*rows, *split])
    for group in groups:
        if (count := lengths[group]) > 1:
            same = _Named(np.eye(count, dtype=bool), [group, ("inner", group[1])])
            left = jnp.where(same.arranged([*rows, *split]), left, 0)
    merged = [name for name in split if name[0] != "inner"]
    lengths = dict(zip(numbers.names, numbers.array.shape))
    shape = [*left.shape[: len(rows)], *(lengths[name] for name in merged)]
    left_names = [*rows, *merged]

    def axes(names):
        return [*map(left_names.index, names)], [*map(numbers.names.index, names)]

    batch = numbers.of("batch", "block")
    total = lax.dot_general(
        left.reshape(shape),
        numbers.array,
        (axes(numbers.of("element")), axes(batch)),
        **options,
    )
    rest = [name for name in rows if name not in batch]
    return _Named(total, [*batch, *rest, *numbers.of("free")])


class _Named(NamedTuple):
    """An array whose axes have names, such as ("block", 0)."""

    array: Any
    names: Sequence[tuple[str, int]]

    @classmethod
    def split(cls, array, summed, batch, splits, other):
        """Splits a factor's axes that are summed over, and names all axes.

        Args:
          array: the factor, or an array with a number for each of its groups.
          summed: the axes of the factor that are summed over.
          batch: its batch axes.
          splits: the lengths, by name, that each axis of `summed` is split into.
          other: the name of all other axes.
        """
        names, shape = [], []
        for axis, length in enumerate(array.shape):
            if axis in summed:
                place = summed.index(axis)
                names += [(kind, place) for kind in splits[place]]
                shape += splits[place].values()
            else:
                is_batch = axis in batch
                names.append(
                    ("batch", batch.index(axis)) if is_batch else (other, axis)
                )
                shape.append(length)
        return cls(array.reshape(shape), names)

    def of(self, *kinds):
        """Returns the names of these kinds, in this order."""
        return [
            name for kind in kinds for name in sorted(self.names) if name[0] == kind
        ]

    def arranged(self, names):
        """Returns the array with its axes in this order, those it lacks of length 1."""
        order = [self.names.index(name) for name in names if name in self.names]
        missing = [place for place, name in enumerate(names) if name not in self.names]
        return jnp.expand_dims(jnp.transpose(self.array, order), missing)

    def sum(self, *kinds, dtype=None):
        """Sums over all axes of these kinds."""
        summed = self.of(*kinds)
        places = tuple(self.names.index(name) for name in summed)
        names = [name for name in self.names if name not in summed]
        return _Named(jnp.sum(self.array, places, dtype=dtype), names)


def _widest(*dtypes):
    return max(map(jnp.dtype, dtypes), key=lambda dtype: dtype.itemsize)


@functools.cache
def _holds(format: Format, dtype: jnp.dtype) -> bool:
    """Returns whether a dtype has all values of a format."""
    return np.array_equal(format.values.astype(dtype).astype(np.float64), format.values)


@functools.cache
def _unit(format: Format) -> float | None:
    """Returns the format's step if every `value / step` fits int8, or None."""
    if format.step is None:
        return None
    multiples = format.values / format.step
    return format.step if np.abs(multiples + 0.5).max() <= 127.5 else None


def _numbers(quantized, dtype):
    """Returns codes as numbers in `dtype`, their unit, and what has to be added."""
    codes, format = quantized.codes, quantized.quantizer.format
    if format.code_offset is not None:
        # Adding it here would keep compilers from widening codes in the product.
        return codes.astype(jnp.int8).astype(dtype), 1.0, format.code_offset
    if dtype == jnp.int8:
        unit = _unit(format)
        return _in_units(quantized, unit), unit, 0.0
    return format.decode(codes, dtype), 1.0, 0.0


def _in_units(quantized, unit):
    """Returns the values of codes in units, int8."""
    values = quantized.quantizer.format.decode(quantized.codes, jnp.float32)
    return (values / unit).astype(jnp.int8)
