"""The products of a program in which a parameter meets data.

A program is traced to a jaxpr, so it does not matter which framework, layer or operator
made a product: a Linen Dense, an NNX Einsum, `x @ w` in a custom module, a tied
embedding. `find` lists the products; `map_inputs` runs the program with other inputs in
them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from cage_jax.arrays.jaxprs import (
    called,
    enter,
    evaluate,
    scan_counts,
    subjaxprs,
    unchanged,
)
from cage_jax.core.straight_through import FAKE_QUANT

# The paths of the parameters that a value is computed from, if it is computed from
# nothing else; None if it depends on data.
Origin = tuple[str, ...] | None
DATA: Origin = None


class Product(NamedTuple):
    """A product of a parameter with data.

    Attributes:
      paths: the path of the parameter; several if the factor is computed from several.
      operation: "dot_general", "ragged_dot_general" or "conv_general_dilated".
      shape: the shape of the input, the other factor.
      features: the axes of the input that are summed over, ascending; for a convolution
        its channels.
      window: for a convolution, the places that it sums over along each axis of space.
      repeats: lengths of the scans around it, the outermost first.
      blocked_by: the name of the operation around it that keeps its input from being
        replaced, or None.
    """

    paths: tuple[str, ...]
    operation: str
    shape: tuple[int, ...]
    features: tuple[int, ...]
    window: tuple[int, ...] = ()
    repeats: tuple[int, ...] = ()
    blocked_by: str | None = None


# Takes the name, a product, its input and its grid or None; returns the input to use
# instead, and an array or tree to record.
Visit = Callable[[str, Product, jax.Array, Any], tuple[jax.Array, Any]]


def find(program: ClosedJaxpr, origins: Sequence[Origin]) -> list[Product]:
    """Finds all products of a parameter with data in `program`, in their order.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
    """
    products: list[Product] = []
    _follow(program.jaxpr, origins, products)
    return products


def map_inputs(
    program: ClosedJaxpr,
    origins: Sequence[Origin],
    values: Sequence[Any],
    name_of: Callable[[Product], str | None],
    visit: Visit,
    grids: dict[str, Any],
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Runs `program` with other inputs in its products.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
      values: its inputs.
      name_of: gives the name of each product whose input is replaced, else None. Named
        products inside a scan get one entry of `grids`, and record one, for each
        repetition.
      visit: called for each product with a name.
      grids: passed to `visit`, by name.

    Returns:
      The outputs, and the records by name, an entry for each product.
    """
    *outputs, records = _run(
        program, [*values, grids], origins=origins, name_of=name_of, visit=visit
    )
    return outputs, records


# --- what depends on what -------------------------------------------------------------


def _follow(
    jaxpr: Jaxpr, origins: Sequence[Origin], products: list[Product]
) -> list[Origin]:
    """Returns the origins of the outputs, and adds what is inside to `products`."""
    return evaluate(
        jaxpr,
        # A function may close over its data: then that is a constant of the program.
        [*[DATA] * len(jaxpr.constvars), *origins],
        functools.partial(_follow_equation, products=products),
        literal=lambda _: (),
    )


def _follow_equation(eqn, origins, products) -> list[Origin]:
    name = eqn.primitive.name
    if name in _FEATURES:
        if (product := _product(eqn, origins)) is not None:
            products.append(product)
        return [_join(origins)]
    if name == "dynamic_slice" or eqn.params.get("name") == FAKE_QUANT:
        # A layer's weight out of a stack is still a weight, whatever the index is. So
        # is a quantized one, whatever its grid; products inside of `fake_quant`, with a
        # matrix that rotates, do not belong to the model.
        return [origins[0]]
    if name == "scan":
        return _follow_scan(eqn, origins, products)
    if (inside := called(eqn)) is not None:
        return _follow(inside.jaxpr, origins, products)
    products.extend(_out_of_reach(eqn, origins))
    return [_join(origins)] * len(eqn.outvars)


def _follow_scan(eqn, origins, products):
    origins, carries = _settled(eqn, origins), scan_counts(eqn)[1]
    inside: list[Product] = []
    outputs = _follow(eqn.params["jaxpr"].jaxpr, origins, inside)
    length = eqn.params["length"]
    products.extend(p._replace(repeats=(length, *p.repeats)) for p in inside)
    return [*origins[_carried(eqn)], *outputs[carries:]]


