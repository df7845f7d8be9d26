"""Quantized activations: the inputs of a program's products, by the weight's path."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from cage_jax.arrays.checks import warn
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors
from cage_jax.core.inputs import fit_input_grid, quantize_input
from cage_jax.core.rules import Rules, check_rules, unused_text
from cage_jax.program.products import DATA, Origin, Product, find, map_inputs
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer

Result = TypeVar("Result")
INPUTS = "/inputs"  # after a weight's path: where the grid of its input is kept


@names_checked
def quantize_activations(
    function: Callable[..., Result], rules: Rules
) -> Callable[..., Result]:
    """Quantizes the inputs of the weights in `function`, as the rules say by path.

    All products with a weight are found in the traced program: layers of any framework,
    `x @ w`, convolutions, tied embeddings, under `jax.jit`, `jax.checkpoint` and
    `jax.lax.scan`. The weights themselves are not quantized; apply
    `fake_quant(params, rules)` first. Call the result under `jax.jit`, otherwise each
    call traces it anew.

    Args:
      function: a function of parameters, and any other arguments, that returns a tree
        of arrays. Arguments that are no arrays are left as they are, such as
        `train=True`.
      rules: a table in which some rules have a quantizer for inputs, along axis -1, 0
        or None: the features, the tokens, or all of the input as a matrix of (tokens,
        features).

    Returns:
      A function like `function`. Its first argument may be what `calibrate` returns.

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: in a call, for a rule with inputs whose parameters are in no product,
        for an input without the axis, for a grid that was not calibrated, and for a
        product that is out of reach, such as in a custom derivative.

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
    check_no_module(function, "Use cage_jax.flax.quantize_activations.")
    if not callable(function):
        raise TypeError(
            f"`function` must be a function of the parameters and of data; got a "
            f"{type(function).__name__}. Use quantize_activations(model.apply, rules)."
        )
    check_rules(rules)

    return with_inputs(function, rules, quantize_input)


def with_inputs(
    function: Callable[..., Result], rules: Rules, quantized_input: Callable
) -> Callable[..., Result]:
    """Does `quantize_activations` with another function than `quantize_input`."""

    def visit(path, product, quantizer, x, grid):
        return quantized_input(x, product.features, quantizer, grid), None

    @functools.wraps(function)
    def quantized(params, *args, **kwargs):
        params, grids = split_grids(params)
        visited = visit_inputs(function, rules, visit, params, grids, args, kwargs)
        check_reached(rules, visited)
        return visited.output

    return quantized


def check_no_module(function: Callable, remedy: str) -> None:
    """Raises for a Flax module in place of a function of parameters."""
    if any(base.__module__.startswith("flax.") for base in type(function).__mro__):
        raise TypeError(
            f"`function` must be a function of the parameters and of data; got the "
            f"module {type(function).__name__}. {remedy}"
        )


