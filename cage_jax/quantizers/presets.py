"""Presets: named quantizers. Those named after files are in `file_presets`."""

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from cage_jax.arrays.checks import check_choice, check_int
from cage_jax.arrays.names import names_checked
from cage_jax.quantizers.axes import CONTRACTED, Axis
from cage_jax.quantizers.formats import (
    NF4,
    Float,
    FloatName,
    Format,
    Integer,
    MidRise,
)
from cage_jax.quantizers.quantizer import Gradient, Quantizer
from cage_jax.quantizers.scale_types import Float8, PowerOfTwo, PowerRounding
from cage_jax.quantizers.scales import (
    AbsMax,
    AbsMean,
    Gaussian,
    Learned,
    MinMax,
    ScaleRule,
)

P = ParamSpec("P")

# --- integers -------------------------------------------------------------------------

_INTEGER_PRESET = """Returns the quantizer of integers of {bits} bits.

Args:
  axis: the axes that share a scale; None for one scale per tensor. See `Quantizer`.
  group_size: how many neighbours along `axis` share a scale; None for all.
  symmetric: without a zero point. False widens the group's range to hold zero and
    spreads all codes over it.
  narrow: leave out the code {low}; by default for symmetric grids, which are idempotent
    then.
  scale: another rule than absmax (symmetric) or minmax (asymmetric).
  hadamard: block of the rotation along `axis`, or None.
  gradient: what passes straight through; by default "clip" where the scale cuts values
    off and "identity" where it cannot.

Raises:
  TypeError, ValueError: for arguments that do not fit together.

Example:
  >>> import cage_jax as cage
  >>> print(cage.int{bits}(group_size=32))
  int{bits} absmax, group 32, identity
"""


def _integers(
    bits: int,
    *,
    axis: Axis = CONTRACTED,
    group_size: int | tuple[int | None, ...] | None = None,
    symmetric: bool = True,
    narrow: bool | None = None,
    scale: ScaleRule | None = None,
    hadamard: int | None = None,
    gradient: Gradient | None = None,
) -> Quantizer:
    if not symmetric and narrow:
        raise ValueError(
            "`narrow` has no meaning for an asymmetric grid; got symmetric=False, "
            "narrow=True. Leave `narrow` out."
        )
    format = Integer(bits, symmetric if narrow is None else narrow)
    if scale is None:
        scale = AbsMax() if symmetric else MinMax()
    elif isinstance(scale, ScaleRule) and scale.asymmetric == symmetric:
        raise ValueError(
            f"`scale` and `symmetric` must agree; got scale={scale}, symmetric="
            f"{symmetric}. Leave one of them out."
        )
    if gradient is None:
        gradient = _gradient_for(scale, format)
    return Quantizer(
        format,
        scale,
        axis=axis,
        group_size=group_size,
        hadamard=hadamard,
        gradient=gradient,
    )


def _gradient_for(scale: ScaleRule, format: Format) -> Gradient:
    clips = isinstance(scale, ScaleRule) and scale.clips(format)
    return "clip" if clips else "identity"


def _with_bits(
    make: Callable[Concatenate[int, P], Quantizer], bits: int
) -> Callable[P, Quantizer]:
    def preset(*args: P.args, **kwargs: P.kwargs) -> Quantizer:
        return make(bits, *args, **kwargs)

    preset.__name__ = preset.__qualname__ = f"int{bits}"
    preset.__doc__ = _INTEGER_PRESET.format(bits=bits, low=-(2 ** (bits - 1)))
    preset.__signature__ = inspect.signature(functools.partial(make, bits))  # type: ignore[attr-defined]
    return names_checked(preset)


int2 = _with_bits(_integers, 2)
int3 = _with_bits(_integers, 3)
int4 = _with_bits(_integers, 4)
int8 = _with_bits(_integers, 8)


@names_checked
def lsq(
    bits: int = 4,
    *,
    axis: Axis = None,
    group_size: int | None = None,
    offset: bool = False,
    narrow: bool = False,
    start: ScaleRule | None = None,
) -> Quantizer:
    """Returns a quantizer with learned scales: LSQ, or LSQ+ with an offset.

    The scales are stored beside the weights; `with_grids(params, rules)` adds them to
    the parameters. Only values within the grid receive a gradient.

    Args:
      bits: 2 to 8.
      axis: the axes that share a scale; None for one scale per tensor, as in the paper.
      group_size: how many neighbours along `axis` share a scale; None for all.
      offset: learn an offset too, for values that lie on one side of zero.
      narrow: leave out the lowest code; of 2 bits this is the ternary grid.
      start: the rule whose scales are the first ones, such as `Searched()`; None for
        those of the papers.

    Raises:
      ValueError: if `bits` is out of range, or for `narrow` or `start` with an offset.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.lsq(3))
      int3 full range learned, per tensor, clip

    Source: LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576.
    """
    format = Integer(bits, narrow, signed=not offset)
    scale = Learned(offset, start)
    return Quantizer(format, scale, axis=axis, group_size=group_size, gradient="clip")


