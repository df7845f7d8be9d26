"""One interpreter of jaxprs, for everything that looks into a traced program.

`evaluate` walks through the equations. At each one a rule decides: it replaces the
equation, computes it `unchanged`, or goes on inside it, with `enter` or by evaluating
what is `called`. Values need not be arrays: they may be what is known about them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    Jaxpr,
    JaxprEqn,
    Literal,
    jaxpr_as_fun,
)
from jax.sharding import PartitionSpec

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_CHECKPOINTS = ("remat2", "checkpoint")
_CUSTOM_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")


def evaluate(
    jaxpr: Jaxpr,
    values: Sequence[Any],
    rule: Callable[[JaxprEqn, list[Any]], Sequence[Any]],
    literal: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """Follows values through a jaxpr, one equation after the other.

    Args:
      jaxpr: the program.
      values: one for each of its constants, then one for each of its inputs.
      rule: takes an equation and the values of its inputs; returns those of its
        outputs.
      literal: takes a number that is written in the program; returns the value of it.

    Returns:
      The values of the outputs.
    """
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(atoms):
        return [literal(a.val) if isinstance(a, Literal) else known[a] for a in atoms]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, rule(eqn, read(eqn.invars)), strict=True))
    return read(jaxpr.outvars)


def evaluate_except(
    jaxpr: Jaxpr,
    values: Sequence[Any],
    rules: Mapping[int, Callable[[list[Any]], Sequence[Any]]],
) -> list[Any]:
    """Computes a jaxpr as it is, except for some of its equations.

    Args:
      jaxpr: the program.
      values: arrays, one for each of its constants, then one for each of its inputs.
      rules: by the number of an equation, a function that takes the values of its
        inputs and returns those of its outputs.

    Returns:
      The values of the outputs.
    """
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(atoms):
        return [a.val if isinstance(a, Literal) else known[a] for a in atoms]

    begin, last_read = 0, last_reads(jaxpr, jaxpr.outvars)
    for place in [*sorted(rules), len(jaxpr.eqns)]:
        between = jaxpr.eqns[begin:place]
        outputs = [
            out
            for eqn in between
            for out in eqn.outvars
            if last_read.get(out, -1) >= place
        ]
        if between:
            inputs = read_by(between)
            found = _computed(between, inputs, read(inputs), outputs)
            known.update(zip(outputs, found, strict=True))
        if place in rules:
            eqn = jaxpr.eqns[place]
            found = rules[place](read(eqn.invars))
            known.update(zip(eqn.outvars, found, strict=True))
        begin = place + 1
    return read(jaxpr.outvars)


def last_reads(jaxpr: Jaxpr, outputs: Sequence[Any]) -> dict[Any, int]:
    """Returns the number of the last equation that reads each variable.

    Those of `outputs` are read after all equations.
    """
    last: dict[Any, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        last.update({a: number for a in eqn.invars if not isinstance(a, Literal)})
    read = (a for a in outputs if not isinstance(a, Literal))
    return last | dict.fromkeys(read, len(jaxpr.eqns))


def read_by(eqns: Sequence[JaxprEqn]) -> list[Any]:
    """Returns the variables that equations read and do not compute, each once."""
    read: dict[Any, None] = {}
    own: set[Any] = set()
    for eqn in eqns:
        inputs = [a for a in eqn.invars if not isinstance(a, Literal) and a not in own]
        read |= dict.fromkeys(inputs)
        own.update(eqn.outvars)
    return [*read]


def unchanged(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Computes an equation as it is, with its derivative, sharding and metadata."""
    inputs = {a: v for a, v in zip(eqn.invars, values) if not isinstance(a, Literal)}
    return _computed([eqn], [*inputs], [*inputs.values()], eqn.outvars)


def _computed(eqns, inputs, values, outputs):
    return jaxpr_as_fun(part_of(eqns, inputs, outputs))(*values)


def part_of(
    eqns: Sequence[JaxprEqn], inputs: Sequence[Any], outputs: Sequence[Any]
) -> ClosedJaxpr:
    """Returns the program of some equations, from variables to variables."""
    names = tuple(("",) * len(each) for each in (inputs, outputs))
    about = DebugInfo("unchanged", eqns[0].primitive.name, *names)
    effects: frozenset = frozenset().union(*(eqn.effects for eqn in eqns))
    jaxpr = Jaxpr((), [*inputs], [*outputs], [*eqns], effects, about)
    return ClosedJaxpr(jaxpr, ())


