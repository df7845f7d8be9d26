"""What a value of a program is computed from: parameters, data, or both.

A value made of parameters alone is a weight, with the axes of the parameters that lie
along its own: through a transpose, a reshape or a row of a stack it is known which axes
a product sums over. A weight stays one if it is masked by data, chosen by data, or a
matrix that data picks out of a stack; or if noise or another weight that is given as
data is added to it. What is added to an activation is a bias, and becomes data.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

Label = tuple[str, int]  # the path of a parameter, and one of its axes
_NONE: frozenset[Label] = frozenset()
_STACK = frozenset(
    [("", 0)]
)  # of an axis that numbers parameters, and is none of theirs

# Operations on elements that leave a weight a weight if one of their factors is data;
# the sums only if this is no activation.
_SUMS = ("add", "sub", "add_any")
_MIXING = (*_SUMS, "mul", "div", "max", "min", "select_n", "and", "or")


class Origin(NamedTuple):
    """What a value is computed from; by default from numbers in the program alone.

    Attributes:
      paths: the paths of the parameters that a weight is made of; empty for data.
      axes: for each axis of a weight, the axes of the parameters that lie along it.
      data: the inputs with data that it depends on, a bit for each.
      activated: whether it is computed from a product of a parameter with data alone,
        or from rows of one that data looks up.
    """

    paths: tuple[str, ...] = ()
    axes: tuple[frozenset[Label], ...] = ()
    data: int = 0
    activated: bool = False

    @property
    def is_data(self) -> bool:
        """Whether it depends on data and is no weight."""
        return bool(self.data) and not self.paths


CONSTANT = Origin()


def axes_of(labels: Iterable[Label], path: str) -> tuple[int, ...]:
    """Returns the axes of one parameter among labels, ascending."""
    return tuple(sorted(axis for other, axis in labels if other == path))


def of_parameter(path: str, ndim: int) -> Origin:
    """Returns the origin of a parameter."""
    return Origin((path,), tuple(frozenset([(path, axis)]) for axis in range(ndim)))


def of_data(number: int) -> Origin:
    """Returns the origin of one of the inputs with data."""
    return Origin(data=1 << number)


def only_data(origins: Sequence[Origin], activated: bool = False) -> Origin:
    """Returns the origin of data that is computed from all of these."""
    data = 0
    for origin in origins:
        data |= origin.data
        activated |= origin.activated
    return Origin(data=data, activated=activated)


def either(origins: Sequence[Origin]) -> Origin:
    """Returns the origin of a value that may be any of these, in one place."""
    if any(origin.is_data for origin in origins):
        return only_data(origins)
    weights = [origin for origin in origins if origin.paths]
    return _weight(weights, [origin.axes for origin in weights], origins)


def after(eqn: JaxprEqn, origins: Sequence[Origin]) -> tuple[Origin, frozenset[Label]]:
    """Follows an operation that is no product or call.

    Returns:
      The origin of its results; and if it looks up rows of weights, which become data,
      the axes of the parameters along the rows.
    """
    weights = [place for place, origin in enumerate(origins) if origin.paths]
    if not weights or not eqn.outvars:
        return only_data(origins), _NONE
    chosen = _CHOSEN.get(eqn.primitive.name)
    if chosen is not None and any(each.data for each in origins):
        # Data that chooses among weights does not mix with them.
        operands, long = chosen(eqn)
        if long is not None and len(long) < 2:
            rows = _NONE.union(*(origins[0].axes[axis] for axis in long))
            return only_data(origins, activated=True), rows
        origins = [
            o if place in operands else CONSTANT for place, o in enumerate(origins)
        ]
        weights = [place for place in weights if place in operands]
    if any(origin.is_data for origin in origins):
        name = eqn.primitive.name
        mixes = name in _MIXING
        if name in _SUMS:
            mixes = not any(o.is_data and o.activated for o in origins)
        shapes = {p: _shape(eqn.invars[p]) for p in weights}
        whole = all(_is_matrix(origins[p], shape) for p, shape in shapes.items())
        # A weight that is repeated for each example becomes data.
        whole &= all(shape == _shape(eqn.outvars[0]) for shape in shapes.values())
        if not (mixes and whole):
            return only_data(origins), _NONE
    out = _shape(eqn.outvars[0])
    axes = [_moved(eqn, p, origins[p].axes, out) for p in weights]
    return _weight([origins[p] for p in weights], axes, origins), _NONE


def dot_axes(
    origins: Sequence[Origin], numbers: Any, kept: Sequence[Sequence[int]]
) -> Origin:
    """Returns the origin of a product of two weights."""
    (_, (batch, rhs_batch)) = numbers
    axes = [origins[0].axes[a] | origins[1].axes[b] for a, b in zip(batch, rhs_batch)]
    for origin, places in zip(origins, kept):
        axes += [origin.axes[place] for place in places]
    return _weight(origins, [tuple(axes)], origins)


def _weight(weights, axes, origins) -> Origin:
    """Returns the origin of a weight that is made of several, of all these origins."""
    paths = tuple(dict.fromkeys(path for weight in weights for path in weight.paths))
    merged = tuple(_NONE.union(*each) for each in zip(*axes))
    return only_data(origins)._replace(paths=paths, axes=merged)


def _shape(atom):
    return getattr(atom.aval, "shape", ())


def _is_matrix(origin, shape):
    """Tells whether a value is a matrix of parameters, not one that is broadcast."""
    long = [axes for axes, length in zip(origin.axes, shape) if length > 1]
    return len(long) > 1 and all(long)


# --- the axes of the results ----------------------------------------------------------


def _moved(eqn, place, axes, out):
    """Returns the parameters' axes along those of the result, for one operand."""
    name, params, shape = eqn.primitive.name, eqn.params, _shape(eqn.invars[place])
    if name == "transpose":
        return tuple(axes[axis] for axis in params["permutation"])
    if name == "reshape":
        return _reshaped(axes, shape, out)
    if name == "broadcast_in_dim":
        places = dict(zip(params["broadcast_dimensions"], zip(axes, shape)))
        return tuple(
            places[axis][0] if axis in places and places[axis][1] == length else _NONE
            for axis, length in enumerate(out)
        )
    if name == "squeeze":
        return _without(axes, params["dimensions"])
    if name == "stack":
        return (*axes[: params["axis"]], _STACK, *axes[params["axis"] :])
    if name == "concatenate":
        place = params["dimension"]
        return (*axes[:place], axes[place] or _STACK, *axes[place + 1 :])
    if name == "unstack":
        return _without(axes, [params["axis"]])
    if name == "gather":
        return _gathered(axes, eqn, out)
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        return _without(axes, params["axes"])
    if len(shape) == len(out):
        return axes
    return (_NONE.union(*axes),) * len(out) if axes else (_NONE,) * len(out)


