"""Tracing a model with qwix active, from what qwix quantizes back to a parameter."""

import contextlib
import functools
import inspect
import itertools
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix
from flax import linen, nnx
from flax.core import DenyList
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import batching
from qwix._src.core import qarray

from cage_jax.arrays.jaxprs import called, evaluate, scan_counts, subjaxprs
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.program.tracing import split_arrays
from cage_jax.qwix.quantizer import ROW, How, Step, Use

# The identity; it marks an array that qwix quantizes.
_quantized_p = Primitive("qwix_quantized")
_quantized_p.def_abstract_eval(lambda x, *, how, batch, caller: x)
_numbers = itertools.count()


def _batched(args, dims, *, how, batch, caller):
    (x,), (dim,) = args, dims
    return _quantized_p.bind(x, how=how, batch=(dim, *batch), caller=caller), dim


batching.primitive_batchers[_quantized_p] = _batched


def quantized_parameters(
    model: Any,
    provider: qwix.QtProvider,
    method: str,
    inputs: tuple,
    kwargs: dict[str, Any],
) -> tuple[dict[str, list[Use]], dict[str, Any]]:
    """Traces a model with qwix active and follows what qwix quantizes back.

    Args:
      model: an NNX or a Linen module.
      provider: the provider of qwix's rules.
      method: name of the method to call.
      inputs: its positional arguments.
      kwargs: its keyword arguments.

    Returns:
      The uses of parameters by qwix, by path, and all parameters by path.
    """
    arrays, static = split_arrays(inputs, kwargs)
    prepare = _prepare_linen if isinstance(model, linen.Module) else _prepare_nnx
    # A unique key in jax's caches: marked traces must not be reused elsewhere.
    key = set_xla_metadata(cage_jax_qwix=str(next(_numbers)))
    with _marking(), key, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # qwix's own
        call, params, rest = prepare(model, provider, method, arrays, static)
        program = jax.make_jaxpr(call)(params, rest, arrays)
    paths, leaves, _ = flatten_with_paths(params)
    values: list[Any] = [_Value(path, ()) for path in paths]
    values += [_DATA] * (len(program.jaxpr.invars) - len(values))
    found: dict[str, list[Use]] = {}
    _follow(program.jaxpr, values, found)
    return found, dict(zip(paths, leaves))


def _prepare_linen(model, provider, method, arrays, static):
    quantized = qwix.quantize_model(model, provider, methods=(method,))
    rngs = {"params": jax.random.key(0)}

    def init(arrays):
        args, kwargs = static.joined(arrays)
        return quantized.init(rngs, *args, method=method, **kwargs)

    def call(params, rest, arrays):
        args, kwargs = static.joined(arrays)
        variables = {"params": params, **rest}
        options = {"rngs": rngs, "mutable": DenyList("params"), "method": method}
        quantized.apply(variables, *args, **options, **kwargs)

    variables = dict(jax.eval_shape(init, arrays))
    return call, variables.pop("params", {}), variables


def _prepare_nnx(model, provider, method, arrays, static):
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states

    def call(params, rest, arrays):
        args, kwargs = static.joined(arrays)
        merged = nnx.merge(graphdef, params, rest)
        # qwix calls the model once.
        qwix.quantize_model(merged, provider, *args, methods=(method,), **kwargs)

    return call, params, rest


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    """Marks what qwix quantizes in this thread, by patching `qarray.calibrate`.

    qwix calibrates every array before it quantizes it.
    """
    thread, original = threading.get_ident(), qarray.calibrate

    def calibrate(array, how):
        if threading.get_ident() == thread:
            how_of_array = How(
                how.qtype,
                how.calibration_method,
                tuple(how.channelwise_axes),
                tuple(how.tiled_axes.items()),
            )
            array = _quantized_p.bind(
                array, how=how_of_array, batch=(), caller=_jitted_caller()
            )
        return original(array, how)

    qarray.calibrate = calibrate
    try:
        yield
    finally:
        qarray.calibrate = original


