"""GGUF blocks: the codes and scale of neighbours in the layout of the file."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays import packing
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.files import malformed
from cage_jax.export.gguf_files import Stored
from cage_jax.llama.folding import Array
from cage_jax.quantizers.file_presets import q4_0, q4_1, q8_0
from cage_jax.quantizers.formats import Float, Integer
from cage_jax.quantizers.presets import mxfp4
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scale_types import Narrow

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""The dtypes of types whose blocks are one number."""
_NAMES = {"float32": "F32", "float16": "F16"}


def _tq2_0(*, axis):
    """Returns the quantizer of TQ2_0, as ggml's `quantize_row_tq2_0_ref` has it."""
    scale_type = Narrow("float16", unrounded=True)
    format = Integer(2, ties="away")
    return Quantizer(format, axis=axis, group_size=256, scale_type=scale_type)


class _Blocks(NamedTuple):
    """A type with blocks of codes.

    Attributes:
      quantizer: makes the quantizer of the type from `axis`.
      size: codes in a block.
      layout: how codes are packed; None for a byte each.
      scale_last: whether the scale follows the codes.
    """

    quantizer: Callable[..., Quantizer]
    size: int = 32
    layout: packing.Layout | None = packing.GGUF_4BIT
    scale_last: bool = False


_BLOCKS = {
    "Q4_0": _Blocks(q4_0),
    "Q4_1": _Blocks(q4_1),
    "Q8_0": _Blocks(q8_0, layout=None),
    "MXFP4": _Blocks(mxfp4),
    "TQ2_0": _Blocks(_tq2_0, 256, packing.GGUF_TQ2_0, scale_last=True),
}
KINDS = tuple(_BLOCKS)
"""The names of the types that hold codes."""
WHAT_FITS = "q4_0, q4_1, q8_0 or mxfp4"
"""The presets whose codes they are, for errors."""


class Layout(NamedTuple):
    """Layout of an array in a file.

    Attributes:
      kind: name of the type, such as "Q4_0".
      shape: shape in the file, (out, in).
      row_bytes: bytes of one row.
    """

    kind: str
    shape: tuple[int, ...]
    row_bytes: int


def layout_of(array: Array, path: str, axis: int, float_dtype: str) -> Layout:
    """Finds the layout in which to write codes or floats.

    Args:
      array: the array.
      path: its path, for errors.
      axis: axis along which blocks run, the last one in the file.
      float_dtype: dtype of floats; vectors are always float32.

    Raises:
      ValueError: if no block type can hold the codes.
    """
    shape = array.shape[::-1] if axis == -2 else array.shape
    if not isinstance(array, QuantizedArray):
        kind = "F32" if len(shape) == 1 else _NAMES[float_dtype]
        return Layout(kind, shape, row_bytes(kind, shape))
    blocks = array.quantizer.blocks(array.shape)
    along = len(shape) == 2 and blocks.axes == (axis % 2,)
    codes_kind = kind_of(array, blocks.sizes[0]) if along else None
    if codes_kind is None:
        if len(shape) == 1:
            raise ValueError(
                f"`{path}`: norms must be floats in GGUF; got {array.quantizer}. Leave "
                f"it unquantized."
            )
        rotated = array.quantizer.hadamard is not None
        rotation = " and hadamard=None" if rotated else ""
        raise ValueError(
            f"`{path}`: codes for GGUF must be in blocks that it has, along axis "
            f"{axis} and without rotation; got {array.quantizer}. Quantize with "
            f"{WHAT_FITS} along axis {axis}{rotation}, or leave it unquantized."
        )
    return Layout(codes_kind, shape, row_bytes(codes_kind, shape))


def row_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a row of an array of this shape in a file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return shape[-1] // size * block_bytes


def file_type(layouts: Iterable[Layout]) -> int:
    """Returns the type of most numbers; llama.cpp shows it, no reader depends on it."""
    from gguf import LlamaFileType

    counts: dict[str, int] = {}
    for layout in layouts:
        counts[layout.kind] = counts.get(layout.kind, 0) + math.prod(layout.shape)
    kind = max(counts, key=counts.__getitem__)
    name = f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"
    # Some names have more at their end, such as MOSTLY_MXFP4_MOE.
    like = [each for each in LlamaFileType if each.name.startswith(name)]
    return int((*like, LlamaFileType.GUESSED)[0])


def kind_of(array: QuantizedArray, group: int) -> str | None:
    """Finds the type whose blocks hold codes and scales exactly, or None.

    Args:
      array: the codes.
      group: how many neighbours along a row of the file share a scale.
    """
    format, scale = array.quantizer.format, str(array.scale.dtype)
    if (
        array.quantizer.hadamard is not None
        or array.zero_point is not None
        or array.tensor_divisor is not None
    ):
        return None
    if format == Float("e2m1") and scale == "float8_e8m0fnu":
        return "MXFP4" if group == 32 and array.offset is None else None
    if not isinstance(format, Integer) or scale != "float16":
        return None
    if array.offset is not None:
        return "Q4_1" if (group, format.bits, format.signed) == (32, 4, False) else None
    if not format.signed:
        return None
    if group == 256 and format.bits == 2 and format.narrow:
        return "TQ2_0"
    if group != 32:
        return None
    return "Q4_0" if format.bits <= 4 else "Q8_0"


