"""The report of a model: its parameters, their inputs, and what may be wrong."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.grids import grid_at
from cage_jax.core.inputs import arranged, quantize_input
from cage_jax.core.quantize import fake_quant, gaussian_error, quantization_error
from cage_jax.core.rules import Rules, check_rules, unused_text
from cage_jax.core.tables import Cells, Shown
from cage_jax.core.weight_report import Row
from cage_jax.program.activations import (
    input_path,
    split_arrays,
    split_grids,
    visit_inputs,
)
from cage_jax.program.products import Product
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import rounding

# The limits beyond which something is a finding.
_MAX_CLIPPED = 0.01  # fraction of values beyond the grid
_MAX_UNUSED = 0.5  # fraction of the levels that no value takes
_MIN_VALUES_PER_LEVEL = 16  # values per level, for unused levels to mean something
_MAX_ERROR_RATIO = 1.5  # error divided by that of normal numbers


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


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of a parameter, which the parameter is multiplied with.

    Attributes:
      product: the product of both.
      quantizer: the input's quantizer; None if it is left alone.
      measured: how well the input fits its grid; None if it is left alone.
    """

    product: Product
    quantizer: Quantizer | None
    measured: GridFit | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A parameter and its inputs.

    Attributes:
      weight: the parameter's quantizer and bytes, or why it is left alone.
      measured: how well the weight fits its grid; None if it is left alone, or has no
        values.
      inputs: one for each product with data; none if it is only added or looked up.
    """

    weight: Row
    measured: GridFit | None
    inputs: tuple[Input, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class ModelReport(Shown):
    """The report of each parameter of a model, shown as a table with findings.

    Attributes:
      layers: one `Layer` for each parameter.
      findings: what may be wrong, in sentences.
    """

    layers: tuple[Layer, ...]
    findings: tuple[str, ...]

    def shown(self) -> tuple[Cells, int, Sequence[str]]:
        """Returns the table, and the findings to write below it."""
        figures = ("error", "clipped", "unused")
        of_inputs = ("input error", *figures[1:])
        head = ("path", "shape", "weight", "inputs", *figures, *of_inputs)
        lines = [line for layer in self.layers for line in _lines(layer)]
        notes = self.findings or ("Nothing looks wrong.",)
        return [head, *lines], 4, ["", *(f"- {note}" for note in notes)]


def report(
    function: Callable, rules: Rules, params: Any, *args: Any, **kwargs: Any
) -> ModelReport:
    """Reports how a program's parameters and their inputs are quantized, with errors.

    Rules that decide nothing are listed among the findings; there is no warning.

    Args:
      function: a function of parameters and any other arguments, as in
        `quantize_activations`.
      rules: a table for weights, inputs or both.
      params: parameters with values, or what `with_grids` or `calibrate` returned.
      args: an example of the arguments of `function` after the parameters.
      kwargs: an example of its keyword arguments.

    Returns:
      A `ModelReport`. Errors of inputs are those of the example, with all weights and
      all earlier inputs quantized.

    Raises:
      TypeError, ValueError: as in `fake_quant` and `quantize_activations`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> from cage_jax.program.model_report import report
      >>> rules = cage.Rules([(r"w", cage.int4(), cage.int8(axis=-1))])
      >>> params = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4), "b": jnp.ones(4)}
      >>> def apply(params, x):
      ...     return x @ params["w"] + params["b"][None, :]
      >>> found = report(apply, rules, params, jnp.linspace(-1, 1, 16).reshape(2, 8))
      >>> [len(layer.inputs) for layer in found.layers]
      [0, 1]
    """
    check_rules(rules)
    values, grids = split_grids(params)

    def visit(path, product, quantizer, x, grid):
        measured = _measure(*arranged(x, product.features, quantizer, grid))
        x = quantize_input(x, product.features, quantizer, grid)
        return x, measured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unused rules are among the findings
        rows = rules.report(values)
        quantized, _ = split_grids(fake_quant(params, _to_nearest(rules)))
    arrays, static = split_arrays(args, kwargs)
    products: list[Product] = []  # static, so collected while tracing

    # One program: op by op, a layer would compile a hundred.
    @jax.jit
    def observed(quantized, grids, arrays):
        args, kwargs = static.joined(arrays)
        visited = visit_inputs(function, rules, visit, quantized, grids, args, kwargs)
        products.extend(visited.products)
        return visited.records

    records_by_path = observed(quantized, grids, arrays)
    records = {path: iter(entries) for path, entries in records_by_path.items()}
    inputs: dict[str, list[Input]] = {}
    for product in products:
        path = input_path(rules, product)
        found = Input(product, None, None)
        if path is not None:
            measured = None if product.blocked_by else _mean(next(records[path]))
            found = Input(product, rules.match_inputs(path), measured)
        for path in product.paths:
            inputs.setdefault(path, []).append(found)
    paths, leaves, _ = flatten_with_paths(values)
    layers = []
    for row, (path, leaf) in zip(rows.rows, zip(paths, leaves)):
        measured = None
        if row.quantizer is not None:
            grid = grid_at(path, params, None)
            measured = _mean(_measured(leaf, row.quantizer, grid))
        layers.append(Layer(row, measured, tuple(inputs.get(path, ()))))
    unused = [unused_text(pattern, paths) for pattern in rows.unused_rules]
    findings = (*unused, *rows.splits, *rows.costs, *_findings(layers, rules))
    return ModelReport(tuple(layers), findings)


def _to_nearest(rules):
    def nearest(quantizer):
        return quantizer and dataclasses.replace(quantizer, rounding="nearest")

    return Rules([(r.pattern, nearest(r.weights), nearest(r.inputs)) for r in rules])


# --- measuring ------------------------------------------------------------------------


def _measure(x, quantizer, grid, _=None):
    """Computes the figures of `GridFit` as arrays."""
    quantizer = dataclasses.replace(quantizer, rounding="nearest")
    error = jnp.linalg.norm(quantization_error(x, quantizer, grid=grid).ravel())
    size = jnp.linalg.norm(x.ravel())
    error = error / jnp.where(size == 0, 1, size)
    if not quantizer.has_codes:
        return error, *[jnp.zeros([])] * 3
    found, format = rounding(x, quantizer, grid), quantizer.format
    values = found.code_values()
    # Half a step beyond the end is rounded, not clipped.
    beyond = ~found.is_inside(format.edge)
    levels = jnp.asarray(format.values, values.dtype)
    used = jnp.zeros(levels.size, bool)
    used = used.at[jnp.searchsorted(levels, values.ravel())].set(True, mode="drop")
    one_sign = jnp.all(values >= 0) | jnp.all(values <= 0)
    one_sign &= not quantizer.asymmetric and not quantizer.scale.has_offset
    return error, jnp.mean(beyond), jnp.mean(~used), one_sign


_measured = jax.jit(_measure, static_argnums=1)


def _mean(arrays) -> GridFit:
    """Averages figures over the repetitions of a scan, if any."""
    return GridFit(*(float(np.mean(array)) for array in arrays))


# --- words ----------------------------------------------------------------------------


def _lines(layer):
    row = layer.weight
    weight = f"- {row.reason}" if row.quantizer is None else str(row.quantizer)
    begin = row.path, str(row.shape), weight
    if not layer.inputs:
        yield (
            *begin,
            "- in no matrix product",
            *_figures(layer.measured),
            *_figures(),
        )
    for each in layer.inputs:
        what = "- not quantized" if each.quantizer is None else str(each.quantizer)
        if each.product.blocked_by:
            what = f"- out of reach in {each.product.blocked_by}"
        yield (*begin, what, *_figures(layer.measured), *_figures(each.measured))


def _figures(measured=None):
    if measured is None:
        return ("",) * 3
    return tuple(f"{part:.3f}" for part in measured[:3])


def _findings(layers, rules):
    weights = [layer.weight.quantizer for layer in layers]
    inputs = [each.quantizer for layer in layers for each in layer.inputs]
    if not any(weights + inputs):
        yield "nothing is quantized. Compare the rules' patterns with the paths above."
    for layer in layers:
        path, size = layer.weight.path, layer.weight.size
        if rules.match_inputs(path) and not layer.inputs:
            yield (
                f"{path}: a rule quantizes its input, but it is in no matrix product "
                f"or convolution with data. Check that its layer is called, or remove "
                f"the input quantizer from its rule."
            )
        if layer.weight.quantizer is not None and layer.weight.quantizer.has_codes:
            yield from _across(layer)
        yield from _misfit(f"{path}, weight", layer.weight.quantizer, layer, size)
        for each in layer.inputs:
            yield from _scales_of_input(f"{path}, input", each)
            size = math.prod((*each.product.shape, *each.product.repeats))
            yield from _misfit(f"{path}, input", each.quantizer, each, size)


def _across(layer):
    row = layer.weight
    shared = set(row.quantizer.blocks(row.shape).axes)
    summed = [axes for each in layer.inputs for axes in _summed(each.product, row)]
    if summed and not any(shared.issuperset(axes) for axes in summed):
        first = summed[0] if len(summed[0]) > 1 else summed[0][0]
        yield (
            f"{row.path}, weight: its product sums over axis {first} of {row.shape}, "
            f"but scales are shared along axis {row.quantizer.axis}, so they cannot "
            f"be factored out of the sum. Use axis={first}."
        )


def _scales_of_input(what, each):
    """Finds scales of an input that are outside of no sum, or cost more than values."""
    product, quantizer = each.product, each.quantizer
    if quantizer is None or not quantizer.has_codes:
        return
    if math.prod(product.window) > 1 and quantizer.axis == -1:
        yield (
            f"{what}: its convolution sums over a window of {product.window} places, "
            f"but axis=-1 gives each place a scale of its own, which cannot be "
            f"factored out of the sum. Use axis=None, one scale for all."
        )
    features = math.prod(product.shape[axis] for axis in product.features)
    size = math.prod(product.shape)
    if size == 0:
        return
    matrix = size // features, features
    codes = quantizer.bits * size
    spent = quantizer.storage_bits(matrix) - codes
    if spent > codes:
        scales = math.prod(quantizer.blocks(matrix).scale_shape)
        yield (
            f"{what}: its scales cost {spent / size:.0f} bits a value beside codes of "
            f"{quantizer.bits} (values per scale: {size / scales:.0f}). Use axis=None, "
            f"or larger groups."
        )


def _summed(product, row):
    """Returns a parameter's axes that a product may sum over, judged by lengths."""
    axes = tuple(range(len(row.shape)))
    if product.operation == "conv_general_dilated":  # all but the outputs
        channels = product.shape[product.features[0]]
        places = {axes[:-1]: -2, axes[1:]: 1}  # (..., in, out) and (out, in, ...)
        return [
            run for run, place in places.items() if channels % row.shape[place] == 0
        ]
    length = math.prod(product.shape[axis] for axis in product.features)
    runs = [axes[i:j] for i in axes for j in range(i + 1, len(axes) + 1)]
    return [
        run for run in runs if math.prod(row.shape[axis] for axis in run) == length > 1
    ]


