"""Parameters and data, followed through a program to the products where they meet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from cage_jax.arrays.jaxprs import called, evaluate, scan_counts, subjaxprs
from cage_jax.core.straight_through import FAKE_QUANT
from cage_jax.program.origins import (
    CONSTANT,
    Label,
    Origin,
    after,
    either,
    of_data,
    only_data,
)
from cage_jax.program.products import (
    PRODUCTS,
    Product,
    product_of,
    product_of_weights,
    repeated_as_data,
)


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


def follow(program: ClosedJaxpr, origins: Sequence[Origin]) -> Followed:
    """Follows parameters and data through a program.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
    """
    return Follower().follow(program, origins)


class Follower:
    """Follows origins through programs; each is followed once from the same origins.

    Args:
      custom_derivatives: whether functions with derivatives of their own are entered.
    """

    def __init__(self, custom_derivatives: bool = False):
        self.custom_derivatives = custom_derivatives
        self._followed: dict[Any, Followed] = {}
        self._constants: dict[int, tuple[Jaxpr, list[Origin]]] = {}

    def follow(
        self, program: ClosedJaxpr | Jaxpr, origins: Sequence[Origin]
    ) -> Followed:
        """Follows parameters and data through a program, as `follow` does."""
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
            origins = repeated_as_data(eqn, origins)
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
        if name in PRODUCTS and (found := product_of(eqn, origins)) is not None:
            product, side = found
            # Another parameter, joined with data earlier, is an input here.
            inputs = origins[side].paths
            out = only_data(origins, activated=not inputs)
            return [out], [product], dict.fromkeys(inputs, Loss(name))
        if eqn.params.get("name") == FAKE_QUANT:
            # Products inside of it, with a matrix that rotates, are not the model's.
            return [origins[0]], [], {}
        if name == "optimization_barrier":
            return origins, [], {}
        weights = any(each.paths for each in origins)
        if name == "dot_general" and weights and not any(o.is_data for o in origins):
            return [product_of_weights(eqn, origins)], [], {}
        inner = _INNER.get(name, Follower._after_call)(self, eqn, origins)
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
    "scan": Follower._after_scan,
    "while": Follower._after_while,
    "cond": Follower._after_cond,
    "shard_map": Follower._after_shard_map,
}
# Operations with kernels of their own, in which products cannot be seen.
_OPAQUE = ("pallas_call", "ffi_call", "custom_call", "pure_callback", "io_callback")
_FIRST_CONSTANT = 2**12  # more than there are arguments with data
