"""Means of squared gradients by input and by output: the recommended curvature.

The squared gradients of a matrix are close to the product of a column and a row. These
two vectors are far less noisy than single entries and take next to no memory. They are
bounded as vectors, and their product is computed where it multiplies the error, so no
array of weights is ever stored. The product is constant within each block of a
rotation, so that it can be applied without rotating the error.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.factors import Factors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.arrays.sharding import replicated
from cage_jax.optim.curvature.averages import check_averaging, total_weight
from cage_jax.optim.curvature.source import Arrays, Curvature, Quantized, Step
from cage_jax.quantizers.rounding import error_elementwise, error_reductions

# Scaling raises levels above their bound again, by less in each round.
_ROUNDS = 4

Rows = dict[str, dict[str, jax.Array]]


@brief_repr
class FactoredState(NamedTuple):
    """Averages of squared gradients and the weights computed from them.

    Vectors of the same length are the rows of one array. Compilers take long over many
    small arrays, and over many rows at constant places, so the places are kept too.

    Attributes:
      steps: the number of steps done with the pull on or near, int32.
      estimates: the number of gradients averaged in each vector, int32.
      rows: the rows of the "inputs" and "outputs" of each parameter, int32, by path.
      means: the averages, float32, debiased.
      weights: the weights, float32, before their product is bounded.
      roots: the roots of the averages, float32; None unless the source multiplies by
        them.
      errors: the root mean square quantization error of each matrix when the state was
        made, float32; None without `largest_error`.
    """

    steps: jax.Array
    estimates: tuple[jax.Array, ...]
    rows: Rows
    means: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...]
    roots: tuple[jax.Array, ...] | None
    errors: tuple[jax.Array, ...] | None


def factored(
    gradients_of: Callable[[Step], Arrays],
    *,
    decay: float = 0.9,
    period: int = 10,
    largest: float = 3.0,
    times_root: bool = False,
    largest_error: float | jax.Array | None = None,
) -> Curvature:
    """Creates a source from means of squared gradients by input and by output.

    The weights of a matrix are the product of three numbers: its mean, relative to that
    of all quantized weights, at most `largest`; the mean of each input and of each
    output, relative to that of the matrix, at most the root of `largest`. The product
    is at most `largest`. The total pull stays nearly the same, and moves to where the
    curvature is. Gradients are read only while the pull is on or near (see `Step`), and
    errors are not weighted before the first one is read. A gradient of a parameter with
    a NaN or an infinity, or too large for its squares to be added up in float32, is
    left out.

    Args:
      gradients_of: maps a `Step` to gradients by path.
      decay: the decay of the exponential average, which is debiased.
      period: the number of steps from one gradient that is read to the next.
      largest: the upper bound of a weight.
      times_root: whether to multiply by the root of the mean squared gradient, too. An
        optimizer after the correction that divides by it, such as Adam, then leaves
        the pull as it would be behind the optimizer.
      largest_error: the largest root mean square error, at the start, of a matrix that
        is pulled fully. The pull of others is less, as if theirs were this one.

    Returns:
      A source with a `FactoredState`: 8 bytes for each input and each output of a
      matrix, or 12 with `times_root`.

    Raises:
      TypeError, ValueError: for arguments out of range.
    """
    check_averaging(decay, period)
    check_number("largest", largest, "Use 3.0.", above=1)

    def init(quantized):
        groups = _groups(quantized)
        means = tuple(group.zeros(quantized) for group in groups)
        errors = None
        if largest_error is not None:
            found = {path: _error(x, q) for path, (q, x) in quantized.items()}
            errors = tuple(group.errors(found) for group in groups)
        return FactoredState(
            steps=jnp.zeros([], jnp.int32),
            estimates=tuple(
                group.total(x).astype(jnp.int32) for group, x in zip(groups, means)
            ),
            rows=_rows(groups),
            means=means,
            weights=jax.tree.map(jnp.ones_like, means),
            # Nothing is pulled before it is known what the optimizer divides by.
            roots=jax.tree.map(jnp.zeros_like, means) if times_root else None,
            errors=errors,
        )

    def update(state, step):
        groups = _groups(step.quantized)
        if not groups:  # the rules quantize nothing
            return state

        def read():
            gradients = gradients_of(step)
            # A CPU would store squares that sums by input and by output shared.
            read_again = functools.partial(jax.tree.map, lax.optimization_barrier)
            again = lax.platform_dependent(
                gradients, cpu=read_again, default=lambda g: g
            )
            averages = [
                group.average(decay, group.mean_squares(gradients, again), count, mean)
                for group, count, mean in zip(groups, state.estimates, state.means)
            ]
            estimates, means = zip(*averages)
            roots = None
            if times_root:
                roots = tuple(group.roots(mean) for group, mean in zip(groups, means))
            shares = None
            if state.errors is not None:
                errors, most = _flat(state.errors), jnp.float32(largest_error)
                shares = jnp.where(errors > most, most / errors, 1)
            weights = _weights(groups, means, largest, shares)
            return state._replace(
                estimates=estimates, means=means, weights=weights, roots=roots
            )

        near = jnp.asarray(step.is_near)
        due = near & (state.steps % period == 0)
        steps = state.steps + near.astype(jnp.int32)
        rest = lax.cond(due, read, lambda: state)
        return rest._replace(steps=steps, rows=state.rows, errors=state.errors)

    def weigh(errors, state, step):
        weights, roots = weights_of(state, step.quantized), None
        if times_root:
            roots = factors_of(state.roots, state.rows, step.quantized)
        weighted = {}
        for path, error in errors.items():
            weight = weights[path].product()
            if roots is not None:
                weight = weight * roots[path].product()
            weighted[path] = weight.astype(error.dtype) * error
        return weighted

    def weights_of(state, quantized):
        return factors_of(state.weights, state.rows, quantized, largest)

    return Curvature(
        init,
        update,
        weigh,
        is_elementwise=True,
        weights=None if times_root else weights_of,
        times_root=times_root,
    )


def factors_of(
    vectors: tuple[jax.Array, ...],
    rows: Rows,
    quantized: Quantized,
    largest: float = math.inf,
) -> dict[str, Factors]:
    """Returns the factors of each parameter by path.

    Args:
      vectors: a field of a `FactoredState`, such as its weights.
      rows: the rows in that state.
      quantized: quantizers and parameters by path.
      largest: the upper bound of the product.
    """
    found: dict[str, dict[str, jax.Array]] = {path: {} for path in quantized}
    for group, array in zip(_groups(quantized), vectors, strict=True):
        for path, kind, over, *_ in group.members:
            row = lax.dynamic_index_in_dim(
                array, rows[path][kind], keepdims=False, allow_negative_indices=False
            )
            found[path][kind] = jnp.expand_dims(row, over)
    return {path: Factors(**each, largest=largest) for path, each in found.items()}


# --- the vectors of one shape ---------------------------------------------------------


class _Vector(NamedTuple):
    """The inputs or the outputs of a parameter.

    Attributes:
      path: path of the parameter.
      kind: "inputs" or "outputs".
      over: the axes of the parameter that it is the mean over.
      length: the number of entries that it is the mean over.
      size: the number of entries of a matrix.
    """

    path: str
    kind: str
    over: tuple[int, ...]
    length: int
    size: int

    @property
    def is_input(self) -> bool:
        return self.kind == "inputs"


class _Shape(NamedTuple):
    """What all vectors of a group share.

    Attributes:
      lengths: shape of the vector: that of the parameter without the axes in `over`.
      stack: the number of axes that are those of a stack of matrices.
      rotated: the rotated axis and the length of its blocks, or None.
      varying: the axes of a mesh along which it differs, inside a `shard_map`.
    """

    lengths: tuple[int, ...]
    stack: int
    rotated: tuple[int, int] | None
    varying: frozenset[str]


class _Group(NamedTuple):
    """The vectors of one shape, the rows of an array of shape (vectors, *lengths)."""

    shape: _Shape
    members: list[_Vector]

    def each(self, field: str) -> np.ndarray:
        """Returns a number of each vector, in the shape of `mean`."""
        numbers = np.asarray([getattr(vector, field) for vector in self.members])
        return numbers.reshape(-1, *[1] * len(self.shape.lengths))

    def of_matrices(self, field: str) -> np.ndarray:
        """Returns a number of each vector, for each matrix of a stack."""
        stack = math.prod(self.shape.lengths[: self.shape.stack])
        return np.repeat(self.each(field), stack)

    def zeros(self, quantized: Quantized) -> jax.Array:
        """Returns vectors of zeros, which vary along the same axes of a mesh."""
        _, x = quantized[self.members[0].path]
        shape = len(self.members), *self.shape.lengths
        return lax.full_like(x, 0, jnp.float32, shape)

    def mean_squares(self, by_input: Arrays, by_output: Arrays) -> jax.Array:
        """Computes the mean squares of gradients, constant within a rotated block.

        They are NaN without a gradient.
        """
        sums = []
        for vector in self.members:
            gradients = by_input if vector.is_input else by_output
            if vector.path in gradients:
                sums.append(_sum_of_squares(gradients[vector.path], vector.over))
            else:
                sums.append(jnp.full(self.shape.lengths, jnp.nan, jnp.float32))
        means = jnp.stack(sums) / np.float32(self.each("length"))
        if self.shape.rotated is None:
            return means
        axis, block = self.shape.rotated
        before, after = means.shape[: axis + 1], means.shape[axis + 2 :]
        blocks = means.reshape(*before, -1, block, *after)
        constant = jnp.mean(blocks, axis + 2, keepdims=True)
        return jnp.broadcast_to(constant, blocks.shape).reshape(means.shape)

    def average(
        self, decay: float, new: jax.Array, count: jax.Array, mean: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Adds vectors to the averages of `count` each, except where not finite."""
        is_finite = jnp.isfinite(self.total(new))
        count += is_finite.astype(count.dtype)
        step = (1 - decay) / total_weight(decay, count) * (new - mean)
        return count, jnp.where(is_finite, mean + step, mean)

    def total(self, vectors: jax.Array) -> jax.Array:
        """Computes the sum of each vector, with its axes kept."""
        return jnp.sum(vectors, range(1, vectors.ndim), keepdims=True)

    def mean(self, vectors: jax.Array) -> jax.Array:
        """Computes the mean of each vector, with its axes kept."""
        axes = range(1 + self.shape.stack, vectors.ndim)
        return jnp.mean(vectors, axes, keepdims=True)

    def errors(self, of_matrices: Arrays) -> jax.Array:
        """Returns the errors of the matrices, by path, in the shape of `mean`."""
        stack = self.shape.stack
        ones = [1] * (len(self.shape.lengths) - stack)
        errors = jnp.stack([of_matrices[vector.path] for vector in self.members])
        return errors.reshape(-1, *self.shape.lengths[:stack], *ones)

    def roots(self, means: jax.Array) -> jax.Array:
        """Computes the factors of the root of mean squares."""
        mean = self.mean(means)
        relative = jnp.where(mean > 0, means / mean, 1)
        return jnp.sqrt(jnp.where(self.each("is_input"), means, relative))