@names_checked
def seq(
    levels: int = 4, *, axis: Axis = CONTRACTED, group_size: int | None = None
) -> Quantizer:
    """Returns ParetoQ's quantizer of 2 bits or ternary weights, with learned scales.

    Levels lie evenly between -a and a, half a step from the ends: -0.75, -0.25, 0.25
    and 0.75 times `a`, or -2/3, 0 and 2/3. `a` starts at the largest magnitude, and
    values up to `a` receive a gradient. Scales are trained as those of `lsq`; ParetoQ
    trains `a`, which is the scale times half the number of levels. Its code takes the
    ternary weights beyond `a` for `a` in the gradient of `a`; here they are 2/3 of it.

    Args:
      levels: 4, or 3 for ternary weights.
      axis: the axes that share a scale; None for one scale per tensor. See `Quantizer`.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Raises:
      ValueError: if `levels` is another number.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.seq())
      midrise2 learned from absmax clip 0.75, trust

    Source: ParetoQ, arXiv 2502.02631, section 4.
    """
    check_int("levels", levels, "Use lsq(bits) for more levels.", least=3, most=4)
    format = Integer(2) if levels == 3 else MidRise(2)
    start = AbsMax(format.half_range / (format.high + format.edge))
    return Quantizer(
        format, Learned(start=start), axis=axis, group_size=group_size, gradient="trust"
    )


@names_checked
def ternary(*, axis: Axis = None, group_size: int | None = None) -> Quantizer:
    """Returns the ternary quantizer: -s, 0 or s, where `s` is the mean of |x|.

    It is not idempotent: see `freeze_scale` of `coupled`.

    Args:
      axis: the axes that share a scale; None for one scale per tensor, as in BitNet.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.ternary())
      int2 absmean, per tensor, identity

    Source: BitNet b1.58, arXiv 2402.17764, equations 1 to 3.
    """
    return Quantizer(Integer(2), AbsMean(), axis=axis, group_size=group_size)


# --- without a zero -------------------------------------------------------------------


@names_checked
def quest(
    bits: int,
    *,
    axis: Axis = CONTRACTED,
    group_size: int | None = None,
    hadamard: int | None = 128,
    gradient: Gradient = "clip",
) -> Quantizer:
    """Returns the quantizer of QuEST and of the CAGE paper.

    It rotates the contracted axis by a block-Hadamard matrix, scales by `c * rms` with
    the MSE-optimal `c` for a unit Gaussian, rounds to the mid-rise grid (2**bits
    levels, no zero) and rotates back. It is not idempotent: see `freeze_scale` of
    `coupled`.

    Args:
      bits: 1 to 8.
      axis: the contracted axis, which is rotated and shares a scale: -2 for a Dense
        kernel (one scale per output channel), -1 for activations (one per token).
      group_size: how many neighbours along `axis` share a scale; None for all.
      hadamard: block size of the rotation; None for no rotation.
      gradient: "clip" as in the CAGE paper, or "trust" as in QuEST.

    Raises:
      TypeError, ValueError: if `bits` is out of range, or `hadamard` is not a power of
        two.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.quest(4))
      midrise4 gaussian, hadamard 128, clip

    Source: QuEST, arXiv 2502.05003, section 3; CAGE, arXiv 2510.18784.
    """
    return Quantizer(
        MidRise(bits),
        Gaussian(),
        axis=axis,
        group_size=group_size,
        hadamard=hadamard,
        gradient=gradient,
    )


@names_checked
def binary(*, axis: Axis = CONTRACTED, group_size: int | None = None) -> Quantizer:
    """Returns the binary quantizer: -s or s, where `s` is the mean of |x|.

    Args:
      axis: the axes that share a scale; None for one scale per tensor. See `Quantizer`.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.binary())
      midrise1 absmean, identity

    Source: XNOR-Net, arXiv 1603.05279, section 3.1.
    """
    return Quantizer(MidRise(1), AbsMean(), axis=axis, group_size=group_size)


# --- floating point -------------------------------------------------------------------


