"""Whole programs that make each weight of adapters where it is used."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from cage_jax.arrays.exact import compute_dtype, times
from cage_jax.arrays.jaxprs import called, enter, evaluate, scan_counts, unchanged
from cage_jax.arrays.names import names_checked
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.core.rules import Rules, check_rules
from cage_jax.finetuning.adapters.frozen_weights import (
    Adapter,
    FrozenWeight,
    weight,
)
from cage_jax.finetuning.adapters.low_rank import map_pairs
from cage_jax.program.activations import with_inputs
from cage_jax.program.low_bit import MARK, Input, dot_of_codes, marked_input
from cage_jax.program.tracing import check_function, trace
from cage_jax.quantizers.axes import from_the_end
from cage_jax.quantizers.quantizer import Quantizer

# What only changes the form of a weight is done again with it.
_FORMS = ("convert_element_type", "transpose", "reshape", "squeeze", "copy")


@names_checked
def adapted(
    function: Callable[..., Any], rules: Rules | None = None
) -> Callable[..., Any]:
    """Makes `function` take adapters and frozen weights in place of parameters.

    The result is that of `function(weights(adapters, frozen), ...)`. But each weight is
    made where it is used, and again in the backward pass, so that memory never holds
    all of them, nor their gradients: in layers of any framework, under `jax.jit` and
    `jax.checkpoint`, and layer by layer in `jax.lax.scan` over stacked layers. It costs
    a second rounding of each weight. Call the result under `jax.jit`, otherwise each
    call traces it anew.

    Beside codes (QLoRA) the factors multiply the input, and no gradient has the size
    of a weight: `x @ w + alpha / rank * ((x @ a) @ b)`.

    Args:
      function: a function of parameters, and any other arguments, that returns a tree
        of arrays.
      rules: None, or a table in which some rules have a quantizer for inputs, which are
        quantized as by `quantize_activations`. Codes are then multiplied as integers,
        where `low_bit_dot` does that; the gradient is that of the values.

    Returns:
      A function of the two trees of `low_rank`, and of the other arguments. The
      gradient is that of `weights`, up to the order of sums.

    Raises:
      TypeError: for a Flax module in place of a function.
      ValueError: in a call, for adapters that belong to other frozen weights, and with
        `rules` as in `quantize_activations`.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...     return x @ params["kernel"]
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules)
      >>> x = jnp.ones((2, 16))
      >>> found = jax.jit(cage.finetuning.adapted(apply))(adapters, frozen, x)
      >>> expected = apply(cage.finetuning.weights(adapters, frozen), x)
      >>> bool(jnp.allclose(found, expected, atol=1e-5))
      True

    Source: LR-QAT, arXiv 2406.06385, section 4 (checkpointing).
    """
    check_function(
        function,
        "adapted(model.apply)",
        "Use adapted(model.apply), or a function that merges what nnx.split gave.",
    )

    with_rules = function
    if rules is not None:
        check_rules(rules)
        with_rules = with_inputs(function, rules, marked_input, strict=True)

    def pending(path, adapter, frozen):
        inputs = None if rules is None else rules.match_inputs(path)
        return _Pending(adapter, frozen, inputs)

    @functools.wraps(function)
    def of_adapters(adapters: Mapping[str, Adapter], frozen: Any, *args, **kwargs):
        tree = map_pairs(pending, decoded, adapters, frozen)
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_pending)
        shapes = [each.frozen.like if _is_pending(each) else each for each in leaves]
        params = jax.tree.unflatten(structure, shapes)
        traced = trace(with_rules, params, args, kwargs)
        values = [*leaves, *traced.values[len(leaves) :]]
        program = traced.program
        found = evaluate(program.jaxpr, [*program.consts, *values], _evaluate)
        return jax.tree.unflatten(traced.structure, map(_made, found))

    return of_adapters


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("adapter", "frozen"),
    meta_fields=("inputs", "forms"),
)
@dataclasses.dataclass(frozen=True)
class _Pending:
    """A value of a program: a weight that is not made yet. A pytree.

    Attributes:
      adapter, frozen: what it is made of.
      inputs: the quantizer of its inputs, or None.
      forms: equations that change its form once it is made.
    """

    adapter: Adapter
    frozen: FrozenWeight
    inputs: Quantizer | None
    forms: tuple[JaxprEqn, ...] = ()


def _evaluate(eqn, values):
    """Computes an equation; one that uses a weight makes it, and keeps it not."""
    if eqn.params.get("name") == MARK:
        (quantized,) = unchanged(eqn, values)
        return [Input(values[0], quantized)]
    if not any(map(_is_pending, values)):
        return unchanged(eqn, [*map(_made, values)])
    name = eqn.primitive.name
    if name in _FORMS and len(values) == 1:
        (pending,) = values
        return [dataclasses.replace(pending, forms=(*pending.forms, eqn))]

    def run(program, values):
        return evaluate(program.jaxpr, [*program.consts, *values], _evaluate)

    if name == "dot_general" and (side := _side_of_codes(values)) is not None:
        product = functools.partial(_product_beside_codes, eqn, side)
        return [jax.checkpoint(product)(*values)]
    if called(eqn) is not None:
        return enter(eqn, values, run)
    if name == "scan":
        constants, carries = scan_counts(eqn)
        first = constants + carries
        values = [*map(_made, values[:first]), *map(_of_layers, values[first:])]
        return enter(eqn, values, lambda *args: [*map(_made, run(*args))])

    def made_and_used(values):
        return unchanged(eqn, [*map(_made, values)])

    return jax.checkpoint(made_and_used)(values)


def _side_of_codes(values):
    """Returns which operand has codes and an adapter, if only its dtype was changed."""
    sides = [n for n, value in enumerate(values) if _is_pending(value)]
    if len(sides) != 1 or values[sides[0]].frozen.grid is not None:
        return None
    names = {eqn.primitive.name for eqn in values[sides[0]].forms}
    return sides[0] if names <= {"convert_element_type"} else None


def _product_beside_codes(eqn, side, *values):
    """Multiplies data with codes, and with the factors of the adapter beside them."""
    pending, x = values[side], _made(values[1 - side])
    codes = lax.stop_gradient(pending.frozen.store)

    def of_values(x, codes):
        operands = [x, _in_form(decoded(codes), pending.forms)]
        return unchanged(eqn, operands if side else operands[::-1])[0]

    def in_low_bits(x, codes):
        options = {"inputs_quantizer": pending.inputs}
        return dot_of_codes(eqn.params, x, codes, side, **options)

    if isinstance(values[1 - side], Input):
        product = _straight_through(in_low_bits, of_values)
        found = product(x, values[1 - side].x, codes)
    else:
        found = of_values(x, codes)
    low = _product_of_factors(eqn.params, side, pending, x)
    return (found.astype(low.dtype) + low).astype(found.dtype)


def _product_of_factors(params, side, pending, x):
    """Multiplies data with `factor * a @ b`, in the dtype of computation."""
    stack, rows, columns = pending.frozen.layout
    rank = len(pending.frozen.store.shape)  # below it axes of the weight, above of `x`
    summed, batch = ([*zip(*pair)] for pair in params["dimension_numbers"])
    pairs = {p[1 - side]: p[side] for p in (*summed, *batch)}
    axes = [pairs.get(axis, rank + 1 + axis) for axis in range(x.ndim)]
    mine = [axis for axis in axes if axis > rank]
    theirs = [axis for axis in range(rank) if axis not in axes]
    free = mine + theirs if side else theirs + mine
    wide = compute_dtype(x.dtype)
    a, b = (pending.adapter[name].astype(wide) for name in "ab")
    return jnp.einsum(
        x.astype(wide),
        axes,
        times(a, pending.frozen.factor),
        (*stack, *rows, rank),
        b,
        (*stack, rank, *columns),
        [p[side] for p in batch] + free,
        precision=params["precision"],
        optimize="optimal",
    )


def _straight_through(in_low_bits, of_values):
    """Returns a product of codes with an input, with the gradient of their values."""

    @jax.custom_vjp
    def product(quantized, x, codes):
        return in_low_bits(x, codes)

    def forward(quantized, x, codes):
        return in_low_bits(x, codes), (quantized, codes)

    def backward(saved, cotangent):
        quantized, codes = saved
        back = jax.linear_transpose(lambda x: of_values(x, codes), quantized)
        return *back(cotangent), None, None

    product.defvjp(forward, backward)
    return product


def _made(value):
    if isinstance(value, Input):
        return value.quantized
    if not _is_pending(value):
        return value
    return _in_form(weight(value.adapter, value.frozen), value.forms)


def _in_form(value, forms):
    for eqn in forms:
        (value,) = unchanged(eqn, [value])
    return value


def _of_layers(value):
    """Returns a stack whose rows are weights of their own, as far as they are."""
    if not _is_pending(value):
        return _made(value)
    frozen = value.frozen
    if value.forms or 0 not in frozen.layout.stack:
        return _made(value)
    moved = functools.partial(from_the_end, ndim=len(frozen.store.shape))
    store = frozen.store
    if isinstance(store, QuantizedArray):
        store = dataclasses.replace(store, quantizer=moved(store.quantizer))
    frozen = dataclasses.replace(frozen, store=store, quantizer=moved(frozen.quantizer))
    return dataclasses.replace(value, frozen=frozen)


def _is_pending(value):
    return isinstance(value, _Pending)
