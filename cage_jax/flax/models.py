"""Whole models of Flax: quantized, calibrated and reported."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
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
from cage_jax.program.resolving import resolve as resolve_function
from cage_jax.program.suggesting import suggest as suggest_function
from cage_jax.quantizers.quantizer import Quantizer

Module = TypeVar("Module", bound=nnx.Module)


def quantize_activations(model: Any, rules: Rules, *, strict: bool = True) -> Any:
    """Returns a model that quantizes the inputs of its weights by path.

    Every product of a parameter with data is found, whichever module it is in; see
    `cage_jax.quantize_activations`. The weights are not quantized here: apply
    `fake_quant(params, rules)` first, or `cage_jax.flax.fake_quant` for NNX. Call the
    new model under `jit`.

    Args:
      model: a Linen module, or an NNX module.
      rules: rules by path, some of them with a quantizer for inputs.
      strict: as in `cage_jax.quantize_activations`.

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
        return QuantizedLinen(model, rules, strict=strict, rounds=False)
    if isinstance(model, nnx.Module):
        return nnx_modules.quantized(nnx.clone(model), rules, strict=strict)
    raise _no_module(model)


@overload
def fake_quant(
    model: Module, rules: Rules, **options: Unpack[TreeOptions]
) -> Module: ...
@overload
def fake_quant(model: linen.Module, rules: Rules) -> QuantizedLinen: ...
def fake_quant(model, rules, **options):
    """Quantizes the weights of a model and the inputs of its products, for training.

    Both are as the rules say. Use the result in the loss: gradients go straight through
    to the parameters of `model`.

    Args:
      model: an NNX module, quantized or not, or a Linen module.
      rules: which parameters and inputs are quantized, and how.
      options: for NNX, as in `cage_jax.fake_quant`: `grid`, `key`, `implementation`.

    Returns:
      For NNX, a module like `model` with rounded parameters, made anew in each step.
      All variables other than `nnx.Param` are shared with `model`, so BatchNorm
      statistics and Dropout counts are updated in it. For Linen, a `QuantizedLinen`,
      whose `apply` rounds the parameters that it is given, and whose `init` is that of
      `model`.

    Raises:
      TypeError: if `model` is not a module; also as `cage_jax.fake_quant`.
      ValueError: when the result is called, as by `cage_jax.quantize_activations`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
      >>> rules = cage.Rules([(r"kernel", "int4", "int8"), (r".*", None)])
      >>> def loss(model):
      ...     return jnp.sum(cage.flax.fake_quant(model, rules)(jnp.ones((3, 4))) ** 2)
      >>> value, gradient = nnx.value_and_grad(loss)(model)
    """
    check_rules(rules)
    if isinstance(model, linen.Module):
        if options:
            raise TypeError(
                f"`options` are for NNX modules; got {[*options]} with a Linen module. "
                f"Use cage_jax.fake_quant(params, rules, ...) on its parameters."
            )
        return QuantizedLinen(model, rules, strict=True, rounds=True)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a Linen or an NNX module; got {type(model).__name__}. "
            f"For a tree of parameters use cage_jax.fake_quant."
        )
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states
    new = nnx.merge(graphdef, fake_quant_tree(params, rules, **options), rest)
    theirs = _rules_of_inputs(model)
    if any(rule.inputs for rule in rules) and not theirs:
        return nnx_modules.quantized(new, rules)
    if text := _why_inputs_unquantized(theirs, rules):
        warn(text)
    return new


