"""The products of a program in which a parameter meets data.

A program is traced to a jaxpr, so it does not matter which framework, layer or operator
made a product: a Linen Dense, an NNX Einsum, `x @ w` in a custom module, a tied
embedding. `follow` lists the products; `map_inputs` runs the program with other inputs
in them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from cage_jax.arrays.jaxprs import (
    called,
    enter,
    evaluate,
    evaluate_except,
    scan_counts,
    subjaxprs,
    unchanged,
)
from cage_jax.core.straight_through import FAKE_QUANT
from cage_jax.program.origins import (
    CONSTANT,
    Label,
    Origin,
    after,
    dot_axes,
    either,
    of_data,
    only_data,
)
from cage_jax.quantizers.axes import CONTRACTED
from cage_jax.quantizers.quantizer import Quantizer


class Product(NamedTuple):
    """A product of a parameter with data.

    Attributes:
      paths: the path of the parameter; several if the factor is computed from several.
      operation: "dot_general", "ragged_dot_general" or "conv_general_dilated"; or an
        operation that cannot be looked into.
      shape: the shape of the input, the other factor.
      features: the axes of the input that are summed over, ascending; for a convolution
        its channels.
      window: for a convolution, the places that it sums over along each axis of space.
      summed: the axes of the input that a sum ranges over; for a convolution those of
        all its overlapping sums, which are all but the examples.
      contracted: the axes of the parameters that are summed over, as pairs with paths.
      kept: the axes of the parameters that become axes of the result.
      repeats: lengths of the scans around it, the outermost first.
      within: other operations around it, which may run it several times or not at all:
        "while", "cond" and "shard_map".
      blocked_by: the name of the operation around it that keeps its input from being
        replaced, or None.
    """

    paths: tuple[str, ...]
    operation: str
    shape: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    contracted: frozenset[Label] = frozenset()
    kept: frozenset[Label] = frozenset()
    repeats: tuple[int, ...] = ()
    within: tuple[str, ...] = ()
    blocked_by: str | None = None

    def axes_for(self, quantizer: Quantizer) -> tuple[int, ...]:
        """Returns the axes of the input that are the features for its quantizer."""
        in_blocks = quantizer.group_size is not None or quantizer.hadamard is not None
        whole = quantizer.axis == CONTRACTED and not in_blocks
        return self.summed if whole else self.features

    def count_features(self) -> int:
        """Returns the number of features of the input."""
        return math.prod(self.shape[axis] for axis in self.features)


class Loss(NamedTuple):
    """How data was made of a parameter without a product.

    Attributes:
      operation: the name of the operation.
      rows: the axes of the parameter along the rows that it looks up; empty if it does
        something else.
    """

    operation: str
    rows: frozenset[Label] = frozenset()


class Followed(NamedTuple):
    """What happens to parameters in a program.

    Attributes:
      outputs: the origins of the program's outputs.
      products: all products of a parameter with data, in their order.
      lost: the first `Loss` of each parameter that has one, by path.
      equations: for each equation, the origins of its inputs and the products in it.
    """

    outputs: list[Origin]
    products: list[Product]
    lost: dict[str, Loss]
    equations: list[tuple[list[Origin], list[Product]]]


# Takes the name, a product, its input, its grid or None, and a dict that lives as long
# as the run of the program around; returns the input to use instead, and an array or
# tree to record.
Visit = Callable[[str, Product, jax.Array, Any, dict], tuple[jax.Array, Any]]


def follow(program: ClosedJaxpr, origins: Sequence[Origin]) -> Followed:
    """Follows parameters and data through a program.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
    """
    return _Follower().follow(program, origins)


def map_inputs(
    program: ClosedJaxpr,
    origins: Sequence[Origin],
    values: Sequence[Any],
    name_of: Callable[[Product], str | None],
    visit: Visit,
    grids: dict[str, Any],
    *,
    custom_derivatives: bool = False,
) -> tuple[list[Any], dict[str, list[Any]], Followed]:
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
      custom_derivatives: whether products in functions with derivatives of their own
        are replaced too; these derivatives are lost.

    Returns:
      The outputs; the records by name, an entry for each product; and what `follow`
      finds.
    """
    follower = _Follower(custom_derivatives)
    run = _Run(follower, name_of, visit).run
    *outputs, records = run(program, [*values, grids], origins=origins)
    return outputs, records, follower.follow(program, origins)


# --- what depends on what -------------------------------------------------------------