def rows_of(array: Array, path: str, layout: Layout, axis: int) -> np.ndarray:
    """Returns the bytes of an array in a file, uint8 of shape (rows, bytes of a row).

    Takes the arguments of `layout_of`, and its result as `layout`.

    Raises:
      ValueError: if floats are too large for float16.
    """
    if isinstance(array, QuantizedArray):
        turned = jax.tree.map(lambda part: part.T, array) if axis == -2 else array
        return block_rows(turned, layout.kind)
    values = np.asarray(array)
    values = np.atleast_2d(values.T if axis == -2 else values)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, DTYPES[layout.kind])
    if (np.isinf(stored) & np.isfinite(values)).any():
        raise ValueError(
            f"`{path}`: floats must be within the range of {stored.dtype}; got "
            f"{np.abs(values).max()}. Use float_dtype='float32'."
        )
    return stored.view(np.uint8)


def block_rows(array: QuantizedArray, kind: str) -> np.ndarray:
    """Returns the blocks of codes, uint8 of shape (rows, bytes of a row).

    Args:
      array: codes whose rows lie along the last axis, as in the file.
      kind: the type, as `kind_of` finds it.
    """
    layout = _BLOCKS[kind].layout
    codes = array.codes.reshape(-1, array.codes.shape[-1])
    if layout is None:
        codes = codes.astype(jnp.int8)
    else:
        if jnp.issubdtype(codes.dtype, jnp.integer):
            codes = codes.astype(f"int{layout.bits}")
        codes = _pack(codes, layout)
    heads = [array.scale] if array.offset is None else [array.scale, array.offset]
    heads = [head.reshape(len(codes), -1) for head in heads]
    groups = heads[0].shape[1]
    parts = [*heads, codes]
    if _BLOCKS[kind].scale_last:
        parts = parts[::-1]
    as_bytes = [np.ascontiguousarray(part).view(np.uint8) for part in parts]
    blocks = [part.reshape(len(codes), groups, -1) for part in as_bytes]
    return np.concatenate(blocks, axis=-1).reshape(len(codes), -1)


def array_of(stored: Stored, axis: int) -> Array:
    """Decodes a tensor of a file: to codes if a preset matches, otherwise to float32.

    Blocks run along `axis` of the result.

    Raises:
      MalformedFileError: if the type is not one of a model's weights.
    """

    def turned(part):
        return jnp.array(part.T if axis == -2 else part)

    if stored.kind in _BLOCKS and len(stored.shape) > 1:
        codes = _codes_of(stored, axis, turned)
        if codes is not None:
            return codes
    dtype = DTYPES.get(stored.kind, np.uint8)
    if jnp.issubdtype(dtype, jnp.floating):
        values = stored.data.view(dtype).reshape(stored.shape)
        return turned(values.astype(np.float32))
    from gguf import GGMLQuantizationType, quants

    rows = stored.data.reshape(*stored.shape[:-1], -1)
    try:
        with np.errstate(all="ignore"):
            values = quants.dequantize(rows, GGMLQuantizationType[stored.kind])
    except NotImplementedError as error:
        raise malformed(
            "the file must have types that the package gguf can decode",
            stored.kind,
            "Convert it to Q8_0 with llama.cpp's llama-quantize.",
        ) from error
    return turned(values.astype(np.float32))


def _codes_of(stored, axis, turned):
    """Decodes blocks of codes; None if some are no codes of the quantizer."""
    make, size, layout, scale_last = _BLOCKS[stored.kind]
    quantizer = make(axis=axis)
    dtype = quantizer.format.code_dtype
    blocks = stored.data.reshape(-1, row_bytes(stored.kind, (size,)))
    # Scales are as wide as the type says, and after them, or before, are the codes.
    scale = np.dtype(quantizer.scale_type.dtype)
    count = 2 if quantizer.scale.has_offset else 1
    cut = scale.itemsize * count
    heads, body = np.split(blocks, [cut], axis=1)
    if scale_last:
        body, heads = np.split(blocks, [-cut], axis=1)
    heads = np.ascontiguousarray(heads).view(scale)
    if layout is None:
        codes = body.view(np.int8)
    else:
        if stored.kind == "TQ2_0" and (body & body >> 1 & 0x55).any():
            return None  # a fourth code
        codes = np.asarray(_unpack(jnp.asarray(body), layout, dtype))
    scales = heads.T.reshape(count, *stored.shape[:-1], -1)
    return QuantizedArray(
        codes=turned(codes.reshape(stored.shape)),
        scale=turned(scales[0]),
        zero_point=None,
        offset=turned(scales[1]) if count == 2 else None,
        tensor_divisor=None,
        quantizer=quantizer,
        dtype=jnp.dtype(jnp.float32),
    )


# Jitted, because these take ten times as long op by op.
_pack = functools.partial(jax.jit, static_argnames="layout")(packing.pack)
_unpack = functools.partial(jax.jit, static_argnames=("layout", "dtype"))(
    packing.unpack
)
