"""NNX modules that quantize the inputs of their weights."""

import functools
import inspect

from flax import nnx

from cage_jax.core.rules import INPUT_GRIDS
from cage_jax.program.activations import quantize_activations
from cage_jax.program.visiting import INPUTS
from cage_jax.quantizers.grid import Grid


class CalibratedScale(nnx.Variable):
    """One array of the grid of a calibrated input."""


class LearnedScale(nnx.Param):
    """One array of the grid of a learned input; a `Param`, so optimizers train it."""


def quantized(model, rules, *, strict=True):
    """Returns a module with the same variables whose public methods quantize inputs."""
    # Made as `nnx.merge` makes a module: of another class, without its `__init__`.
    new = object.__new__(_quantized_class(type(model)))  # type: ignore[arg-type]
    vars(new).update(vars(model))
    new.quantization_is_strict = strict
    new.quantization_rules = nnx.static(rules)
    return new


@functools.cache
def _quantized_class(cls):
    """Makes a subclass of a module's class whose public methods quantize."""
    if hasattr(cls, "_is_quantized"):
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
    methods = {name: _quantized_method(getattr(cls, name)) for name in sorted(names)}
    return type(
        f"Quantized{cls.__name__}",
        (cls,),
        {"_is_quantized": True, "__module__": cls.__module__, **methods},
    )


def _quantized_method(method):
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        rules = self.quantization_rules
        if rules is None:  # called by a method that quantizes
            return method(self, *args, **kwargs)
        graphdef, state, grids = split(self)
        function = functools.partial(_call_with_state, graphdef, method)
        params = {"params": state, "grids": grids}
        quantize = quantize_activations(
            function, rules, strict=self.quantization_is_strict
        )
        output, changed = quantize(params, *args, **kwargs)
        flat = nnx.to_flat_state(state)
        new = [
            (path, variable.replace(value))
            for (path, variable), value in zip(flat, changed)
            if value is not None
        ]
        # Write only changed variables: those of another trace can only be read.
        nnx.update(self, nnx.from_flat_state(new))
        return output

    return run


def split(model):
    """Splits a module into the definition of one that does not quantize, state, grids.

    Args:
      model: a module, quantized or not.

    Returns:
      The graph's definition and its variables, as from `nnx.split`; and the grids of
      inputs by path, which are not among them.
    """
    plain, grids = nnx.clone(model), {}
    if hasattr(plain, "quantization_rules"):
        plain.quantization_rules = None
        grids = {
            path + INPUTS: Grid(**{name: part[...] for name, part in parts.items()})
            for path, parts in getattr(plain, INPUT_GRIDS, {}).items()
        }
        if grids:
            delattr(plain, INPUT_GRIDS)
    return *nnx.split(plain), grids


def call(graphdef, method, state, *args, **kwargs):
    """Calls a method of the module that `split` took apart."""
    return method(nnx.merge(graphdef, state), *args, **kwargs)


def with_grids(model, rules, grids):
    """Stores the grids of inputs in a module, as one `nnx.Dict` per path."""
    found = {}
    for key, grid in grids.items():
        if key.endswith(INPUTS):
            path = key.removesuffix(INPUTS)
            learned = rules.match_inputs(path).scale.learned
            kind = LearnedScale if learned else CalibratedScale
            parts = {n: kind(v) for n, v in grid._asdict().items() if v is not None}
            found[path] = nnx.Dict(parts)
    setattr(model, INPUT_GRIDS, nnx.Dict(found))
    return model


def _call_with_state(graphdef, method, state, *args, **kwargs):
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
            "some. Call the unquantized model once, or its init_cache, before you "
            "quantize it."
        )
    after = [variable.get_value() for _, variable in flat]
    # `nnx.remat` and the like give even the parameters that they only read new tracers.
    read = [isinstance(variable, nnx.Param) for _, variable in flat]
    changed = zip(after, before, read)
    return output, [None if a is b or only else a for a, b, only in changed]
