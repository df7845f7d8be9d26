"""Rules for a model that is trained through qwix: its own quantizer of each weight.

qwix decides inside the forward pass which factor of which product is a weight and how
it is quantized. So the model is traced with qwix at work, without computing anything,
and each factor that qwix quantizes is followed back to the parameter that it is. The
values then are those of qwix's compiled training step, to the bit; this is tried out
for each kind of quantizer, on the compiler at hand.

It leans on private modules of qwix, hence on one version of it.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
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
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import batching

from cage_jax.formats import NF4, Codebook, Float, Format, Integer
from cage_jax.paths import flatten_with_paths
from cage_jax.quantization import fake_quant
from cage_jax.quantizers import Quantizer
from cage_jax.rounding import fit_grid
from cage_jax.rules import Rules
from cage_jax.scale_types import FULL, Float8, PowerOfTwo, ScaleType
from cage_jax.scales import Grid, ScaleRule

_VERSION = "0.1.8"

try:
    _found = version("qwix")
except PackageNotFoundError:
    _found = "none"
if _found != _VERSION:
    raise ImportError(
        f"`cage_jax.qwix` needs qwix {_VERSION}, of which it reads private modules; "
        f"got {_found}. Use pip install qwix=={_VERSION}."
    )

import qwix  # noqa: E402
from qwix._src.core import (  # noqa: E402
    conv_general,
    conv_general_qt,
    dot_general,
    dot_general_qt,
    numerics,
    qarray,
    ragged_dot_qt,
)


def rules(
    model: Any,
    qwix_rules: Sequence[qwix.QuantizationRule],
    *inputs: Any,
    method: str = "__call__",
    **kwargs: Any,
) -> Rules:
    """The quantizers that qwix trains a model's weights with, by path.

    `fake_quant(w, rules.match(path))` under `jax.jit` has the bits of the weight in
    qwix's compiled step, so CAGE pulls to the grid that the model is trained on. Train
    with `qwix.quantize_model(model, qwix.QtProvider(qwix_rules), *inputs)` and put
    `cage(rules, ...)` or its relatives among the optimizer's transformations. The
    forward pass, and so the gradient, is qwix's own.

    What has no equal is left alone, with a warning that names path and reason. Further
    warnings say what of qwix's defaults is at odds with CAGE: gradients at the
    unquantized weights, grids that are not idempotent, weights that are not quantized.

    Args:
      model: an NNX module, or a Linen module.
      qwix_rules: what `qwix.QtProvider` is given.
      inputs: of the model, as for `qwix.quantize_model`; arrays, or
        `jax.ShapeDtypeStruct` since nothing is computed.
      method: the name of the method that is called.
      kwargs: of the call; for a Linen module of `init` too.

    Returns:
      A `Rules` with one rule for each weight that qwix quantizes.

    Raises:
      TypeError: for something else than a module and qwix's rules.
      ValueError: without inputs, and where qwix quantizes no weight.

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
      int4 full range qwix absmax,1.0714286, axis -2, identity
    """
    _check_arguments(model, qwix_rules, inputs, kwargs)
    provider = qwix.QtProvider(qwix_rules)
    program, origins, shapes = _trace(model, provider, method, inputs, kwargs)
    walk = _Walk()
    walk.jaxpr(program.jaxpr, [_CONSTANT] * len(program.consts) + origins)
    table: list[tuple[str, Quantizer | None]] = []
    for path in [path for path in shapes if path in walk.operands]:
        quantizer, problem = _quantizer(walk.operands[path], shapes[path])
        if problem is not None:
            warnings.warn(f"`{path}`: {problem}", stacklevel=2)
        table.append((re.escape(path), quantizer))
    if not table:
        raise ValueError(
            f"`qwix_rules` must quantize a weight of the model; got module_path="
            f"{[rule.module_path for rule in qwix_rules]}, parameters {list(shapes)}. "
            f"Match their paths without the last part, set `weight_qtype`, and use the "
            f"layers of flax or jnp.einsum; qwix does not see lax.dot."
        )
    for text in _doubts(walk, table, qwix_rules, shapes):
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


# --- what is said of qwix -------------------------------------------------------------


def _doubts(walk, table, qwix_rules, shapes):
    """What of a training through qwix is at odds with CAGE, one text for each."""
    quantized = [path for path in shapes if path in walk.operands]
    gradients = {
        residual: [
            path
            for path in quantized
            if any(each.use.residual == residual for each, _ in walk.operands[path])
        ]
        for residual in ("original", "tiled")
    }
    walking = [
        path
        for path, (_, quantizer) in zip(quantized, table)
        if quantizer is not None and not quantizer.idempotent
    ]
    unseen = [
        path
        for path in {**walk.plain, **walk.looked_up}
        if len(shapes[path]) > 1
        and path not in walk.operands
        and _wanted(path, qwix_rules)
    ]
    both = [path for path in quantized if path in walk.plain]
    if paths := gradients["original"]:
        yield (
            f"qwix's gradient of what comes before these weights uses the unquantized "
            f"ones, so it is not that of the loss at the quantized weights: "
            f"{_listed(paths)}. Use additional_qt_config={{'use_original_residuals': "
            f"False}} in qwix's rule."
        )
    if paths := gradients["tiled"]:
        yield (
            f"qwix's gradient of what comes before these weights uses the unquantized "
            f"ones, as always for tiles and MX types: {_listed(paths)}. Use no "
            f"`tile_size`, or cage_jax.fake_quant in the place of qwix."
        )
    if walking:
        yield (
            f"these quantizers are not idempotent, so a long pull moves their grids: "
            f"{_listed(walking)}. For integers use weight_calibration_method="
            f"'absmax,f' with f = 1 + 1 / (2**bits - 2), 1.0714286 for 4 bits, in "
            f"qwix's rule; `freeze_scale` keeps CAGE's grid, but not that of qwix."
        )
    if unseen:
        yield (
            f"a rule of qwix's matches the module of these parameters, but qwix "
            f"quantizes no product of them: {_listed(unseen)}. It does not see "
            f"`x @ w`, jnp.dot, jnp.matmul, `Embed.attend` and lookups; use "
            f"jnp.einsum, or leave the module out of the rule."
        )
    if both:
        yield (
            f"these weights are used in a product that qwix does not quantize, too: "
            f"{_listed(both)}. Use jnp.einsum there."
        )


def _listed(paths, most=6):
    """The first of the paths, each quoted."""
    text = ", ".join(f"`{path}`" for path in paths[:most])
    more = len(paths) - most
    return f"{text} and {more} more" if more > 0 else text


def _wanted(path, qwix_rules):
    """Whether a rule of qwix's is for weights of the parameter's module."""
    module = path.rpartition("/")[0]
    for rule in qwix_rules:
        if not rule.op_names and re.fullmatch(rule.module_path, module):
            return rule.weight_qtype is not None
    return False


# --- the quantizer of a parameter -----------------------------------------------------


class _Use(NamedTuple):
    """How a factor of a product is quantized; hashable, unlike qwix's own description.

    Attributes:
      qtype: the name of the type.
      calibration: the calibration method.
      channelwise: the axes with a scale for each index.
      tiles: pairs of an axis and its tile size, or one over the number of tiles.
      residual: "original" or "tiled" where the gradient uses it unquantized, else None.
      obstacle: why it cannot be known what is quantized, or None.
    """

    qtype: str
    calibration: str
    channelwise: tuple[int, ...]
    tiles: tuple[tuple[int, int | float], ...]
    residual: str | None = None
    obstacle: str | None = None


class _Operand(NamedTuple):
    """A factor that qwix quantizes.

    Attributes:
      use: how.
      axes: where the axes of the factor are in the array, which has more under `vmap`.
      shape: of the array.
    """

    use: _Use
    axes: tuple[int, ...]
    shape: tuple[int, ...]


class _NoEqualError(Exception):
    """Something of qwix's that has no equal here."""