@functools.partial(jax.jit, static_argnums=1)
def _sum_of_squares(g, over):
    return replicated(jnp.sum(jnp.square(g.astype(jnp.float32)), over))


@functools.partial(jax.jit, static_argnums=1)
def _error(x, quantizer):
    """Computes the root mean square error of each matrix of a stack."""
    x = x.astype(compute_dtype(x.dtype))
    error = error_elementwise(x, quantizer, error_reductions(x, quantizer))
    axes = quantizer.blocks(x.shape).tensor_axes
    size = math.prod(x.shape[axis] for axis in axes)
    return jnp.sqrt(_sum_of_squares(error, axes) / size)


def _groups(quantized: Quantized) -> list[_Group]:
    """Returns the vectors of all parameters, in groups of one shape."""
    groups: dict[_Shape, _Group] = {}
    for path, (quantizer, x) in quantized.items():
        blocks, basis = quantizer.blocks(x.shape), quantizer.basis(x.shape)
        matrix = blocks.tensor_axes
        inputs = tuple(axis for axis in matrix if axis in blocks.axes)
        if inputs in ((), matrix):  # all have one scale, or the quantizer has none
            inputs = matrix[:-1]
        outputs = tuple(axis for axis in matrix if axis not in inputs)
        for kind, over in (("inputs", outputs), ("outputs", inputs)):
            kept = [axis for axis in range(x.ndim) if axis not in over]
            rotated = None
            if basis.block is not None and basis.axis in kept:
                rotated = kept.index(basis.axis), basis.block
            shape = _Shape(
                lengths=tuple(x.shape[axis] for axis in kept),
                stack=matrix[0],
                rotated=rotated,
                varying=jax.typeof(x).manual_axis_type.varying,
            )
            length, size = (
                math.prod(x.shape[axis] for axis in axes) for axes in (over, matrix)
            )
            vector = _Vector(path, kind, over, length, size)
            groups.setdefault(shape, _Group(shape, [])).members.append(vector)
    return list(groups.values())


