"""A quantizer that calls qwix."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from qwix._src.core import qarray

from cage_jax.quantizers.codeless import CodelessQuantizer


class How(NamedTuple):
    """How qwix quantizes an array; hashable, unlike `qarray.HowToQuantize`."""

    qtype: Any
    calibration: str
    channelwise: tuple[int, ...]
    tiles: tuple[tuple[int, int | float], ...]

    @property
    def name(self) -> str:
        """Name of the dtype."""
        return self.qtype if isinstance(self.qtype, str) else np.dtype(self.qtype).name

    def quantize(self, x):
        """Quantizes an array with qwix to its codes and scales."""
        how = qarray.HowToQuantize(
            qtype=self.qtype,
            channelwise_axes=self.channelwise,
            tiled_axes=dict(self.tiles),
            calibration_method=self.calibration,
        )
        with _promotions_of_qwix():
            return qarray.quantize(x, how)

    def values(self, x):
        """Returns the values of `x` after qwix quantizes and dequantizes it."""
        quantized = self.quantize(x)
        with _promotions_of_qwix():
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


@contextlib.contextmanager
def _promotions_of_qwix():
    """Allows the promotions that qwix relies on and users may have turned off."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Step(NamedTuple):
    """One layout operation between a parameter and the array that qwix quantizes."""

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]


ROW = None  # the step from a stack to each of its rows, as in a scan


class Use(NamedTuple):
    """One quantization of an array by qwix.

    Attributes:
      how: how qwix quantizes the array.
      batch: `vmap` axes, which qwix does not see; the outermost first.
      steps: layout steps from the parameter to the array, each a `Step` or `ROW`; None
        if the array is more than a new layout of the parameter.
      changed: the operation that changed more than the layout, or None.
    """

    how: How
    batch: tuple[int, ...]
    steps: tuple[Any, ...] | None
    changed: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QwixQuantizer(CodelessQuantizer):
    """The quantizer of one parameter in a model trained with qwix.

    Attributes:
      use: how qwix quantizes the parameter, and in which layout.
      dtype: dtype of the parameter, in which qwix computes.
    """

    use: Use
    dtype: np.dtype

    def fake_quant(self, x):
        """Returns the values that qwix gives `x`."""
        how = self.use.how
        values = _in_layout(how.values, x.astype(self.dtype), self.use, back=True)
        kind = jnp.finfo(values.dtype)
        # A compiler may leave out the rounding to a narrow dtype if a cast follows.
        return lax.reduce_precision(values.astype(x.dtype), kind.nexp, kind.nmant)

    @property
    def bits(self):
        """Width of one of qwix's codes."""
        return int("".join(filter(str.isdigit, self.use.how.name))[0])

    @property
    def idempotent(self):
        """Whether quantizing normal numbers twice changes nothing."""
        return _is_idempotent(self.use.how)

    def storage_bits(self, shape, scale_dtype=jnp.float32):
        """Returns the number of bits of qwix's codes, scales and zero points."""
        made = jax.eval_shape(
            lambda x: _in_layout(self.use.how.quantize, x, self.use, back=False),
            jax.ShapeDtypeStruct(shape, self.dtype),
        )
        stored = [part for part in (made.scale, made.zero_point) if part is not None]
        bits = sum(8 * part.dtype.itemsize * part.size for part in stored)
        return self.bits * made.qvalue.size + bits

    def __str__(self):
        return str(self.use.how)


def _in_layout(function: Callable, x, use: Use, *, back: bool):
    """Lays `x` out as qwix sees it, and maps `function` over the parts.

    Args:
      function: a function of one array.
      x: the parameter.
      use: the layout.
      back: whether to return the results in the layout of `x`.
    """
    steps = use.steps
    assert steps is not None
    if ROW in steps:
        place = steps.index(ROW)
        inner = use._replace(steps=steps[place + 1 :])
        steps = steps[:place]
        function = jax.vmap(
            functools.partial(_in_layout, function, use=inner, back=back)
        )
    else:
        for axis in reversed(use.batch):
            function = jax.vmap(function, in_axes=axis, out_axes=axis)
    values = function(_laid_out(x, steps))
    if not back:
        return values
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
def _is_idempotent(how: How) -> bool:
    """Tests on random numbers whether quantizing twice changes nothing."""
    sizes = dict.fromkeys(how.channelwise, 4)
    for axis, size in how.tiles:
        sizes[axis] = 2 * size if isinstance(size, int) else 8 * round(1 / size)
    shape = [sizes.get(axis, 8) for axis in range(max([1, *sizes]) + 1)]
    x = np.random.default_rng(0).standard_normal(shape)
    with jax.ensure_compile_time_eval():
        values = jax.jit(how.values)
        once = values(jnp.asarray(x, jnp.float32))
        return bool(np.allclose(values(once), once, rtol=1e-3))
