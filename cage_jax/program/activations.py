"""Quantized activations: the inputs of a program's products, by the weight's path."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from cage_jax.arrays.names import names_checked
from cage_jax.core.inputs import fit_input_grid, quantize_input
from cage_jax.core.rules import Rules, check_rules
from cage_jax.program.tracing import check_function, split_arrays, split_grids
from cage_jax.program.visiting import INPUTS, check_reached, input_path, visit_inputs
from cage_jax.quantizers.grid import Grid

Result = TypeVar("Result")


@names_checked
def quantize_activations(
    function: Callable[..., Result], rules: Rules, *, strict: bool = True
) -> Callable[..., Result]:
    """Quantizes the inputs of the weights in `function`, as the rules say by path.

    All products with a weight are found in the traced program: layers of any framework,
    `x @ w`, convolutions, experts, tied embeddings, under `jax.jit`, `jax.checkpoint`,
    `jax.shard_map` and control flow of `jax.lax`. The weights themselves are not
    quantized; apply `fake_quant(params, rules)` first. Call the result under `jax.jit`,
    otherwise each call traces it anew.

    Args:
      function: a function of parameters, and any other arguments, that returns a tree
        of arrays. Arguments that are no arrays are left as they are, such as
        `train=True`.
      rules: a table in which some rules have a quantizer for inputs, along axis -1, 0
        or None: the features, the tokens, or all of the input as a matrix of (tokens,
        features). The default of presets, "contracted", is one scale for each sum: per
        token, and per example for a convolution over several places.
      strict: whether an input that cannot be reached is an error. With False there is
        one warning, and such inputs are left as they are.

    Returns:
      A function like `function`. Its first argument may be what `calibrate` returns.

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: in a call, for each parameter whose input is out of reach, such as in
        a custom derivative, with the operation that is in the way; for an input without
        the axis, and for a grid that was not calibrated. A parameter that the call does
        not use, and a vector, need no input.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"w", cage.int4(), cage.int8(axis=-1))])
      >>> params, x = {"w": jnp.eye(4)}, jnp.array([[0.3, -1.0, 0.2, 0.1]])
      >>> def apply(params, x):
      ...     return x @ params["w"]
      >>> quantized = jax.jit(cage.quantize_activations(apply, rules))
      >>> y = quantized(cage.fake_quant(params, rules), x)
      >>> [round(float(each), 4) for each in 127 * y[0]]
      [38.0, -127.0, 25.0, 13.0]

    Source: Jacob et al., arXiv 1712.05877 (quantized inputs in training).
    """
    check_function(
        function,
        "quantize_activations(model.apply, rules)",
        "Use cage_jax.flax.quantize_activations.",
    )
    check_rules(rules)
    return with_inputs(function, rules, quantize_input, strict=strict)


def with_inputs(
    function: Callable[..., Result],
    rules: Rules,
    quantized_input: Callable,
    *,
    strict: bool,
    custom_derivatives: bool = False,
) -> Callable[..., Result]:
    """Does `quantize_activations` with another function than `quantize_input`."""

    def visit(path, product, quantizer, x, grid):
        return quantized_input(x, product.axes_for(quantizer), quantizer, grid), None

    @functools.wraps(function)
    def quantized(params, *args, **kwargs):
        params, grids = split_grids(params)
        visited = visit_inputs(
            function,
            rules,
            visit,
            params,
            grids,
            args,
            kwargs,
            custom_derivatives=custom_derivatives,
        )
        check_reached(rules, visited, strict=strict)
        return visited.output

    return quantized


@names_checked
def calibrate(
    function: Callable,
    rules: Rules,
    params: Any,
    batches: Iterable[tuple],
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Finds the grids of calibrated or learned inputs from data.

    Each input is measured while the other inputs are quantized, except for those that
    are calibrated or learned too.

    Args:
      function: as in `quantize_activations`.
      rules: a table in which some input quantizers have the scale `Calibrated` or
        `Learned`.
      params: the parameters, or what `with_grids` or this function returned.
      batches: the arguments of `function` after the parameters, a tuple for each batch.
      strict: as in `quantize_activations`.

    Returns:
      `{"params": params, "grids": {path: Grid}}` for `quantize_activations`. The path
      of an input is that of its weight followed by "/inputs". A weight in a scan has a
      grid for each repetition.

    Raises:
      ValueError: without batches, if no input needs a grid, and for an input with NaN
        or infinity.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> static = cage.int8(axis=None, scale=cage.scales.Calibrated())
      >>> rules = cage.Rules([(r"w", None, static)])
      >>> batches = [(jnp.ones((3, 2)),), (jnp.zeros((3, 2)),)]
      >>> def apply(params, x):
      ...     return x @ params["w"]
      >>> variables = cage.calibrate(apply, rules, {"w": jnp.eye(2)}, batches)
      >>> round(127 * float(variables["grids"]["w/inputs"].scale), 3)
      1.0
    """
    check_rules(rules)
    params, grids = split_grids(params)

    def visit(path, product, quantizer, x, grid):
        if not quantizer.scale.needs_grid:
            axes = product.axes_for(quantizer)
            return quantize_input(x, axes, quantizer, None), None
        return x, fit_input_grid(x, product.features, quantizer)

    def merged(path, grids):
        quantizer = rules.match_inputs(path)
        assert quantizer is not None
        scale, format = quantizer.scale, quantizer.format
        return functools.reduce(lambda a, b: scale.merged(a, b, format), grids)

    @functools.partial(jax.jit, static_argnums=2)
    def observe(params, arrays, static):
        args, kwargs = static.joined(arrays)
        visited = visit_inputs(function, rules, visit, params, {}, args, kwargs)
        check_reached(rules, visited, strict=strict)
        _check_measured(rules, visited.followed.products)
        # One weight may multiply several inputs.
        return {
            path: merged(path, grids)
            for path, grids in visited.records.items()
            if grids[0] is not None
        }

    seen: dict[str, Grid] | None = None
    for batch in batches:
        if not isinstance(batch, (tuple, list)):
            raise TypeError(
                f"`batches` must be tuples of arguments; got one of "
                f"{type(batch).__name__}. Use [(x,) for x in batches]."
            )
        now = observe(params, *split_arrays(batch, {}))
        if seen is not None:
            now = {path: merged(path, (seen[path], now[path])) for path in now}
        seen = now
    if seen is None:
        raise ValueError(
            "`batches` must have a batch to calibrate with; got none. Pass a list of "
            "tuples of arguments."
        )
    if not seen:
        raise ValueError(
            f"`rules` must have inputs with a calibrated or learned scale; got "
            f"{rules}. Use int8(axis=None, scale=Calibrated()) in a rule."
        )
    for path, grid in seen.items():
        if not all(bool(jnp.isfinite(part).all()) for part in jax.tree.leaves(grid)):
            raise ValueError(
                f"`{path}`: `batches` must give finite inputs; got NaN or infinity in "
                f"the input of this weight. Look for it in the data or the parameters."
            )
        known = grid._replace(scale=jnp.where(grid.scale == 0, 1, grid.scale))
        grids = grids | {path + INPUTS: known}
    return {"params": params, "grids": grids}


def _check_measured(rules, products):
    """Raises for an input that is calibrated where its batches cannot be joined."""
    for product in products:
        path = input_path(rules, product)
        inside = {"while", "shard_map"}.intersection(product.within)
        if path and inside and rules.match_inputs(path).scale.needs_grid:
            raise ValueError(
                f"`{path}`: an input whose grid is calibrated or learned must not be "
                f"inside {min(inside)}. Use a quantizer that finds its scales, such as "
                f"int8(axis=None)."
            )
