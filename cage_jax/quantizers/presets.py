"""Presets: named quantizers."""

from cage_jax.quantizers.formats import NF4, Float, FloatName, Integer, MidRise
from cage_jax.quantizers.quantizer import Gradient, Quantizer
from cage_jax.quantizers.scale_types import (
    Float8,
    Full,
    Narrow,
    PowerOfTwo,
    PowerRounding,
)
from cage_jax.quantizers.scales import (
    AbsMax,
    AbsMean,
    Gaussian,
    Learned,
    MinMax,
    ScaleRule,
    SignedMax,
)

Axis = int | tuple[int, ...] | None


def _integer(bits, axis, group_size, symmetric, narrow, scale, hadamard, gradient):
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
        clips = isinstance(scale, ScaleRule) and scale.clips(format)
        gradient = "clip" if clips else "identity"
    return Quantizer(
        format,
        scale,
        axis=axis,
        group_size=group_size,
        hadamard=hadamard,
        gradient=gradient,
    )


def _integer_preset(bits: int):
    def preset(
        *,
        axis: int | tuple[int, ...] | None = -2,
        group_size: int | tuple[int | None, ...] | None = None,
        symmetric: bool = True,
        narrow: bool | None = None,
        scale: ScaleRule | None = None,
        hadamard: int | None = None,
        gradient: Gradient | None = None,
    ) -> Quantizer:
        return _integer(
            bits, axis, group_size, symmetric, narrow, scale, hadamard, gradient
        )

    low = -(2 ** (bits - 1))
    preset.__name__ = preset.__qualname__ = f"int{bits}"
    preset.__doc__ = f"""Integers of {bits} bits; scale by the largest magnitude.

    Args:
      axis: the axes that share a scale; None for one scale per tensor.
      group_size: how many neighbours along `axis` share a scale; None for all.
      symmetric: without a zero point. False widens the group's range to hold zero
        and spreads all {2**bits} codes over it.
      narrow: codes {low + 1}..{-low - 1} instead of {low}..{-low - 1}; by default for
        symmetric grids, which are idempotent then.
      scale: another rule than absmax (symmetric) or minmax (asymmetric).
      hadamard: block of the rotation along `axis`, or None.
      gradient: what passes straight through; by default "clip" where the scale cuts
        values off and "identity" where it cannot.

    Returns:
      A `Quantizer`.

    Raises:
      TypeError, ValueError: for arguments that do not fit together.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.int{bits}(group_size=32))
      int{bits} absmax, group 32 of axis -2, identity
    """
    return preset


int2 = _integer_preset(2)
int3 = _integer_preset(3)
int4 = _integer_preset(4)
int8 = _integer_preset(8)


def quest(
    bits: int,
    *,
    axis: int = -2,
    group_size: int | None = None,
    hadamard: int | None = 128,
    gradient: Gradient = "clip",
) -> Quantizer:
    """Returns the quantizer of QuEST and of the CAGE paper.

    It rotates the contracted axis by a block-Hadamard matrix, scales by `c * rms` with
    the MSE-optimal `c` for a unit Gaussian, rounds to the mid-rise grid (2**bits
    levels, no zero) and rotates back.

    Args:
      bits: 1 to 8.
      axis: the contracted axis, which is rotated and shares a scale: -2 for a Dense
        kernel (one scale per output channel), -1 for activations (one per token).
      group_size: how many neighbours along `axis` share a scale; None for all.
      hadamard: block size of the rotation; None for no rotation.
      gradient: "clip" as in the CAGE paper, or "trust" as in QuEST.

    Returns:
      A `Quantizer`. It is not idempotent: see `freeze_scale` of `cage`.

    Raises:
      TypeError, ValueError: if `bits` is out of range, or `hadamard` is not a power of
        two.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.quest(4))
      midrise4 gaussian, axis -2, hadamard 128, clip

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


# --- floating point -------------------------------------------------------------------


def fp8(
    name: FloatName = "e4m3", *, axis: Axis = -2, group_size: int | None = None
) -> Quantizer:
    """Returns the FP8 quantizer: one float32 scale per output channel.

    The scale maps the largest magnitude to the largest value of the format: 448 for
    E4M3.

    Args:
      name: "e4m3", or "e5m2" for a wider range and less precision.
      axis: the axes that share a scale; None for one scale per tensor.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Returns:
      A `Quantizer`.

    Raises:
      ValueError: if `name` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.fp8())
      fp8 e4m3 absmax, axis -2, identity

    Source: Micikevicius et al., arXiv 2209.05433.
    """
    _check_name(name, ("e4m3", "e5m2"), "fp8")
    return Quantizer(Float(name), AbsMax(), axis=axis, group_size=group_size)


def mxfp8(
    name: FloatName = "e4m3", *, axis: int = -2, rounding: PowerRounding = "down"
) -> Quantizer:
    """Returns the MXFP8 quantizer: FP8 in blocks of 32 with a power-of-two scale.

    Args:
      name: "e4m3" or "e5m2".
      axis: the contracted axis, along which the blocks lie.
      rounding: how the scale's exponent is rounded; see
        `cage_jax.scale_types.PowerOfTwo`.

    Returns:
      A `Quantizer`.

    Raises:
      ValueError: if `name` or `rounding` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.mxfp8())
      fp8 e4m3 absmax, group 32 of axis -2, e8m0 scales down, identity

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    _check_name(name, ("e4m3", "e5m2"), "mxfp8")
    return _microscaling(name, axis, rounding)