def _quantizer(operands, shape):
    """The quantizer of a parameter or None, and what is wrong with it or None.

    Args:
      operands: pairs of an `_Operand` and the `_Value` that it is of.
      shape: of the parameter.
    """
    try:
        found = [_quantizer_of(operand, value, shape) for operand, value in operands]
        if len(set(found)) > 1:
            raise _NoEqualError(
                f"its products must quantize it in one way; got it quantized as "
                f"{' and as '.join(sorted({str(quantizer) for quantizer in found}))}. "
                f"Give what shares it one rule of qwix's, and one orientation."
            )
    except _NoEqualError as error:
        return None, f"{error} CAGE leaves it alone."
    (operand, value), *_ = operands
    return _tried(found[0], operand.use, value.view.dtypes)


def _quantizer_of(operand, value, shape):
    """The quantizer of a parameter by one of its uses."""
    if operand.use.obstacle is not None:
        raise _NoEqualError(operand.use.obstacle)
    if value.view is None:
        raise _NoEqualError(
            f"qwix quantizes not it but what is computed from it by {value.changed}. "
            f"Use cage_jax.fake_quant in the place of qwix."
        )
    use, view = operand.use, value.view
    shared: dict[int, int] = {}
    for axis, place in enumerate(operand.axes):
        if axis not in use.channelwise:
            size = _tile(use, axis, operand.shape[place])
            _share(shared, view.axes[place], size, shape)
    whole = all(shared.get(axis, 1) == n for axis, n in enumerate(shape))
    format, scale_type, bounds = _format(use)
    narrow = None if view.dtypes[-1].itemsize >= 4 else view.dtypes[-1].name
    if narrow is not None:
        format = InDtype(format, narrow)
    fixed = _parsed(use.calibration)[0] == "fixed"
    axes = None if fixed or whole else sorted(shared)
    sizes = [shared[a] if shared[a] != shape[a] else None for a in axes or ()]
    grouped = axes is not None and any(sizes)
    return Quantizer(
        format,
        QwixScale(use.calibration, *bounds, narrow),
        axis=None if axes is None else _one_or_all([a - len(shape) for a in axes]),
        group_size=_one_or_all(sizes) if grouped else None,
        scale_type=scale_type,
    )


