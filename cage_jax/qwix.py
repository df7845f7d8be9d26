"""Rules for a model trained with qwix: qwix's own quantizer for each weight.

qwix decides inside the forward pass which factor of each product is a weight and how to
quantize it. So the model is traced with qwix active, without computing anything. Each
array that qwix quantizes is followed back to its parameter. The quantizer of that
parameter lays it out in the same way and calls qwix.

This uses private modules of qwix, so it works with one version only.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import DenyList
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Literal, Primitive
from jax.interpreters import batching

from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.rules import Rules
from cage_jax.program.products import scan_counts, subjaxprs
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scale_types import FULL
from cage_jax.quantizers.scales import ScaleRule

_VERSION = "0.1.8"

try:
    _found = version("qwix")
except PackageNotFoundError:
    _found = "none"
if _found != _VERSION:
    raise ImportError(
        f"`cage_jax.qwix` needs qwix {_VERSION}, of which it uses private modules; "
        f"got {_found}. Use pip install qwix=={_VERSION}."
    )

import qwix  # noqa: E402
from qwix._src.core import qarray  # noqa: E402


def rules(
    model: Any,
    qwix_rules: Sequence[qwix.QuantizationRule],
    *inputs: Any,
    method: str = "__call__",
    **kwargs: Any,
) -> Rules:
    """Returns rules with the quantizers that qwix uses for a model's weights.

    Under `jax.jit`, `fake_quant(w, rules.match(path))` is bit-identical to the weight
    in qwix's compiled step, so CAGE pulls toward the grid that the model is trained on.
    Train with `qwix.quantize_model(model, qwix.QtProvider(qwix_rules), *inputs)` and
    add `cage(rules, ...)` or a related transformation to the optimizer. qwix computes
    the forward pass, and so the gradient. It also makes the codes: CAGE's `quantize`,
    `freeze_scale` and `statistics` do not support these rules.

    If an array that qwix quantizes cannot be followed back to one parameter, it is left
    alone, with a warning that names the path and the reason. Other warnings report
    settings of qwix that conflict with CAGE: gradients at the unquantized weights,
    grids that are not idempotent, and weights that are not quantized.

    Args:
      model: an NNX module, or a Linen module.
      qwix_rules: the rules given to `qwix.QtProvider`.
      inputs: inputs of the model, as for `qwix.quantize_model`: arrays, or
        `jax.ShapeDtypeStruct`, because nothing is computed.
      method: name of the method to call.
      kwargs: keyword arguments of the call, and of `init` for a Linen module.

    Returns:
      A `Rules` with one rule for each weight that qwix quantizes.

    Raises:
      TypeError: if `model` is not a module or `qwix_rules` are not qwix's.
      ValueError: if there are no inputs, or if qwix quantizes no weight.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.qwix
      >>> import jax.numpy as jnp
      >>> import qwix
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> rule = qwix.QtRule(
      ...     weight_qtype="int4",
      ...     weight_calibration_method="absmax,1.0714286",  # over 7, not 7.5
      ...     additional_qt_config={"use_original_residuals": False},
      ... )
      >>> rules = cage.qwix.rules(model, [rule], jnp.ones((2, 64)))
      >>> print(rules.match("kernel"))
      int4 by qwix, absmax,1.0714286, a scale for each index of axis 1
    """
    _check_arguments(model, qwix_rules, inputs, kwargs)
    provider = qwix.QtProvider(qwix_rules)
    program, values, params = _trace(model, provider, method, inputs, kwargs)
    found: dict[str, list[_Use]] = {}
    _follow(program.jaxpr, [_NEUTRAL] * len(program.consts) + values, found)
    table: list[tuple[str, Quantizer | None]] = []
    for path in (path for path in params if path in found):
        quantizer, problem = _quantizer(found[path], params[path])
        if problem is not None:
            warnings.warn(f"`{path}`: {problem}", stacklevel=2)
        table.append((re.escape(path), quantizer))
    if not table:
        raise ValueError(
            f"`qwix_rules` must quantize a weight of the model; got module_path="
            f"{[rule.module_path for rule in qwix_rules]}, parameters {list(params)}. "
            f"Match their paths without the last part, set `weight_qtype`, and use the "
            f"layers of flax or jnp.einsum; qwix does not see `x @ w`."
        )
    for text in _doubts(found, table, qwix_rules, params):
        warnings.warn(text, stacklevel=2)
    return Rules(table)


def _check_arguments(model, qwix_rules, inputs, kwargs):
    if not isinstance(model, (linen.Module, nnx.Module)):
        raise TypeError(
            f"`model` must be an NNX or a Linen module; got {type(model).__name__}. "
            f"Give the module itself, not its variables."
        )
    if not isinstance(qwix_rules, (list, tuple)) or not all(
        isinstance(rule, qwix.QuantizationRule) for rule in qwix_rules
    ):
        raise TypeError(
            f"`qwix_rules` must be a list of qwix's rules; got {qwix_rules!r}. Use "
            f"[qwix.QtRule(weight_qtype='int4')], not the provider."
        )
    if not inputs and not kwargs:
        raise ValueError(
            "`inputs` must be those of the model; got none. Give what the model is "
            "called with; shapes are enough."
        )


# --- a quantizer that calls qwix ------------------------------------------------------


class _How(NamedTuple):
    """How qwix quantizes an array; hashable, unlike `qarray.HowToQuantize`."""

    qtype: Any
    calibration: str
    channelwise: tuple[int, ...]
    tiles: tuple[tuple[int, int | float], ...]

    @property
    def name(self) -> str:
        return self.qtype if isinstance(self.qtype, str) else np.dtype(self.qtype).name

    def quantize(self, x):
        """Quantizes an array with qwix to its codes and scales."""
        own = qarray.HowToQuantize(
            qtype=self.qtype,
            channelwise_axes=self.channelwise,
            tiled_axes=dict(self.tiles),
            calibration_method=self.calibration,
        )
        # qwix relies on promotions that users may have turned off.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return qarray.quantize(x, own)

    def values(self, x):
        """Returns the values of `x` after qwix quantizes and dequantizes it."""
        quantized = self.quantize(x)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return qarray.dequantize(quantized)

    def __str__(self):
        parts = [f"{self.name} by qwix", self.calibration]
        if self.channelwise:
            several = len(self.channelwise) > 1
            axes = ", ".join(map(str, self.channelwise))
            parts.append(
                f"a scale for each index of ax{'es' if several else 'is'} {axes}"
            )
        parts += [f"tiles of {size} of axis {axis}" for axis, size in self.tiles]
        return ", ".join(parts)


class _Step(NamedTuple):
    """One layout operation between a parameter and the array that qwix quantizes."""

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]


_ROW = None  # the step from a stack to each of its rows, as in a scan


class _Use(NamedTuple):
    """One quantization of an array by qwix.

    Attributes:
      how: how qwix quantizes the array.
      batch: `vmap` axes, which qwix does not see; the outermost first.
      steps: layout steps from the parameter to the array; None if the array is more
        than a new layout of the parameter.
      changed: the operation that changed more than the layout, or None.
    """

    how: _How
    batch: tuple[int, ...]
    steps: tuple[_Step | None, ...] | None
    changed: str | None


@dataclasses.dataclass(frozen=True)
class QwixValues(ScaleRule):
    """The values that qwix gives a parameter, instead of a grid.

    Attributes:
      use: how qwix quantizes the parameter, and in which layout.
      dtype: dtype of the parameter, in which qwix computes.
    """

    use: _Use
    dtype: np.dtype

    has_offset = True  # each value is the offset of its own one-value grid
    finds_values = True

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        """Returns a grid whose offsets are the values that qwix gives `x`."""
        own = x.astype(self.dtype)
        values = _through(own, self.use.steps, self.use.batch, self.use.how.values)
        kind = jnp.finfo(values.dtype)
        # A compiler may leave out the rounding to a narrow dtype if a cast follows.
        values = lax.reduce_precision(values.astype(x.dtype), kind.nexp, kind.nmant)
        return Grid(jnp.ones([1] * x.ndim, x.dtype), offset=values)

    def clips(self, format):
        """Returns False; the value is not used, because the gradient is qwix's own."""
        return False

    def idempotent(self, format):
        """Returns whether quantizing normal numbers twice changes nothing."""
        return _stays(self.use.how)

    def __str__(self):
        return str(self.use.how)


