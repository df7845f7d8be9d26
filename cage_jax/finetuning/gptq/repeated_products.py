"""Parameters that a program multiplies with data several times."""

from collections import Counter
from collections.abc import Iterator, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr

from cage_jax.arrays.jaxprs import scan_counts
from cage_jax.program.following import Follower
from cage_jax.program.origins import Origin


def used_again(program: ClosedJaxpr, origins: Sequence[Origin]) -> set[str]:
    """Returns the paths of parameters in several products, or in one that repeats.

    A recurrent layer multiplies its weights in each repetition of a scan. A row of a
    stack, which a scan multiplies once, is not among them.

    Args:
      program: the result of `jax.make_jaxpr`.
      origins: the origins of its inputs.
    """
    follower = Follower(custom_derivatives=True)
    products = follower.follow(program, origins).products
    counts = Counter(path for product in products for path in product.paths)
    several = {path for path, count in counts.items() if count > 1}
    return several.union(_repeated(follower, program.jaxpr, origins))


def _repeated(
    follower: Follower, jaxpr: Jaxpr, origins: Sequence[Origin]
) -> Iterator[str]:
    """Yields the paths of parameters that stay the same in the repetitions of scans."""
    equations = follower.follow(jaxpr, origins).equations
    for eqn, (inputs, products) in zip(jaxpr.eqns, equations):
        paths = {path for product in products for path in product.paths}
        if not paths:
            continue
        inside = follower.called(eqn)
        if eqn.primitive.name == "scan":
            kept = {p for o in inputs[: sum(scan_counts(eqn))] for p in o.paths}
            if eqn.params["length"] > 1:
                yield from paths & kept
            inside, inputs = eqn.params["jaxpr"], follower.inside(eqn, inputs)
        if inside is not None:
            yield from _repeated(follower, inside.jaxpr, inputs)