def _one_or_all(entries):
    return entries[0] if len(entries) == 1 else tuple(entries)


def _tile(use, axis, length):
    """How many neighbours along an axis share a scale."""
    size = dict(use.tiles).get(axis, length)
    return round(length * size) if isinstance(size, float) else size


def _share(shared, axes, size, shape):
    """Adds the sizes of groups along the parameter's axes that make up one axis."""
    for axis in reversed(axes):
        inside = min(size, shape[axis])
        if size % inside or shape[axis] % inside:
            raise _NoEqualError(
                f"a group must be a block of the parameter; got {size} values of the "
                f"axes {axes} of {shape}. Use a `tile_size` that divides the last one."
            )
        if inside > 1:
            shared[axis] = inside
        size //= inside


def _format(use) -> tuple[Format, ScaleType, tuple[float, float]]:
    """The format of a qtype, its scale type, and the ends of its range."""
    formats: dict[str, tuple[Format, ScaleType]] = {
        **{f"int{b}": (Integer(b, narrow=False), FULL) for b in range(2, 9)},
        "float8_e4m3fn": (Float("e4m3"), FULL),
        "float8_e5m2": (Float("e5m2"), FULL),
        "float4_e2m1fn": (Float("e2m1"), FULL),
        "mxfp8": (Float("e4m3"), PowerOfTwo("up")),
        "mxfp4": (Float("e2m1"), PowerOfTwo("up")),
        "nvfp4": (Float("e2m1"), Float8(tensor_divisor=False)),
        "nf4": (Nearest(NF4.levels, "nf4"), FULL),
    }
    if use.qtype not in formats:
        raise _NoEqualError(
            f"its qtype must be one of {list(formats)}; got {use.qtype}. Use one of "
            f"them in qwix's rule."
        )
    if _asymmetric(use.calibration):
        return *formats[use.qtype], numerics.get_asymmetric_bound(use.qtype)
    bound = numerics.get_symmetric_bound(use.qtype)
    return *formats[use.qtype], (-bound, bound)


# --- scales and codes as qwix's compiled step has them --------------------------------