def _rows(groups):
    rows: dict[str, dict[str, jax.Array]] = {}
    for group in groups:
        for i, vector in enumerate(group.members):
            rows.setdefault(vector.path, {})[vector.kind] = jnp.int32(i)
    return rows


def _weights(groups, means, largest, shares):
    """Computes the factors of the weights, before their product is bounded.

    `shares` are None or what is left of the weights of each matrix, in one array.

    Compilers take long over many small kernels, so the numbers of all matrices are
    computed as one array.
    """
    levels = [group.mean(vectors) for group, vectors in zip(groups, means)]
    # Vectors of zeros, of which nothing is known, become constant.
    bounded = [
        jnp.minimum(vectors, level * math.sqrt(largest)) + jnp.finfo(jnp.float32).tiny
        for vectors, level in zip(means, levels)
    ]
    mean = _flat([group.mean(vectors) for group, vectors in zip(groups, bounded)])
    is_input = np.concatenate([group.of_matrices("is_input") for group in groups])
    level = _flat(levels)
    level = _level(level, _unit(groups, level, largest), largest)
    if shares is not None:
        level *= shares
    factors = _split(jnp.where(is_input, level, 1) / mean, levels)
    weights = []
    for group, vectors, factor in zip(groups, bounded, factors):
        # The devices of the other axes know the same number.
        if others := _varying(groups) - group.shape.varying:
            factor = lax.pmax(factor, tuple(others))
        weights.append(vectors * factor)
    return tuple(weights)


