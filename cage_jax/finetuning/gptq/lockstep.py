"""A program run over all batches at once, operation by operation.

So what happens to a parameter at its product with data is seen by all batches after it,
in one pass. The values of parameters that `visit` changes are read anew at each use.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from cage_jax.arrays.jaxprs import (
    called,
    last_reads,
    part_of,
    read_by,
    scan_counts,
    unchanged,
)
from cage_jax.program.following import Loss
from cage_jax.program.origins import CONSTANT, after, of_data, of_parameter
from cage_jax.program.products import PRODUCTS

# Operations after which a value still has the elements of a parameter, in other places.
_MOVES = (
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice"),
    *("gather", "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze"),
    *("transpose", "unstack"),
)


class Batched(list):
    """A value of a program that depends on data: one for each batch."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value of a program that has the elements of a parameter in other places.

    Attributes:
      path: the path of the parameter.
      layer: the place of a layer in the stack that the parameter is; () for all of it.
      moves: what moves the elements: functions of an array and of a batch's number.
      chosen: whether data chooses the elements, others for each batch.
      in_place: whether each element is still in its place.
    """

    path: str
    layer: tuple[int, ...] = ()
    moves: tuple[Callable[[Any, int], Any], ...] = ()
    chosen: bool = False
    in_place: bool = True

    def of(self, parameter: Any, batch: int = 0) -> Any:
        """Moves the elements of a parameter's layer, or their numbers."""
        for move in self.moves:
            parameter = move(parameter, batch)
        return parameter

    def moved(
        self,
        move: Callable[[Any, int], Any],
        chosen: bool = False,
        in_place: bool = False,
    ) -> "Weight":
        """Returns the weight after one more move."""
        return dataclasses.replace(
            self,
            moves=(*self.moves, move),
            chosen=self.chosen or chosen,
            in_place=self.in_place and in_place,
        )

    def row(self, number: int) -> "Weight":
        """Returns a row of a stack."""
        if self.in_place:
            return dataclasses.replace(self, layer=(*self.layer, number))
        return self.moved(lambda x, _: _row(x, number))


# Takes an equation that multiplies a weight with data, the values of its operands, the
# side of the weight and the number of each repetition around it; returns the values to
# multiply, or None for a product that is not to be visited.
Visit = Callable[[JaxprEqn, list[Any], int, tuple[int, ...]], list[Any] | None]


class Lockstep:
    """Runs programs over all batches at once.

    Args:
      count: the number of batches.
      visit: called at each product of a weight with data.
      value_of: returns the present value of a parameter's layer, by path and place.

    Attributes:
      lost: what was done to parameters other than a product, by path.
    """

    def __init__(
        self,
        count: int,
        visit: Visit,
        value_of: Callable[[str, tuple[int, ...]], jax.Array],
    ):
        self.count, self.visit, self.value_of = count, visit, value_of
        self.lost: dict[str, Loss] = {}
        self._compiled: dict[Any, tuple[Any, ClosedJaxpr]] = {}

    def run(
        self,
        program: ClosedJaxpr,
        values: Sequence[Any],
        wanted: Sequence[bool],
        repeats: tuple[int, ...] = (),
    ) -> list[Any]:
        """Runs a program.

        Args:
          program: the program.
          values: its inputs: a `Weight`, a `Batched`, or an array that is the same for
            all batches.
          wanted: for each output, whether it is computed.
          repeats: the number of each repetition around the program.

        Returns:
          The outputs, None for those that are not wanted.
        """
        return _Frame(self, program, values, wanted, repeats).run()

    def at(self, value: Any, batch: int) -> Any:
        """Returns the array of a value in one batch."""
        match value:
            case Batched():
                return value[batch]
            case Weight():
                return value.of(self.value_of(value.path, value.layer), batch)
        return value

    def every(self, function: Callable, values: Sequence[Any]) -> list[Any]:
        """Calls a function with the arrays of each batch; returns its outputs."""
        values = [
            self.at(value, 0)
            if isinstance(value, Weight) and not value.chosen
            else value
            for value in values
        ]
        if not any(map(is_batched, values)):
            return function(*values)
        found = [
            function(*(self.at(value, batch) for value in values))
            for batch in range(self.count)
        ]
        return [Batched(each) for each in zip(*found)]

    def compiled(self, eqns: list[JaxprEqn], inputs: list, outputs: list) -> Callable:
        """Compiles equations; equal ones, as those of equal layers, once."""
        part = part_of(eqns, inputs, outputs)
        key = str(part.jaxpr), *map(id, _constants(part.jaxpr))
        if key not in self._compiled:
            # The program is kept so that no other constant gets the number of its.
            self._compiled[key] = jax.jit(jaxpr_as_fun(part)), part
        return self._compiled[key][0]


