"""Whole models of Flax: quantized, calibrated and reported."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Unpack

import jax
from flax import linen, nnx

from cage_jax.arrays.checks import warn
from cage_jax.core.quantize import TreeOptions
from cage_jax.core.quantize import fake_quant as fake_quant_tree
from cage_jax.core.rules import Rules, check_rules
from cage_jax.flax import linen as linen_modules
from cage_jax.flax import nnx as nnx_modules
from cage_jax.flax.linen import QuantizedLinen
from cage_jax.program.activations import calibrate as calibrate_function
from cage_jax.program.model_report import ModelReport
from cage_jax.program.model_report import report as report_of_function

Module = TypeVar("Module", bound=nnx.Module)


def quantize_activations(model: Any, rules: Rules) -> Any:
    """Returns a model that quantizes the inputs of its weights by path.

    Every product of a parameter with data is found, whichever module it is in; see
    `cage_jax.quantize_activations`. The weights are not quantized here: apply
    `fake_quant(params, rules)` first, or `cage_jax.flax.fake_quant` for NNX. Call the
    new model under `jit`.

    Args:
      model: a Linen module, or an NNX module.
      rules: rules by path, some of them with a quantizer for inputs.

    Returns:
      For NNX, a new module with the same arrays. Its class is a subclass of the class
      of `model`, and its `__call__` and other public methods quantize. `model` itself
      is not changed. The submodules keep their classes, so `new.encoder(x)`, called
      from outside, does not quantize. For Linen, a `QuantizedLinen`, with the `init`
      and `apply` of `model`.

    Raises:
      TypeError: if `model` is not a module or `rules` is not `Rules`.
      ValueError: when the result is called, as by `cage_jax.quantize_activations`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> rules = cage.Rules([(r"kernel", cage.int4(), cage.int8(axis=-1))])
      >>> quantized = cage.flax.quantize_activations(model, rules)
      >>> quantized(jnp.ones((3, 4))).shape
      (3, 2)
    """
    check_rules(rules)
    if isinstance(model, linen.Module):
        return QuantizedLinen(model, rules)
    if isinstance(model, nnx.Module):
        return nnx_modules.quantized(model, rules)
    raise _no_module(model)


def fake_quant(model: Module, rules: Rules, **options: Unpack[TreeOptions]) -> Module:
    """Rounds the parameters of an NNX model, for use in the loss.

    All variables other than `nnx.Param` are shared with `model`, so BatchNorm
    statistics and Dropout counts are still updated in it; `cage_jax.fake_quant` does
    not handle them. For Linen, pass the rounded parameters to `apply` instead.

    Args:
      model: an NNX module, quantized or not.
      rules: which parameters are quantized, and how.
      options: as in `cage_jax.fake_quant`: `grid`, `key`, `implementation`.

    Returns:
      A module like `model`. The gradient goes straight through to its parameters.

    Raises:
      TypeError: if `model` is not an NNX module; also as `cage_jax.fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> rules = cage.Rules([(r"kernel", cage.int4()), (r".*", None)])
      >>> def loss(model):
      ...     return jnp.sum(cage.flax.fake_quant(model, rules)(jnp.ones((3, 4))) ** 2)
      >>> value, gradient = nnx.value_and_grad(loss)(model)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an NNX module; got {type(model).__name__}. For a tree of "
            f"parameters, such as those of Linen, use cage_jax.fake_quant."
        )
    check_rules(rules)
    if text := _why_inputs_unquantized(model, rules):
        warn(text)
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states
    return nnx.merge(graphdef, fake_quant_tree(params, rules, **options), rest)


def calibrate(
    model: Any,
    rules: Rules,
    batches: Iterable[tuple],
    variables: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Fits the grids of calibrated and learned inputs to batches of data.

    Args:
      model: as in `quantize_activations`.
      rules: rules by path, some with an input quantizer whose scale is `Calibrated` or
        `Learned`.
      batches: tuples of positional arguments, one for each call of the model.
      variables: the variables of a Linen module; None for NNX.
      kwargs: keyword arguments of every call, such as `train=False`.

    Returns:
      For Linen, `variables` with the collection "grids", for the `apply` of
      `quantize_activations(model, rules)`. For NNX, the quantized model with the grids
      in its attribute `input_grids`; the learned ones are `nnx.Param`.

    Raises:
      TypeError, ValueError: as `cage_jax.calibrate`, and for a Linen module without
        `variables`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> static = cage.int8(axis=None, scale=cage.scales.Calibrated())
      >>> rules = cage.Rules([(r"kernel", cage.int4(), static)])
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> model = cage.flax.calibrate(model, rules, [(jnp.ones((3, 4)),)])
      >>> round(127 * float(model.input_grids["kernel"].scale[...]), 3)
      1.0
    """
    quantized = quantize_activations(model, rules)
    call = "calibrate(model, rules, batches, variables=variables)"
    function, state, grids = _program(model, variables, call)
    params = {"params": state, "grids": grids}
    found = calibrate_function(
        functools.partial(function, **kwargs), rules, params, batches
    )
    if isinstance(quantized, QuantizedLinen):
        return {**state, "grids": found["grids"]}
    return nnx_modules.with_grids(quantized, rules, found["grids"])


def report(
    model: Any,
    rules: Rules,
    *args: Any,
    variables: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> ModelReport:
    """Reports how each parameter and its inputs are quantized, with their errors.

    Args:
      model: as in `quantize_activations`, quantized or not.
      rules: rules for weights, inputs or both.
      args: example positional arguments of a call.
      variables: the variables of a Linen module; None for NNX.
      kwargs: keyword arguments of the call, such as `train=False`.

    Returns:
      A `ModelReport`; print it, or read its `layers` and `findings`.

    Raises:
      TypeError, ValueError: as `cage_jax.program.model_report.report`, without `args`
        and `kwargs`, and for a Linen module without `variables`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> rules = cage.Rules([(r"kernel", cage.int4(), cage.int8(axis=-1))])
      >>> found = cage.flax.report(model, rules, jnp.ones((3, 4)))
      >>> [layer.weight.path for layer in found.layers if layer.inputs]
      ['kernel']
    """
    is_linen = isinstance(model, (linen.Module, QuantizedLinen))
    call = f"report(model, rules, x{', variables=variables' * is_linen})"
    function, state, grids = _program(model, variables, call)
    if not args and not kwargs:
        raise TypeError(
            f"`args` must be an example of the arguments of `model`; got none. Use "
            f"{call}."
        )
    function, state = _of_parameters(function, state)
    params = {"params": state, "grids": grids} if grids else state
    found = report_of_function(function, rules, params, *args, **kwargs)
    if text := _why_inputs_unquantized(model, rules):
        found = dataclasses.replace(found, findings=(*found.findings, text))
    return found


def _why_inputs_unquantized(model, rules):
    """Explains why a model does not quantize its inputs as `rules` say, or None."""

    def inputs(rules):
        return [(rule.pattern, rule.inputs) for rule in rules if rule.inputs]

    if not inputs(rules):
        return None
    if isinstance(model, nnx.Module):
        modules = [module for _, module in nnx.iter_modules(model)]
        quantized = [m for m in modules if hasattr(m, "quantization_rules")]
        theirs = [module.quantization_rules for module in quantized]
    else:
        theirs = [model.rules] if isinstance(model, QuantizedLinen) else []
    if not theirs:
        return (
            "`rules` quantize inputs, but `model` does not. Use the new model that "
            "cage_jax.flax.quantize_activations(model, rules) returns."
        )
    if all(inputs(each) != inputs(rules) for each in theirs):
        return (
            "`rules` do not quantize the same inputs as the rules that `model` was "
            "quantized with; it keeps those. Quantize the original model with `rules`."
        )
    return None


def _of_parameters(function, state):
    """Closes a function over all variables but the parameters; returns both."""
    if isinstance(state, nnx.State):
        variables, rest = nnx.split_state(state, nnx.Param, ...)

        def with_rest(variables, *args, **kwargs):
            # The call may change variables, so it gets new ones made in its own trace.
            new = jax.tree.map(lambda leaf: leaf, rest)
            return function(nnx.merge_state(variables, new), *args, **kwargs)

        return with_rest, variables
    params = {"params": state.get("params", {})}
    return lambda p, *a, **k: function({**state, **p}, *a, **k), params


def _program(model, variables, call):
    """Splits a model into a function of its variables, the variables and the grids."""
    if isinstance(model, (linen.Module, QuantizedLinen)):
        if variables is None:
            raise ValueError(
                f"`variables` must be given for a Linen module; got None. Use "
                f"{call}, where variables = model.init(key, x)."
            )
        if "params" not in variables:
            raise ValueError(
                f"`variables` must have the collection 'params'; got "
                f"{sorted(variables)}. Use variables={{'params': params}}."
            )
        module = getattr(model, "module", model)
        function = functools.partial(linen_modules.apply_module, module, {})
        return function, *linen_modules.split(variables)
    if not isinstance(model, nnx.Module):
        raise _no_module(model)
    graphdef, state, grids = nnx_modules.split(model)
    method = type(model).__call__
    return functools.partial(nnx_modules.call, graphdef, method), state, grids


def _no_module(model):
    return TypeError(
        f"`model` must be a Linen or an NNX module; got {type(model).__name__}. For a "
        f"function of parameters use cage_jax.quantize_activations."
    )