def mxfp6(
    name: FloatName = "e2m3", *, axis: int = -2, rounding: PowerRounding = "down"
) -> Quantizer:
    """Returns the MXFP6 quantizer: FP6 in blocks of 32 with a power-of-two scale.

    Args:
      name: "e2m3" or "e3m2".
      axis: the contracted axis, along which the blocks lie.
      rounding: how the scale's exponent is rounded; see
        `cage_jax.scale_types.PowerOfTwo`.

    Returns:
      A `Quantizer`.

    Raises:
      ValueError: if `name` or `rounding` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.mxfp6("e3m2"))
      fp6 e3m2 absmax, group 32 of axis -2, e8m0 scales down, identity

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    _check_name(name, ("e2m3", "e3m2"), "mxfp6")
    return _microscaling(name, axis, rounding)


def mxfp4(*, axis: int = -2, rounding: PowerRounding = "down") -> Quantizer:
    """Returns the MXFP4 quantizer: FP4 in blocks of 32 with a power-of-two scale.

    Args:
      axis: the contracted axis, along which the blocks lie.
      rounding: how the scale's exponent is rounded; see
        `cage_jax.scale_types.PowerOfTwo`.

    Returns:
      A `Quantizer`.

    Raises:
      ValueError: if `rounding` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.mxfp4())
      fp4 e2m1 absmax, group 32 of axis -2, e8m0 scales down, identity

    Source: OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    return _microscaling("e2m1", axis, rounding)


def _microscaling(name, axis, rounding):
    scale_type = PowerOfTwo(rounding)
    return Quantizer(
        Float(name), AbsMax(), axis=axis, group_size=32, scale_type=scale_type
    )


def nvfp4(*, axis: int = -2, tensor_divisor: bool = True) -> Quantizer:
    """Returns the NVFP4 quantizer: FP4 in blocks of 16 with E4M3 scales.

    The scales of a tensor share one more float32 scale.

    Args:
      axis: the contracted axis, along which the blocks lie.
      tensor_divisor: False for E4M3 scales alone, as in qwix.

    Returns:
      A `Quantizer`.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.nvfp4())
      fp4 e2m1 absmax, group 16 of axis -2, e4m3 scales and one a tensor, identity

    Source: NVIDIA's NVFP4; the values agree with compressed-tensors.
    """
    scale_type = Float8(tensor_divisor)
    return Quantizer(
        Float("e2m1"), AbsMax(), axis=axis, group_size=16, scale_type=scale_type
    )


# --- few levels -----------------------------------------------------------------------


def nf4(*, axis: Axis = -2, group_size: int | None = 64) -> Quantizer:
    """Returns the NF4 quantizer: 16 quantiles of a normal distribution.

    The scale is the largest magnitude of each group.

    Args:
      axis: the axes that share a scale; None for one scale per tensor.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Returns:
      A `Quantizer`.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.nf4())
      nf4 absmax, group 64 of axis -2, identity

    Source: QLoRA, arXiv 2305.14314, appendix E.
    """
    if axis is None:
        group_size = None
    return Quantizer(NF4, AbsMax(), axis=axis, group_size=group_size)


def ternary(*, axis: Axis = None, group_size: int | None = None) -> Quantizer:
    """Returns the ternary quantizer: -s, 0 or s, where `s` is the mean of |x|.

    Args:
      axis: the axes that share a scale; None for one scale per tensor, as in BitNet.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Returns:
      A `Quantizer`. It is not idempotent: see `freeze_scale` of `cage`.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.ternary())
      int2 absmean, per tensor, identity

    Source: BitNet b1.58, arXiv 2402.17764, equations 1 to 3.
    """
    return Quantizer(Integer(2), AbsMean(), axis=axis, group_size=group_size)


def binary(*, axis: Axis = -2, group_size: int | None = None) -> Quantizer:
    """Returns the binary quantizer: -s or s, where `s` is the mean of |x|.

    Args:
      axis: the axes that share a scale; None for one scale per tensor.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Returns:
      A `Quantizer`.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.binary())
      midrise1 absmean, axis -2, identity

    Source: XNOR-Net, arXiv 1603.05279, section 3.1.
    """
    return Quantizer(MidRise(1), AbsMean(), axis=axis, group_size=group_size)


# --- named after files ----------------------------------------------------------------