def resolve(
    rules: Rules,
    model: Any,
    *args: Any,
    variables: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Rules:
    """Finds the axes along which the weights of a model share scales.

    Args:
      rules: a table by path.
      model: a Linen or an NNX module.
      args: an example of the positional arguments of a call, or shapes of arrays.
      variables: the variables of a Linen module, or their shapes; None for NNX.
      kwargs: keyword arguments of the call, such as `train=False`.

    Returns:
      The rules with axes by number, as from `cage_jax.resolve`.

    Raises:
      TypeError, ValueError: as `cage_jax.resolve`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Conv(16, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> rules = cage.Rules([(r"kernel", "int4")])
      >>> x = jnp.ones((1, 8, 8, 16))
      >>> print(cage.flax.resolve(rules, model, x).match("kernel"))
      int4 absmax, axis (-4, -3, -2), identity
    """
    function, params = _example(model, variables, args, kwargs, "resolve(rules, model")
    return resolve_function(rules, function, params, *args, **kwargs)


def suggest(
    model: Any,
    *args: Any,
    variables: Mapping[str, Any] | None = None,
    weights: Quantizer | str = "int4",
    inputs: Quantizer | str | None = "int8",
    show: bool = True,
    **kwargs: Any,
) -> Rules:
    """Suggests rules for a model, and prints them with what is left alone and why.

    Args:
      model: a Linen or an NNX module.
      args: an example of the positional arguments of a call, or shapes of arrays.
      variables: the variables of a Linen module, or their shapes; None for NNX.
      weights, inputs, show: as in `cage_jax.suggest`.
      kwargs: keyword arguments of the call, such as `train=False`.

    Returns:
      Rules with axes by number, as from `cage_jax.suggest`.

    Raises:
      TypeError, ValueError: as `cage_jax.suggest`.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layers = [nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(4)]
      >>> model = nnx.Sequential(*layers)
      >>> rules = cage.flax.suggest(model, jnp.ones((1, 64)), show=False)
      >>> print(rules.match("layers/1/kernel"))
      int4 absmax, group 64 of axis -2, identity
    """
    function, params = _example(model, variables, args, kwargs, "suggest(model")
    return suggest_function(
        function,
        params,
        *args,
        weights=weights,
        inputs=inputs,
        show=show,
        **kwargs,
    )


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
    function, state = _example(model, variables, args, kwargs, "report(model, rules")
    grids = _program(model, variables, "")[2]
    params = {"params": state, "grids": grids} if grids else state
    found = report_of_function(function, rules, params, *args, **kwargs)
    if text := _why_inputs_unquantized(_rules_of_inputs(model), rules):
        found = dataclasses.replace(found, findings=(*found.findings, text))
    return found


def _example(model, variables, args, kwargs, begin):
    """Returns a function of the parameters alone, and the parameters."""
    is_linen = isinstance(model, (linen.Module, QuantizedLinen))
    call = f"{begin}, x{', variables=variables' * is_linen})"
    function, state, _ = _program(model, variables, call)
    if not args and not kwargs:
        raise TypeError(
            f"`args` must be an example of the arguments of `model`; got none. Use "
            f"{call}."
        )
    return _of_parameters(function, state)


def _rules_of_inputs(model) -> list[Rules]:
    """Returns the rules by which a model and its parts quantize inputs."""
    if isinstance(model, nnx.Module):
        modules = [module for _, module in nnx.iter_modules(model)]
        return [
            m.quantization_rules for m in modules if hasattr(m, "quantization_rules")
        ]
    return [model.rules] if isinstance(model, QuantizedLinen) else []


def _why_inputs_unquantized(theirs, rules):
    """Explains why a model by the rules `theirs` does not follow `rules`, or None."""

    def inputs(rules):
        return [(rule.pattern, rule.inputs) for rule in rules if rule.inputs]

    # `fake_quant` quantizes the inputs of a model without rules of its own.
    if (
        theirs
        and inputs(rules)
        and all(inputs(each) != inputs(rules) for each in theirs)
    ):
        return (
            "`rules` do not quantize the same inputs as the rules that `model` was "
            "quantized with; it keeps those. Quantize the original model with `rules`."
        )
    return None


def _of_parameters(function, state):
    """Closes a function over all variables but the parameters; returns both."""

    def new(rest):
        # The call may change variables, so it gets new ones made in its own trace.
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if _is_shape(x) else x, rest
        )

    if isinstance(state, nnx.State):
        variables, rest = nnx.split_state(state, nnx.Param, ...)

        def with_rest(variables, *args, **kwargs):
            return function(nnx.merge_state(variables, new(rest)), *args, **kwargs)

        return with_rest, variables
    params = {"params": state.get("params", {})}
    others = {name: part for name, part in state.items() if name != "params"}
    return lambda p, *a, **k: function({**new(others), **p}, *a, **k), params


def _is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


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