@dataclasses.dataclass(frozen=True)
class QwixFormat(Format):
    """A format with the single value 0; the value itself is the grid's offset."""

    bits: int
    edge = 0.0  # nothing is clipped

    @property
    def values(self):
        """All values of the grid."""
        return np.zeros(1)

    @property
    def code_dtype(self):
        """Raises `TypeError`: there are no codes."""
        raise self._no_codes()

    def round(self, x):
        """Returns zeros; NaN stays NaN."""
        return x * 0

    def neighbours(self, x):
        """Returns `round(x)` twice."""
        return self.round(x), self.round(x)

    def encode(self, value):
        """Raises `TypeError`: there are no codes."""
        raise self._no_codes()

    def decode(self, codes, dtype):
        """Raises `TypeError`: there are no codes."""
        raise self._no_codes()

    to_index = from_index = encode

    def _no_codes(self):
        return TypeError(
            "`quantizer` must have codes of its own; got one of qwix's. Use a "
            "quantizer of cage_jax, or qwix.quantize_params for qwix's codes."
        )


@dataclasses.dataclass(frozen=True)
class QwixQuantizer(Quantizer):
    """The quantizer of one parameter in a model trained with qwix."""

    def storage_bits(self, shape, scale_dtype=jnp.float32):
        """Returns the number of bits of qwix's codes, scales and zero points."""
        assert isinstance(self.scale, QwixValues)
        use, like = self.scale.use, jax.ShapeDtypeStruct(shape, self.scale.dtype)
        made = jax.eval_shape(
            lambda x: _ahead(x, use.steps, use.batch, use.how.quantize), like
        )
        stored = [made.scale] + [part for part in [made.zero_point] if part is not None]
        bits = sum(8 * part.dtype.itemsize * part.size for part in stored)
        return self.bits * made.qvalue.size + bits

    def __str__(self):
        return str(self.scale)


