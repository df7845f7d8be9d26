"""One interpreter of jaxprs, for everything that looks into a traced program.

`evaluate` walks through the equations. At each one a rule decides: it replaces the
equation, computes it `unchanged`, or goes on inside it, with `enter` or by evaluating
what is `called`. Values need not be arrays: they may be what is known about them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


def unchanged(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Computes an equation as it is, with its derivative, sharding and metadata."""
    inputs = {a: v for a, v in zip(eqn.invars, values) if not isinstance(a, Literal)}
    about = DebugInfo(
        "unchanged",
        eqn.primitive.name,
        ("",) * len(inputs),
        ("",) * len(eqn.outvars),
    )
    jaxpr = Jaxpr((), [*inputs], eqn.outvars, [eqn], eqn.effects, about)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*inputs.values())


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
    """Computes a call, checkpoint or scan, with another way to run what is inside.

    A scan stays a scan and a checkpoint a checkpoint, and their derivatives with them.

    Args:
      eqn: the equation, a scan or one of which `called` returns a program.
      values: trees of arrays, one for each input of the equation. Others may follow; a
        scan passes on a row of these in each repetition.
      run: takes the program and values for its inputs and what follows them; returns
        its outputs, and maybe more. A scan stacks these.

    Returns:
      The outputs, and what follows them.
    """
    name, params = eqn.primitive.name, eqn.params
    if name != "scan":
        inside = called(eqn)
        assert inside is not None
        entered: Callable[[list[Any]], list[Any]] = functools.partial(run, inside)
        if name in _CHECKPOINTS:
            entered = jax.checkpoint(
                entered, prevent_cse=params["prevent_cse"], policy=params["policy"]
            )
        return entered([*values])
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