@dataclasses.dataclass(frozen=True)
class QwixScale(ScaleRule):
    """The scale that qwix finds, with the bits that it has in a compiled step.

    A compiler folds the division by the range into a product with its reciprocal, and
    a factor of the calibration method with it; `rules` finds out whether it turns the
    division by the scale around, too.

    Args:
      calibration: qwix's calibration method, such as "absmax,0.9".
      low: the end of the range below, in units of the scale.
      high: the end above.
      dtype: in which qwix computes, "bfloat16" or "float16"; None for that of the
        array.
      product: whether values are multiplied with the reciprocal of the scale, as on
        CPUs, and not divided by it.
    """

    calibration: str
    low: float
    high: float
    dtype: str | None = None
    product: bool = True

    @property
    def asymmetric(self):
        """Whether the rule gives a zero point."""
        return _asymmetric(self.calibration)

    def fit(self, x, axes, format, scale_type=FULL, tensor_axes=()):
        """As `ScaleRule.fit`; groups whose scale underflows get what qwix gives."""
        method, numbers = _parsed(self.calibration)
        x = _narrowed(x, self.dtype)
        bottom = None
        if method == "fixed":
            bottom, scale = self._fixed(x, axes, numbers)
        elif method == "minmax":
            bottom, scale = self._minmax(x, axes, numbers)
        elif method == "rms":
            mean = jnp.mean(jnp.square(x), axis=axes, keepdims=True)
            scale = self._over_range(jnp.sqrt(mean), numbers)
        else:
            largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
            scale = self._over_range(largest, numbers)
        tiny = math.sqrt(jnp.finfo(self.dtype or x.dtype).tiny)
        scale = jnp.where(scale < jnp.asarray(tiny, x.dtype), 1, scale)
        scale = self._stored(scale, scale_type).astype(x.dtype)
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
        zero_point = None
        if bottom is not None:
            zero_point = jnp.round(self.low - bottom / scale)
            zero_point = jnp.clip(zero_point, self.low, self.high)
        # Where a group is one value, there is no broadcast to turn around.
        single = method != "fixed" and all(x.shape[axis] == 1 for axis in axes)
        if not self.product or single:
            return Grid(scale, zero_point)
        inverse = jnp.where(scale == 0, 0, 1 / scale)
        if self.dtype == "float16":
            inverse = _narrowed(inverse, self.dtype)
        return Grid(scale, zero_point, inverse=inverse)

    @property
    def _range(self):
        return self.high - self.low if self.asymmetric else self.high

    def _over_range(self, bound, factors):
        """The bound, times the factor if there is one, over the range."""
        if self.dtype == "bfloat16":  # it is rounded after each operation
            for factor in factors[:1]:
                bound = _narrowed(
                    bound * float(jnp.dtype("bfloat16").type(factor)), self.dtype
                )
            inverse = np.float32(1) / np.float32(self._range)
            return _narrowed(bound * inverse, self.dtype)
        number = np.dtype(self.dtype or bound.dtype).type
        constant = number(1) / number(self._range)
        for factor in factors[:1]:
            constant = number(factor) * constant
        return _narrowed(bound * constant.astype(bound.dtype), self.dtype)

    def _minmax(self, x, axes, factors):
        bottom = jnp.minimum(jnp.min(x, axis=axes, keepdims=True), 0)
        top = jnp.maximum(jnp.max(x, axis=axes, keepdims=True), 0)
        for factor in factors[:1]:
            bottom, top = bottom * factor, top * factor
        return bottom, self._over_range(_narrowed(top - bottom, self.dtype), [])

    def _fixed(self, x, axes, ends):
        low, high = ends if len(ends) == 2 else (-ends[0], ends[0])
        number = jnp.dtype(self.dtype or x.dtype).type
        low, high = number(low), number(high)
        spread = number(high - low) if self.asymmetric else high
        scale = number(spread / number(self._range))
        shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
        full = functools.partial(jnp.full, shape, dtype=x.dtype)
        return full(float(low)) if self.asymmetric else None, full(float(scale))

    def _stored(self, scale, scale_type):
        """The scale as the number that its type can hold."""
        if isinstance(scale_type, PowerOfTwo):
            return 2 ** jnp.ceil(self._log2(scale))
        if isinstance(scale_type, Float8):
            return Float("e4m3").round(scale)
        return scale

    def _log2(self, scale):
        """As qwix has it: next to a power of two it can be on the other side."""
        if self.dtype is None:
            return jnp.log2(scale)
        number = jnp.dtype(self.dtype).type
        factor = np.float32(1) / np.float32(number(math.log(2)))
        if self.dtype == "float16":
            factor = np.float32(number(factor))
        logarithm = _narrowed(jnp.log(scale), self.dtype)
        return _narrowed(logarithm * factor, self.dtype)

    def clips(self, format):
        """Whether values of a group can lie beyond the end of its grid."""
        method, numbers = _parsed(self.calibration)
        covers = method in ("absmax", "minmax") and (not numbers or numbers[0] >= 1)
        return self.high > format.high or not covers

    def idempotent(self, format):
        """Whether fitting quantized values gives the same grid again."""
        method, numbers = _parsed(self.calibration)
        if method == "absmax":
            # So is the largest value on the grid; what 1e-4 moves is not worth a word.
            factor = numbers[0] if numbers else 1.0
            return math.isclose(self.high / factor, format.high, rel_tol=1e-4)
        return method == "fixed" or (method == "minmax" and not numbers)

    def __str__(self):
        return f"qwix {self.calibration}"


def _parsed(calibration):
    """A calibration method's name and its numbers."""
    method, *texts = calibration.lower().split(",")
    return method, [float(text) for text in texts]


def _asymmetric(calibration):
    """Whether a calibration method gives a zero point."""
    method, numbers = _parsed(calibration)
    uneven = len(numbers) == 2 and sum(numbers) != 0
    return method == "minmax" or (method == "fixed" and uneven)