def _quantizer(uses, like):
    """Returns the quantizer of a parameter, or None and the reason."""
    changed = next((use.changed for use in uses if use.steps is None), None)
    if changed is not None and changed.startswith("jnp."):
        return None, (
            f"qwix quantizes it in {changed}, which jax may have traced before, and "
            f"then not, so CAGE leaves it alone. Use jnp.einsum, which qwix always "
            f"sees."
        )
    if changed is not None:
        return None, (
            f"qwix quantizes not it but what is computed from it by {changed}, so CAGE "
            f"leaves it alone. Use cage_jax.fake_quant in the place of qwix."
        )
    if len(set(uses)) > 1:
        return None, (
            f"qwix quantizes it in several ways, "
            f"{' and '.join(sorted({str(use.how) for use in uses}))}, so CAGE leaves "
            f"it alone. Give what shares it one rule of qwix's, and one orientation."
        )
    how = uses[0].how
    bits = int("".join(filter(str.isdigit, how.name))[0])
    scale = QwixValues(uses[0], np.dtype(like.dtype))
    return QwixQuantizer(QwixFormat(bits), scale, axis=()), None


def _ahead(x, steps, batch, function):
    """Lays `x` out by the steps and maps `function` over the parts that qwix sees."""
    if _ROW in steps:
        place = steps.index(_ROW)
        x = _laid_out(x, steps[:place])
        return jax.vmap(lambda x: _ahead(x, steps[place + 1 :], batch, function))(x)
    x = _laid_out(x, steps)
    for axis in reversed(batch):
        function = jax.vmap(function, in_axes=axis, out_axes=axis)
    return function(x)


def _through(x, steps, batch, function):
    """Computes `_ahead` and returns the result in the layout of `x`."""
    if _ROW in steps:
        place = steps.index(_ROW)
        return _and_back(
            x,
            steps[:place],
            jax.vmap(lambda x: _through(x, steps[place + 1 :], batch, function)),
        )
    return _and_back(x, steps, lambda x: _ahead(x, (), batch, function))


def _and_back(x, steps, function):
    values = function(_laid_out(x, steps))
    # The layout holds each number once, so its transpose is its inverse. Casts are left
    # out, to keep the values' own precision.
    layout = [s for s in steps if s.primitive.name != "convert_element_type"]
    like = jax.ShapeDtypeStruct(x.shape, values.dtype)
    return jax.linear_transpose(lambda x: _laid_out(x, layout), like)(values)[0]


def _laid_out(x, steps):
    for step in steps:
        x = step.primitive.bind(x, **dict(step.params))
    return x


