"""The factors of a product as matrices of (rows, inputs) and (inputs, outputs)."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def input_matrices(eqn: Any, side: int, x: jax.Array) -> jax.Array:
    """Arranges the input of a product, as (stack, rows, inputs).

    Args:
      eqn: a `dot_general`, `ragged_dot_general` or `conv_general_dilated`.
      side: the number of the operand that is the input.
      x: its value. The rows of a ragged product are a stack of single rows.
    """
    if eqn.primitive.name == "conv_general_dilated":
        return _patches(eqn.params, eqn.invars[1 - side].aval.shape, x)
    summed, batch = _dot_axes(eqn, side)
    rows = [axis for axis in range(x.ndim) if axis not in (*summed, *batch)]
    if eqn.primitive.name == "ragged_dot_general":
        return arranged(x, rows, (), summed)
    return arranged(x, batch, rows, summed)


def form_of_input(eqn: Any, side: int) -> Any:
    """Returns what `input_matrices` depends on besides the input, to be compared."""
    if eqn.primitive.name == "conv_general_dilated":
        return str(eqn.params), eqn.invars[1 - side].aval.shape
    return _dot_axes(eqn, side)


def weight_matrices(eqn: Any, side: int, x: Any) -> Any:
    """Arranges the weight of a product, as (stack, inputs, outputs)."""
    if eqn.primitive.name == "conv_general_dilated":
        outputs, *inputs = eqn.params["dimension_numbers"].rhs_spec
        return arranged(x, (), inputs, (outputs,))
    summed, batch = _dot_axes(eqn, side)
    outputs = [axis for axis in range(x.ndim) if axis not in (*summed, *batch)]
    return arranged(x, batch, summed, outputs)


def why_no_matrices(eqn: Any, side: int) -> str | None:
    """Returns why the weight of a product is no stack of matrices, or None."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return None
    if side == 0:
        return f"it is the first operand of a `{name}`"
    counts = [params.get(f"{each}_group_count", 1) for each in ("feature", "batch")]
    if counts != [1, 1]:
        return f"its `{name}` has groups of channels"
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        summed, _ = numbers.dot_dimension_numbers
        ragged = numbers.lhs_ragged_dimensions
        if len(numbers.rhs_group_dimensions) != 1 or set(ragged) & set(summed[0]):
            return f"its `{name}` sums over rows"
    return None


def matrix_of_row(sizes: jax.Array, rows: int) -> jax.Array:
    """Returns the number of the matrix for each row of a ragged product."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")


def _dot_axes(eqn, side):
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        summed, batch = params["dimension_numbers"]
        return summed[side], batch[side]
    numbers = params["ragged_dot_dimension_numbers"]
    summed, _ = numbers.dot_dimension_numbers
    return summed[side], tuple(numbers.rhs_group_dimensions) if side else ()


def arranged(x: Any, *parts: Sequence[int]) -> Any:
    """Makes an array of as many axes as there are parts, each of several axes."""
    shape = [math.prod(x.shape[axis] for axis in part) for part in parts]
    return x.transpose([axis for part in parts for axis in part]).reshape(shape)


def put_back(x: Any, shape: Sequence[int], parts: Sequence[Sequence[int]]) -> Any:
    """Undoes `arranged` for an array of this shape."""
    order = [axis for part in parts for axis in part]
    moved = x.reshape([shape[axis] for axis in order])
    return moved.transpose(np.argsort(order).tolist())


def _patches(params, kernel, x):
    numbers = params["dimension_numbers"]
    identity = tuple(range(x.ndim))  # the patches' axes are (examples, features, space)
    x = lax.conv_general_dilated_patches(
        x.transpose(numbers.lhs_spec),
        tuple(kernel[axis] for axis in numbers.rhs_spec[2:]),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.ConvDimensionNumbers(identity, identity, identity),
        precision=lax.Precision.HIGHEST,
    )
    return arranged(x, (), (0, *identity[2:]), (1,))


# --- sums of products -----------------------------------------------------------------


@jax.jit
def products_of(x: jax.Array) -> jax.Array:
    """Sums `x^T x` over the rows of each matrix, in float32."""
    x = x.astype(jnp.float32)
    return jnp.einsum("brf,brg->bfg", x, x, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=2)
def products_by_matrix(x: jax.Array, numbers: jax.Array, count: int) -> jax.Array:
    """Sums `x^T x` over what has the same number, of `count` numbers."""

    def one(number):
        mine = jnp.where((numbers == number)[:, None, None], x, 0)
        return products_of(mine.reshape(1, -1, x.shape[-1]))[0]

    return lax.map(one, jnp.arange(count))


# --- places in a parameter ------------------------------------------------------------


class Places(NamedTuple):
    """Where the elements of a stack of matrices lie in their parameter.

    Attributes:
      stack: axes of the parameter that number matrices.
      inputs: axes along the inputs.
      outputs: axes along the outputs.
      shape: the shape of the parameter.
      matrices: for each matrix, its number along `stack`.
      rows: for each input, its number along `inputs`.
      columns: for each output, its number along `outputs`.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...]
    matrices: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """The axes of the parameter along those of its stack of matrices."""
        return self.stack, self.inputs, self.outputs


def places_of(index: np.ndarray, shape: tuple[int, ...]) -> Places | None:
    """Finds the places of matrices from the numbers of their elements.

    Args:
      index: the number of each element in the flat parameter, as (stack, inputs,
        outputs).
      shape: the shape of the parameter.

    Returns:
      The places, or None if the matrices do not lie along axes of the parameter, or
      have a part of its inputs alone.
    """
    lines = index[:, 0, 0], index[0, :, 0], index[0, 0, :]
    # Along axes of the parameter, the numbers are sums of one for each axis.
    matrix = lines[1][:, None] + (lines[2] - lines[2][0])
    if (index != (lines[0] - lines[0][0])[:, None, None] + matrix).any():
        return None
    each = [np.unravel_index(line, shape) for line in lines]
    along = [
        {axis for axis, n in enumerate(coordinates) if (n != n[0]).any()}
        for coordinates in each
    ]
    if along[1] & (along[0] | along[2]) or along[0] & along[2]:
        return None
    inputs, outputs = (tuple(sorted(axes)) for axes in along[1:])
    stack = tuple(a for a in range(len(shape)) if a not in (*inputs, *outputs))

    def numbers(coordinates, axes):
        number = np.zeros_like(coordinates[0])
        for axis in axes:
            number = number * shape[axis] + coordinates[axis]
        return number

    parts = [*map(numbers, each, (stack, inputs, outputs))]
    rows = np.sort(parts[1])
    if not np.array_equal(rows, np.arange(math.prod(shape[a] for a in inputs))):
        return None
    return Places(stack, inputs, outputs, shape, *parts)
