"""The inputs that rules quantize: visited in a program, or found out of reach."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cage_jax.arrays.checks import first_lines, warn
from cage_jax.arrays.paths import path_in_errors
from cage_jax.core.rules import Rules
from cage_jax.core.unused import unused_text
from cage_jax.program.following import Followed, follow
from cage_jax.program.mapping import map_inputs
from cage_jax.program.products import PRODUCTS, Product
from cage_jax.program.tracing import trace
from cage_jax.quantizers.grid import Grid

INPUTS = "/inputs"  # after a weight's path: where the grid of its input is kept


class Visited(NamedTuple):
    """The results of a program that was run with other inputs of its products.

    Attributes:
      output: the program's output.
      records: the records of `visit` by path, in the order of the products.
      followed: the products, and what became of other parameters.
      shapes: the shapes of the parameters by path.
    """

    output: Any
    records: dict[str, list[Any]]
    followed: Followed
    shapes: dict[str, tuple[int, ...]]


def follow_function(
    function: Callable, params: Any, args: tuple, kwargs: dict
) -> tuple[Followed, dict[str, tuple[int, ...]]]:
    """Traces a function; returns what becomes of its parameters, and their shapes."""
    traced = trace(function, params, args, kwargs)
    return follow(traced.program, traced.origins), traced.shapes


def visit_inputs(
    function: Callable,
    rules: Rules,
    visit: Callable,
    params: Any,
    grids: dict[str, Grid],
    args: tuple,
    kwargs: dict,
    *,
    custom_derivatives: bool = False,
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
      custom_derivatives: as in `map_inputs`.
    """
    traced = trace(function, params, args, kwargs)

    def visit_one(path, product, x, grid, shared):
        quantizer = rules.match_inputs(path)
        # Several layers may have one input, such as queries, keys and values; it is
        # kept with the result, so that no other array gets its number.
        key = id(x), product.axes_for(quantizer), quantizer
        if grid is not None or key not in shared:
            with path_in_errors(path + INPUTS):
                found = visit(path, product, quantizer, x, grid)
            if grid is not None:
                return found
            shared[key] = x, found
        return shared[key][1]

    given = {
        path.removesuffix(INPUTS): grid
        for path, grid in grids.items()
        if path.endswith(INPUTS)
    }
    wanted = functools.partial(input_path, rules)
    outputs, records, followed = map_inputs(
        traced.program,
        traced.origins,
        traced.values,
        wanted,
        visit_one,
        given,
        custom_derivatives=custom_derivatives,
    )
    output = traced.structure.unflatten(outputs)
    return Visited(output, records, followed, traced.shapes)


def input_path(rules: Rules, product: Product) -> str | None:
    """Returns the path whose rule quantizes the input of a product, or None."""
    return next((p for p in product.paths if rules.match_inputs(p)), None)


def check_reached(rules: Rules, visited: Visited, *, strict: bool = True) -> None:
    """Raises, or warns unless `strict`, for inputs that are not reached."""
    used = {id(rules.rule_of(path)) for path in visited.shapes}
    for rule in rules:
        if rule.inputs and id(rule) not in used:
            warn(unused_text(rule.pattern, [*visited.shapes]))
    found = [
        f"`{path}`: its input cannot be quantized: {why}"
        for path, why in out_of_reach(rules, visited.followed, visited.shapes).items()
    ]
    if not found:
        return
    text = first_lines(found)
    if strict:
        raise ValueError(f"{text} Use strict=False to leave such inputs as they are.")
    warn(text)


def out_of_reach(
    rules: Rules, followed: Followed, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Returns why the inputs of parameters are not quantized, by path."""
    reached, found = set(), {}
    for product in followed.products:
        path = input_path(rules, product)
        if path is not None and product.blocked_by is None:
            reached.add(path)
        elif path is not None:
            found[path] = (
                f"its product is inside `{product.blocked_by}`, where the input cannot "
                f"be replaced. Use `fake_quant` on it there, and give the parameter a "
                f"rule without an input quantizer."
            )
    lost = followed.lost
    for path, shape in shapes.items():
        wanted = rules.match_inputs(path) and len(shape) > 1
        if wanted and path in lost and path not in reached | found.keys():
            found[path] = _why_lost(lost[path])
    owners = {path: rules.rule_of(path) for path in shapes}
    for rule in rules:
        own = [path for path, owner in owners.items() if owner is rule]
        if rule.inputs and own and not (reached | found.keys()).intersection(own):
            found[own[0]] = (
                f"no parameter of the rule {rule.pattern!r} is in a product with data "
                f"here. Remove the input quantizer from that rule."
            )
    return found


def _why_lost(loss):
    remedy = "Give it a rule without an input quantizer."
    if loss.rows:
        return (
            f"it is only looked up (`{loss.operation}`), so it has no input. {remedy}"
        )
    if loss.operation in PRODUCTS:
        return (
            f"it is joined with data before `{loss.operation}`, whose other factor "
            f"depends on that data or is a weight, so it is not the weight there. "
            f"{remedy}"
        )
    return (
        f"`{loss.operation}` joins it with data, and no matrix product or convolution "
        f"does. {remedy}"
    )
