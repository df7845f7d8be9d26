"""RoSTE: rotations chosen by the errors of weights and of their inputs."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.names import names_checked
from cage_jax.core.inputs import quantize_input
from cage_jax.core.quantize import fake_quant
from cage_jax.core.rules import Rules, check_rules
from cage_jax.program.tracing import check_function, split_arrays
from cage_jax.program.visiting import check_reached, visit_inputs
from cage_jax.quantizers.quantizer import Quantizer


@names_checked
def choose_rotations(
    function: Callable, rules: Rules, params: Any, batches: Iterable[tuple]
) -> Rules:
    """Returns rules that rotate weights and inputs where that lowers their errors.

    Each product is rotated or not, its weight and input together, whichever has the
    smaller sum of the two squared errors, each as a share of its array's sum of
    squares. That sum, over all products, is therefore at most that of rotating all of
    them and that of rotating none. Inputs are those of `function` in full precision;
    their errors and squares are added up over all batches, in float32. A weight whose
    input is not quantized is judged alone, as in `cage.choose_rotation`.

    The choice is made again every few hundred steps of a training, always from the same
    rotated `rules`. Make the rules a static argument of the jitted step, so that each
    table is compiled once.

    Args:
      function: a function of the parameters and the arguments of a batch. As it is
        compiled once for each function, give the same one every time.
      rules: a table in which some quantizers have a rotation.
      params: a tree of arrays with values, outside of `jax.jit`.
      batches: the arguments of `function` after the parameters, a tuple for each batch.

    Returns:
      `rules`, with a line for each parameter that is not rotated before the others, and
      without the rules that decide nothing then.

    Raises:
      TypeError: for anything but `Rules`, and for a module in place of a function.
      ValueError: without batches, and as in `quantize_activations`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> apply = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.eye(8)}
      >>> both = cage.int4(hadamard=8), cage.int4(axis=-1, hadamard=8)
      >>> rules = cage.Rules([(r"w", *both)])
      >>> outlier = jnp.array([[0.3, 3.0, 0.4, 0.1, -0.2, 0.3, -0.4, 0.2]])
      >>> exact = jnp.array([[7.0, 3.0, -2.0, 1.0, 0.0, 5.0, 4.0, -6.0]])
      >>> for x in (outlier, exact):
      ...     chosen = contrib.choose_rotations(apply, rules, params, [(x,)])
      ...     print(chosen.match("w").hadamard)
      8
      None

    Source: RoSTE, arXiv 2502.09003, which alternates this choice with straight-through
    training. How it weighs the two errors was not found; shares are ours.
    """
    check_rules(rules)
    check_function(function, "choose_rotations(model.apply, ...)", "Use its apply.")
    found = [_errors_of_weights(rules, params)]
    for batch in batches:
        arrays, static = split_arrays(tuple(batch), {})
        found.append(_errors_of_inputs(function, rules, params, arrays, static))
    if not found[1:]:
        raise ValueError(
            "`batches` must have a batch to judge inputs by; got none. Pass a list of "
            "tuples of arguments, or use cage.choose_rotation for weights alone."
        )
    weights, *by_batch = found
    inputs = jax.tree.map(lambda *each: sum(each), *by_batch)
    lines, resolved = [], dict(rules.resolved)
    with_plain, with_other = set[int](), set[int]()
    for path, (quantizer, _) in rules.quantized(params).items():
        errors = [each[path].shares() for each in (weights, inputs) if path in each]
        rotated, plain = (float(sum(each)) for each in zip(*errors))
        rule = rules.rule_of(path)
        assert rule is not None
        if plain < rotated:
            with_plain.add(id(rule))
            resolved[path] = _plain(quantizer)
            lines.append((re.escape(path), resolved[path], _plain(rule.inputs)))
        else:
            with_other.add(id(rule))
    # A rule that no longer decides anything would be warned about.
    idle = with_plain - with_other
    left = [rule for rule in rules if id(rule) not in idle]
    return Rules([*lines, *left], resolved=resolved)


class _Errors(NamedTuple):
    """Squared errors of an array, rotated and not, and the sum of its squares."""

    rotated: jax.Array
    plain: jax.Array
    square: jax.Array

    def shares(self) -> tuple[jax.Array, jax.Array]:
        square = jnp.where(self.square == 0, 1, self.square)
        return self.rotated / square, self.plain / square


def _errors(x: jax.Array, rounded: Callable, quantizer: Quantizer | None) -> _Errors:
    """Returns the errors of `rounded(x, quantizer)`, of None those of `x` itself."""

    def square(x):
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    def error(quantizer):
        return square(x - (x if quantizer is None else rounded(x, quantizer)))

    return _Errors(error(quantizer), error(_plain(quantizer)), square(x))


def _plain(quantizer):
    """Returns a quantizer without its rotation."""
    if quantizer is None or quantizer.hadamard is None:
        return quantizer
    return dataclasses.replace(quantizer, hadamard=None, hadamard_seed=None)


@functools.partial(jax.jit, static_argnums=0)
def _errors_of_weights(rules, params):
    return {
        path: _errors(x, fake_quant, quantizer)
        for path, (quantizer, x) in rules.quantized(params).items()
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _errors_of_inputs(function, rules, params, arrays, static):
    def visit(path, product, quantizer, x, grid):
        def rounded(x, quantizer):
            return quantize_input(x, product.axes_for(quantizer), quantizer, grid)

        return x, _errors(x, rounded, quantizer)

    args, kwargs = static.joined(arrays)
    visited = visit_inputs(function, rules, visit, params, {}, args, kwargs)
    check_reached(rules, visited)
    # A weight may multiply several inputs, and has one in each turn of a scan.
    return {
        path: jax.tree.map(lambda *each: sum(map(jnp.sum, each)), *records)
        for path, records in visited.records.items()
    }