@dataclasses.dataclass(frozen=True)
class InDtype(Format):
    """A format whose values are rounded to a narrow dtype before they get a code.

    Args:
      format: the format.
      dtype: "bfloat16" or "float16", in which the quotient by the scale is computed.
    """

    format: Format
    dtype: str

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Width of one code."""
        return self.format.bits

    @property
    def values(self) -> np.ndarray:
        """All values of the grid."""
        values = self.format.values
        if isinstance(self.format, Codebook):  # qwix rounds the levels themselves
            return values.astype(self.dtype).astype(np.float64)
        return values

    @property
    def code_dtype(self) -> np.dtype:
        """The narrowest jax dtype that holds every code."""
        return self.format.code_dtype

    def round(self, x):
        """The nearest value of the grid."""
        return self._own(self.format.round(_narrowed(x, self.dtype)))

    def neighbours(self, x):
        """The values of the grid next to `x`."""
        below, above = self.format.neighbours(_narrowed(x, self.dtype))
        return self._own(below), self._own(above)

    def encode(self, value):
        """The codes of grid values."""
        return self.format.encode(value)

    def decode(self, codes, dtype):
        """The grid values of `codes`."""
        return self._own(self.format.decode(codes, dtype))

    def to_index(self, codes):
        """The bits of each code."""
        return self.format.to_index(codes)

    def from_index(self, index):
        """The codes of such bits."""
        return self.format.from_index(index)

    def _own(self, value):
        narrow = isinstance(self.format, Codebook)
        return _narrowed(value, self.dtype) if narrow else value

    def __str__(self):
        return f"{self.format} in {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Nearest(Codebook):
    """A codebook that rounds by the least distance as floats, the lower one of equals.

    Near the middle of two levels distances can be equal that are not, as numbers.
    """

    def round(self, x):
        """The nearest value of the grid."""
        value, least = jnp.full_like(x, self.levels[0]), jnp.abs(x - self.levels[0])
        for level in self.levels[1:]:
            distance = jnp.abs(x - jnp.asarray(level, x.dtype))
            value = jnp.where(distance < least, jnp.asarray(level, x.dtype), value)
            least = jnp.minimum(distance, least)
        return jnp.where(jnp.isnan(x), x, value)

    def __str__(self):
        return self.name


def _narrowed(x, dtype):
    """`x` rounded to a narrow dtype, but for the dtype; by no cast, which may go."""
    if dtype is None:
        return x
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


# --- are the bits the same? -----------------------------------------------------------


def _tried(quantizer, use, dtypes):
    """The quantizer as the compiler at hand has it, and what is still different."""
    found = _trial(
        quantizer.format,
        quantizer.scale,
        quantizer.scale_type,
        use.qtype,
        bool(use.tiles),
        tuple(dtype.name for dtype in dtypes),
    )
    scale = dataclasses.replace(quantizer.scale, product=found.product)
    quantizer = dataclasses.replace(quantizer, scale=scale)
    remedy = "Use weight_calibration_method='absmax' in qwix's rule"
    if _parsed(use.calibration)[0] == "rms":
        reason = "qwix scales it by a mean, whose last bits are the compiler's"
    elif len(set(dtypes)) > 1 and not isinstance(quantizer.scale_type, PowerOfTwo):
        names = " to ".join(dict.fromkeys(dtype.name for dtype in dtypes))
        reason = f"qwix quantizes it after a conversion from {names}"
        remedy = "Keep it in the dtype that its module computes in, or use an MX type"
    elif found.different:
        reason = f"{use.calibration} of {use.qtype} is compiled to other bits here"
    else:
        return quantizer, None
    return quantizer, (
        f"{reason}, so its values can differ from qwix's in the last bits, and next to "
        f"the middle of two codes by a step ({found.different} of {found.total} that "
        f"were tried do). {remedy} for the very bits."
    )


class _Trial(NamedTuple):
    """What came of comparing with qwix.

    Attributes:
      product: the better one of `QwixScale.product`.
      different: how many values differ with it.
      total: of how many.
    """

    product: bool
    different: int
    total: int


@functools.cache
def _trial(format, scale, scale_type, qtype, tiled, dtypes) -> _Trial:
    """Quantizes an array of values that are hard to round, here and by qwix."""
    size = _TILES.get(qtype, 16)
    how = qarray.HowToQuantize(
        qtype=qtype,
        channelwise_axes=[1],
        tiled_axes={0: size} if tiled else {},
        calibration_method=scale.calibration,
    )

    @jax.jit
    def by_qwix(x):
        for dtype in dtypes[1:]:
            x = x.astype(dtype)
        return qarray.dequantize(qarray.quantize(x, how))

    fixed = _parsed(scale.calibration)[0] == "fixed"
    results: list[_Trial] = []
    for product in (True, False):
        quantizer = Quantizer(
            format,
            dataclasses.replace(scale, product=product),
            axis=None if fixed else 0,
            group_size=size if tiled and not fixed else None,
            scale_type=scale_type,
        )
        ours = jax.jit(functools.partial(fake_quant, quantizer=quantizer))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            x = _hard_values(quantizer, dtypes)
            expected = np.asarray(by_qwix(x)).astype(np.float64)
            actual = np.asarray(ours(x)).astype(np.float64)
        different = int(np.sum(~((actual == expected) | np.isnan(expected))))
        results.append(_Trial(product, different, x.size))
        if not different:
            break
    return min(results, key=lambda result: result.different)


_TILES = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}


def _hard_values(quantizer, dtypes):
    """Normal numbers, many of them moved next to the middle of two codes."""
    dtype = dtypes[0]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 64)) * np.exp2(rng.integers(-8, 2, 64))
    x[:, 0], x[:, 1] = 0, x[:, 1] * 1e-20
    largest = np.abs(x).max(0)
    x[0, 2:] = np.where(np.arange(62) % 2, 1, -1) * largest[2:]
    x[0, 3:8] = 2.0 * np.exp2(np.floor(np.log2(largest[3:8]))) * quantizer.scale.high
    wide = np.float64 if dtype == "float64" else np.float32
    x = x.astype(jnp.dtype(dtype)).astype(wide)
    grid = fit_grid(jnp.asarray(x), quantizer)
    groups = grid.scale.shape[0]
    step = np.repeat(np.asarray(grid.scale), 64 // groups, 0)
    values = quantizer.format.values
    middle = rng.choice((values[1:] + values[:-1]) / 2, x.shape)
    if grid.zero_point is not None:
        middle = middle - np.repeat(np.asarray(grid.zero_point), 64 // groups, 0)
    near = (middle * step).astype(jnp.dtype(dtype)).astype(wide)
    for name in set(dtypes):  # as near as that dtype can tell apart
        epsilon = float(jnp.finfo(name).eps)
        near *= (1 + epsilon * rng.integers(-1, 2, x.shape)).astype(wide)
    # What would change a group's range stays as it is.
    whole = x.reshape(groups, -1, x.shape[1])
    low = np.broadcast_to(whole.min(1, keepdims=True), whole.shape).reshape(x.shape)
    high = np.broadcast_to(whole.max(1, keepdims=True), whole.shape).reshape(x.shape)
    if not quantizer.asymmetric:
        high = np.maximum(-low, high)
        low = -high
    keep = (np.abs(x) == np.abs(high)) | (x == low) | (near <= low) | (near >= high)
    return jnp.asarray(np.where(keep, x, near), dtype)


# --- the trace ------------------------------------------------------------------------

# The identity, at a factor that qwix quantizes.
_operand_p = Primitive("qwix_operand")
_operand_p.def_abstract_eval(lambda x, *, use, axes: x)
_numbers = itertools.count()


def _batched_operand(args, dims, *, use, axes):
    (x,), (dim,) = args, dims
    axes = tuple(axis + (axis >= dim) for axis in axes)
    return _operand_p.bind(x, use=use, axes=axes), dim


batching.primitive_batchers[_operand_p] = _batched_operand


def _trace(model, provider, method, inputs, kwargs):
    """The program of a model with qwix at work, with its factors marked.

    Returns:
      The jaxpr, what is known of its inputs, and the shapes of the parameters by path.
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
    # Its own key of jax's caches: what is traced here must not turn up elsewhere.
    key = set_xla_metadata(cage_jax_qwix=str(next(_numbers)))
    with _marking(), key, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # qwix's own
        call, params, rest = prepare(model, provider, method, arrays, joined)
        program = jax.make_jaxpr(call)(params, rest, arrays)
    paths, leaves, _ = flatten_with_paths(params)
    shapes = {path: leaf.shape for path, leaf in zip(paths, leaves)}
    origins = [_parameter(path, leaf) for path, leaf in zip(paths, leaves)]
    others = len(program.jaxpr.invars) - len(origins)
    return program, origins + [_DATA] * others, shapes


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
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def call(params, rest, arrays):
        args, kwargs = joined(arrays)
        merged = nnx.merge(graphdef, params, rest)
        # It calls the model once.
        qwix.quantize_model(merged, provider, *args, methods=(method,), **kwargs)

    return call, params, rest


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    """Marks the factors that qwix quantizes in this thread."""
    thread = threading.get_ident()
    patched = [
        (dot_general_qt, "dot_general_qt", _mark_dot_general),
        (conv_general_qt, "conv_general_qt", _mark_conv_general),
        (ragged_dot_qt, "ragged_dot_qt", _mark_ragged_dot),
    ]
    originals = [getattr(module, name) for module, name, _ in patched]

    def replacement(original, mark):
        def product(lhs, rhs, *args):
            if threading.get_ident() == thread:
                lhs, rhs = mark(lhs, rhs, *args)
            return original(lhs, rhs, *args)

        return product

    try:
        for (module, name, mark), original in zip(patched, originals):
            setattr(module, name, replacement(original, mark))
        yield
    finally:
        for (module, name, _), original in zip(patched, originals):
            setattr(module, name, original)


