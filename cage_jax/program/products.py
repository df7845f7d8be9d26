"""The products of a program in which a parameter meets data.

A program is traced to a jaxpr, so it does not matter which framework, layer or operator
made a product: a Linen Dense, an NNX Einsum, `x @ w` in a custom module, a tied
embedding. `find` lists the products; `map_inputs` runs the program with other inputs in
them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    Jaxpr,
    JaxprEqn,
    Literal,
    jaxpr_as_fun,
)

# A program of this name quantizes and dequantizes its first argument, so its result has
# the origin of that argument, whatever the grid. Its own products, with a matrix that
# rotates, do not belong to the model.
FAKE_QUANT = "_cage_jax_fake_quant"

# The paths of the parameters that a value is computed from, if it is computed from
# nothing else; None if it depends on data.
Origin = tuple[str, ...] | None
DATA: Origin = None


class Product(NamedTuple):
    """A product of a parameter with data.

    Attributes:
      paths: the path of the parameter; several if the factor is computed from several.
      operation: "dot_general" or "conv_general_dilated".
      shape: the shape of the input, the other factor.
      features: the axes of the input that are summed over, ascending; for a convolution
        its channels.
      repeats: lengths of the scans around it, the outermost first.
      beyond: the name of the operation around it that keeps its input from being
        replaced, or None.
    """

    paths: tuple[str, ...]
    operation: str
    shape: tuple[int, ...]
    features: tuple[int, ...]
    repeats: tuple[int, ...] = ()
    beyond: str | None = None


# Takes the name, a product, its input and what was given for it; returns the input to
# use instead, and an array or tree to record.
Visit = Callable[[str, Product, jax.Array, Any], tuple[jax.Array, Any]]


def find(program: ClosedJaxpr, origins: Sequence[Origin]) -> list[Product]:
    """Finds all products of a parameter with data in `program`, in their order.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
    """
    return _follow(program.jaxpr, _with_constants(program, origins))[1]


def map_inputs(
    program: ClosedJaxpr,
    origins: Sequence[Origin],
    values: Sequence[Any],
    wanted: Callable[[Product], str | None],
    visit: Visit,
    given: dict[str, Any],
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Runs `program` with other inputs in its products.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
      values: its inputs.
      wanted: gives the name of each product whose input is replaced, else None. Named
        products inside a scan get one entry of `given`, and record one, for each
        repetition.
      visit: called for each product that is wanted.
      given: what `visit` is given, by name.

    Returns:
      The outputs, and the records by name, an entry for each product.
    """
    run = _Run(wanted, visit)
    return run.program(program, _with_constants(program, origins), values, given)


def _with_constants(program, origins):
    # A function may close over its data: then that is a constant of the program.
    return [DATA] * len(program.jaxpr.constvars) + list(origins)


# --- what depends on what -------------------------------------------------------------


def _follow(jaxpr: Jaxpr, origins) -> tuple[list[Origin], list[Product]]:
    """Returns the origins of the outputs, and the products inside."""
    known = _Known(jaxpr, origins)
    products: list[Product] = []
    for eqn in jaxpr.eqns:
        products += known.step(eqn)
    return known.read(jaxpr.outvars), products


class _Known:
    """The origins of a jaxpr's values, found from one equation to the next."""

    def __init__(self, jaxpr, origins):
        self._origins = dict(zip((*jaxpr.constvars, *jaxpr.invars), origins))

    def read(self, atoms):
        return [() if isinstance(a, Literal) else self._origins[a] for a in atoms]

    def step(self, eqn) -> list[Product]:
        """Follows one equation and returns the products inside."""
        origins = self.read(eqn.invars)
        outputs, products = _step(eqn, origins)
        self._origins.update(zip(eqn.outvars, outputs))
        return products


def _step(eqn: JaxprEqn, origins):
    name = eqn.primitive.name
    if name in _FEATURES:
        product = _product(eqn, origins)
        return [_join(origins)], [] if product is None else [product]
    if name == "dynamic_slice":
        # A layer's weight out of a stack is still a weight, whatever the index is.
        return [origins[0]], []
    if name == "scan":
        return _follow_scan(eqn, origins)
    if eqn.params.get("name") == FAKE_QUANT:
        return [origins[0]], []
    called = inner_program(eqn)
    if called is None:
        return [_join(origins)] * len(eqn.outvars), _opaque(eqn, origins)
    jaxpr, constants = called
    return _follow(jaxpr, [DATA] * len(constants) + list(origins))


def _follow_scan(eqn, origins):
    program, (_, carries) = eqn.params["jaxpr"], scan_counts(eqn)
    origins = _settled(eqn, origins)
    outputs, products = _follow(program.jaxpr, _with_constants(program, origins))
    inside = [p._replace(repeats=(eqn.params["length"], *p.repeats)) for p in products]
    return [*origins[_carried(eqn)], *outputs[carries:]], inside


def _settled(eqn, origins):
    """Returns the origins of a scan's inputs that hold in every repetition."""
    program, origins = eqn.params["jaxpr"], list(origins)
    while True:
        outputs, _ = _follow(program.jaxpr, _with_constants(program, origins))
        joined = [_join(pair) for pair in zip(origins[_carried(eqn)], outputs)]
        if joined == origins[_carried(eqn)]:
            return origins
        origins[_carried(eqn)] = joined


def _carried(eqn):
    first, carries = scan_counts(eqn)
    return slice(first, first + carries)


