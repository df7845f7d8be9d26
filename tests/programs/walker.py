"""What W4A8 of a program has to compute, found without the library.

A program is traced and run equation by equation, with a rule of its own. A value that
is computed from parameters alone is a weight, and what depends on data is data. Data
that is multiplied with a weight is rounded there. A table written by hand says which
axes of each parameter are summed over. Calls and checkpoints are entered; scans and
conditionals are built again.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, Literal, jaxpr_as_fun

# What a value is computed from: the paths of parameters, or data too.
NOTHING, DATA = frozenset(), None
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call")


class Kernel(NamedTuple):
    """A parameter that is multiplied: a line of the table.

    Attributes:
      pattern: of its path, written as `layers/0/kernel`.
      axes: the axes that its products sum over.
      bits: of its codes.
    """

    pattern: str
    axes: int | tuple[int, ...]
    bits: int = 4


class Found(NamedTuple):
    """A product of a weight with data: the paths, its kind, the input's shape."""

    paths: frozenset
    kind: str
    shape: tuple


@jax.custom_jvp
def replaced(x, by):
    """`by`, with the gradient of `x`."""
    del x
    return by


@replaced.defjvp
def _(primals, tangents):
    return replaced(*primals), tangents[0]


def rounded(x, bits, axes):
    """`x` on the grid of its largest magnitude along `axes`; its gradient is 1."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    # Compilers would multiply with the reciprocal, which rounds otherwise.
    top = lax.optimization_barrier(jnp.full_like(largest, 2 ** (bits - 1) - 1))
    scale = lax.optimization_barrier(jnp.broadcast_to(largest / top, wide.shape))
    codes = jnp.round(wide / jnp.where(scale == 0, jnp.ones_like(scale), scale))
    return replaced(x, lax.stop_gradient((codes * scale).astype(x.dtype)))


def flattened(params):
    """The paths of a tree, its leaves and its structure."""
    found, structure = jax.tree.flatten_with_path(params)
    paths = ["/".join(map(_key, path)) for path, _ in found]
    return paths, [leaf for _, leaf in found], structure


def _key(key):
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def line_of(table, path):
    """The table's line for a path, or None."""
    return next((line for line in table if re.fullmatch(line.pattern, path)), None)


def rounded_weights(params, table):
    """The tree with its kernels rounded."""
    paths, leaves, structure = flattened(params)
    lines = [line_of(table, path) for path in paths]
    return structure.unflatten(
        leaf if line is None else rounded(leaf, line.bits, line.axes)
        for leaf, line in zip(leaves, lines, strict=True)
    )


def quantized(function, table, found):
    """`function` of parameters and arrays with the inputs of its kernels rounded.

    Appends to the list `found` whenever it is traced.
    """

    def run(params, *args):
        paths, leaves, structure = flattened(params)
        data, outer = jax.tree.flatten(args)

        def flat(leaves, data):
            return function(structure.unflatten(leaves), *outer.unflatten(data))

        program, shape = jax.make_jaxpr(flat, return_shape=True)(leaves, data)
        origins = [frozenset([path]) for path in paths] + [DATA] * len(data)
        walk = Walk(table, found)
        outputs, _ = walk.program(program, [*leaves, *data], origins)
        return jax.tree.structure(shape).unflatten(outputs)

    return run