@functools.cache
def _stays(how):
    """Tests on random numbers whether quantizing twice changes nothing."""
    sizes = dict.fromkeys(how.channelwise, 4)
    for axis, size in how.tiles:
        sizes[axis] = 2 * size if isinstance(size, int) else 8 * round(1 / size)
    last = max([1, *sizes])
    shape = [sizes.get(axis, 8) for axis in range(last + 1)]
    x = np.random.default_rng(0).standard_normal(shape)
    with jax.ensure_compile_time_eval():
        values = jax.jit(how.values)
        once = values(jnp.asarray(x, jnp.float32))
        return np.allclose(values(once), once, rtol=1e-3)


# --- warnings about qwix --------------------------------------------------------------


def _doubts(found, table, qwix_rules, params):
    """Yields a warning for each way in which training with qwix conflicts with CAGE."""
    quantized = {path: uses[0].how for path, uses in found.items()}
    tiled = [
        path
        for path, how in quantized.items()
        if how.tiles or how.name in ("mxfp8", "mxfp4", "nvfp4")
    ]
    original = [
        path
        for path in quantized
        if path not in tiled and _original_residuals(_rule_of(path, qwix_rules))
    ]
    walking = [
        path
        for path, (_, quantizer) in zip(quantized, table)
        if quantizer is not None and not quantizer.idempotent
    ]
    unseen = [
        path
        for path, like in params.items()
        if len(like.shape) > 1
        and path not in found
        and (rule := _rule_of(path, qwix_rules)) is not None
        and rule.weight_qtype is not None
    ]
    if original:
        yield (
            f"qwix's gradient of what comes before these weights uses the unquantized "
            f"ones, so it is not that of the loss at the quantized weights: "
            f"{_listed(original)}. Use additional_qt_config="
            f"{{'use_original_residuals': False}} in qwix's rule."
        )
    if tiled:
        yield (
            f"qwix's gradient of what comes before these weights uses the unquantized "
            f"ones, as always for tiles and MX types: {_listed(tiled)}. Use no "
            f"`tile_size`, or cage_jax.fake_quant in the place of qwix."
        )
    if walking:
        yield (
            f"these quantizers are not idempotent, so a long pull moves their grids: "
            f"{_listed(walking)}. For integers use weight_calibration_method="
            f"'absmax,f' with f = 1 + 1 / (2**bits - 2), 1.0714286 for 4 bits, in "
            f"qwix's rule."
        )
    if unseen:
        yield (
            f"a rule of qwix's matches the module of these parameters, but qwix "
            f"quantizes no product of them: {_listed(unseen)}. It does not see "
            f"`x @ w`, jnp.dot, jnp.matmul, `Embed.attend` and lookups; use "
            f"jnp.einsum, or leave the module out of the rule."
        )


def _listed(paths, most=6):
    """Lists the first paths, quoted, and the number of the others."""
    text = ", ".join(f"`{path}`" for path in paths[:most])
    more = len(paths) - most
    return f"{text} and {more} more" if more > 0 else text


def _rule_of(path, qwix_rules):
    """Finds qwix's rule for the products of a parameter's module, or None."""
    module = path.rpartition("/")[0]
    for rule in qwix_rules:
        if not rule.op_names and re.fullmatch(rule.module_path, module):
            return rule
    return None


def _original_residuals(rule):
    """Tells, as qwix decides it, whether gradients use the unquantized factors."""
    config = dict(getattr(rule, "additional_qt_config", None) or {})
    default = getattr(rule, "bwd_qtype", None) is None
    return config.get("use_original_residuals", default)


# --- the trace ------------------------------------------------------------------------

# The identity; it marks an array that qwix quantizes.
_quantized_p = Primitive("qwix_quantized")
_quantized_p.def_abstract_eval(lambda x, *, how, batch, caller: x)
_numbers = itertools.count()


def _batched(args, dims, *, how, batch, caller):
    (x,), (dim,) = args, dims
    return _quantized_p.bind(x, how=how, batch=(dim, *batch), caller=caller), dim


batching.primitive_batchers[_quantized_p] = _batched


