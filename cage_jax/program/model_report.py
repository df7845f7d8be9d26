"""The report of a model: its parameters, their inputs, and what may be wrong."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cage_jax.core.inputs import of_features
from cage_jax.core.quantize import gaussian_error
from cage_jax.core.rules import Rules, check_rules
from cage_jax.core.tables import Cells, Shown
from cage_jax.core.unused import unused_text
from cage_jax.core.weight_report import Row
from cage_jax.program.following import Loss
from cage_jax.program.measuring import GridFit, Measured, measure
from cage_jax.program.origins import axes_of
from cage_jax.program.products import Product
from cage_jax.program.roles import beside_routers, other_roles
from cage_jax.program.tracing import split_grids
from cage_jax.program.visiting import (
    follow_function,
    input_path,
    out_of_reach,
)
from cage_jax.quantizers.quantizer import Quantizer

# The limits beyond which something is a finding.
_MAX_CLIPPED = 0.01  # fraction of values beyond the grid
_MAX_UNUSED = 0.5  # fraction of the levels that no value takes
_MIN_VALUES_PER_LEVEL = 16  # values per level, for unused levels to mean something
_MAX_ERROR_RATIO = 1.5  # error divided by that of normal numbers


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
      lost: the operation that joins it with data without a product, or None.
    """

    weight: Row
    measured: GridFit | None
    inputs: tuple[Input, ...]
    lost: Loss | None = None


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
      params: the parameters, or what `with_grids` or `calibrate` returned; or the
        shapes of parameters as `jax.ShapeDtypeStruct`, which gives a report without
        errors in the time of a trace.
      args: an example of the arguments of `function` after the parameters, or shapes.
      kwargs: an example of its keyword arguments.

    Returns:
      A `ModelReport`. Errors of inputs are those of the example, with all weights and
      all earlier inputs quantized.

    Raises:
      TypeError, ValueError: as in `fake_quant` and `quantize_activations`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"w", cage.int4(), cage.int8(axis=-1))])
      >>> params = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4), "b": jnp.ones(4)}
      >>> def apply(params, x):
      ...     return x @ params["w"] + params["b"][None, :]
      >>> x = jnp.linspace(-1, 1, 16).reshape(2, 8)
      >>> found = cage.report(apply, rules, params, x)
      >>> [len(layer.inputs) for layer in found.layers]
      [0, 1]
    """
    check_rules(rules)
    values, _ = split_grids(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unused rules are among the findings
        rows = rules.report(values)
    if any(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((params, args))
    ):
        followed, shapes = follow_function(function, values, args, kwargs)
        measured = Measured({}, {})
    else:
        followed, shapes, measured = measure(function, rules, params, args, kwargs)
    inputs: dict[str, list[Input]] = {}
    for product in followed.products:
        path = input_path(rules, product)
        found = Input(product, None, None)
        if path is not None and product.blocked_by is None:
            of_path = measured.inputs.get(path)
            figures = of_path.pop(0) if of_path else None
            found = Input(product, rules.match_inputs(path), figures)
        for path in product.paths:
            inputs.setdefault(path, []).append(found)
    layers = tuple(
        Layer(
            row,
            measured.weights.get(row.path),
            tuple(inputs.get(row.path, ())),
            followed.lost.get(row.path),
        )
        for row in rows.rows
    )
    unused = [unused_text(pattern, [*shapes]) for pattern in rows.unused_rules]
    reach = [
        f"{path}: {why}" for path, why in out_of_reach(rules, followed, shapes).items()
    ]
    roles = _roles(layers, beside_routers(shapes, followed.products))
    findings = (*unused, *rows.splits, *rows.costs, *reach, *roles, *_findings(layers))
    return ModelReport(layers, findings)


# --- words ----------------------------------------------------------------------------


def _lines(layer):
    row = layer.weight
    weight = f"- {row.reason}" if row.quantizer is None else str(row.quantizer)
    begin = row.path, str(row.shape), weight
    if not layer.inputs:
        looked_up = layer.lost is not None and layer.lost.rows
        yield (
            *begin,
            "- looked up" if looked_up else "- in no matrix product",
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


def _findings(layers):
    weights = [layer.weight.quantizer for layer in layers]
    inputs = [each.quantizer for layer in layers for each in layer.inputs]
    if not any(weights + inputs):
        yield "nothing is quantized. Compare the rules' patterns with the paths above."
    for layer in layers:
        path, size = layer.weight.path, layer.weight.size
        if layer.weight.quantizer is not None and layer.weight.quantizer.has_codes:
            yield from _across(layer)
        yield from _misfit(f"{path}, weight", layer.weight.quantizer, layer, size)
        for each in layer.inputs:
            yield from _scales_of_input(f"{path}, input", each)
            size = math.prod((*each.product.shape, *each.product.repeats))
            yield from _misfit(f"{path}, input", each.quantizer, each, size)


def _roles(layers, experts):
    for layer in layers:
        row, products = layer.weight, [each.product for each in layer.inputs]
        if row.quantizer is not None or row.inputs is not None:
            yield from dict.fromkeys(other_roles(row, products, experts))


def _across(layer):
    """Finds scales of a weight that are not shared along what its products sum over."""
    row = layer.weight
    shared = set(row.quantizer.blocks(row.shape).axes)
    each = [axes_of(labels.product.contracted, row.path) for labels in layer.inputs]
    windows = any(labels.product.window for labels in layer.inputs)
    each = list(dict.fromkeys(axes for axes in each if axes))
    # A scale for each slice of a sum, such as an expert's part, is like one of a group.
    parts = [axes for axes in each if {*axes[1:]} == shared and not windows]
    across = [a for a in each if not shared.issuperset(a) and a not in parts]
    if across and len(across) == len(each):
        yield (
            f"{row.path}, weight: its product sums over axis {_told(across[0])} of "
            f"{row.shape}, but scales are shared along axis {row.quantizer.axis}, so "
            f"they cannot be factored out of the sum. Use axis={_told(across[0])}, or "
            f"cage.resolve."
        )
    elif across:
        yield (
            f"{row.path}, weight: its products sum over different axes of {row.shape}; "
            f"scales are shared along axis {row.quantizer.axis}, and cannot be "
            f"factored out of the sum over axis {_told(across[0])}. If that product "
            f"matters more, use axis={_told(across[0])}."
        )
    if not each and layer.lost is not None and layer.lost.rows:
        rows = axes_of(layer.lost.rows, row.path)
        if rows and not shared.issuperset(rows):
            yield (
                f"{row.path}, weight: rows along axis {_told(rows)} of {row.shape} are "
                f"looked up, but scales are shared along axis {row.quantizer.axis}, "
                f"among all rows. Use axis={_told(rows)}, or cage.resolve."
            )


def _told(axes):
    return axes if len(axes) > 1 else axes[0]


def _scales_of_input(what, each):
    """Finds scales of an input that are outside of no sum, or cost more than values."""
    product, quantizer = each.product, each.quantizer
    if quantizer is None or not quantizer.has_codes:
        return
    if math.prod(product.window) > 1 and quantizer.axis == -1:
        yield (
            f"{what}: its convolution sums over a window of {product.window} places, "
            f"but axis=-1 gives each place a scale of its own, which cannot be "
            f"factored out of the sum. Leave `axis` out, or use axis=None."
        )
    axes = product.axes_for(quantizer)
    features = math.prod(product.shape[axis] for axis in axes)
    size = math.prod(product.shape)
    if size == 0:
        return
    matrix = size // features, features
    codes = quantizer.bits * size
    quantizer = of_features(quantizer)
    spent = quantizer.storage_bits(matrix) - codes
    if spent > codes:
        scales = math.prod(quantizer.blocks(matrix).scale_shape)
        yield (
            f"{what}: its scales cost {spent / size:.0f} bits a value beside codes of "
            f"{quantizer.bits} (values per scale: {size / scales:.0f}). Use axis=None, "
            f"or larger groups."
        )


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
