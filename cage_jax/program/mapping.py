"""Programs that are run with other inputs in their products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from cage_jax.arrays.jaxprs import enter, evaluate_except, unchanged
from cage_jax.program.following import Followed, Follower
from cage_jax.program.origins import Origin
from cage_jax.program.products import PRODUCTS, Product, product_of

# Takes the name, a product, its input, its grid or None, and a dict that lives as long
# as the run of the program around; returns the input to use instead, and an array or
# tree to record.
Visit = Callable[[str, Product, jax.Array, Any, dict], tuple[jax.Array, Any]]


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
    follower = Follower(custom_derivatives)
    run = _Run(follower, name_of, visit).run
    *outputs, records = run(program, [*values, grids], origins=origins)
    return outputs, records, follower.follow(program, origins)


class _Run(NamedTuple):
    """Runs programs as `map_inputs` does.

    The grids come after the values, and the records come after the outputs, so that a
    scan reads and writes an entry of both in each repetition.
    """

    follower: Follower
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
                    self._replaced if eqn.primitive.name in PRODUCTS else self._entered
                )
                rules[place] = functools.partial(
                    replaced, eqn, inputs, names, grids, records, shared
                )
        outputs = evaluate_except(program.jaxpr, [*program.consts, *values], rules)
        return [*outputs, records]

    def _replaced(self, eqn, origins, names, grids, records, shared, values):
        """Computes a product with another input."""
        found = product_of(eqn, origins)
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