@names_checked
def calibrate(
    function: Callable, rules: Rules, params: Any, batches: Iterable[tuple]
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
    quantizers: dict[str, Quantizer] = {}

    def visit(path, product, quantizer, x, grid):
        if not quantizer.scale.needs_grid:
            return quantize_input(x, product.features, quantizer, None), None
        quantizers[path] = quantizer
        return x, fit_input_grid(x, product.features, quantizer)

    def merged(path, grids):
        scale, format = quantizers[path].scale, quantizers[path].format
        return functools.reduce(lambda a, b: scale.merged(a, b, format), grids)

    @functools.partial(jax.jit, static_argnums=2)
    def observe(params, arrays, static):
        args, kwargs = static.joined(arrays)
        visited = visit_inputs(function, rules, visit, params, {}, args, kwargs)
        check_reached(rules, visited)
        # One weight may multiply several inputs.
        return {path: merged(path, visited.records[path]) for path in quantizers}

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


# --- whole programs -------------------------------------------------------------------


class Visited(NamedTuple):
    """The results of a program that was run with other inputs of its products.

    Attributes:
      output: the program's output.
      records: the records of `visit` by path, in the order of the products.
      products: all products, also those whose inputs were left alone.
      paths: the paths of the parameters.
    """

    output: Any
    records: dict[str, list[Any]]
    products: list[Product]
    paths: list[str]


def trace(
    function: Callable, params: Any, args: tuple, kwargs: dict
) -> tuple[ClosedJaxpr, list[Origin], list[Any], Any]:
    """Traces `function` to a program.

    Returns:
      The program, the origins of its inputs, the inputs, and its output's structure.
    """
    paths, leaves, structure = flatten_with_paths(params)
    arrays, static = split_arrays(args, kwargs)

    def flat(leaves, arrays):
        args, kwargs = static.joined(arrays)
        return function(structure.unflatten(leaves), *args, **kwargs)

    program, shape = jax.make_jaxpr(flat, return_shape=True)(leaves, arrays)
    origins = [(path,) for path in paths] + [DATA] * len(arrays)
    return program, origins, [*leaves, *arrays], jax.tree.structure(shape)


def visit_inputs(
    function: Callable,
    rules: Rules,
    visit: Callable,
    params: Any,
    grids: dict[str, Grid],
    args: tuple,
    kwargs: dict,
) -> Visited:
    """Calls `function` with `visit` at the inputs that the rules quantize.

    Args:
      function: a function of parameters and any other arguments.
      rules: a table in which some rules have a quantizer for inputs.
      visit: gets the path, the product, its input's quantizer, the input and its grid
        or None; returns another input and a record.
      params: the parameters, without grids.
      grids: the grids by path.
      args: the arguments after the parameters.
      kwargs: the keyword arguments.
    """
    program, origins, values, structure = trace(function, params, args, kwargs)

    def visit_one(path, product, x, grid):
        with path_in_errors(path + INPUTS):
            return visit(path, product, rules.match_inputs(path), x, grid)

    given = {
        path.removesuffix(INPUTS): grid
        for path, grid in grids.items()
        if path.endswith(INPUTS)
    }
    wanted = functools.partial(input_path, rules)
    outputs, records = map_inputs(program, origins, values, wanted, visit_one, given)
    return Visited(
        output=structure.unflatten(outputs),
        records=records,
        products=find(program, origins),
        paths=flatten_with_paths(params)[0],
    )


def check_reached(rules: Rules, visited: Visited) -> None:
    """Raises if inputs that the rules ask for cannot be quantized."""
    for product in visited.products:
        name = input_path(rules, product)
        if name is not None and product.blocked_by is not None:
            raise ValueError(
                f"`{name}`: a product whose input is quantized must not be inside "
                f"{product.blocked_by}, where its input cannot be replaced. Use "
                f"`fake_quant` there, and remove the input quantizer from its rule."
            )
    reached = {input_path(rules, product) for product in visited.products}
    for rule in rules:
        if rule.inputs is None:
            continue
        own = [path for path in visited.paths if rules.rule_of(path) is rule]
        if not own:
            warn(unused_text(rule.pattern, visited.paths))
        elif not reached.intersection(own):
            raise ValueError(
                f"`{own[0]}`: a parameter whose inputs are quantized must be in a "
                f"matrix product or convolution with data; got one that is in none, "
                f"from the rule {rule.pattern!r}. Remove the input quantizer from that "
                f"rule."
            )


def input_path(rules: Rules, product: Product) -> str | None:
    """Returns the path whose rule quantizes the input of a product, or None."""
    return next((p for p in product.paths if rules.match_inputs(p)), None)


def split_grids(params: Any) -> tuple[Any, dict[str, Grid]]:
    """Returns the parameters, and the grids beside them if there are any."""
    if isinstance(params, dict) and set(params) == {"params", "grids"}:
        return params["params"], params["grids"]
    return params, {}


class _Static(NamedTuple):
    """Arguments without their arrays; hashable if the rest is."""

    structure: Any
    leaves: tuple[Any, ...]

    def joined(self, arrays):
        """Returns the arguments and keyword arguments with their arrays put back."""
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return self.structure.unflatten(leaves)


_ARRAY = object()


def split_arrays(args: tuple, kwargs: dict) -> tuple[list[Any], _Static]:
    """Separates the arrays, or their shapes, among arguments from the rest."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    types = jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct
    kinds = [isinstance(leaf, types) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, kinds) if is_array]
    rest = [_ARRAY if is_array else leaf for leaf, is_array in zip(leaves, kinds)]
    return arrays, _Static(structure, tuple(rest))