def _mark_dot_general(lhs, rhs, dimension_numbers, config):
    marked = []
    for x, side in ((lhs, "lhs"), (rhs, "rhs")):
        qtype = getattr(config, f"{side}_qtype")
        if not qtype or not numerics.should_quantize(x.dtype):
            marked.append(x)
            continue
        how = dot_general.get_how_to_quantize(
            dimension_numbers=dimension_numbers,
            ndims=(lhs.ndim, rhs.ndim),
            for_lhs=side == "lhs",
            qtype=qtype,
            tile_size=config.tile_size,
            calibration_method=getattr(config, f"{side}_calibration_method"),
        )
        obstacle = None
        if side == "rhs" and config.sparsity_rule is not None:
            obstacle = "qwix prunes it by a sparsity rule before. Use none."
        residual = "original" if config.use_original_residuals else None
        counts = qarray.get_scale_shape(x.shape, how)
        if qtype in _TILES or any(1 < k < n for k, n in zip(counts, x.shape)):
            residual = "tiled"
        marked.append(_marked(x, how, config, side, residual, obstacle))
    return marked


def _mark_conv_general(lhs, rhs, config, strides, padding, *rest):
    numbers = rest[2] if len(rest) > 2 else None
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
    marked = []
    for x, side in ((lhs, "lhs"), (rhs, "rhs")):
        qtype = getattr(config, f"{side}_qtype")
        if not qtype or not numerics.should_quantize(x.dtype):
            marked.append(x)
            continue
        how = conv_general.get_how_to_quantize(
            dimension_numbers=numbers,
            for_lhs=side == "lhs",
            qtype=qtype,
            calibration_method=getattr(config, f"{side}_calibration_method"),
        )
        marked.append(_marked(x, how, config, side, None, None))
    return marked


