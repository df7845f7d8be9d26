"""How well the weights and inputs of a program fit their grids.

Each is judged by some of its values, 2**18 of a weight and 2**16 of an input, so that a
report compiles little more than the program itself.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.sharding import replicated
from cage_jax.core.grids import check_grid, needed_grid
from cage_jax.core.inputs import arranged, check_calibrated
from cage_jax.core.rules import Rules
from cage_jax.program.following import Followed
from cage_jax.program.tracing import split_arrays, split_grids
from cage_jax.program.visiting import visit_inputs
from cage_jax.quantizers.rounding import dequantized, rounding

# The values of an array that are measured, in even steps.
_MOST_OF_WEIGHTS = 2**18
_MOST_OF_INPUTS = 2**16  # which are kept until the program ends


class GridFit(NamedTuple):
    """How well an array fits its grid.

    Attributes:
      error: ||x - Q(x)|| / ||x||.
      clipped: fraction of the values beyond the ends of the grid.
      unused: fraction of the grid's levels that no value takes.
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
    weights: dict[str, GridFit | None] = {}
    about: list[Any] = []  # known while the program is traced

    def quantized_weight(path, quantizer, x):
        grid = needed_grid(path, quantizer, params)
        if grid is not None:
            check_grid(grid, quantizer, quantizer.blocks(x.shape))
        x, sample = _quantized(x, quantizer, grid, _MOST_OF_WEIGHTS)
        weights[path] = _fit(jax.device_get(sample), quantizer)
        return x

    def visit(path, product, quantizer, x, grid):
        check_calibrated(quantizer, grid)
        x, quantizer, grid, back = arranged(
            x, product.axes_for(quantizer), quantizer, grid
        )
        x, sample = _quantized(x, quantizer, grid, _MOST_OF_INPUTS)
        return back(x), sample

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
    inputs = {
        path: [_fit(sample, rules.match_inputs(path)) for sample in samples]
        for path, samples in jax.device_get(inputs).items()
    }
    return *about, Measured(weights, inputs)


def _to_nearest(rules):
    def nearest(quantizer):
        return quantizer and dataclasses.replace(quantizer, rounding="nearest")

    return Rules(
        [(r.pattern, nearest(r.weights), nearest(r.inputs)) for r in rules],
        resolved={path: nearest(each) for path, each in rules.resolved.items()},
    )


class _Sample(NamedTuple):
    """What is kept of an array, to compute its `GridFit` on the host.

    Attributes:
      x, values: some of the values, and the same ones quantized.
      positions, code_values: the same in units of the grid, and rounded to its levels.
      poison: 0, or NaN if any value of the whole array is not finite.
      ran: 1, and 0 where a branch was not taken.
    """

    x: Any
    values: Any
    positions: Any
    code_values: Any
    poison: Any
    ran: Any


@functools.partial(jax.jit, static_argnums=(1, 3))
def _quantized(x, quantizer, grid, most):
    """Returns the quantized array, and a sample of both."""
    found = rounding(x, quantizer, grid)
    code_values = found.code_values()
    values = dequantized(code_values, quantizer, found.grid, x)
    positions = found.position() if quantizer.has_codes else x
    size, step = math.prod(x.shape), 1
    if size > most:
        # In steps without a common divisor with the size, all rows and columns occur.
        step = next(
            n for n in itertools.count(-(-size // most)) if math.gcd(n, size) == 1
        )

    def some(x):
        return jnp.ravel(replicated(x))[::step]

    return values, _Sample(
        some(x),
        some(values),
        some(positions),
        some(code_values),
        poison=jnp.sum(values * 0),
        ran=jnp.ones([]),
    )


def _fit(sample: _Sample, quantizer: Any) -> GridFit | None:
    """Computes how well a sample fits, averaged over the repetitions that ran."""
    *parts, poison, ran = map(np.asarray, sample)
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    each = zip(*rows, poison.ravel(), ran.ravel())
    fits = [_fit_of_one(quantizer, *row) for *row, ran in each if ran and row[0].size]
    return GridFit(*(float(np.mean(part)) for part in zip(*fits))) if fits else None


def _fit_of_one(quantizer, x, values, positions, code_values, poison) -> GridFit:
    x, values = (part.astype(np.float64) for part in (x, values))
    error = np.linalg.norm(x - values) / (np.linalg.norm(x) or 1) + poison
    if not quantizer.has_codes:
        return GridFit(error, 0, 0, 0)
    format = quantizer.format
    # Half a step beyond the end is rounded, not clipped.
    beyond = positions < format.low - format.edge
    beyond |= positions > format.high + format.edge
    levels = np.asarray(format.values, code_values.dtype)
    used = np.zeros(len(levels), bool)
    used[np.searchsorted(levels, code_values).clip(max=len(levels) - 1)] = True
    has_sides = not quantizer.asymmetric and not quantizer.scale.has_offset
    one_sign = has_sides and ((code_values >= 0).all() or (code_values <= 0).all())
    return GridFit(error, float(beyond.mean()), float((~used).mean()), one_sign)
