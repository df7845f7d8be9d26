"""The products of a program in which a parameter meets data.

It does not matter which framework, layer or operator made a product: a Linen Dense, an
NNX Einsum, `x @ w` in a custom module, a tied embedding. `product_of` describes one
equation; `following` finds all of a program.
"""

import math
from typing import Any, NamedTuple

from cage_jax.program.origins import Label, Origin, dot_axes, of_data
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


def product_of(eqn: Any, origins: list[Origin]) -> tuple[Product, int] | None:
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


def repeated_as_data(eqn: Any, origins: list[Origin]) -> list[Origin]:
    """Returns the origins that a product of two weights sees.

    A weight whose rows are repeated for each example, such as learned latents or
    queries, is data for the other one.
    """
    if eqn.primitive.name != "dot_general":
        return origins
    if any(origin.data or not origin.paths for origin in origins):
        return origins
    numbers = eqn.params["dimension_numbers"]
    repeated = []
    for side, (atom, origin) in enumerate(zip(eqn.invars, origins)):
        shape, axes = atom.aval.shape, origin.axes
        _, summed, kept = _sides_of_dot(numbers, side, len(shape))
        # A matrix with an axis of no parameter may be a diagonal one.
        repeated.append(
            len(shape) > 2
            and all(axes[axis] for axis in summed)
            and any(shape[axis] > 1 and not axes[axis] for axis in kept)
        )
    if sum(repeated) != 1:
        return origins
    return [of_data(_REPEATED) if r else o for r, o in zip(repeated, origins)]


def product_of_weights(eqn: Any, origins: list[Origin]) -> Origin:
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
_REPEATED = 2**12 - 1  # numbers weights as data; more than there are arguments
PRODUCTS = (*_SIDES,)  # the names of operations that are products
