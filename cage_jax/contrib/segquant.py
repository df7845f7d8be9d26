"""SegQuant: a scale for each sign of an input, and for each chunk of a fused layer."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.exact import clamp, divide, select
from cage_jax.arrays.names import names_checked
from cage_jax.core.quantize import fake_quant
from cage_jax.quantizers.axes import Axis
from cage_jax.quantizers.codeless import CodelessQuantizer
from cage_jax.quantizers.quantizer import Quantizer


class DualScaleCodes(NamedTuple):
    """Codes of an array, and the scales of its two signs.

    Attributes:
      codes: int8; those of negative values are negative.
      positive: scale of the codes above 0, one entry per group.
      negative: scale of the codes below 0, one entry per group.
    """

    codes: jax.Array
    positive: jax.Array
    negative: jax.Array

    def values(self) -> jax.Array:
        """Returns the values of the codes, in the dtype of the scales."""
        codes = self.codes.astype(self.positive.dtype)
        return codes * jnp.where(codes < 0, self.negative, self.positive)


@dataclasses.dataclass(frozen=True, repr=False)
class DualScale(CodelessQuantizer):
    """A quantizer with a scale for each sign; made by `dual_scale`."""

    width: int = 8

    def quantize(self, x: jax.Array) -> DualScaleCodes:
        """Returns the codes and scales of a float32 or float64 array."""
        axes = tuple(range(x.ndim)) if self.axis is None else self.axis
        most = 2 ** (self.width - 1)
        # A maximum with 0, rather than a selection by sign, keeps a NaN.
        positive = jnp.max(jnp.maximum(x, 0), axes, keepdims=True) / (most - 1)
        negative = jnp.max(jnp.maximum(-x, 0), axes, keepdims=True) / most
        scale = jnp.where(x < 0, negative, positive)
        position = divide(x, select(scale == 0, 1, scale))
        # NaN has code 0; the scale of its group is NaN.
        whole = select(jnp.isnan(position), 0, jnp.round(position))
        codes = clamp(whole, -most, most - 1).astype(jnp.int8)
        return DualScaleCodes(codes, positive, negative)

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """Returns the values of the codes of `x`."""
        return self.quantize(x).values()

    @property
    def bits(self) -> int:
        """Width of one code."""
        return self.width

    @property
    def idempotent(self) -> bool:
        """True: the largest value of each sign stays where it is."""
        return True

    def storage_bits(self, shape, scale_dtype=jnp.float32) -> int:
        """Counts the bits of all codes, and of two scales per group."""
        scales = 2 * math.prod(self.blocks(tuple(shape)).scale_shape)
        wide = 8 * jnp.dtype(scale_dtype).itemsize
        return self.width * math.prod(shape) + wide * scales

    def __str__(self):
        per = "per tensor" if self.axis is None else f"axis {self.axis}"
        return f"int{self.width} with a scale per sign, {per}"


@names_checked
def dual_scale(bits: int = 8, *, axis: Axis = None) -> DualScale:
    """Returns a quantizer with one scale for values above 0 and one for those below.

    Behind SiLU or GELU an input is never far below 0 and may be far above it, where one
    scale spends nearly half of its codes on nothing. Here the codes are

        x >= 0 ? round(x * qmax / max+) : round(x * |qmin| / max-)

    with `qmin = -2**(bits - 1)`, `qmax = -qmin - 1`, the largest value `max+`, and the
    largest size `max-` of a negative value, of each group. It is for inputs, the third
    entry of a rule. Its method `quantize` gives codes, int8, and both scales; a product
    with them is a product of the codes above 0 and one of those below. All values pass
    their gradient, and scales are constants. A side of zeros has scale 0. NaN makes its
    group NaN, infinity its side of the group.

    Args:
      bits: width of a code, 2 to 8.
      axis: the axes that share scales: None, one pair for all of the input, -1, a pair
        per token, or 0, a pair per feature.

    Returns:
      A quantizer for `Rules`.

    Raises:
      TypeError, ValueError: if `bits` is no whole number from 2 to 8.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> dual = contrib.dual_scale(4, axis=-1)
      >>> dual.quantize(jnp.array([[-0.16, -0.04, 0.0, 1.0, 7.0]])).codes
      Array([[-8, -2,  0,  1,  7]], dtype=int8)
      >>> rules = cage.Rules([(r"down/kernel", cage.int4(), dual)])

    Source: SegQuant, arXiv 2507.14811. Its code fixes both scales by calibration; here
    they are found in each input.
    """
    check_int("bits", bits, "Use 8 or 4.", least=2, most=8)
    return DualScale(axis=axis, width=bits)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, repr=False)
class Chunked(CodelessQuantizer):
    """A quantizer that is applied to each chunk of an axis; made by `chunked`."""

    _: dataclasses.KW_ONLY
    inner: Quantizer
    boundaries: tuple[int, ...]
    chunk_axis: int

    def fake_quant(self, x: jax.Array) -> jax.Array:
        """Returns the quantized chunks of `x`, joined."""
        inner = dataclasses.replace(self.inner, axis=self.axis)
        parts = jnp.split(x, self._within(x.shape), self.chunk_axis)
        return jnp.concatenate([fake_quant(x, inner) for x in parts], self.chunk_axis)

    def _within(self, shape):
        length = shape[self.chunk_axis]
        if self.boundaries[-1] >= length:
            raise ValueError(
                f"`boundaries` must be below the length of axis {self.chunk_axis}; got "
                f"{self.boundaries}, shape {shape}. Name the place where each chunk "
                f"after the first begins."
            )
        return self.boundaries

    @property
    def bits(self) -> int:
        """Width of one code."""
        return self.inner.bits

    @property
    def idempotent(self) -> bool:
        """Whether the quantizer of the chunks is."""
        return self.inner.idempotent

    def storage_bits(self, shape, scale_dtype=jnp.float32) -> int:
        """Counts the bits that store all chunks."""
        inner = dataclasses.replace(self.inner, axis=self.axis)
        ends = 0, *self._within(shape), shape[self.chunk_axis]
        total, part = 0, list(shape)
        for start, end in itertools.pairwise(ends):
            part[self.chunk_axis] = end - start
            total += inner.storage_bits(tuple(part), scale_dtype)
        return total

    def __str__(self):
        return f"{self.inner} in chunks at {self.boundaries} of axis {self.chunk_axis}"


@names_checked
def chunked(
    quantizer: Quantizer, boundaries: tuple[int, ...], *, axis: int = -1
) -> Quantizer:
    """Returns a quantizer that gives each chunk of an axis scales of its own.

    A fused layer computes several things at once, such as queries, keys and values, or
    the shifts, scales and gates of a modulation. One scale for all of them suits the
    largest. Chunks of the outputs are those of its kernel's last axis. Chunks of the
    inputs are those of the kernel's axis -2, and of the last axis of the input.

    Args:
      quantizer: quantizes each chunk, and passes all gradients. With scales along the
        axis, or one for the whole array, each chunk gets its own.
      boundaries: the places where the chunks after the first begin, ascending.
      axis: the axis that is divided, -1 for the last.

    Returns:
      A quantizer for `Rules`, for weights or inputs. It has no codes of its own: ship
      the chunks as arrays of their own, with `quantize(chunk, quantizer)`.

    Raises:
      ValueError: for boundaries that do not ascend from above 0, or do not lie within
        an array; for a quantizer that masks gradients or needs a grid.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> fused = jnp.array([[7.0, 3.2, 0.07, 0.032]])
      >>> print(cage.fake_quant(fused, cage.int4(axis=None)))
      [[7. 3. 0. 0.]]
      >>> print(cage.fake_quant(fused, contrib.chunked(cage.int4(axis=None), (2,))))
      [[7.   3.   0.07 0.03]]

    Source: SegLinear of SegQuant, arXiv 2507.14811.
    """
    ascending = all(a < b for a, b in itertools.pairwise((0, *boundaries)))
    if not boundaries or not ascending:
        raise ValueError(
            f"`boundaries` must ascend from above 0; got {boundaries}. Use (64, 128) "
            f"for three chunks of 64."
        )
    if quantizer.gradient != "identity" or quantizer.scale.needs_grid:
        raise ValueError(
            f"`quantizer` must pass all gradients and find its scales; got {quantizer}."
            f" Use int4(axis=None), for example."
        )
    return Chunked(
        axis=quantizer.axis,  # type: ignore[arg-type]
        inner=quantizer,
        boundaries=tuple(boundaries),
        chunk_axis=axis,
    )