class Walk:
    """Runs programs; values and what they are computed from go side by side."""

    def __init__(self, table, found):
        self.table, self.found = table, found

    def program(self, program, values, origins):
        """The outputs of a closed jaxpr, and their origins."""
        jaxpr = program.jaxpr
        # A function may close over its data.
        known = dict(zip(jaxpr.constvars, ((c, DATA) for c in program.consts)))
        known |= zip(jaxpr.invars, zip(values, origins, strict=True), strict=True)

        def read(atoms):
            pairs = [
                (a.val, NOTHING) if isinstance(a, Literal) else known[a] for a in atoms
            ]
            return [v for v, _ in pairs], [o for _, o in pairs]

        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, *read(eqn.invars))
            known |= zip(eqn.outvars, zip(*outputs, strict=True), strict=True)
        return read(jaxpr.outvars)

    def equation(self, eqn, values, origins):
        name = eqn.primitive.name
        if name in PRODUCTS:
            values = self.product(eqn, values, origins)
        elif name == "scan":
            return self.scan(eqn, values, origins)
        elif name == "cond":
            return self.cond(eqn, values, origins)
        elif name in CALLS and self.inside(eqn, values, origins):
            return self.program(_called(eqn), values, origins)
        elif "custom_vjp" in name and self.inside(eqn, values, origins):
            raise NotImplementedError("a product inside a custom derivative")
        joined = _joined(_of_a_slice(eqn, origins))
        return _bound(eqn, values), [joined] * len(eqn.outvars)

    def product(self, eqn, values, origins):
        """The factors, with the one rounded that is data and meets a weight."""
        for side in (0, 1):
            paths = origins[1 - side]
            if origins[side] is not DATA or not paths:
                continue
            line = next(
                (found for p in sorted(paths) if (found := line_of(self.table, p))),
                None,
            )
            if line is not None:
                x = values[side]
                self.found.append(Found(paths, eqn.primitive.name, x.shape))
                values = [*values]
                values[side] = rounded(x, 8, _summed(eqn, side))
        return values

    def inside(self, eqn, values, origins):
        """Whether there are products to round inside a call."""
        walk = Walk(self.table, [])
        jax.eval_shape(lambda v: walk.program(_called(eqn), v, origins)[0], values)
        return bool(walk.found)

    def scan(self, eqn, values, origins):
        params = eqn.params
        constants, carries = _counts(params)
        first = constants + carries
        origins, settled = [*origins], False
        while not settled:  # a carry that becomes data is data from the beginning
            rows = [*values[:first], *(v[0] for v in values[first:])]
            after = self.origins_of(params["jaxpr"], rows, origins)
            joined = [
                _joined(p) for p in zip(origins[constants:first], after[:carries])
            ]
            settled = joined == origins[constants:first]
            origins[constants:first] = joined

        def body(carry, row):
            outputs, _ = self.program(
                params["jaxpr"], [*values[:constants], *carry, *row], origins
            )
            return outputs[:carries], outputs[carries:]

        carry, stacked = lax.scan(
            body,
            values[constants:first],
            values[first:],
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carry, *stacked], [*joined, *after[carries:]]

    def cond(self, eqn, values, origins):
        index, *values = values
        branches, origins = eqn.params["branches"], origins[1:]
        after = [self.origins_of(branch, values, origins) for branch in branches]

        def run(branch):
            return lambda *values: self.program(branch, values, origins)[0]

        outputs = lax.switch(index, [run(branch) for branch in branches], *values)
        # Which branch it is depends on data.
        return outputs, [DATA for _ in zip(*after, strict=True)]

    def origins_of(self, program, values, origins):
        """The origins of a program's outputs, without a trace in `found`."""
        after = []

        def run(values):
            outputs, found = Walk(self.table, []).program(program, values, origins)
            after.extend(found)
            return outputs

        jax.eval_shape(run, [*values])
        return after


def _joined(origins):
    origins = [*origins]
    return DATA if DATA in origins else frozenset().union(*origins)


def _of_a_slice(eqn, origins):
    """A matrix out of a stack of weights is a weight, wherever its index is from."""
    operand = eqn.invars[0].aval if eqn.invars else None
    if eqn.primitive.name == "dynamic_slice":
        return origins[:1]
    if (
        eqn.primitive.name == "gather"
        and sum(n > 1 for n in eqn.params["slice_sizes"]) > 1
    ):
        return origins[:1] if operand.ndim > 2 else origins
    return origins


def _summed(eqn, side):
    """The axes of a factor that are summed over; of a convolution with a window, all.

    All but the examples: each place is in many sums.
    """
    params = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        (example, channels, *_), (_, _, *places), _ = params["dimension_numbers"]
        if all(eqn.invars[1].aval.shape[axis] == 1 for axis in places):
            return (channels,)
        return tuple(a for a in range(eqn.invars[0].aval.ndim) if a != example)
    if eqn.primitive.name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        numbers = params["dimension_numbers"]
    return tuple(numbers[0][side])


def _counts(params):
    if "ft_in" in params:  # from JAX 0.11 on
        constants, carry, _ = params["ft_in"].unpack()
        return len(constants), len(carry)
    return params["num_consts"], params["num_carry"]


def _called(eqn):
    program = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def _bound(eqn, values):
    """The outputs of an equation as it is."""
    inputs = {a: v for a, v in zip(eqn.invars, values) if not isinstance(a, Literal)}
    about = DebugInfo("bound", "", ("",) * len(inputs), ("",) * len(eqn.outvars))
    alone = Jaxpr((), [*inputs], eqn.outvars, [eqn], eqn.effects, about)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*inputs.values())