def _jitted_caller():
    """Finds the jitted `jax.numpy` function around the current call, or None.

    jax caches its trace, so in a later call qwix may not be seen.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _JITTED:
            return _JITTED[frame.f_code]
        frame = frame.f_back
    return None


_JITTED = {
    function.__wrapped__.__code__: name
    for name, function in vars(jnp).items()
    if hasattr(function, "lower")
    and inspect.isfunction(getattr(function, "__wrapped__", None))
}


# --- from what qwix quantizes back to a parameter -------------------------------------


class _Value(NamedTuple):
    """An array that depends on a parameter and on no data.

    Attributes:
      path: path of the parameter.
      steps: as in `Use`.
      changed: as in `Use`.
    """

    path: str
    steps: tuple[Any, ...] | None
    changed: str | None = None


_DATA = None  # an array that depends on data
_NEUTRAL = ()  # an array that depends on nothing

# Operations that keep each number exactly once.
_LAYOUTS = (
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "reshape",
    "rev",
    "sharding_constraint",
    "squeeze",
    "transpose",
)


def _follow(jaxpr, values, found) -> list:
    """Follows values through a jaxpr to its outputs; adds to `found` by path."""
    return evaluate(
        jaxpr,
        [*[_NEUTRAL] * len(jaxpr.constvars), *values],
        functools.partial(_after, found=found),
        literal=lambda _: _NEUTRAL,
    )


def _after(eqn, values, found):
    """Follows values through one equation to its outputs."""
    name, first = eqn.primitive.name, next(iter(values), _NEUTRAL)
    if eqn.primitive is _quantized_p:
        if isinstance(first, _Value):
            found.setdefault(first.path, []).append(_use(eqn, first))
        return values
    if name == "scan":
        return _after_scan(eqn, values, found)
    if name in ("slice", "dynamic_slice") and isinstance(first, _Value):
        return [_after_slice(eqn, first)]
    if (inside := called(eqn, custom_derivatives=True)) is not None:
        return _follow(inside.jaxpr, values, found)
    for jaxpr in subjaxprs(eqn.params):
        count = len(jaxpr.invars)
        given = values[1:] if name == "cond" else [_joined([v], name) for v in values]
        # The leading operands of a loop and its carries may be anything.
        _follow(jaxpr, given if count == len(given) else [_DATA] * count, found)
    if isinstance(first, _Value) and first.steps is not None and _lays_out(eqn):
        return [first._replace(steps=(*first.steps, _step(eqn)))]
    return [_joined(values, name)] * len(eqn.outvars)


def _use(eqn, value):
    params = eqn.params
    if params["caller"] is not None and value.steps is not None:
        value = value._replace(steps=None, changed=f"jnp.{params['caller']}")
    return Use(params["how"], params["batch"], value.steps, value.changed)


def _lays_out(eqn):
    if eqn.primitive.name == "broadcast_in_dim":
        return eqn.outvars[0].aval.size == eqn.invars[0].aval.size
    return eqn.primitive.name in _LAYOUTS


def _joined(values, name):
    """Combines the values that one result is computed from."""
    if any(value is _DATA for value in values):
        return _DATA
    for value in values:
        if isinstance(value, _Value):
            return _Value(value.path, None, value.changed or name)
    return _NEUTRAL


def _after_slice(eqn, value):
    whole, part = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if whole == part:
        return value
    if value.steps is None or part != (1, *whole[1:]):
        return _Value(value.path, None, value.changed or eqn.primitive.name)
    like = jnp.zeros(part[1:])
    (one_more,) = jax.make_jaxpr(lambda x: x.reshape(part))(like).jaxpr.eqns
    return value._replace(steps=(*value.steps, ROW, _step(one_more)))


def _step(eqn):
    return Step(eqn.primitive, tuple(sorted(eqn.params.items())))


def _after_scan(eqn, values, found):
    program, (constants, carries) = eqn.params["jaxpr"].jaxpr, scan_counts(eqn)
    rows = constants + carries
    # A carry may become data in a later iteration.
    carried = [_DATA] * carries
    stacks = [
        value._replace(steps=(*value.steps, ROW))
        if isinstance(value, _Value) and value.steps is not None
        else value
        for value in values[rows:]
    ]
    inputs = [*values[:constants], *carried, *stacks]
    outputs = _follow(program, inputs, found)
    return [_joined([value], "scan") for value in outputs]