@names_checked
def fp8(
    name: FloatName = "e4m3", *, axis: Axis = CONTRACTED, group_size: int | None = None
) -> Quantizer:
    """Returns the FP8 quantizer: one float32 scale per output channel.

    The scale maps the largest magnitude to the largest value of the format: 448 for
    E4M3.

    Args:
      name: "e4m3", or "e5m2" for a wider range and less precision.
      axis: the axes that share a scale; None for one scale per tensor. See `Quantizer`.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Raises:
      ValueError: if `name` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.fp8())
      fp8 e4m3 absmax, identity

    Source: Micikevicius et al., arXiv 2209.05433.
    """
    check_choice("name", name, ("e4m3", "e5m2"))
    return Quantizer(Float(name), AbsMax(), axis=axis, group_size=group_size)


@names_checked
def mxfp8(
    name: FloatName = "e4m3",
    *,
    axis: Axis = CONTRACTED,
    rounding: PowerRounding = "down",
    scale: ScaleRule | None = None,
) -> Quantizer:
    """Returns the MXFP8 quantizer: FP8 in blocks of 32 with a power-of-two scale.

    Args:
      name: "e4m3" or "e5m2".
      axis: the contracted axis, along which the blocks lie.
      rounding: how the scale's exponent is rounded; see
        `cage_jax.scale_types.PowerOfTwo`.
      scale: another rule than absmax, such as `Learned()`.

    Raises:
      ValueError: if `name` or `rounding` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.mxfp8())
      fp8 e4m3 absmax, group 32, e8m0 scales down, identity

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    check_choice("name", name, ("e4m3", "e5m2"))
    return _blocks(name, axis, 32, PowerOfTwo(rounding), scale)


@names_checked
def mxfp6(
    name: FloatName = "e2m3",
    *,
    axis: Axis = CONTRACTED,
    rounding: PowerRounding = "down",
    scale: ScaleRule | None = None,
) -> Quantizer:
    """Returns the MXFP6 quantizer: FP6 in blocks of 32 with a power-of-two scale.

    Args:
      name: "e2m3" or "e3m2".
      axis, rounding, scale: as for `mxfp8`.

    Raises:
      ValueError: if `name` or `rounding` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.mxfp6("e3m2"))
      fp6 e3m2 absmax, group 32, e8m0 scales down, identity

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    check_choice("name", name, ("e2m3", "e3m2"))
    return _blocks(name, axis, 32, PowerOfTwo(rounding), scale)


@names_checked
def mxfp4(
    *,
    axis: Axis = CONTRACTED,
    rounding: PowerRounding = "down",
    scale: ScaleRule | None = None,
) -> Quantizer:
    """Returns the MXFP4 quantizer: FP4 in blocks of 32 with a power-of-two scale.

    Args:
      axis, rounding, scale: as for `mxfp8`.

    Raises:
      ValueError: if `rounding` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.mxfp4())
      fp4 e2m1 absmax, group 32, e8m0 scales down, identity

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    return _blocks("e2m1", axis, 32, PowerOfTwo(rounding), scale)


def _blocks(name, axis, size, scale_type, scale):
    format = Float(name)
    scale = AbsMax() if scale is None else scale
    return Quantizer(
        format,
        scale,
        axis=axis,
        group_size=size,
        scale_type=scale_type,
        gradient=_gradient_for(scale, format),
    )


@names_checked
def nvfp4(
    *,
    axis: Axis = CONTRACTED,
    tensor_divisor: bool = True,
    scale: ScaleRule | None = None,
) -> Quantizer:
    """Returns the NVFP4 quantizer: FP4 in blocks of 16 with E4M3 scales.

    The scales of a tensor share one more float32 scale.

    Args:
      axis: the contracted axis, along which the blocks lie.
      tensor_divisor: False for E4M3 scales alone, as in qwix.
      scale: another rule than absmax, such as `FourOverSix()` or
        `Learned(start=Searched())`.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.nvfp4())
      fp4 e2m1 absmax, group 16, e4m3 scales and one a tensor, identity

    Source: NVIDIA's NVFP4; the values agree with compressed-tensors.
    """
    return _blocks("e2m1", axis, 16, Float8(tensor_divisor), scale)


# --- codebooks ------------------------------------------------------------------------


@names_checked
def nf4(*, axis: Axis = CONTRACTED, group_size: int | None = 64) -> Quantizer:
    """Returns the NF4 quantizer: 16 quantiles of a normal distribution.

    The scale is the largest magnitude of each group.

    Args:
      axis: the axes that share a scale; None for one scale per tensor. See `Quantizer`.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.nf4())
      nf4 absmax, group 64, identity

    Source: QLoRA, arXiv 2305.14314, appendix E.
    """
    group_size = None if axis is None else group_size
    return Quantizer(NF4, AbsMax(), axis=axis, group_size=group_size)
