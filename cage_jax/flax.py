"""Quantization of the activations of Flax models, Linen and NNX, by path.

The models need no edits. Each one is run as a function of its variables, which
`cage_jax.quantize_activations` transforms like any other function, so custom layers
work too.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import lax

from cage_jax.core.inputs import quantize_input
from cage_jax.core.quantize import fake_quant as fake_quant_tree
from cage_jax.core.rules import INPUT_GRIDS, Rules, check_rules
from cage_jax.program.activations import INPUTS
from cage_jax.program.activations import calibrate as calibrate_function
from cage_jax.program.activations import quantize_activations as quantize_function
from cage_jax.program.model_report import ModelReport
from cage_jax.program.model_report import report as report_of_function
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer

try:
    from flax import linen, nnx
except ModuleNotFoundError as error:
    raise ImportError(
        "cage_jax.flax cannot be used without the package flax, which is not "
        'installed. Run pip install "cage_jax[flax]", or in a clone '
        "pip install -e '.[flax]'."
    ) from error


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
        return _quantized_nnx(model, rules)
    raise _no_module(model)


def fake_quant(model: nnx.Module, rules: Rules, **options: Any) -> nnx.Module:
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
            f"parameters, as Linen has it, use cage_jax.fake_quant."
        )
    check_rules(rules)
    if text := _why_inputs_are_not(model, rules):
        warnings.warn(text, stacklevel=2)
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
    function, state, grids = _program(model, variables)
    params = {"params": state, "grids": grids}
    found = calibrate_function(
        functools.partial(function, **kwargs), rules, params, batches
    )
    if isinstance(quantized, QuantizedLinen):
        return {**state, "grids": found["grids"]}
    return _with_grids(quantized, rules, found["grids"])


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
      TypeError, ValueError: as `cage_jax.program.model_report.report`, and for a Linen
        module without `variables`.

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
    function, state, grids = _program(model, variables)
    function, state = _of_parameters(function, state)
    params = {"params": state, "grids": grids} if grids else state
    found = report_of_function(function, rules, params, *args, **kwargs)
    if text := _why_inputs_are_not(model, rules):
        found = dataclasses.replace(found, findings=(*found.findings, text))
    return found


def _why_inputs_are_not(model, rules):
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
            "`rules` quantize inputs, and `model` does not. Write model = "
            "cage_jax.flax.quantize_activations(model, rules), which returns a new one."
        )
    if all(inputs(each) != inputs(rules) for each in theirs):
        return (
            "`rules` quantize inputs otherwise than those that `model` was quantized "
            "by, which it keeps to. Quantize the original by these."
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


def _program(model, variables):
    """Splits a model into a function of its variables, the variables and the grids."""
    if isinstance(model, (linen.Module, QuantizedLinen)):
        if variables is None:
            raise ValueError(
                "`variables` must be given for a Linen module; got None. Use "
                "variables=model.init(...)."
            )
        if "params" not in variables:
            raise ValueError(
                f"`variables` must have the collection 'params'; got "
                f"{sorted(variables)}. Use variables={{'params': params}}."
            )
        module = getattr(model, "module", model)
        state: Any = {name: v for name, v in variables.items() if name != "grids"}
        function = functools.partial(_apply_linen, module, {})
        return function, state, dict(variables.get("grids", {}))
    if not isinstance(model, nnx.Module):
        raise _no_module(model)
    cls, plain, grids = _plain(model)
    graphdef, state = nnx.split(plain)
    function = functools.partial(_call_nnx, graphdef, cls.__call__)
    return function, state, grids


def _no_module(model):
    return TypeError(
        f"`model` must be a Linen or an NNX module; got {type(model).__name__}. For a "
        f"function of parameters use cage_jax.quantize_activations."
    )


# --- arguments of Flax's layers -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _QuantizedProduct:
    """A product that quantizes its first factor; hashable, so that it can be static."""

    inputs: Quantizer

    def __post_init__(self):
        if not isinstance(self.inputs, Quantizer):
            raise TypeError(
                f"`inputs` must be a Quantizer; got {self.inputs!r}. Use int8(axis=-1)."
            )
        if self.inputs.scale.needs_grid:
            raise ValueError(
                f"`inputs` must have a scale that is found in each input; got "
                f"{self.inputs}. Use calibrate(model, rules, ...) for others."
            )


@dataclasses.dataclass(frozen=True)
class dot_general(_QuantizedProduct):  # noqa: N801, the name of Flax's argument
    """A `jax.lax.dot_general` that quantizes its first argument.

    Pass it as `dot_general` to `nn.Dense`, `nnx.Linear` and others, or as
    `_dot_general` to `jnp.einsum`.

    Args:
      inputs: the quantizer, along axis -1, 0 or None of the matrix of (tokens,
        features).

    Raises:
      TypeError: if `inputs` is not a `Quantizer`.
      ValueError: if the quantizer needs a grid.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> from flax import linen as nn
      >>> product = cage.flax.dot_general(cage.int8(axis=-1))
      >>> layer = nn.Dense(16, dot_general=product)
    """

    def __call__(self, lhs, rhs, dimension_numbers, *args, **kwargs) -> jax.Array:
        """Computes `jax.lax.dot_general` with `lhs` quantized."""
        features = tuple(sorted(a % lhs.ndim for a in dimension_numbers[0][0]))
        lhs = quantize_input(lhs, features, self.inputs, None)
        return lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class conv_general_dilated(_QuantizedProduct):  # noqa: N801, the name of Flax's argument
    """A `jax.lax.conv_general_dilated` that quantizes its first argument.

    Pass it as `conv_general_dilated` to `nn.Conv` and `nnx.Conv`. The features are the
    channels, so `axis=-1` gives one scale per pixel.

    Args:
      inputs: the quantizer, along axis -1, 0 or None.

    Raises:
      TypeError: if `inputs` is not a `Quantizer`.
      ValueError: if the quantizer needs a grid.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> from flax import linen as nn
      >>> product = cage.flax.conv_general_dilated(cage.int8(axis=None))
      >>> layer = nn.Conv(16, (3, 3), conv_general_dilated=product)
    """

    def __call__(self, lhs, rhs, *args, **kwargs) -> jax.Array:
        """Computes `jax.lax.conv_general_dilated` with `lhs` quantized."""
        bound = inspect.signature(lax.conv_general_dilated).bind(
            lhs, rhs, *args, **kwargs
        )
        numbers = lax.conv_dimension_numbers(
            lhs.shape, rhs.shape, bound.arguments.get("dimension_numbers")
        )
        lhs = quantize_input(lhs, (numbers.lhs_spec[1],), self.inputs, None)
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)


# --- Linen ----------------------------------------------------------------------------


class QuantizedLinen:
    """A Linen module whose `apply` quantizes the inputs of weights."""

    def __init__(self, module: linen.Module, rules: Rules):
        self.module = module
        self.rules = rules

    def init(self, *args, **kwargs) -> Any:
        """Returns the variables of the module's own `init`."""
        return self.module.init(*args, **kwargs)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs,
    ) -> Any:
        """Calls the module's `apply` with quantized inputs."""
        options = {
            "method": method,
            "mutable": mutable,
            "capture_intermediates": capture_intermediates,
        }
        params = {name: v for name, v in variables.items() if name != "grids"}
        function = functools.partial(_apply_linen, self.module, options)
        quantized = quantize_function(function, self.rules)
        both = {"params": params, "grids": dict(variables.get("grids", {}))}
        return quantized(both, *args, _rngs=rngs, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `TypeError`: a quantized module has no bound variables."""
        raise TypeError(
            "a quantized Linen module must be the outermost one; got a call of it. Use "
            "its apply(variables, ...), or quantize the model that it is a part of: "
            "rules are by path."
        )

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if inspect.ismethod(value):
            raise AttributeError(
                f"a quantized Linen module has `init` and `apply`; got {name!r}. Use "
                f"apply(variables, ..., method={name!r}), or `.module.{name}` for the "
                f"module without quantized inputs."
            )
        return value


def _apply_linen(module, options, variables, *args, _rngs=None, **kwargs):
    return module.apply(variables, *args, rngs=_rngs, **options, **kwargs)


# --- NNX ------------------------------------------------------------------------------


class CalibratedScale(nnx.Variable):
    """One array of the grid of a calibrated input."""


class LearnedScale(nnx.Param):
    """One array of the grid of a learned input; a `Param`, so optimizers train it."""


def _quantized_nnx(model, rules):
    new = nnx.clone(model)
    new.__class__ = _quantized_class(type(model))  # type: ignore[arg-type]
    new.quantization_rules = nnx.static(rules)
    return new


def _with_grids(model, rules, grids):
    """Stores the grids of inputs in a module, as one `nnx.Dict` per path."""
    found = {}
    for key, grid in grids.items():
        if not key.endswith(INPUTS):
            continue
        path = key.removesuffix(INPUTS)
        quantizer = rules.match_inputs(path)
        kind = LearnedScale if quantizer.scale.learned else CalibratedScale
        parts = {n: kind(v) for n, v in grid._asdict().items() if v is not None}
        found[path] = nnx.Dict(parts)
    setattr(model, INPUT_GRIDS, nnx.Dict(found))
    return model


def _grids_of(model):
    return {
        path + INPUTS: Grid(**{name: part[...] for name, part in parts.items()})
        for path, parts in getattr(model, INPUT_GRIDS, {}).items()
    }


@functools.cache
def _quantized_class(cls):
    """Makes a subclass of a module's class whose public methods quantize."""
    if "_quantized_from" in vars(cls):
        raise ValueError(
            f"`model` must not be quantized yet; got a {cls.__qualname__}. Quantize "
            f"the original, with all rules in one table."
        )
    names = {
        name
        for base in cls.__mro__
        if base.__module__.partition(".")[0] != "flax" or base is cls
        for name, member in vars(base).items()
        if inspect.isfunction(member) and (name == "__call__" or name[0] != "_")
    }
    methods = {name: _quantized_method(cls, name) for name in sorted(names)}
    return type(
        f"Quantized{cls.__name__}",
        (cls,),
        {"_quantized_from": cls, "__module__": cls.__module__, **methods},
    )


def _quantized_method(cls, name):
    method = getattr(cls, name)

    @functools.wraps(method)
    def quantized(self, *args, **kwargs):
        _, plain, grids = _plain(self)
        graphdef, state = nnx.split(plain)
        function = functools.partial(_call_nnx_with_state, graphdef, method)
        run = quantize_function(function, self.quantization_rules)
        output, changed = run({"params": state, "grids": grids}, *args, **kwargs)
        flat = nnx.to_flat_state(state)
        new = [
            (path, variable.replace(value))
            for (path, variable), value in zip(flat, changed)
            if value is not None
        ]
        # Write only changed variables: those of another trace can only be read.
        nnx.update(self, nnx.from_flat_state(new))
        return output

    return quantized


def _plain(model):
    """Returns the original class, an unquantized copy and the grids of a module."""
    plain, grids = nnx.clone(model), {}
    cls = vars(type(model)).get("_quantized_from", type(model))
    if cls is not type(model):
        grids = _grids_of(plain)
        if grids:
            delattr(plain, INPUT_GRIDS)
        del plain.quantization_rules
        plain.__class__ = cls
    return cls, plain, grids


def _call_nnx(graphdef, method, state, *args, **kwargs):
    return method(nnx.merge(graphdef, state), *args, **kwargs)


def _call_nnx_with_state(graphdef, method, state, *args, **kwargs):
    """Returns the output and the variables' new values, None for unchanged ones.

    A call never changes parameters.
    """
    before = [variable.get_value() for _, variable in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, state)
    output = method(model, *args, **kwargs)
    flat = nnx.to_flat_state(nnx.state(model))
    if [path for path, _ in flat] != [path for path, _ in nnx.to_flat_state(state)]:
        raise ValueError(
            "`model` must keep its variables in a call; got one that adds or removes "
            "some. Call the model as it was once before it is quantized, or its "
            "init_cache."
        )
    after = [variable.get_value() for _, variable in flat]
    # `nnx.remat` and the like give even the parameters that they only read new tracers.
    read = [isinstance(variable, nnx.Param) for _, variable in flat]
    changed = zip(after, before, read)
    return output, [None if a is b or only else a for a, b, only in changed]
