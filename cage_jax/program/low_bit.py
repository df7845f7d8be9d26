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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from cage_jax.arrays.dispatch import (
    Implementation,
    Variants,
    check_implementation,
    dispatch,
)
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors
from cage_jax.core.quantize import dequantize, quantize
from cage_jax.core.quantized_array import QuantizedArray, grid_of
from cage_jax.core.rules import Rules, check_rules
from cage_jax.pallas import choice as kernels
from cage_jax.program.activations import arranged, check_no_module, trace
from cage_jax.program.products import inner_program, scan_counts, unchanged
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.quantizer import Quantizer

DimensionNumbers = tuple[tuple, tuple]

# Elements that a matrix unit sums at a time: shorter groups are multiplied together.
_BLOCK = 128
# Per element of a group: with more, the partial sums cost more than the weights.
_MOST_TOKENS = 2


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
    numbers = _checked(inputs, weights, dimension_numbers)
    dtype = jnp.dtype(preferred_element_type or inputs.dtype)
    product = _Product(weights, inputs.shape, numbers, precision, dtype, implementation)
    if inputs_quantizer is not None:
        return _of_quantized_inputs(inputs, inputs_quantizer, product)
    return _of_floats(inputs, product)


def low_bit(
    function: Callable,
    rules: Rules | None = None,
    *,
    implementation: Implementation | None = None,
) -> Callable:
    """Makes `function` take codes in place of parameters and multiply them as such.

    Every product of a `QuantizedArray` with data becomes a `low_bit_dot`: in layers of
    any framework, `x @ w`, einsums, tied embeddings, under `jax.jit` and
    `jax.checkpoint`, and in `jax.lax.scan` over stacked layers. Anything else done with
    quantized parameters, such as looking up embeddings, is done with `dequantize`d
    ones. Use it forward only. Call the result under `jax.jit`, otherwise each call
    traces it anew.

    Args:
      function: a function of parameters, and any other arguments, that returns a tree
        of arrays. Arguments that are no arrays are left as they are, such as
        `train=False`.
      rules: None, or a table in which some rules have a quantizer for inputs. These
        inputs are quantized, and multiplied as integers if both factors are whole
        numbers. Calibrated and learned scales are not supported.
      implementation: the implementation of each product, as in `low_bit_dot`.

    Returns:
      A function like `function`, whose first argument may have a `QuantizedArray` in
      place of any leaf.

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: in a call, as in `low_bit_dot`, with the parameter's path.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(8), jnp.ones((3, 32))
      >>> variables = model.init(jax.random.key(0), x)
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> codes = cage.quantize(variables, rules)
      >>> apply = jax.jit(cage.low_bit(model.apply))
      >>> expected = model.apply(cage.dequantize(codes), x)
      >>> bool(jnp.allclose(apply(codes, x), expected, atol=1e-5))
      True
    """
    check_no_module(
        function,
        "Use low_bit(model.apply), or a function that merges what nnx.split gave.",
    )
    if rules is not None:
        check_rules(rules)
    check_implementation(implementation)

    @functools.wraps(function)
    def run(params, *args, **kwargs):
        paths, leaves, structure = flatten_with_paths(params, is_leaf=_is_quantized)
        like = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            if _is_quantized(leaf)
            else leaf
            for leaf in leaves
        ]
        program, _, values, out = trace(
            function, structure.unflatten(like), args, kwargs
        )
        values[: len(leaves)] = [
            _Weights(leaf, path) if _is_quantized(leaf) else leaf
            for path, leaf in zip(paths, leaves)
        ]
        found = _Run(rules, implementation).jaxpr(program.jaxpr, program.consts, values)
        return jax.tree.unflatten(out, [_plain(each) for each in found])

    return run