def called(eqn: JaxprEqn, *, custom_derivatives: bool = False) -> ClosedJaxpr | None:
    """Returns the program that an equation calls once with its inputs, or None.

    Args:
      eqn: the equation: a `jit` or `checkpoint`, for example, but no loop.
      custom_derivatives: whether functions with derivatives of their own count too. To
        enter them loses these derivatives.
    """
    names = _CALLS + _CHECKPOINTS + _CUSTOM_DERIVATIVES * custom_derivatives
    if eqn.primitive.name not in names:
        return None
    program: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


def enter(
    eqn: JaxprEqn,
    values: Sequence[Any],
    run: Callable[[ClosedJaxpr, list[Any]], list[Any]],
) -> list[Any]:
    """Computes an operation with another way to run what is inside of it.

    A scan stays a scan, a checkpoint a checkpoint and so on, and their derivatives with
    them.

    Args:
      eqn: an equation of which `called` returns a program; or a scan, while, cond or
        shard_map.
      values: trees of arrays, one for each input of the equation. Others may follow; a
        scan passes on a row of these in each repetition.
      run: takes the program and values for its inputs and what follows them; returns
        its outputs, and maybe more.

    Returns:
      The outputs, and of what follows them: rows in a stack from a scan; the last ones
      from a `while`; a list with those of each branch from a `cond`; those of each
      device along a new first axis from a `shard_map`. There are zeros for what did not
      run.
    """
    name = eqn.primitive.name
    if name in _LOOPS:
        return _LOOPS[name](eqn, values, run)
    inside = called(eqn, custom_derivatives=True)
    assert inside is not None
    entered: Callable[[list[Any]], list[Any]] = functools.partial(run, inside)
    if name in _CHECKPOINTS:
        params = eqn.params
        entered = jax.checkpoint(
            entered, prevent_cse=params["prevent_cse"], policy=params["policy"]
        )
    return entered([*values])


def _enter_scan(eqn, values, run):
    params = eqn.params
    constants, carries = scan_counts(eqn)
    first = constants + carries

    def body(carry, rows):
        outputs = run(params["jaxpr"], [*values[:constants], *carry, *rows])
        return outputs[:carries], outputs[carries:]

    carry, stacked = lax.scan(
        body,
        [*values[constants:first]],
        [*values[first:]],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _enter_while(eqn, values, run):
    params, own = eqn.params, len(eqn.invars)
    of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
    first = of_condition + of_body
    closed, rest = values[:first], values[own:]
    condition = params["cond_jaxpr"]

    def body(carry):
        return run(params["body_jaxpr"], [*closed[of_condition:], *carry, *rest])

    def goes_on(state):
        carry, _ = state
        return jaxpr_as_fun(condition)(*closed[:of_condition], *carry)[0]

    def step(state):
        outputs = body(state[0])
        return outputs[: own - first], outputs[own - first :]

    carry = [*values[first:own]]
    more = _zeros(jax.eval_shape(body, carry)[own - first :])
    carry, more = lax.while_loop(goes_on, step, (carry, more))
    return [*carry, *more]


def _enter_cond(eqn, values, run):
    index, *operands = values
    own, branches = len(eqn.outvars), eqn.params["branches"]
    shapes = [
        jax.eval_shape(functools.partial(run, branch), operands)[own:]
        for branch in branches
    ]

    def branch(number):
        def taken(operands):
            outputs = run(branches[number], operands)
            more = [_zeros(shape) for shape in shapes]
            more[number] = outputs[own:]
            return outputs[:own], more

        return taken

    outputs, more = lax.switch(index, [*map(branch, range(len(branches)))], operands)
    return [*outputs, *map(list, zip(*more))]


def _enter_shard_map(eqn, values, run):
    params, own = eqn.params, len(eqn.outvars)
    program = ClosedJaxpr(params["jaxpr"], ())
    axes = params.get("newly_manual_axes", params.get("manual_axes"))
    along = PartitionSpec(tuple(a for a in params["mesh"].axis_names if a in axes))

    def body(*values):
        outputs = run(program, [*values])
        more = jax.tree.map(lambda x: jnp.expand_dims(x, 0), outputs[own:])
        return outputs[:own], more

    rest = [PartitionSpec()] * (len(values) - len(eqn.invars))
    outputs, more = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=(*params["in_specs"], *rest),
        out_specs=([*params["out_specs"]], along),
        check_vma=params["check_vma"],
        axis_names=axes,
    )(*values)
    return [*outputs, *more]


_LOOPS = {
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
    "shard_map": _enter_shard_map,
}


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """Counts the constants and the carried values, a scan's first operands."""
    if "ft_in" in eqn.params:  # from JAX 0.11 on
        constants, carry, _ = eqn.params["ft_in"].unpack()
        return len(constants), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def subjaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs among the parameters of an operation."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each
