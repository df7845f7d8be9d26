"""GGUF blocks: the codes and scale of 32 neighbours in the layout of the file."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.packing import GGUF_4BIT, pack, unpack
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.files import malformed
from cage_jax.export.gguf_files import Stored
from cage_jax.llama.folding import Array
from cage_jax.quantizers.file_presets import q4_0, q4_1, q8_0
from cage_jax.quantizers.formats import Integer

_BLOCK = 32
_PRESETS = {"Q4_0": q4_0, "Q4_1": q4_1, "Q8_0": q8_0}
_FLOATS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {"float32": "F32", "float16": "F16"}


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
        return Layout(kind, shape, shape[-1] * _FLOATS[kind].itemsize)
    kind = _kind(array, axis)
    if kind is None:
        if len(shape) == 1:
            raise ValueError(
                f"`{path}`: norms must be floats in GGUF; got {array.quantizer}. Leave "
                f"it unquantized."
            )
        rotated = array.quantizer.hadamard is not None
        rotation = " and hadamard=None" if rotated else ""
        raise ValueError(
            f"`{path}`: codes for GGUF must be integers in blocks of {_BLOCK} along "
            f"axis {axis}, with float16 scales and no rotation; got {array.quantizer}. "
            f"Quantize with q4_0, q4_1 or q8_0 along axis {axis}{rotation}, or leave "
            f"it unquantized."
        )
    block_bytes = _PRESETS[kind]().storage_bits((_BLOCK, 1)) // 8
    return Layout(kind, shape, shape[-1] // _BLOCK * block_bytes)


def _kind(array, axis):
    """Finds the type whose blocks hold the codes and scales exactly, or None."""
    quantizer, format = array.quantizer, array.quantizer.format
    if (
        len(array.shape) != 2
        or not isinstance(format, Integer)
        or quantizer.hadamard is not None
        or array.zero_point is not None
        or array.tensor_divisor is not None
        or array.scale.dtype != jnp.float16
        or quantizer.blocks(array.shape).by_axis != {axis % 2: _BLOCK}
    ):
        return None
    if array.offset is not None:
        return "Q4_1" if format.bits == 4 and not format.signed else None
    if not format.signed:
        return None
    return "Q4_0" if format.bits <= 4 else "Q8_0"


def rows_of(array: Array, path: str, layout: Layout, axis: int) -> np.ndarray:
    """Returns the bytes of an array in a file, uint8 of shape (rows, bytes of a row).

    Takes the arguments of `layout_of`, and its result as `layout`.

    Raises:
      ValueError: if floats are too large for float16.
    """

    def turned(part):
        return part.T if axis == -2 else part

    if not isinstance(array, QuantizedArray):
        values = np.atleast_2d(turned(np.asarray(array)))
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, _FLOATS[layout.kind])
        if (np.isinf(stored) & np.isfinite(values)).any():
            raise ValueError(
                f"`{path}`: floats must be within the range of {stored.dtype}; got "
                f"{np.abs(values).max()}. Use float_dtype='float32'."
            )
        return stored.view(np.uint8)
    codes = turned(array.codes)
    if layout.kind == "Q8_0":
        body = np.asarray(codes.astype(jnp.int8)).view(np.uint8)
    else:
        body = np.asarray(_packed(codes))
    heads = [array.scale] if array.offset is None else [array.scale, array.offset]
    rows, groups = turned(array.scale).shape
    parts = [
        np.ascontiguousarray(turned(np.asarray(head)), "<f2").view(np.uint8)
        for head in heads
    ]
    parts = [part.reshape(rows, groups, -1) for part in [*parts, body]]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def array_of(stored: Stored, axis: int) -> Array:
    """Decodes a tensor of a file: to codes if a preset matches, otherwise to float32.

    Blocks run along `axis` of the result.

    Raises:
      MalformedFileError: if the type is not one of a model's weights.
    """

    def turned(part):
        return jnp.array(part.T if axis == -2 else part)

    if stored.kind in _PRESETS and len(stored.shape) == 2:
        return _codes_of(stored, axis, turned)
    if stored.kind in _FLOATS:
        values = stored.data.view(_FLOATS[stored.kind]).reshape(stored.shape)
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
    rows, length = stored.shape
    quantizer = _PRESETS[stored.kind](axis=axis)
    blocks = stored.data.reshape(rows, length // _BLOCK, -1)

    def half(begin):
        part = np.ascontiguousarray(blocks[..., begin : begin + 2])
        return turned(part.view("<f2")[..., 0])

    if stored.kind == "Q8_0":
        codes = turned(blocks[..., 2:].view(np.int8).reshape(stored.shape))
    else:
        words = jnp.asarray(blocks[..., -_BLOCK // 2 :].reshape(rows, length // 2))
        codes = turned(_unpacked(words))
    return QuantizedArray(
        codes=codes,
        scale=half(0),
        zero_point=None,
        offset=half(2) if quantizer.scale.has_offset else None,
        tensor_divisor=None,
        quantizer=quantizer,
        dtype=jnp.dtype(jnp.float32),
    )


# Jitted, because these take ten times as long op by op.
@jax.jit
def _packed(codes):
    return pack(codes.astype(jnp.int4), GGUF_4BIT)


@jax.jit
def _unpacked(words):
    return unpack(words, GGUF_4BIT, jnp.int4)
