"""How well the weights and inputs of a program fit their grids."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.grids import check_grid, grid_at
from cage_jax.core.inputs import arranged, check_calibrated
from cage_jax.core.rules import Rules
from cage_jax.program.products import Followed
from cage_jax.program.tracing import split_arrays, split_grids
from cage_jax.program.visiting import visit_inputs
from cage_jax.quantizers.rounding import dequantized, rounding

_MOST_COUNTED = 2**16  # values whose levels are counted, evenly spread


class GridFit(NamedTuple):
    """How well an array fits its grid.

    Attributes:
      error: ||x - Q(x)|| / ||x||.
      clipped: fraction of the values beyond the ends of the grid.
      unused: fraction of the grid's levels that no value takes, of 65,536 values that
        are evenly spread if there are more.
      one_sign: fraction of the scans' repetitions, or 1 or 0 without a scan, in which
        all values have one sign on a grid that has both.
    """

    error: float
    clipped: float
    unused: float
    one_sign: float


class Measured(NamedTuple):
    """How well arrays fit their grids, by path.

    Attributes:
      weights: of each quantized weight.
      inputs: of each product whose input is quantized; None if it did not run.
    """

    weights: dict[str, GridFit | None]
    inputs: dict[str, list[GridFit | None]]


def measure(
    function: Callable, rules: Rules, params: Any, args: tuple, kwargs: dict
) -> tuple[Followed, dict[str, tuple[int, ...]], Measured]:
    """Runs a function with quantized weights and inputs, and measures both.

    Returns:
      What becomes of the parameters, their shapes, and how well arrays fit.
    """
    rules = _to_nearest(rules)
    arrays, static = split_arrays(args, kwargs)
    values, grids = split_grids(params)
    weights = {}
    about: list[Any] = []  # known while the program is traced

    def quantized_weight(path, quantizer, x):
        grid = grid_at(path, params, None)
        if grid is not None:
            check_grid(grid, quantizer, quantizer.blocks(x.shape))
        x, weights[path] = _quantized(x, quantizer, grid)
        return x

    def visit(path, product, quantizer, x, grid):
        check_calibrated(quantizer, grid)
        x, quantizer, grid, back = arranged(
            x, product.axes_for(quantizer), quantizer, grid
        )
        x, figures = _quantized(x, quantizer, grid)
        return back(x), figures

    # One program: op by op, there would be hundreds.
    @jax.jit
    def observed(quantized, grids, arrays):
        args, kwargs = static.joined(arrays)
        visited = visit_inputs(function, rules, visit, quantized, grids, args, kwargs)
        about.extend((visited.followed, visited.shapes))
        return visited.records

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Weights are measured outside of it, with a program for each shape.
        quantized = rules.map(quantized_weight, values)
        inputs = observed(quantized, grids, arrays)
    figures = Measured(
        {path: _mean(each) for path, each in jax.device_get(weights).items()},
        {
            path: [*map(_mean, entries)]
            for path, entries in jax.device_get(inputs).items()
        },
    )
    return *about, figures


def _to_nearest(rules):
    def nearest(quantizer):
        return quantizer and dataclasses.replace(quantizer, rounding="nearest")

    return Rules(
        [(r.pattern, nearest(r.weights), nearest(r.inputs)) for r in rules],
        resolved={path: nearest(each) for path, each in rules.resolved.items()},
    )


@functools.partial(jax.jit, static_argnums=1)
def _quantized(x, quantizer, grid):
    """Returns the quantized array, and the figures of `GridFit` with 1 for having run."""
    found = rounding(x, quantizer, grid)
    code_values = found.code_values()
    values = dequantized(code_values, quantizer, found.grid, x)
    wide = x.astype(found.rotated.dtype)
    size = _norm(wide)
    error = _norm(wide - values.astype(wide.dtype)) / jnp.where(size == 0, 1, size)
    if not quantizer.has_codes:
        return values, (error, *[jnp.zeros([])] * 3, jnp.ones([]))
    # Half a step beyond the end is rounded, not clipped.
    beyond = jnp.mean(~found.is_inside(quantizer.format.edge))
    one_sign = (jnp.min(code_values) >= 0) | (jnp.max(code_values) <= 0)
    one_sign &= not quantizer.asymmetric and not quantizer.scale.has_offset
    unused = _unused(code_values, quantizer.format)
    return values, (error, beyond, unused, one_sign, jnp.ones([]))


def _norm(x):
    return jnp.sqrt(jnp.sum(x * x))


def _unused(code_values, format):
    """Returns the fraction of the levels that none of the counted values takes."""
    counted = code_values.ravel()[:: math.ceil(code_values.size / _MOST_COUNTED)]
    levels = jnp.asarray(format.values, counted.dtype)
    return jnp.mean(~jnp.any(counted[:, None] == levels[None], axis=0))


def _mean(arrays) -> GridFit | None:
    """Averages figures over the repetitions that ran."""
    *figures, ran = (np.asarray(array, np.float64) for array in arrays)
    if not ran.sum():
        return None
    return GridFit(*(float(np.sum(each * ran) / ran.sum()) for each in figures))