# --- one product ----------------------------------------------------------------------


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
        taken = {*contracted, *batch}
        return math.prod(
            n for axis, n in enumerate(self.inputs_shape) if axis not in taken
        )

    @property
    def sizes(self) -> list[int] | None:
        """Group size along each axis summed over; None if codes are not used."""
        (_, contracted), _ = self.numbers
        shape, quantizer = self.weights.shape, self.weights.quantizer
        groups = quantizer.blocks(shape).by_axis
        if quantizer.hadamard is not None and not {*groups} <= {*contracted}:
            return None
        sizes = [groups.get(axis, 1) for axis in contracted]
        split = sizes != [shape[axis] for axis in contracted]
        if split and self.tokens > _MOST_TOKENS * math.prod(sizes):
            return None
        return sizes


def _of_floats(inputs, product):
    (contracted, _), _ = product.numbers
    weights, sizes = product.weights, product.sizes
    if sizes is None:

        def dequantized(inputs, weights):
            values = dequantize(weights).astype(inputs.dtype)
            return _dot(inputs, values, product).astype(product.dtype)

        return _dispatch(dequantized, inputs, product, scaled=True)
    quantizer = weights.quantizer
    if quantizer.hadamard is not None:
        # x @ (H w) = (H x) @ w, whichever axis is rotated.
        (axis,) = quantizer.blocks(weights.shape).axes
        axis = contracted[product.numbers[0][1].index(axis)]
        along = dataclasses.replace(quantizer, axis=axis, group_size=None)
        inputs = along.basis(inputs.shape).rotate(inputs)
    dtype = inputs.dtype
    if quantizer.format.of_zero_code is None and not _holds(quantizer.format, dtype):
        dtype = _widest(dtype, compute_dtype(weights.dtype))

    def by_codes(inputs, weights):
        own = product._replace(weights=weights)
        return _of_numbers(inputs, own, sizes).astype(product.dtype)

    return _dispatch(by_codes, inputs.astype(dtype), product, scaled=False)