class _Follower:
    """Follows origins through programs; each is followed once from the same origins."""

    def __init__(self, custom_derivatives: bool = False):
        self.custom_derivatives = custom_derivatives
        self._followed: dict[Any, Followed] = {}
        self._constants: dict[int, tuple[Jaxpr, list[Origin]]] = {}

    def follow(self, program: ClosedJaxpr | Jaxpr, origins: Sequence[Origin]):
        jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
        key = id(jaxpr), tuple(origins)
        if key not in self._followed:
            self._followed[key] = self._follow(jaxpr, origins)
        return self._followed[key]

    def called(self, eqn: JaxprEqn) -> ClosedJaxpr | None:
        """Returns the program that an equation calls and that can be entered."""
        return called(eqn, custom_derivatives=self.custom_derivatives)

    def _follow(self, jaxpr, origins) -> Followed:
        found = Followed([], [], {}, [])

        def rule(eqn, origins):
            outputs, products, lost = self._after(eqn, origins)
            found.products.extend(products)
            found.equations.append((origins, products))
            for path, loss in lost.items():
                found.lost.setdefault(path, loss)
            return outputs

        constants = self._constants_of(jaxpr)
        outputs = evaluate(jaxpr, [*constants, *origins], rule, lambda _: CONSTANT)
        found.outputs.extend(outputs)
        return found

    def _constants_of(self, jaxpr):
        """Returns origins of constants: a function may close over its data."""
        if id(jaxpr) not in self._constants:
            begin = _FIRST_CONSTANT + sum(len(o) for _, o in self._constants.values())
            numbers = range(begin, begin + len(jaxpr.constvars))
            self._constants[id(jaxpr)] = jaxpr, [*map(of_data, numbers)]
        return self._constants[id(jaxpr)][1]

    def _after(self, eqn, origins):
        """Returns the origins of the outputs, the products, and what is lost."""
        name = eqn.primitive.name
        if name in _SIDES and (found := _product(eqn, origins)) is not None:
            return [only_data(origins)], [found[0]], {}
        if eqn.params.get("name") == FAKE_QUANT:
            # Products inside of it, with a matrix that rotates, are not the model's.
            return [origins[0]], [], {}
        if name == "optimization_barrier":
            return origins, [], {}
        weights = any(each.paths for each in origins)
        if name == "dot_general" and weights and not any(o.is_data for o in origins):
            return [_product_of_weights(eqn, origins)], [], {}
        inner = _INNER.get(name, _Follower._after_call)(self, eqn, origins)
        if inner is not None:
            return inner
        out, rows = after(eqn, origins)
        lost = [p for o in origins for p in o.paths] if out.is_data else []
        products = []
        if lost and name in _OPAQUE:
            products = [Product(tuple(lost), name, blocked_by=name)]
        return [out] * len(eqn.outvars), products, dict.fromkeys(lost, Loss(name, rows))

    def _after_call(self, eqn, origins):
        if (inside := self.called(eqn)) is not None:
            found = self.follow(inside, origins)
            return found.outputs, found.products, found.lost
        if eqn.primitive.name in _OPAQUE or not (jaxprs := [*subjaxprs(eqn.params)]):
            return None
        return self._out_of_reach(eqn, jaxprs, origins)

    def _out_of_reach(self, eqn, jaxprs, origins):
        """Finds products in jaxprs whose inputs cannot be replaced."""
        name = eqn.primitive.name
        products: list[Product] = []
        lost: dict[str, Loss] = {}
        outputs = None
        for jaxpr in jaxprs:
            # Operands that the jaxpr lacks (predicates, constants) come first.
            missing = len(origins) - len(jaxpr.invars)
            known = origins[missing:] if missing >= 0 else None
            found = self.follow(
                jaxpr, known or [only_data(origins)] * len(jaxpr.invars)
            )
            products += [
                p._replace(blocked_by=p.blocked_by or name) for p in found.products
            ]
            lost |= found.lost
            if known is not None and len(found.outputs) == len(eqn.outvars):
                outputs = found.outputs
        return outputs or [only_data(origins)] * len(eqn.outvars), products, lost

    def inside(self, eqn: JaxprEqn, origins: list[Origin]) -> list[Origin]:
        """Returns the origins of the inputs of the program that `enter` runs."""
        name, params = eqn.primitive.name, eqn.params
        if name == "cond":
            return origins[1:]
        if name == "while":
            origins = origins[params["cond_nconsts"] :]
            constants = params["body_nconsts"]
            carries = len(origins) - constants
            return self._settled(params["body_jaxpr"], origins, constants, carries)
        if name == "scan":
            counts = scan_counts(eqn)
            first = sum(counts)
            rows = [origin._replace(axes=origin.axes[1:]) for origin in origins[first:]]
            return self._settled(params["jaxpr"], [*origins[:first], *rows], *counts)
        return origins

    def _settled(self, program, origins, constants, carries):
        """Returns the origins of a loop's inputs that hold in every repetition."""
        origins, carried = list(origins), slice(constants, constants + carries)
        while True:
            outputs = self.follow(program, origins).outputs
            joined = [*map(either, zip(origins[carried], outputs))]
            if joined == origins[carried]:
                return origins
            origins[carried] = joined

    def _after_scan(self, eqn, origins):
        constants, carries = scan_counts(eqn)
        inside = self.inside(eqn, origins)
        found = self.follow(eqn.params["jaxpr"], inside)
        repeats = (eqn.params["length"],)
        products = [p._replace(repeats=repeats + p.repeats) for p in found.products]
        stacked = [
            origin._replace(axes=(frozenset(), *origin.axes))
            if origin.paths
            else origin
            for origin in found.outputs[carries:]
        ]
        return (
            [*inside[constants : constants + carries], *stacked],
            products,
            found.lost,
        )

    def _after_while(self, eqn, origins):
        params, inside = eqn.params, self.inside(eqn, origins)
        found = self.follow(params["body_jaxpr"], inside)
        carried = inside[params["body_nconsts"] :]
        condition = [*origins[: params["cond_nconsts"]], *carried]
        asked = self.follow(params["cond_jaxpr"], condition).products
        products = [
            *(p._replace(within=("while", *p.within)) for p in found.products),
            *(p._replace(blocked_by="while") for p in asked),
        ]
        return carried, products, found.lost

    def _after_cond(self, eqn, origins):
        found = [self.follow(each, origins[1:]) for each in eqn.params["branches"]]
        products = [p for each in found for p in each.products]
        products = [p._replace(within=("cond", *p.within)) for p in products]
        lost = {path: loss for each in found for path, loss in each.lost.items()}
        return [*map(either, zip(*(each.outputs for each in found)))], products, lost

    def _after_shard_map(self, eqn, origins):
        found = self.follow(eqn.params["jaxpr"], origins)
        products = [p._replace(within=("shard_map", *p.within)) for p in found.products]
        return found.outputs, products, found.lost


