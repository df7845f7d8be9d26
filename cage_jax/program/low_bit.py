"""Whole programs that take codes in place of parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.dispatch import Implementation, check_implementation
from cage_jax.arrays.jaxprs import called, enter, evaluate, scan_counts, unchanged
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors
from cage_jax.core.inputs import quantize_input
from cage_jax.core.low_bit_dot import low_bit_dot
from cage_jax.core.quantize import dequantize
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.core.rules import Rules, check_rules
from cage_jax.program.activations import Result, with_inputs
from cage_jax.program.tracing import check_function, trace


@names_checked
def low_bit(
    function: Callable[..., Result],
    rules: Rules | None = None,
    *,
    strict: bool = True,
    implementation: Implementation | None = None,
) -> Callable[..., Result]:
    """Makes `function` take codes in place of parameters and multiply them directly.

    Every product of a `QuantizedArray` with data becomes a `low_bit_dot`: in layers of
    any framework, `x @ w`, einsums, tied embeddings, under `jax.jit` and
    `jax.checkpoint`, and in `jax.lax.scan` over stacked layers. Anything else done with
    quantized parameters, such as looking up embeddings, is done with `dequantize`d
    ones. Use it forward only. Call the result under `jax.jit`, otherwise each call
    traces it anew.

    Args:
      function: a function of parameters, and any other arguments, that returns a tree
        of arrays. Arguments that are no arrays are left as they are, such as
        `train=False`.
      rules: None, or a table in which some rules have a quantizer for inputs. These
        inputs are quantized as by `quantize_activations`, those of convolutions too.
        In a `low_bit_dot` they are multiplied as integers if both factors are whole
        numbers. Calibrated and learned scales are not supported.
      strict: as in `quantize_activations`.
      implementation: the implementation of each product, as in `low_bit_dot`.

    Returns:
      A function like `function`, whose first argument may have a `QuantizedArray` in
      place of any leaf.

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: in a call, as in `low_bit_dot` and, with `rules`, in
        `quantize_activations`, with the parameter's path.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(8), jnp.ones((3, 32))
      >>> variables = model.init(jax.random.key(0), x)
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> codes = cage.quantize(variables, rules)
      >>> apply = jax.jit(cage.low_bit(model.apply))
      >>> expected = model.apply(cage.dequantize(codes), x)
      >>> bool(jnp.allclose(apply(codes, x), expected, atol=1e-5))
      True
    """
    check_function(
        function,
        "low_bit(model.apply)",
        "Use low_bit(model.apply), or a function that merges what nnx.split gave.",
    )
    if rules is not None:
        check_rules(rules)
    check_implementation(implementation)
    with_rules = function
    if rules:  # forward only, so derivatives of its own may be lost
        with_rules = with_inputs(
            function, rules, marked_input, strict=strict, custom_derivatives=True
        )

    @functools.wraps(function)
    def of_codes(params, *args, **kwargs):
        paths, leaves, structure = flatten_with_paths(params, QuantizedArray)
        shapes = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_codes(leaf) else leaf
            for leaf in leaves
        ]
        traced = trace(with_rules, structure.unflatten(shapes), args, kwargs)
        program, values = traced.program, traced.values
        values[: len(leaves)] = [
            _Weights(leaf, path) if _is_codes(leaf) else leaf
            for path, leaf in zip(paths, leaves)
        ]
        rule = functools.partial(
            _evaluate_with_codes, rules=rules, implementation=implementation
        )
        found = evaluate(program.jaxpr, [*program.consts, *values], rule)
        return jax.tree.unflatten(traced.structure, map(_dequantized, found))

    return of_codes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes",), meta_fields=("path",)
)
@dataclasses.dataclass(frozen=True)
class _Weights:
    """A value of a program that is a quantized parameter. A pytree."""

    codes: QuantizedArray
    path: str


def _cage_jax_input(x, features, quantizer, grid):
    return quantize_input(x, features, quantizer, grid)


marked_input = jax.jit(_cage_jax_input, static_argnums=(1, 2))
# Its name in a program, by which the inputs to quantize are found.
MARK = _cage_jax_input.__name__


class Input(NamedTuple):
    """An input of a product: what `low_bit_dot` quantizes, and quantized values."""

    x: Any
    quantized: Any


def _evaluate_with_codes(eqn, values, *, rules, implementation):
    """Computes an equation: products, and new layouts, from codes; others from values.

    Calls, checkpoints and scans are entered, in search of products.
    """
    if eqn.params.get("name") == MARK:
        (quantized,) = unchanged(eqn, values)
        return [Input(values[0], quantized)]
    are_codes = [isinstance(value, _Weights) for value in values]
    if any(are_codes):
        name, params = eqn.primitive.name, eqn.params
        sums = name == "dot_general" and params["dimension_numbers"][0][0]
        if sums and sum(are_codes) == 1:
            return [_product(params, values, rules, implementation)]
        if name == "transpose":
            return [_transposed(values[0], params["permutation"])]
        if name == "convert_element_type":
            dtype = jnp.dtype(params["new_dtype"])
            if jnp.issubdtype(dtype, jnp.floating):
                return [_replaced(values[0], dtype=dtype)]
        rule = functools.partial(
            _evaluate_with_codes, rules=rules, implementation=implementation
        )

        def run(program, values):
            return evaluate(program.jaxpr, [*program.consts, *values], rule)

        if called(eqn) is not None:
            return enter(eqn, values, run)
        if name == "scan":
            constants, carries = scan_counts(eqn)
            rows = constants + carries
            carry, stacks = values[constants:rows], values[rows:]
            values = [*values[:constants], *map(_dequantized, carry)]
            values += map(_prepared_stack, stacks)
            return enter(eqn, values, lambda *args: [*map(_dequantized, run(*args))])
    return unchanged(eqn, [*map(_dequantized, values)])


def _product(params, values, rules, implementation):
    side = next(n for n, value in enumerate(values) if isinstance(value, _Weights))
    weights, inputs, quantizer = values[side], values[1 - side], None
    if isinstance(inputs, Input):
        inputs, quantizer = inputs.x, rules.match_inputs(weights.path)
    options = {"inputs_quantizer": quantizer, "implementation": implementation}
    with path_in_errors(weights.path):
        return dot_of_codes(params, inputs, weights.codes, side, **options)


def dot_of_codes(
    params: dict[str, Any],
    inputs: jax.Array,
    codes: QuantizedArray,
    side: int,
    **options: Any,
) -> jax.Array:
    """Computes a `dot_general`, one operand of which are codes, by `low_bit_dot`.

    Args:
      params: the parameters of its equation.
      inputs: the other operand.
      codes: the codes.
      side: the number of the operand that they are.
      options: options of `low_bit_dot`.
    """
    numbers = params["dimension_numbers"]
    if side == 0:
        numbers = tuple(pair[::-1] for pair in numbers)
    options |= {name: params[name] for name in ("precision", "preferred_element_type")}
    found = low_bit_dot(inputs, codes, numbers, **options)
    if side == 1:
        return found
    (_, contracted), (_, batch) = numbers
    free = len(codes.shape) - len(contracted) - len(batch)
    return jnp.moveaxis(found, range(-free, 0), range(len(batch), len(batch) + free))


def _prepared_stack(stack):
    """Prepares a stack for a scan: codes if each layer has its own scales."""
    if not isinstance(stack, _Weights):
        return stack
    codes = stack.codes
    ndim = len(codes.shape)
    if 0 in codes.quantizer.blocks(codes.shape).axes or ndim < 2:
        return dequantize(codes)
    return _replaced(stack, quantizer=_along(codes, lambda axis: axis - ndim))


def _transposed(weights, permutation):
    codes, ndim = weights.codes, len(permutation)
    parts = jax.tree.map(lambda part: jnp.transpose(part, permutation), codes)
    quantizer = _along(codes, lambda axis: permutation.index(axis) - ndim)
    return _replaced(dataclasses.replace(weights, codes=parts), quantizer=quantizer)


def _along(codes, moved):
    """Returns the quantizer along other axes: `moved(axis)` for each, from 0."""
    quantizer, ndim = codes.quantizer, len(codes.shape)
    match quantizer.axis:
        case None:
            return quantizer
        case tuple(axes):
            axis = tuple(moved(axis % ndim) for axis in axes)
        case axis:
            axis = moved(axis % ndim)
    return dataclasses.replace(quantizer, axis=axis)


def _replaced(weights, **changes):
    codes = dataclasses.replace(weights.codes, **changes)
    return dataclasses.replace(weights, codes=codes)


def _dequantized(value):
    match value:
        case _Weights():
            return dequantize(value.codes)
        case Input():
            return value.quantized
    return value


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)