def _opaque(eqn, origins):
    """Finds products in jaxprs whose inputs cannot be replaced, assuming the worst."""
    found: list[Product] = []
    for jaxpr in subjaxprs(eqn.params):
        count = len(jaxpr.invars)
        # Operands that the jaxpr lacks (predicates, constants) come first.
        inner = list(origins)[-count:] if count <= len(origins) else [DATA] * count
        found += _follow(jaxpr, [DATA] * len(jaxpr.constvars) + inner)[1]
    return [p._replace(beyond=p.beyond or eqn.primitive.name) for p in found]


def subjaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs among the parameters of an operation."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _join(origins) -> Origin:
    """Returns the origin of a value computed from all of these."""
    paths: list[str] = []
    for origin in origins:
        if origin is DATA:
            return DATA
        paths += [path for path in origin if path not in paths]
    return tuple(paths)


def scan_counts(eqn):
    """Counts the constants and the carried values, a scan's first operands."""
    if "ft_in" in eqn.params:  # from JAX 0.11 on
        constants, carry, _ = eqn.params["ft_in"].unpack()
        return len(constants), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def inner_program(eqn):
    """Returns the jaxpr and the constants of a plain call, or None."""
    if eqn.primitive.name not in _CALLS:
        return None
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


# --- products -------------------------------------------------------------------------


def _product(eqn, origins) -> Product | None:
    side = _data_side(origins)
    if side is None:
        return None
    features = _FEATURES[eqn.primitive.name](eqn.params, side)
    return Product(
        paths=origins[1 - side],
        operation=eqn.primitive.name,
        shape=eqn.invars[side].aval.shape,
        features=tuple(sorted(features)),
    )


def _data_side(origins) -> int | None:
    """Returns which factor is data, if the other is a parameter; else None."""
    for side in (0, 1):
        if origins[side] is DATA and origins[1 - side]:
            return side
    return None


_FEATURES = {
    "dot_general": lambda params, side: params["dimension_numbers"][0][side],
    "conv_general_dilated": lambda params, side: (
        (params["dimension_numbers"].lhs_spec, params["dimension_numbers"].rhs_spec)[
            side
        ][1],
    ),
}


# --- running with other inputs --------------------------------------------------------


class _Run:
    """Runs jaxprs, and calls `visit` at each product that is wanted."""

    def __init__(self, wanted, visit):
        self._wanted = wanted
        self._visit = visit

    def program(self, program, origins, values, given):
        return self._jaxpr(program.jaxpr, origins, [*program.consts, *values], given)

    def _jaxpr(self, jaxpr, origins, values, given):
        known = _Known(jaxpr, origins)
        environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), values))
        records: dict[str, list[Any]] = {}

        def read(atoms):
            return [a.val if isinstance(a, Literal) else environment[a] for a in atoms]

        for eqn in jaxpr.eqns:
            inputs = known.read(eqn.invars)
            products = known.step(eqn)
            names = {n for p in products if not p.beyond and (n := self._wanted(p))}
            if names:
                run = self._equation(eqn)
                parts = {name: given[name] for name in names if name in given}
                outputs, found = run(eqn, inputs, read(eqn.invars), parts)
                for name, entries in found.items():
                    records.setdefault(name, []).extend(entries)
            else:
                outputs = unchanged(eqn)(*read(eqn.invars))
            environment.update(zip(eqn.outvars, outputs))
        return read(jaxpr.outvars), records

    def _equation(self, eqn):
        name = eqn.primitive.name
        if name in _FEATURES:
            return self._product
        if name == "scan":
            return self._scan
        return self._rematerialized if name in ("remat2", "checkpoint") else self._call

    def _product(self, eqn, origins, values, given):
        product = _product(eqn, origins)
        name, side = self._wanted(product), _data_side(origins)
        replaced, record = self._visit(name, product, values[side], given.get(name))
        values[side] = replaced.astype(values[side].dtype)
        return unchanged(eqn)(*values), {name: [record]}

    def _call(self, eqn, origins, values, given):
        jaxpr, constants = inner_program(eqn)
        origins = [DATA] * len(constants) + origins
        return self._jaxpr(jaxpr, origins, [*constants, *values], given)

    def _rematerialized(self, eqn, origins, values, given):
        def run(values, given):
            return self._jaxpr(eqn.params["jaxpr"], origins, values, given)

        checkpointed = jax.checkpoint(
            run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
        return checkpointed(values, given)

    def _scan(self, eqn, origins, values, given):
        params, carried = eqn.params, _carried(eqn)
        program = params["jaxpr"]
        origins = _with_constants(program, _settled(eqn, origins))
        constants, rows = values[: carried.start], values[carried.stop :]

        def body(carry, rows):
            row, given = rows
            values = [*program.consts, *constants, *carry, *row]
            outputs, records = self._jaxpr(program.jaxpr, origins, values, given)
            return outputs[: len(carry)], (outputs[len(carry) :], records)

        carry, (stacked, records) = lax.scan(
            body,
            values[carried],
            (rows, given),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked], records


def unchanged(eqn):
    """Returns an equation as a function from its inputs to a list of its outputs."""
    inputs = list(dict.fromkeys(a for a in eqn.invars if not isinstance(a, Literal)))
    about = DebugInfo(
        "products",
        eqn.primitive.name,
        ("",) * len(inputs),
        ("",) * len(eqn.outvars),
    )
    jaxpr = Jaxpr((), inputs, eqn.outvars, [eqn], eqn.effects, about)

    def run(*values):
        environment = {
            a: v for a, v in zip(eqn.invars, values) if not isinstance(a, Literal)
        }
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*environment.values())

    return run