def _misfit(what, quantizer, layer, size):
    measured = layer.measured
    if measured is None or not quantizer.has_codes:
        return
    if not math.isfinite(measured.error):
        yield (
            f"{what}: there are NaNs or infinities. Find the first step or "
            f"layer that has them."
        )
        return
    if measured.error == 0 and round((1 - measured.unused) * quantizer.levels) == 1:
        yield f"{what}: all values are the same, such as zero."
        return
    usual = math.sqrt(gaussian_error(quantizer))
    if not measured.error <= _MAX_ERROR_RATIO * usual:
        yield (
            f"{what}: the error is {measured.error:.2f} of the norm, where normal "
            f"numbers have {usual:.2f}. A few large values may stretch the grid: use "
            f"groups, a rotation or more bits."
        )
    if measured.clipped > _MAX_CLIPPED:
        yield (
            f"{what}: {measured.clipped:.1%} of the values lie beyond the grid. Use a "
            f"wider scale, or calibrate again."
        )
    enough = _MIN_VALUES_PER_LEVEL * quantizer.levels
    if not measured.unused > _MAX_UNUSED or size < enough:
        return
    unused = f"{what}: {measured.unused:.0%} of the levels are not used"
    # Of the levels on the side of the values, enough are used.
    if measured.one_sign == 1 and 2 * measured.unused - 1 <= _MAX_UNUSED:
        yield (
            f"{unused}, since all values have one sign, as after a ReLU or GELU. Use "
            f"symmetric=False, as in int8(symmetric=False)."
        )
    else:
        yield (
            f"{unused}. The grid is wider than most values: use groups, or a clipped "
            f"or searched scale."
        )