def is_batched(value: Any) -> bool:
    """Tells whether a value differs between batches."""
    return isinstance(value, Batched) or (isinstance(value, Weight) and value.chosen)


def _constants(jaxpr):
    """Yields the arrays in a jaxpr that its text does not show."""
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if isinstance(atom, Literal) and np.ndim(atom.val):
                yield atom.val
        for value in eqn.params.values():
            for each in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(each, ClosedJaxpr):
                    yield from each.consts
                if isinstance(each, ClosedJaxpr | Jaxpr):
                    yield from _constants(getattr(each, "jaxpr", each))
                elif isinstance(each, jax.Array | np.ndarray):
                    yield each


class _Frame:
    """One program on its way.

    Equations without weights wait until one of their results is needed, so that they
    are compiled together and what is not needed is never computed.
    """

    def __init__(self, lockstep, program, values, wanted, repeats):
        self.lockstep, self.repeats, self.wanted = lockstep, repeats, wanted
        jaxpr = self.jaxpr = program.jaxpr
        inputs = *jaxpr.constvars, *jaxpr.invars
        self.known = dict(zip(inputs, [*program.consts, *values], strict=True))
        outputs = [a for a, used in zip(jaxpr.outvars, wanted) if used]
        self.last = last_reads(jaxpr, outputs)
        self.waiting: list[JaxprEqn] = []

    def run(self):
        for place, eqn in enumerate(self.jaxpr.eqns):
            outputs = self._weights_in(eqn) and self._after_weights(eqn, place)
            if outputs:
                self.known.update(zip(eqn.outvars, outputs))
            else:
                self.waiting.append(eqn)
        outputs = zip(self.jaxpr.outvars, self.wanted)
        atoms = [atom if used else None for atom, used in outputs]
        return self._read(atoms, len(self.jaxpr.eqns))

    def _weights_in(self, eqn):
        values = (self._known(atom) for atom in eqn.invars)
        return [n for n, value in enumerate(values) if isinstance(value, Weight)]

    def _known(self, atom):
        return None if isinstance(atom, Literal) else self.known.get(atom)

    def _after_weights(self, eqn, place):
        """Returns the outputs of an equation that reads weights; None if it waits."""
        name, wanted = eqn.primitive.name, [out in self.last for out in eqn.outvars]
        weights = self._weights_in(eqn)
        if name in PRODUCTS:
            return self._product(eqn, place, weights)
        if (inside := called(eqn, custom_derivatives=True)) is not None:
            values = self._read(eqn.invars, place)
            return self.lockstep.run(inside, values, wanted, self.repeats)
        if name == "scan":
            return self._scan(eqn, self._read(eqn.invars, place))
        if name == "optimization_barrier":
            return self._read(eqn.invars, place)
        rows: frozenset = frozenset()
        if name in _MOVES and len(weights) == 1:
            values = self._read(eqn.invars, place)
            out, rows = after(eqn, [*map(_origin, values, eqn.invars)])
            if not out.is_data:
                return _moved(eqn, values, weights[0])
        return self._lose(eqn, weights, rows)

    def _lose(self, eqn, weights, rows=frozenset()):
        """Notes that weights become data without a product that was visited."""
        for number in weights:
            path = self.known[eqn.invars[number]].path
            self.lockstep.lost.setdefault(path, Loss(eqn.primitive.name, rows))

    def _product(self, eqn, place, weights):
        values = self._read(eqn.invars, place)
        batched = [is_batched(value) for value in values[:2]]
        # Of two weights, rows that data looks up are the input of the other.
        sides = [n for n in weights if n < 2 and batched[1 - n]]
        found = None
        if len(sides) == 1:
            found = self.lockstep.visit(eqn, values, sides[0], self.repeats)
        if found is None:
            return self._lose(eqn, weights)
        if eqn.outvars[0] not in self.last:
            return [None]
        function = self.lockstep.compiled([eqn], eqn.invars, eqn.outvars)
        return self.lockstep.every(function, found)

    def _scan(self, eqn, values):
        """Runs one repetition after the other."""
        params, run = eqn.params, self.lockstep.run
        constants, carries = scan_counts(eqn)
        first = constants + carries
        carry, length = values[constants:first], params["length"]
        stacks = []
        for number in reversed(range(length)) if params["reverse"] else range(length):
            rows = [_row(stack, number) for stack in values[first:]]
            inputs = [*values[:constants], *carry, *rows]
            wanted = [True] * len(eqn.outvars)
            outputs = run(params["jaxpr"], inputs, wanted, (*self.repeats, number))
            carry = outputs[:carries]
            stacks.append(outputs[carries:])
        if params["reverse"]:
            stacks.reverse()
        joined = [
            self.lockstep.every(lambda *rows: [jnp.stack(rows)], each)[0]
            for each in zip(*stacks)
        ]
        return [*carry, *joined]

    def _read(self, atoms, place):
        """Returns values; computes what waits if one of them is among it."""
        made = {out for eqn in self.waiting for out in eqn.outvars}
        if any(not isinstance(a, Literal) and a in made for a in atoms):
            self._compute(place)
        return [
            atom.val if isinstance(atom, Literal) else self.known.get(atom)
            for atom in atoms
        ]

    def _compute(self, place):
        """Computes the equations that wait: first what is the same for all batches."""
        single, batched, differ = [], [], set()
        for eqn in self.waiting:
            inputs = [a for a in eqn.invars if not isinstance(a, Literal)]
            if any(a in differ or is_batched(self.known.get(a)) for a in inputs):
                batched.append(eqn)
                differ.update(eqn.outvars)
            else:
                single.append(eqn)
        self.waiting = []
        needed = {*read_by(batched)}
        for eqns in (single, batched):
            outputs = [
                out
                for eqn in eqns
                for out in eqn.outvars
                if self.last.get(out, -1) >= place or (eqns is single and out in needed)
            ]
            if outputs:
                inputs = read_by(eqns)
                function = self.lockstep.compiled(eqns, inputs, outputs)
                values = [self.known[a] for a in inputs]
                found = self.lockstep.every(function, values)
                self.known.update(zip(outputs, found, strict=True))
        for var in [var for var in self.known if self.last.get(var, -1) < place]:
            del self.known[var]


