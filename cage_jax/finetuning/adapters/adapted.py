"""Whole programs that make each weight of adapters where it is used."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from cage_jax.arrays.jaxprs import called, enter, evaluate, scan_counts, unchanged
from cage_jax.arrays.names import names_checked
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.finetuning.adapters.frozen_weights import Adapter, FrozenWeight, weight
from cage_jax.finetuning.adapters.low_rank import map_pairs
from cage_jax.program.tracing import check_function, trace

# What only changes the form of a weight is done again with it.
_FORMS = ("convert_element_type", "transpose", "reshape", "squeeze", "copy")


@names_checked
def adapted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function` take adapters and frozen weights in place of parameters.

    The result is that of `function(weights(adapters, frozen), ...)`. But each weight is
    made where it is used, and again in the backward pass, so that memory never holds
    all of them, nor their gradients: in layers of any framework, under `jax.jit` and
    `jax.checkpoint`, and layer by layer in `jax.lax.scan` over stacked layers. It costs
    a second rounding of each weight. Call the result under `jax.jit`, otherwise each
    call traces it anew.

    Args:
      function: a function of parameters, and any other arguments, that returns a tree
        of arrays.

    Returns:
      A function of the two trees of `low_rank`, and of the other arguments. The
      gradient is that of `weights`, up to the order of sums.

    Raises:
      TypeError: for a Flax module in place of a function.
      ValueError: in a call, for adapters that belong to other frozen weights.

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

    @functools.wraps(function)
    def of_adapters(adapters: Mapping[str, Adapter], frozen: Any, *args, **kwargs):
        tree = map_pairs(_Pending, decoded, adapters, frozen)
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_pending)
        shapes = [each.frozen.like if _is_pending(each) else each for each in leaves]
        params = jax.tree.unflatten(structure, shapes)
        traced = trace(function, params, args, kwargs)
        values = [*leaves, *traced.values[len(leaves) :]]
        program = traced.program
        found = evaluate(program.jaxpr, [*program.consts, *values], _evaluate)
        return jax.tree.unflatten(traced.structure, map(_made, found))

    return of_adapters


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("adapter", "frozen"),
    meta_fields=("forms",),
)
@dataclasses.dataclass(frozen=True)
class _Pending:
    """A value of a program: a weight that is not made yet. A pytree.

    Attributes:
      adapter, frozen: what it is made of.
      forms: equations that change its form once it is made.
    """

    adapter: Adapter
    frozen: FrozenWeight
    forms: tuple[JaxprEqn, ...] = ()


def _evaluate(eqn, values):
    """Computes an equation; one that uses a weight makes it, and keeps it not."""
    if not any(map(_is_pending, values)):
        return unchanged(eqn, values)
    name = eqn.primitive.name
    if name in _FORMS and len(values) == 1:
        (pending,) = values
        return [dataclasses.replace(pending, forms=(*pending.forms, eqn))]

    def run(program, values):
        return evaluate(program.jaxpr, [*program.consts, *values], _evaluate)

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


def _made(value):
    if not _is_pending(value):
        return value
    found = weight(value.adapter, value.frozen)
    for eqn in value.forms:
        (found,) = unchanged(eqn, [found])
    return found


def _of_layers(value):
    """Returns a stack whose rows are weights of their own, as far as they are."""
    if not _is_pending(value):
        return value
    frozen = value.frozen
    if value.forms or 0 not in frozen.layout.stack:
        return _made(value)
    moved = functools.partial(_from_the_end, ndim=len(frozen.store.shape))
    store = frozen.store
    if isinstance(store, QuantizedArray):
        store = dataclasses.replace(store, quantizer=moved(store.quantizer))
    frozen = dataclasses.replace(frozen, store=store, quantizer=moved(frozen.quantizer))
    return dataclasses.replace(value, frozen=frozen)


def _from_the_end(quantizer, ndim):
    """Returns the quantizer with axes that are the same in a row of a stack."""
    axes = quantizer.axis
    if isinstance(axes, tuple):
        axes = tuple(axis % ndim - ndim for axis in axes)
    elif axes is not None:
        axes = axes % ndim - ndim
    return dataclasses.replace(quantizer, axis=axes)


def _is_pending(value):
    return isinstance(value, _Pending)