_INNER = {
    "scan": _Follower._after_scan,
    "while": _Follower._after_while,
    "cond": _Follower._after_cond,
    "shard_map": _Follower._after_shard_map,
}
# Operations with kernels of their own, in which products cannot be seen.
_OPAQUE = ("pallas_call", "ffi_call", "custom_call", "pure_callback", "io_callback")
_FIRST_CONSTANT = 2**12  # more than there are arguments with data


# --- products -------------------------------------------------------------------------


def _product(eqn, origins) -> tuple[Product, int] | None:
    """Describes a product of a parameter with data, and tells which factor is data."""
    side = _weight_side(origins)
    if side is None:
        return None
    numbers = _SIDES[eqn.primitive.name](eqn.params, side, eqn.invars[side].aval.ndim)
    features, contracted, kept = numbers
    weight = origins[side]
    features = summed = tuple(sorted(features))
    window: tuple[int, ...] = ()
    if eqn.primitive.name == "conv_general_dilated":
        numbers, shape = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
        window, summed = sums_of_convolution(numbers, shape, 1 - side)
    product = Product(
        paths=weight.paths,
        operation=eqn.primitive.name,
        shape=eqn.invars[1 - side].aval.shape,
        features=features,
        window=window,
        summed=summed,
        contracted=frozenset().union(*(weight.axes[axis] for axis in contracted)),
        kept=frozenset().union(*(weight.axes[axis] for axis in kept)),
    )
    return product, 1 - side