def q4_0(*, axis: int = -2) -> Quantizer:
    """Returns the quantizer of GGUF's Q4_0: 4 bits in blocks of 32.

    The float16 scales may be negative.

    Args:
      axis: the contracted axis, along which the blocks lie.

    Returns:
      A `Quantizer` with the values that the file holds, to the bit.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.q4_0())
      int4 full range signed max, group 32 of axis -2, float16 scales, identity

    Source: ggml's `quantize_row_q4_0_ref`.
    """
    format = Integer(4, narrow=False, ties="up")
    return _gguf(format, SignedMax(), axis)


def q4_1(*, axis: int = -2) -> Quantizer:
    """Returns the quantizer of GGUF's Q4_1: 4 bits, float16 scales and minima.

    Each block of 32 has a scale and a minimum.

    Args:
      axis: the contracted axis, along which the blocks lie.

    Returns:
      A `Quantizer` with the values that the file holds, to the bit.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.q4_1())
      uint4 minmax with an offset, group 32 of axis -2, float16 scales, identity

    Source: ggml's `quantize_row_q4_1_ref`.
    """
    format = Integer(4, narrow=False, signed=False, ties="up")
    return _gguf(format, MinMax(zero_point=False), axis)


def q8_0(*, axis: int = -2) -> Quantizer:
    """Returns the quantizer of GGUF's Q8_0: 8 bits in blocks of 32, float16 scales.

    Args:
      axis: the contracted axis, along which the blocks lie.

    Returns:
      A `Quantizer` with the values that the file holds, to the bit.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.q8_0())
      int8 absmax, group 32 of axis -2, float16 scales, identity

    Source: ggml's `quantize_row_q8_0_ref`.
    """
    return _gguf(Integer(8, ties="away"), AbsMax(), axis)


def _gguf(format, scale, axis):
    scale_type = Narrow("float16", unrounded=True)
    return Quantizer(format, scale, axis=axis, group_size=32, scale_type=scale_type)


def ct_w4a16(
    *,
    axis: int = -2,
    group_size: int | None = 128,
    symmetric: bool = True,
    scale_dtype: str = "float16",
) -> Quantizer:
    """Returns the quantizer of compressed-tensors' W4A16: INT4 in groups.

    transformers and vLLM read this format.

    Args:
      axis: the contracted axis, along which the groups lie.
      group_size: how many neighbours share a scale; None for one scale per channel.
      symmetric: whether to leave out the zero point.
      scale_dtype: dtype of the model in the file: "float16", "bfloat16" or "float32".

    Returns:
      A `Quantizer` with the values that the file holds, to the bit.

    Raises:
      ValueError: if `scale_dtype` is none of these.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.ct_w4a16())
      int4 full range absmax, group 128 of axis -2, float16 scales, identity

    Source: compressed-tensors, format `pack-quantized`.
    """
    return _compressed_tensors(4, axis, group_size, symmetric, scale_dtype)


def ct_w8a8(*, axis: int = -2, scale_dtype: str = "float16") -> Quantizer:
    """Returns the weight quantizer of compressed-tensors' W8A8: INT8 per channel.

    Each output channel has one scale.

    Args:
      axis: the contracted axis.
      scale_dtype: dtype of the model in the file: "float16", "bfloat16" or "float32".

    Returns:
      A `Quantizer` with the values that the file holds, to the bit.

    Raises:
      ValueError: if `scale_dtype` is none of these.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.ct_w8a8())
      int8 full range absmax, axis -2, float16 scales, identity

    Source: compressed-tensors, INT8 of the scheme W8A8.
    """
    return _compressed_tensors(8, axis, None, True, scale_dtype)


def _compressed_tensors(bits, axis, group_size, symmetric, scale_dtype):
    full = scale_dtype == "float32"
    return Quantizer(
        Integer(bits, narrow=False),
        AbsMax() if symmetric else MinMax(),
        axis=axis,
        group_size=group_size,
        scale_type=Full() if full else Narrow(scale_dtype),
    )


# --- learned --------------------------------------------------------------------------


def lsq(
    bits: int = 4,
    *,
    axis: Axis = None,
    group_size: int | None = None,
    offset: bool = False,
) -> Quantizer:
    """Returns a quantizer with learned scales: LSQ, or LSQ+ with an offset.

    The scales are stored beside the weights; `with_grids(params, rules)` adds them to
    the parameters.

    Args:
      bits: 2 to 8.
      axis: the axes that share a scale; None for one scale per tensor, as in the paper.
      group_size: how many neighbours along `axis` share a scale; None for all.
      offset: learn an offset too, for values that lie on one side of zero.

    Returns:
      A `Quantizer`. Only values within the grid receive a gradient.

    Raises:
      ValueError: if `bits` is out of range.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.lsq(3))
      int3 full range learned, per tensor, clip

    Source: LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576.
    """
    format = Integer(bits, narrow=False, signed=not offset)
    scale = Learned(offset)
    return Quantizer(format, scale, axis=axis, group_size=group_size, gradient="clip")


def _check_name(name, names, preset):
    if name not in names:
        raise ValueError(
            f"`name` must be one of {names} for {preset}; got {name!r}. Use "
            f"{names[0]!r}."
        )