def _trace(model, provider, method, inputs, kwargs):
    """Traces a model with qwix active and marks the arrays that qwix quantizes.

    Returns:
      The jaxpr, a `_Value` or `_DATA` for each of its inputs, and the parameters by
      path.
    """
    leaves, structure = jax.tree.flatten((inputs, kwargs))
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]
    arrays = [leaves[i] for i in places]

    def joined(arrays):
        every = list(leaves)
        for i, array in zip(places, arrays):
            every[i] = array
        return jax.tree.unflatten(structure, every)

    prepare = _prepare_linen if isinstance(model, linen.Module) else _prepare_nnx
    # A unique key in jax's caches: marked traces must not be reused elsewhere.
    key = set_xla_metadata(cage_jax_qwix=str(next(_numbers)))
    with _marking(), key, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # qwix's own
        call, params, rest = prepare(model, provider, method, arrays, joined)
        program = jax.make_jaxpr(call)(params, rest, arrays)
    paths, leaves, _ = flatten_with_paths(params)
    values = [_Value(path, ()) for path in paths]
    others = len(program.jaxpr.invars) - len(values)
    return program, values + [_DATA] * others, dict(zip(paths, leaves))


def _prepare_linen(model, provider, method, arrays, joined):
    quantized = qwix.quantize_model(model, provider, methods=(method,))
    rngs = {"params": jax.random.key(0)}

    def init(arrays):
        args, kwargs = joined(arrays)
        return quantized.init(rngs, *args, method=method, **kwargs)

    def call(params, rest, arrays):
        args, kwargs = joined(arrays)
        variables = {"params": params, **rest}
        options = {"rngs": rngs, "mutable": DenyList("params"), "method": method}
        quantized.apply(variables, *args, **options, **kwargs)

    variables = dict(jax.eval_shape(init, arrays))
    return call, variables.pop("params", {}), variables


def _prepare_nnx(model, provider, method, arrays, joined):
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states

    def call(params, rest, arrays):
        args, kwargs = joined(arrays)
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
            own = _How(
                how.qtype,
                how.calibration_method,
                tuple(how.channelwise_axes),
                tuple(how.tiled_axes.items()),
            )
            array = _quantized_p.bind(array, how=own, batch=(), caller=_jitted_caller())
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
      steps: layout steps from the parameter to the array; None if the array is more
        than a new layout of the parameter.
      changed: the operation that changed more than the layout, or None.
    """

    path: str
    steps: tuple[_Step | None, ...] | None
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
_CALLS = (
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat2",
)


def _follow(jaxpr, values, found) -> list:
    """Follows values through a jaxpr to its outputs; adds to `found` by path."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values))

    def read(atoms):
        return [_NEUTRAL if isinstance(a, Literal) else known[a] for a in atoms]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _after(eqn, read(eqn.invars), found)))
    return read(jaxpr.outvars)


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
    inner = list(subjaxprs(eqn.params))
    if name in _CALLS and len(inner) == 1:
        constants = [_NEUTRAL] * len(inner[0].constvars)
        return _follow(inner[0], constants + values[-len(inner[0].invars) :], found)
    for jaxpr in inner:
        count = len(jaxpr.invars)
        given = values[1:] if name == "cond" else [_joined([v], name) for v in values]
        # The leading operands of a loop and its carries may be anything.
        given = given if count == len(given) else [_DATA] * count
        _follow(jaxpr, [_NEUTRAL] * len(jaxpr.constvars) + given, found)
    if isinstance(first, _Value) and first.steps is not None and _lays_out(eqn):
        return [first._replace(steps=(*first.steps, _step(eqn)))]
    return [_joined(values, name)] * len(eqn.outvars)


def _use(eqn, value):
    params = eqn.params
    if params["caller"] is not None and value.steps is not None:
        value = value._replace(steps=None, changed=f"jnp.{params['caller']}")
    return _Use(params["how"], params["batch"], value.steps, value.changed)


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
    return value._replace(steps=(*value.steps, _ROW, _step(one_more)))


def _step(eqn):
    return _Step(eqn.primitive, tuple(sorted(eqn.params.items())))


def _after_scan(eqn, values, found):
    program, (constants, carries) = eqn.params["jaxpr"].jaxpr, scan_counts(eqn)
    rows = constants + carries
    # A carry may become data in a later iteration.
    carried = [_DATA] * carries
    stacks = [
        value._replace(steps=(*value.steps, _ROW))
        if isinstance(value, _Value) and value.steps is not None
        else value
        for value in values[rows:]
    ]
    inputs = [*values[:constants], *carried, *stacks]
    outputs = _follow(program, [_NEUTRAL] * len(program.constvars) + inputs, found)
    return [_joined([value], "scan") for value in outputs]