def _mark_ragged_dot(lhs, rhs, sizes, config, *rest):
    marked = []
    for x, qtype, axis in ((lhs, config.lhs_qtype, 0), (rhs, config.rhs_qtype, 2)):
        how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=[axis])
        marked.append(_bind(x, how))
    return marked


def _marked(x, how, config, side, residual, obstacle):
    if getattr(config, f"{side}_disable_channelwise_axes"):
        how = dataclasses.replace(how, channelwise_axes=[])
    if getattr(config, f"{side}_collect_quant_stat") is not None:
        obstacle = "qwix scales it by statistics of inputs. Use no static scale."
    return _bind(x, how, residual, obstacle)


def _bind(x, how, residual=None, obstacle=None):
    if name := _jitted_caller():
        obstacle = (
            f"its product is in jnp.{name}, which qwix quantizes only where jax has "
            f"not traced it before. Use jnp.einsum, which qwix always sees."
        )
    named = isinstance(how.qtype, str)
    use = _Use(
        how.qtype if named else jnp.dtype(how.qtype).name,
        how.calibration_method,
        tuple(how.channelwise_axes),
        tuple(how.tiled_axes.items()),
        residual,
        obstacle,
    )
    return _operand_p.bind(x, use=use, axes=tuple(range(x.ndim)))


def _jitted_caller():
    """The function of `jax.numpy` around the present call that keeps its trace."""
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


# --- from a factor back to its parameter ----------------------------------------------


class _View(NamedTuple):
    """An array that is a parameter, or a part of it, laid out otherwise.

    Attributes:
      shape: of the parameter.
      axes: for each axis of the array the parameter's axes that it is made of.
      dtypes: of the parameter, and of each conversion after it.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]


class _Value(NamedTuple):
    """What is known of an array that does not depend on data.

    Attributes:
      paths: of the parameters that it is computed from.
      view: what it is of the one parameter, or None if it is computed from it.
      changed: the operation that made it something else, or None.
      marked: whether qwix quantizes it.
    """

    paths: tuple[str, ...]
    view: _View | None
    changed: str | None = None
    marked: bool = False


_DATA = None
_CONSTANT = _Value((), None)

# Operations that leave all of their operands as they are.
_SAME = {
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pvary",
    "reshard",
    "sharding_constraint",
}
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
_CALLS = (
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "checkpoint",
    "remat2",
)


def _parameter(path, leaf):
    axes = tuple((axis,) for axis in range(len(leaf.shape)))
    return _Value((path,), _View(leaf.shape, axes, (np.dtype(leaf.dtype),)))


def _joined(values, operation):
    """What is computed from all of these."""
    if any(value is _DATA for value in values):
        return _DATA
    paths = dict.fromkeys(path for value in values for path in value.paths)
    changed = next((v.changed for v in values if v.changed), operation)
    return _Value(tuple(paths), None, changed, any(v.marked for v in values))


class _Walk:
    """Follows the parameters through a program.

    Attributes:
      operands: for each parameter the factors that qwix quantizes.
      plain: the parameters in products that qwix does not quantize.
      looked_up: those of which single rows are taken.
    """

    def __init__(self):
        self.operands: dict[str, list[tuple[_Operand, _Value]]] = {}
        self.plain: dict[str, None] = {}
        self.looked_up: dict[str, None] = {}

    def jaxpr(self, jaxpr: Jaxpr, values: list) -> list:
        """What is known of the outputs."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), values))

        def read(atoms):
            return [_CONSTANT if isinstance(a, Literal) else known[a] for a in atoms]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, read(eqn.invars))))
        return read(jaxpr.outvars)

    def _equation(self, eqn, values):
        name = eqn.primitive.name
        if eqn.primitive is _operand_p:
            return [self._operand(eqn, values[0])]
        if name in _SAME:
            return values
        if name == "scan":
            return self._scan(eqn, values)
        inner = list(_subjaxprs(eqn.params))
        if name in _CALLS and len(inner) == 1:
            return self._call(inner[0], values)
        if inner:
            self._opaque(eqn, inner, values)
        if name in _PRODUCTS:
            _note(self.plain, values[:2])
        if name == "gather":
            _note(self.looked_up, values[:1])
        if name in _LAYOUTS and values[0] is not _DATA and values[0].view is not None:
            view = _LAYOUTS[name](eqn, values[0].view)
            if view is not None:
                return [values[0]._replace(view=view)]
        return [_joined(values, name)] * len(eqn.outvars)

    def _operand(self, eqn, value):
        if value is _DATA or not value.paths:
            return value
        use, axes = eqn.params["use"], eqn.params["axes"]
        operand = _Operand(use, axes, eqn.invars[0].aval.shape)
        for path in value.paths:
            self.operands.setdefault(path, []).append((operand, value))
        return value._replace(marked=True)

    # Calls and loops.

    def _call(self, jaxpr, values):
        constants = [_CONSTANT] * len(jaxpr.constvars)
        return self.jaxpr(jaxpr, constants + values[-len(jaxpr.invars) :])

    def _scan(self, eqn, values):
        program, first = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"]
        carried = slice(first, first + eqn.params["num_carry"])
        rows = [_row(value) for value in values[carried.stop :]]
        carry, constants = values[carried], [_CONSTANT] * len(program.constvars)
        while True:
            inputs = [*constants, *values[:first], *carry, *rows]
            outputs = _Walk().jaxpr(program, inputs)[: len(carry)]
            joined = [
                a if a == b else _joined((a, b), "scan") for a, b in zip(carry, outputs)
            ]
            if joined == carry:
                break
            carry = joined
        outputs = self.jaxpr(program, [*constants, *values[:first], *carry, *rows])
        stacked = [_joined([value], "scan") for value in outputs[len(carry) :]]
        return [*outputs[: len(carry)], *stacked]

    def _opaque(self, eqn, inner, values):
        """Looks for products in what else has programs inside."""
        name, params = eqn.primitive.name, eqn.params
        if name == "while":
            constants = [
                values[: params["cond_nconsts"]],
                values[params["cond_nconsts"] : -len(eqn.outvars)],
            ]
            # What is carried may become data.
            inputs = [each + [_DATA] * len(eqn.outvars) for each in constants]
        elif name == "cond":
            inputs = [values[1:] for _ in inner]
        else:  # its values may be parts: of a shard, of a block
            inputs = [[v if v is _DATA else _joined([v], name) for v in values]]
            inputs *= len(inner)
        for jaxpr, values in zip(inner, inputs):
            count = len(jaxpr.invars)
            values = values if count == len(values) else [_DATA] * count
            self.jaxpr(jaxpr, [_CONSTANT] * len(jaxpr.constvars) + values)