def sums_of_convolution(
    numbers: Any, kernel: tuple[int, ...], side: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the window of a convolution, and the axes that its sums range over.

    Args:
      numbers: its `jax.lax.ConvDimensionNumbers`.
      kernel: the shape of its second argument.
      side: the number of the argument whose axes are returned.
    """
    window = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
    examples, features, *_ = numbers[side]
    if math.prod(window) == 1:
        return window, (features,)
    return window, tuple(a for a in range(len(kernel)) if a != examples)


def _weight_side(origins):
    """Returns which factor of a product is the parameter's, or None."""
    left, right = origins[:2]
    for side, mine, other in ((0, left, right), (1, right, left)):
        if mine.paths and not mine.data and other.data:
            return side
    # A weight that is masked by other data than that which it is multiplied with.
    for side, mine, other in ((1, right, left), (0, left, right)):
        if mine.paths and other.data and not mine.data & other.data:
            return side
    return None


def _product_of_weights(eqn, origins):
    """Returns the origin of a product of parameters, as in LoRA, or with constants."""
    numbers = eqn.params["dimension_numbers"]
    ndims = [atom.aval.ndim for atom in eqn.invars]
    kept = [_sides_of_dot(numbers, side, ndims[side])[2] for side in (0, 1)]
    origins = [
        origin if origin.paths else origin._replace(axes=(frozenset(),) * ndim)
        for origin, ndim in zip(origins, ndims)
    ]
    return dot_axes(origins, numbers, kept)


def _sides_of_dot(numbers, side, ndim, groups=()):
    """Returns the input's axes that are summed over, the weight's, and its others."""
    summed, batch = numbers
    gone = (*summed[side], *batch[side], *groups)
    kept = [axis for axis in range(ndim) if axis not in gone]
    return summed[1 - side], summed[side], kept


def _sides_of_ragged_dot(params, side, ndim):
    numbers = params["ragged_dot_dimension_numbers"]
    groups = numbers.rhs_group_dimensions if side == 1 else ()
    return _sides_of_dot(numbers.dot_dimension_numbers, side, ndim, groups)


def _sides_of_convolution(params, side, ndim):
    numbers = params["dimension_numbers"]
    mine, other = (numbers.lhs_spec, numbers.rhs_spec)[:: 1 if side == 0 else -1]
    outputs = mine[0]
    contracted = [axis for axis in range(ndim) if axis != outputs]
    return (other[1],), contracted, [outputs]


_SIDES = {
    "dot_general": lambda params, side, ndim: _sides_of_dot(
        params["dimension_numbers"], side, ndim
    ),
    "ragged_dot_general": _sides_of_ragged_dot,
    "conv_general_dilated": _sides_of_convolution,
}
PRODUCTS = (*_SIDES,)


# --- running with other inputs --------------------------------------------------------


class _Run(NamedTuple):
    """Runs programs as `map_inputs` does.

    The grids come after the values, and the records come after the outputs, so that a
    scan reads and writes an entry of both in each repetition.
    """

    follower: _Follower
    name_of: Callable[[Product], str | None]
    visit: Visit

    def run(self, program: ClosedJaxpr, values, *, origins) -> list[Any]:
        *values, grids = values
        records: dict[str, list[Any]] = {}
        shared: dict[Any, Any] = {}
        followed = self.follower.follow(program, origins)
        rules = {}
        for place, (inputs, products) in enumerate(followed.equations):
            names = {self.name_of(p) for p in products if not p.blocked_by} - {None}
            if names:
                eqn = program.jaxpr.eqns[place]
                replaced = (
                    self._replaced if eqn.primitive.name in _SIDES else self._entered
                )
                rules[place] = functools.partial(
                    replaced, eqn, inputs, names, grids, records, shared
                )
        outputs = evaluate_except(program.jaxpr, [*program.consts, *values], rules)
        return [*outputs, records]

    def _replaced(self, eqn, origins, names, grids, records, shared, values):
        """Computes a product with another input."""
        found = _product(eqn, origins)
        assert found is not None
        (name,), (product, side) = names, found
        x, record = self.visit(name, product, values[side], grids.get(name), shared)
        records.setdefault(name, []).append(record)
        values[side] = x.astype(values[side].dtype)
        return unchanged(eqn, values)

    def _entered(self, eqn, origins, names, grids, records, _, values):
        """Computes an operation that has such products inside."""
        inside = self.follower.inside(eqn, origins)
        parts = {name: grids[name] for name in names if name in grids}
        run = functools.partial(self.run, origins=inside)
        *outputs, found = enter(eqn, [*values, parts], run)
        # A cond has the records of each branch.
        for each in found if isinstance(found, list) else [found]:
            for name, entries in each.items():
                records.setdefault(name, []).extend(entries)
        return outputs