def _row(stack, number):
    """Returns a row of a stack of any kind."""
    match stack:
        case Weight():
            return stack.row(number)
        case Batched():
            return Batched(_row(each, number) for each in stack)
    return lax.dynamic_index_in_dim(stack, number, keepdims=False)


def _origin(value, atom):
    if isinstance(value, Weight):
        return of_parameter(value.path, atom.aval.ndim)
    return of_data(0) if is_batched(value) else CONSTANT


def _moved(eqn, values, place):
    """Returns the weights that an operation makes of the one at `place`."""
    chosen = any(is_batched(v) for n, v in enumerate(values) if n != place)

    def move(number, x, batch):
        if eqn.primitive.name == "convert_element_type":
            # The numbers of elements pass through it as they are.
            floats = jnp.issubdtype(x.dtype, jnp.floating)
            return x.astype(eqn.params["new_dtype"]) if floats else x
        inputs = [v[batch] if isinstance(v, Batched) else v for v in values]
        inputs[place] = x
        return unchanged(eqn, inputs)[number]

    def at(number):
        return lambda x, batch: move(number, x, batch)

    weight, in_place = values[place], eqn.primitive.name == "convert_element_type"
    count = len(eqn.outvars)
    return [weight.moved(at(number), chosen, in_place) for number in range(count)]