def _varying(groups):
    return frozenset().union(*(group.shape.varying for group in groups))


def _flat(arrays):
    return jnp.concatenate([array.ravel() for array in arrays])


def _split(flat, arrays):
    """Returns what `_flat` made of arrays of these shapes."""
    parts = jnp.split(flat, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays)]


def _level(level, unit, largest):
    return jnp.where(unit > 0, jnp.minimum(level / unit, largest), 1)


def _unit(groups, level, largest):
    """Finds the number to divide levels by, so that once bounded their mean is 1.

    The mean is over all weights, inside a `shard_map` over those of all devices.
    """
    # Each matrix counts twice, with its inputs and with its outputs. Along the axes of
    # the others, the devices have copies of a parameter.
    axes = _varying(groups)
    copies = [math.prod(map(lax.axis_size, axes - g.shape.varying)) for g in groups]
    sizes = [group.of_matrices("size") / n for group, n in zip(groups, copies)]
    size = np.float32(np.concatenate(sizes))
    total = size.sum() * math.prod(map(lax.axis_size, axes))

    def next_unit(i, unit):
        # Bounding, from the second round on, lowers the mean, by less in each.
        bounded = _level(level, unit, jnp.where(i > 0, largest, jnp.inf))
        return unit * lax.psum(jnp.sum(size / total * bounded), tuple(axes))

    return lax.fori_loop(0, 1 + _ROUNDS, next_unit, jnp.float32(1))