def _without(axes, removed):
    return tuple(each for axis, each in enumerate(axes) if axis not in removed)


def _reshaped(axes, shape, out):
    """Follows axes that are merged and split: each run of them keeps its elements."""
    found: list[frozenset[Label]] = []
    if 0 in shape:
        return (_NONE.union(*axes),) * len(out)
    lengths, others = iter(zip(shape, axes)), iter(out)
    while len(found) < len(out):
        before, run, now = 1, _NONE, [next(others)]
        while before != math.prod(now):
            if before < math.prod(now):
                length, labels = next(lengths)
                before, run = before * length, run | (labels if length > 1 else _NONE)
            else:
                now.append(next(others))
        found += [run if length > 1 else _NONE for length in now]
    return tuple(found)


# --- choosing -------------------------------------------------------------------------


# Each returns the operands that are chosen from; and if it takes a slice of the first,
# its axes that are longer than 1: with fewer than two, a row is looked up.


def _chosen_by_slice(eqn):
    sizes = eqn.params["slice_sizes"]
    return (0,), [axis for axis, length in enumerate(sizes) if length > 1]


def _chosen_by_gather(eqn):
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    kept = _kept_by_gather(numbers, len(sizes))
    return (0,), [axis for axis in kept if sizes[axis] > 1]


def _chosen_by_select(eqn):
    return range(1, len(eqn.invars)), None


_CHOSEN = {
    "dynamic_slice": _chosen_by_slice,
    "gather": _chosen_by_gather,
    "select_n": _chosen_by_select,
}


def _kept_by_gather(numbers, ndim):
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return [axis for axis in range(ndim) if axis not in gone]


def _gathered(axes, eqn, out):
    """Returns the axes of slices, which are placed along the axes that index them."""
    numbers = eqn.params["dimension_numbers"]
    indexed = _NONE.union(*(axes[axis] for axis in numbers.collapsed_slice_dims))
    found = [indexed] * len(out)
    kept = _kept_by_gather(numbers, len(axes))
    for place, axis in zip(numbers.offset_dims, kept):
        found[place] = axes[axis]
    return tuple(found)
