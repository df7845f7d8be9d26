"""Matrices rounded one input after the other, each error spread over the later ones.

This is the arithmetic of GPTQ (arXiv 2210.17323) for matrices of (inputs, outputs) in
the basis of their quantizer: `W` with `H = sum x^T x` over its inputs `x`. With the
upper Cholesky factor `U^T U = H^-1`, input `i` is rounded to `Q_i`, and
`W_j -= U_ij / U_ii (W_i - Q_i)` for each later input `j`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import Rounding, dequantized, fit

# So many inputs pass their errors among themselves, before the others get all of them.
_CHUNK = 128


class Grids(NamedTuple):
    """What is known of the grids of a matrix before it is rounded.

    Attributes:
      grid: the grid, without a tensor divisor: without groups that of each element;
        with groups that of each group, to keep where its scale is not 0.
      rounding_grid: as in `Rounding`; None with groups.
      forced: the code values of elements that must get them, NaN for the others. With
        groups it counts for those whose grid is kept.
    """

    grid: Grid
    rounding_grid: Grid | None
    forced: jax.Array


@functools.partial(jax.jit, static_argnames=("quantizer", "group"))
def round_columns(
    weights: jax.Array,
    products: jax.Array,
    known: Grids | None,
    damping: float,
    *,
    quantizer: Quantizer,
    group: int | None,
) -> tuple[jax.Array, jax.Array, Grid | None]:
    """Rounds a stack of matrices.

    Args:
      weights: float32 of shape (stack, inputs, outputs).
      products: the sums of products of the inputs, (stack, inputs, inputs).
      known: grids that are kept, or None.
      damping: added to the diagonal of `products`, in units of its mean.
      quantizer: how they are quantized, without a rotation and a tensor divisor.
      group: how many inputs share a scale that is found when the first of them is
        rounded; or None.

    Returns:
      The code values, NaN where `products` cannot be inverted; the weights before they
      were rounded, with the errors of earlier ones, but forced ones after it; and the
      grids that were found, of shape (stack, groups, outputs), or None.
    """
    round_one = functools.partial(_round_one, quantizer=quantizer, group=group)
    each = jax.vmap(lambda w, h, known: round_one(w, _factor(h, damping), known))
    return each(weights, products, known)


def _factor(products, damping):
    """Returns the upper factor `U` with `U^T U = H^-1`, of the damped `H`."""
    diagonal = jnp.diag(products)
    # An input that is always 0 spreads no errors.
    added = jnp.where(diagonal == 0, 1, damping * jnp.mean(diagonal))
    flipped = (products + jnp.diag(added))[::-1, ::-1]
    root = jnp.linalg.cholesky(flipped)[::-1, ::-1]  # upper, H = root root^T
    one = jnp.eye(len(root), dtype=root.dtype)
    return lax.linalg.triangular_solve(root, one, left_side=True, lower=False)


def _round_one(w, factor, known, *, quantizer, group):
    inputs, outputs = w.shape
    cell = dataclasses.replace(quantizer, axis=0, group_size=None)
    if group is None:
        pad = -inputs % min(_CHUNK, inputs)
        w = jnp.pad(w, [(0, pad), (0, 0)])
        known = jax.tree.map(lambda x: jnp.pad(x, [(0, pad), (0, 0)], "edge"), known)
        added = (jnp.arange(inputs + pad) >= inputs).astype(w.dtype)
        factor = jnp.pad(factor, (0, pad)) + jnp.diag(added)
        _, values, before = _through_group(w, factor, 0, known, cell)
        return values[:inputs], before[:inputs], None

    def step(w, each):
        begin, known = each
        rows = lax.dynamic_slice(w, (begin, 0), (group, outputs))
        found = fit(rows, cell, known and known.grid)
        forced = forced_values(found)
        if known is not None:
            forced = jnp.where(known.grid.scale != 0, known.forced, forced)
        grids = Grids(found.grid, found.rounding_grid, forced)
        grids = jax.tree.map(lambda x: jnp.broadcast_to(x, rows.shape), grids)
        w, values, before = _through_group(w, factor, begin, grids, cell)
        return w, (values, before, found.grid)

    begins = jnp.arange(0, inputs, group)
    by_group = jax.tree.map(lambda x: x.reshape(len(begins), -1, outputs), known)
    _, (values, before, grid) = lax.scan(step, w, (begins, by_group))
    grid = jax.tree.map(lambda x: x[:, 0], grid)
    return values.reshape(w.shape), before.reshape(w.shape), grid


def _through_group(w, factor, begin, grids, cell):
    """Rounds neighbouring inputs.

    Returns the weights with the errors, the code values, and what was rounded to them.
    """
    size, outputs = grids.forced.shape
    chunk = next(n for n in range(min(_CHUNK, size), 0, -1) if size % n == 0)
    numbers = jnp.arange(len(w))[:, None]

    def round_chunk(w, each):
        at, grids = each
        rows = lax.dynamic_slice(w, (at, 0), (chunk, outputs))
        spread = lax.dynamic_slice(factor, (at, 0), (chunk, len(w))).T
        within = lax.dynamic_slice(spread, (at, 0), (chunk, chunk))

        def round_row(rows, each):
            number, grids = each
            x = rows[number][None]
            values = _rounded(x, grids, cell)
            rounded = dequantized(values, cell, grids.grid, x)
            error, before = x - rounded, jnp.where(jnp.isnan(grids.forced), x, rounded)
            column = within[:, number][:, None]
            error = error / column[number, 0]
            later = jnp.arange(chunk)[:, None] > number
            return rows - jnp.where(later, column, 0) * error, (
                values[0],
                error[0],
                before[0],
            )

        each = jnp.arange(chunk), grids
        _, (values, errors, before) = lax.scan(round_row, rows, each)
        later = jnp.where(numbers >= at + chunk, spread, 0)
        w = w - jnp.dot(later, errors, precision=lax.Precision.HIGHEST)
        return w, (values, before)

    def parts(x):
        return x.reshape(size // chunk, chunk, 1, outputs)

    ats = begin + jnp.arange(0, size, chunk)
    w, found = lax.scan(round_chunk, w, (ats, jax.tree.map(parts, grids)))
    return w, *(x.reshape(size, outputs) for x in found)


def _rounded(x, grids, cell):
    values = Rounding(x, grids.grid, grids.rounding_grid, cell).code_values()
    return jnp.where(jnp.isnan(grids.forced), values, grids.forced)


def forced_values(found: Rounding) -> jax.Array:
    """Returns code values that keep the grid of each group what it is.

    If the scale rule is to find the same grid in the rounded values, the values at the
    ends of a group must stay there, whatever errors they are given. One at either end
    is enough; for a grid without a zero point or an offset, one at any end.

    Args:
      found: the array with its grid.

    Returns:
      An array of code values, NaN for elements that may get any.
    """
    quantizer, position = found.quantizer, found.position()
    values = found.code_values()
    if not quantizer.idempotent or quantizer.scale.needs_grid:
        return jnp.full_like(position, jnp.nan)
    blocks = quantizer.blocks(position.shape)
    place = jnp.arange(math.prod(position.shape), dtype=jnp.int32)
    place = place.reshape(position.shape)

    def first_largest(x):
        top = blocks.spread(blocks.reduce(largest, x))
        places = jnp.where(x == top, place, place.size)
        return place == blocks.spread(blocks.reduce(_least, places))

    if quantizer.asymmetric or quantizer.scale.has_offset:
        ends = first_largest(position) | first_largest(-position)
    else:
        ends = first_largest(jnp.abs(position))
    return jnp.where(ends, values, jnp.nan)


def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the largest number along axes, kept with size 1."""
    return jnp.max(x, axis=axes, keepdims=True)


def _least(x, axes):
    return jnp.min(x, axis=axes, keepdims=True)