def _settled(eqn, origins):
    """Returns the origins of a scan's inputs that hold in every repetition."""
    origins, carried = list(origins), _carried(eqn)
    while True:
        outputs = _follow(eqn.params["jaxpr"].jaxpr, origins, [])
        joined = [_join(pair) for pair in zip(origins[carried], outputs)]
        if joined == origins[carried]:
            return origins
        origins[carried] = joined


def _carried(eqn):
    first, carries = scan_counts(eqn)
    return slice(first, first + carries)


def _out_of_reach(eqn, origins):
    """Finds products in jaxprs whose inputs cannot be replaced, assuming the worst."""
    found: list[Product] = []
    for jaxpr in subjaxprs(eqn.params):
        # Operands that the jaxpr lacks (predicates, constants) come first.
        missing = len(origins) - len(jaxpr.invars)
        known = origins[missing:] if missing >= 0 else [DATA] * len(jaxpr.invars)
        _follow(jaxpr, known, found)
    return [p._replace(blocked_by=p.blocked_by or eqn.primitive.name) for p in found]


def _join(origins) -> Origin:
    """Returns the origin of a value computed from all of these."""
    if any(origin is DATA for origin in origins):
        return DATA
    return tuple(dict.fromkeys(path for origin in origins for path in origin))


# --- products -------------------------------------------------------------------------


def _product(eqn, origins) -> Product | None:
    """Describes a product, if one factor is data and the other a parameter."""
    for side in (0, 1):
        paths = origins[1 - side]
        if origins[side] is DATA and paths:
            features = _FEATURES[eqn.primitive.name](eqn.params, side)
            window: tuple[int, ...] = ()
            if eqn.primitive.name == "conv_general_dilated":
                _, _, *places = eqn.params["dimension_numbers"].rhs_spec
                window = tuple(eqn.invars[1].aval.shape[axis] for axis in places)
            return Product(
                paths=paths,
                operation=eqn.primitive.name,
                shape=eqn.invars[side].aval.shape,
                features=tuple(sorted(features)),
                window=window,
            )
    return None


_FEATURES = {
    "dot_general": lambda params, side: params["dimension_numbers"][0][side],
    "ragged_dot_general": lambda params, side: params[
        "ragged_dot_dimension_numbers"
    ].dot_dimension_numbers[0][side],
    "conv_general_dilated": lambda params, side: (
        (params["dimension_numbers"].lhs_spec, params["dimension_numbers"].rhs_spec)[
            side
        ][1],
    ),
}


# --- running with other inputs --------------------------------------------------------


def _run(program: ClosedJaxpr, values, *, origins, name_of, visit) -> list[Any]:
    """Runs a program as `map_inputs` does.

    The grids come after the values, and the records come after the outputs, so
    that a scan reads and writes an entry of both in each repetition.
    """
    *values, grids = values
    records: dict[str, list[Any]] = {}

    def rule(eqn, known):
        origins, values = [origin for origin, _ in known], [value for _, value in known]
        products: list[Product] = []
        outputs_origins = _follow_equation(eqn, origins, products)
        names = {n for p in products if not p.blocked_by and (n := name_of(p))}
        found: dict[str, list[Any]] = {}
        if not names:
            outputs = unchanged(eqn, values)
        elif eqn.primitive.name in _FEATURES:
            (product,), (name,) = products, names
            side = origins.index(DATA)  # the other factor is a parameter
            x, record = visit(name, product, values[side], grids.get(name))
            values[side] = x.astype(values[side].dtype)
            outputs, found = unchanged(eqn, values), {name: [record]}
        else:
            inside = _settled(eqn, origins) if eqn.primitive.name == "scan" else origins
            run = functools.partial(_run, origins=inside, name_of=name_of, visit=visit)
            parts = {name: grids[name] for name in names if name in grids}
            *outputs, found = enter(eqn, [*values, parts], run)
        for name, entries in found.items():
            records.setdefault(name, []).extend(entries)
        return zip(outputs_origins, outputs, strict=True)

    outputs = evaluate(
        program.jaxpr,
        [*((DATA, c) for c in program.consts), *zip(origins, values, strict=True)],
        rule,
        literal=lambda value: ((), value),
    )
    return [*(value for _, value in outputs), records]
