"""Presets named after files: their values are those that the file holds, to the bit."""

from cage_jax.arrays.names import names_checked
from cage_jax.quantizers.axes import CONTRACTED, Axis
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scale_types import Full, Narrow
from cage_jax.quantizers.scales import AbsMax, MinMax, SignedMax


@names_checked
def q4_0(*, axis: Axis = CONTRACTED) -> Quantizer:
    """Returns the quantizer of GGUF's Q4_0: 4 bits in blocks of 32.

    The float16 scales may be negative.

    Args:
      axis: the contracted axis, along which the blocks lie.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.q4_0())
      int4 full range signed max, group 32, float16 scales, identity

    Source: ggml's `quantize_row_q4_0_ref`.
    """
    return _gguf(Integer(4, narrow=False, ties="up"), SignedMax(), axis)


@names_checked
def q4_1(*, axis: Axis = CONTRACTED) -> Quantizer:
    """Returns the quantizer of GGUF's Q4_1: 4 bits in blocks of 32 with a minimum.

    Scales and minima are float16.

    Args:
      axis: the contracted axis, along which the blocks lie.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.q4_1())
      uint4 minmax with an offset, group 32, float16 scales, identity

    Source: ggml's `quantize_row_q4_1_ref`.
    """
    format = Integer(4, narrow=False, signed=False, ties="up")
    return _gguf(format, MinMax(zero_point=False), axis)


@names_checked
def q8_0(*, axis: Axis = CONTRACTED) -> Quantizer:
    """Returns the quantizer of GGUF's Q8_0: 8 bits in blocks of 32, float16 scales.

    Args:
      axis: the contracted axis, along which the blocks lie.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.q8_0())
      int8 absmax, group 32, float16 scales, identity

    Source: ggml's `quantize_row_q8_0_ref`.
    """
    return _gguf(Integer(8, ties="away"), AbsMax(), axis)


def _gguf(format, scale, axis):
    scale_type = Narrow("float16", unrounded=True)
    return Quantizer(format, scale, axis=axis, group_size=32, scale_type=scale_type)


@names_checked
def ct_w4a16(
    *,
    axis: Axis = CONTRACTED,
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

    Raises:
      ValueError: if `scale_dtype` is none of these.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.ct_w4a16())
      int4 full range absmax, group 128, float16 scales, identity

    Source: compressed-tensors, format `pack-quantized`.
    """
    return _compressed_tensors(4, axis, group_size, symmetric, scale_dtype)


@names_checked
def ct_w8a8(*, axis: Axis = CONTRACTED, scale_dtype: str = "float16") -> Quantizer:
    """Returns the weight quantizer of compressed-tensors' W8A8: INT8 per channel.

    Args:
      axis: the contracted axis; the other axes have a scale for each channel.
      scale_dtype: as for `ct_w4a16`.

    Raises:
      ValueError: if `scale_dtype` is unknown.

    Example:
      >>> import cage_jax as cage
      >>> print(cage.ct_w8a8())
      int8 full range absmax, float16 scales, identity

    Source: compressed-tensors, INT8 of the scheme W8A8.
    """
    return _compressed_tensors(8, axis, None, True, scale_dtype)


def _compressed_tensors(bits, axis, group_size, symmetric, scale_dtype):
    return Quantizer(
        Integer(bits, narrow=False),
        AbsMax() if symmetric else MinMax(),
        axis=axis,
        group_size=group_size,
        scale_type=Full() if scale_dtype == "float32" else Narrow(scale_dtype),
    )