def _note(paths, values):
    """Adds the parameters among values that qwix does not quantize."""
    for value in values:
        if value is not _DATA and not value.marked:
            paths.update(dict.fromkeys(value.paths))


def _row(value):
    """One of a stack, as a scan has it."""
    if value is _DATA or value.view is None:
        return value
    return value._replace(view=value.view._replace(axes=value.view.axes[1:]))


def _subjaxprs(params):
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


# --- layouts: the view after an operation, or None if it is something else ------------


def _converted(eqn, view):
    return view._replace(dtypes=(*view.dtypes, np.dtype(eqn.params["new_dtype"])))


def _transposed(eqn, view):
    axes = tuple(view.axes[axis] for axis in eqn.params["permutation"])
    return view._replace(axes=axes)


def _squeezed(eqn, view):
    gone = eqn.params["dimensions"]
    axes = tuple(axes for place, axes in enumerate(view.axes) if place not in gone)
    return view._replace(axes=axes)


def _with_new_axes(eqn, view):
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if math.prod(shape) != math.prod(eqn.invars[0].aval.shape):
        return None
    own = dict(zip(places, view.axes))
    return view._replace(axes=tuple(own.get(i, ()) for i in range(len(shape))))


def _reshaped(eqn, view):
    if eqn.params["dimensions"] is not None:
        return None
    left = [axis for axes in view.axes for axis in axes]
    result = []
    for length in eqn.params["new_sizes"]:
        own: list[int] = []
        while left and math.prod(view.shape[axis] for axis in own) < length:
            own.append(left.pop(0))
        if math.prod(view.shape[axis] for axis in own) != length:
            return None
        result.append(tuple(own))
    return view._replace(axes=tuple(result))


def _sliced(eqn, view):
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    if any(step != 1 for step in eqn.params["strides"] or ()):
        return None
    sizes = [limit - start for start, limit in zip(starts, limits)]
    return _cut(view, sizes, eqn.invars[0].aval.shape)


def _sliced_somewhere(eqn, view):
    return _cut(view, eqn.params["slice_sizes"], eqn.invars[0].aval.shape)


def _cut(view, sizes, whole):
    """One of a stack: its axis is then none of the parameter's."""
    if any(size not in (1, n) for size, n in zip(sizes, whole)):
        return None
    axes = [own if size == n else () for own, size, n in zip(view.axes, sizes, whole)]
    return view._replace(axes=tuple(axes))


_LAYOUTS = {
    "convert_element_type": _converted,
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _with_new_axes,
    "reshape": _reshaped,
    "slice": _sliced,
    "dynamic_slice": _sliced_somewhere,
}