def _dispatch(default, inputs, product, *, scaled):
    """Runs `default`, or a kernel for rows of floats with a matrix of codes."""
    weights, found = product.weights, Variants()
    rotated = weights.quantizer.hadamard is not None
    rows = product.numbers == (((inputs.ndim - 1,), (0,)), ((), ()))
    fits = compute_dtype(weights.dtype) == jnp.float32 and not (scaled and rotated)
    if rows and fits and _in_bfloat16(inputs.dtype, product.precision):
        found = kernels.product(
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


def _of_quantized_inputs(inputs, quantizer, product):
    (contracted, _), (batch, _) = product.numbers
    x, quantizer, _, back = arranged(inputs, tuple(sorted(contracted)), quantizer, None)
    codes, sizes = quantize(x, quantizer), product.sizes
    unit, format = _unit(quantizer.format), product.weights.quantizer.format
    whole = (format.of_zero_code, _unit(format)) != (None, None)
    whole = whole and _in_one_basis(codes, inputs, product)
    if sizes is None or unit is None or not whole:
        return _of_floats(back(dequantize(codes)), product)
    whole = _whole(codes, unit)
    found = dispatch(
        lambda whole: _of_numbers(whole, product, sizes),
        Variants(),
        whole,
        implementation=product.implementation,
    )
    step = grid_of(codes).step * unit
    rest = [a for a in range(x.ndim) if a not in (*contracted, *batch)]
    step = jnp.transpose(step, (*batch, *rest, *contracted)).astype(found.dtype)
    kept = step.shape[: len(batch) + len(rest)]
    found = found * step.reshape(*kept, *[1] * (found.ndim - len(kept)))
    return found.astype(product.dtype)


def _in_one_basis(codes, inputs, product):
    """Returns whether codes of inputs can be multiplied: each sum has one scale."""
    (contracted, _), _ = product.numbers
    grid, mine, theirs = grid_of(codes), codes.quantizer, product.weights.quantizer
    return (
        codes.shape == inputs.shape
        and all(grid.scale.shape[axis] == 1 for axis in contracted)
        and grid.zero_point is None
        and grid.offset is None
        and mine.hadamard == theirs.hadamard
        and mine.hadamard_seed == theirs.hadamard_seed
    )


def _of_numbers(x, product, sizes):
    """Computes the product from the codes' numbers, in the dtype of `x`: float or int8.

    Each axis that is summed over is split into (blocks, groups, group). A block is
    multiplied at once, with rows for each of its groups: the inputs of that group, and
    zeros for the others.
    """
    (xs, ws), (x_batch, w_batch) = product.numbers
    grid, batch, count = grid_of(product.weights), len(x_batch), len(xs)
    numbers, unit, start = _numbers(product.weights, x.dtype)
    pieces = [_pieces(numbers.shape[axis], size) for axis, size in zip(ws, sizes)]
    x = jnp.moveaxis(x, (*x_batch, *xs), (*range(batch), *range(-count, 0)))
    alone = product.tokens == 1 and all(groups == 1 for _, groups, _ in pieces)
    alone = alone and any(blocks > 1 for blocks, _, _ in pieces)
    if alone:  # else a compiler uses no matrix unit, and writes widened codes
        x = jnp.stack([x, jnp.zeros_like(x)], axis=batch)
    rows = x.ndim - batch - count
    x = x.reshape(*x.shape[: batch + rows], *(n for each in pieces for n in each))
    exact = x.dtype == jnp.int8
    wide = grid.scale.dtype if exact else _widest(grid.scale.dtype, x.dtype)
    free = [a for a in range(numbers.ndim) if a not in (*w_batch, *ws)]

    def spread(per_group):
        """Reshapes scales to (batches, blocks, groups, rows, free axes)."""
        moved = jnp.transpose(per_group, (*w_batch, *ws, *free)).astype(wide)
        others = zip((*w_batch, *free), (*range(batch), *range(-len(free), 0)))
        for axis, place in others:
            if 1 < moved.shape[place] < numbers.shape[axis]:
                times = numbers.shape[axis] // moved.shape[place]
                moved = jnp.repeat(moved, times, axis=place)
        split = [n for blocks, groups, _ in pieces for n in (blocks, groups)]
        batches, kept = moved.shape[:batch], moved.shape[batch + count :]
        moved = moved.reshape(*batches, *split, *kept)
        moved = _blocks_first(moved, batch, count, 2)
        shape = moved.shape[: batch + 2 * count]
        return moved.reshape(*shape, *[1] * rows, *kept)

    def sums():
        """Sums the inputs of each group, with the axes that `spread` gives."""
        last = tuple(batch + rows + 3 * i + 2 for i in range(count))
        found = jnp.sum(x, axis=last, dtype=jnp.int32 if exact else wide).astype(wide)
        found = jnp.moveaxis(found, range(batch, batch + rows), range(-rows, 0))
        found = _blocks_first(found, batch, count, 2)
        return found.reshape(*found.shape, *[1] * len(free))

    right, dimensions = _in_blocks(numbers, ws, w_batch, pieces, batch, rows)
    total = lax.dot_general(
        _in_rows(x, pieces, batch, rows),
        right,
        dimensions,
        precision=None if exact else product.precision,
        preferred_element_type=jnp.int32 if exact else wide,
    )
    total = total.astype(wide) * unit
    if grid.zero_point is not None:
        total = total - spread(grid.zero_point - start) * sums()
    elif start:
        total = total + start * sums()
    total = total * spread(grid.step)
    if grid.offset is not None:
        total = total + spread(grid.offset) * sums()
    total = jnp.sum(total, axis=tuple(range(batch, batch + 2 * count)))
    return lax.index_in_dim(total, 0, batch, keepdims=False) if alone else total


def _pieces(length, size):
    """Returns an axis's number of blocks, a block's number of groups, and `size`."""
    count = length // size
    most = max(1, _BLOCK // size)
    groups = max(n for n in range(1, most + 1) if count % n == 0)
    return count // groups, groups, size


def _blocks_first(x, first, count, each):
    """Reorders (block, group) for each axis to all blocks, then all groups."""
    order = [first + each * i + j for j in range(each) for i in range(count)]
    rest = range(first + each * count, x.ndim)
    return jnp.transpose(x, (*range(first), *order, *rest))


def _in_rows(x, pieces, batch, rows):
    """Arranges (batches, rows, and each axis in pieces) as the product's left side.

    The result is (batches, groups, rows, and each axis in blocks and their elements).
    """
    for place, (blocks, groups, size) in enumerate(pieces):
        at = batch + place + rows + 2 * place  # before it, groups and (block, element)
        x = jnp.expand_dims(x, batch + place)
        if groups > 1:
            own = [1] * x.ndim
            own[batch + place] = own[at + 2] = groups
            x = jnp.where(np.eye(groups, dtype=bool).reshape(own), x, 0)
        x = x.reshape(*x.shape[: at + 1], blocks, groups * size, *x.shape[at + 4 :])
    return x


def _in_blocks(numbers, ws, w_batch, pieces, batch, rows):
    """Returns the product's right side, and its dimension numbers with `_in_rows`."""
    count = len(ws)
    shape: list[int] = []
    place, starts = {}, dict(zip(ws, pieces))
    for axis, length in enumerate(numbers.shape):
        place[axis] = len(shape)
        if axis in starts:
            blocks, groups, size = starts[axis]
            shape += [blocks, groups * size]
        else:
            shape.append(length)
    first = batch + count + rows
    left = [first + 2 * i for i in range(count)], [place[axis] for axis in ws]
    contracting = [i + 1 for i in left[0]], [i + 1 for i in left[1]]
    batches = [*range(batch), *left[0]], [*(place[a] for a in w_batch), *left[1]]
    return numbers.reshape(shape), (contracting, batches)


def _dot(inputs, weights, product):
    wide = compute_dtype(inputs.dtype)
    return lax.dot_general(
        inputs,
        weights,
        product.numbers,
        precision=product.precision,
        preferred_element_type=wide,
    )


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
    if format.of_zero_code is not None:
        # Adding it here would keep compilers from widening codes in the product.
        return codes.astype(jnp.int8).astype(dtype), 1.0, format.of_zero_code
    if dtype == jnp.int8:
        unit = _unit(format)
        return _whole(quantized, unit), unit, 0.0
    return format.decode(codes, dtype), 1.0, 0.0


def _whole(quantized, unit):
    """Returns the values of codes in units, int8."""
    values = quantized.quantizer.format.decode(quantized.codes, jnp.float32)
    return (values / unit).astype(jnp.int8)


def _checked(inputs, weights, numbers):
    if not isinstance(weights, QuantizedArray):
        raise TypeError(
            f"`weights` must be a QuantizedArray; got {type(weights).__name__}. Use "
            f"quantize(weights, quantizer) first."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"`inputs` must be an array of real floats; got dtype {inputs.dtype}. For "
            f"products of whole numbers give floats and an `inputs_quantizer`."
        )
    if numbers is None:
        numbers = (((-1,), (0,)), ((), ()))
    shapes = inputs.shape, weights.shape
    try:
        (xs, ws), (x_batch, w_batch) = (
            tuple(tuple(a % len(s) if -len(s) <= a < len(s) else a for a in axes)
                  for axes, s in zip(pair, shapes)) for pair in numbers
        )  # fmt: skip
        paired = len(xs) == len(ws) and len(x_batch) == len(w_batch)
        pairs = [*zip(xs, ws), *zip(x_batch, w_batch)]
        fits = paired and all(shapes[0][a] == shapes[1][b] for a, b in pairs)
        fits = fits and len(xs) > 0
    except (IndexError, TypeError, ValueError, ZeroDivisionError):
        fits = False
    if not fits:
        raise ValueError(
            f"`dimension_numbers` must pair axes of `inputs` and `weights` of the same "
            f"length, at least one to be summed over; got {numbers}, inputs.shape="
            f"{shapes[0]}, weights.shape={shapes[1]}. Use (((inputs axis,), (weights "
            f"axis,)), ((), ()))."
        )
    return (xs, ws), (x_batch, w_batch)


# --- whole programs -------------------------------------------------------------------


class _Weights(NamedTuple):
    """A value of a program that is a quantized parameter."""

    quantized: QuantizedArray
    path: str


class _Run:
    """Runs jaxprs in which some values are `_Weights`."""

    def __init__(self, rules, implementation):
        self._rules = rules
        self._implementation = implementation

    def jaxpr(self, jaxpr, constants, values):
        """Returns the outputs of a jaxpr."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *values)))

        def read(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, values):
        quantized = [isinstance(value, _Weights) for value in values]
        if any(quantized):
            name, params = eqn.primitive.name, eqn.params
            if name == "dot_general" and sum(quantized) == 1:
                return [self._product(params, values, weights_first=quantized[0])]
            if name == "transpose":
                return [_transposed(values[0], params["permutation"])]
            if name == "convert_element_type":
                ((array, path),) = values
                if jnp.issubdtype(params["new_dtype"], jnp.floating):
                    dtype = jnp.dtype(params["new_dtype"])
                    return [_Weights(dataclasses.replace(array, dtype=dtype), path)]
            if name == "scan":
                return self._scan(eqn, values)
            if (inner := inner_program(eqn)) is not None:
                jaxpr, constants = inner
                return self.jaxpr(jaxpr, constants, values)
        return unchanged(eqn)(*map(_plain, values))

    def _product(self, params, values, weights_first):
        numbers = params["dimension_numbers"]
        if weights_first:
            values, numbers = values[::-1], tuple(pair[::-1] for pair in numbers)
        inputs, (weights, path) = values
        quantizer = self._rules and self._rules.match_inputs(path)
        with path_in_errors(path):
            found = low_bit_dot(
                inputs,
                weights,
                numbers,
                inputs_quantizer=quantizer,
                precision=params["precision"],
                preferred_element_type=params["preferred_element_type"],
                implementation=self._implementation,
            )
        if not weights_first:
            return found
        batch, free = len(numbers[1][0]), weights.codes.ndim - len(numbers[0][1])
        free -= batch
        return jnp.moveaxis(found, range(-free, 0), range(batch, batch + free))

    def _scan(self, eqn, values):
        params, (first, carries) = eqn.params, scan_counts(eqn)
        program, end = params["jaxpr"], first + carries
        constants, carry = values[:first], [_plain(v) for v in values[first:end]]
        paths = [v.path if isinstance(v, _Weights) else "" for v in values[end:]]
        rows = [_rows(value) for value in values[end:]]

        def body(carry, rows):
            rows = [
                row if not _is_quantized(row) else _Weights(row, path)
                for row, path in zip(rows, paths)
            ]
            outputs = self.jaxpr(
                program.jaxpr, program.consts, [*constants, *carry, *rows]
            )
            outputs = [_plain(each) for each in outputs]
            return outputs[: len(carry)], outputs[len(carry) :]

        carry, stacked = lax.scan(
            body,
            carry,
            rows,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked]


def _rows(value):
    """Returns a scan's rows of a stack: codes if each layer has scales of its own."""
    if not isinstance(value, _Weights):
        return value
    array = value.quantized
    if 0 in array.quantizer.blocks(array.shape).axes or array.codes.ndim < 2:
        return dequantize(array)
    return _with_axes(array, lambda axis: axis - array.codes.ndim)


def _transposed(weights, permutation):
    def moved(array):
        return None if array is None else jnp.transpose(array, permutation)

    ndim = len(permutation)
    array = _with_axes(weights.quantized, lambda axis: permutation.index(axis) - ndim)
    names = ("codes", "scale", "zero_point", "offset", "tensor_divisor")
    parts = {name: moved(getattr(array, name)) for name in names}
    return weights._replace(quantized=dataclasses.replace(array, **parts))


def _with_axes(array, moved):
    """Replaces each axis of the quantizer, counted from 0, by `moved(axis)`."""
    quantizer, ndim = array.quantizer, array.codes.ndim
    axis = quantizer.axis
    if isinstance(axis, int):
        axis = moved(axis % ndim)
    elif axis is not None:
        axis = tuple(moved(each % ndim) for each in axis)
    quantizer = dataclasses.replace(quantizer, axis=axis)
    return dataclasses.replace(array, quantizer=quantizer)


def _plain(value):
    return dequantize(value.quantized) if isinstance(value, _Weights) else value


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)
