"""Codes of 2, 4 and 8 bits packed into words, in the orders that files use.

    import cage_jax as cage
    from cage_jax.arrays import packing

    codes = cage.quantize(kernel, cage.ct_w4a16()).codes.T  # (out, in)
    words = packing.pack(codes, packing.COMPRESSED_TENSORS)  # (out, in / 8), int32

The functions work under `jit` and `vmap` and along any axis of a stack. Sharded arrays
need no collective if each device has whole words.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.sharding import across_shards


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of codes in words.

    The lowest bits of a word hold its first code, and the next bits the code `stride`
    elements later in the array. Integers are stored with an offset, so that they are
    not negative, and floats as their bits.

    Args:
      word: dtype of a word.
      stride: distance in the array between neighbours in a word.
      bits: width of a code; None for the width of the codes' dtype.
      zero: the number that stores the integer 0; None for `2**(bits - 1)`.
      pads: whether an array may end within a word, which is then filled up with 0.
    """

    word: np.dtype
    stride: int = 1
    bits: int | None = None
    zero: int | None = None
    pads: bool = False


COMPRESSED_TENSORS = Layout(np.dtype(np.int32), pads=True)
"""`pack-quantized` of compressed-tensors, along the inputs of (out, in)."""
FP4 = Layout(np.dtype(np.uint8), bits=4)
"""E2M1 of MXFP4 and NVFP4 in safetensors, with two neighbours per byte."""
GGUF_4BIT = Layout(np.dtype(np.uint8), stride=16, bits=4)
"""Q4_0, Q4_1 and MXFP4 of GGUF, with 16 codes in the low halves of 16 bytes and the
next 16 in the high halves."""
GGUF_TQ2_0 = Layout(np.dtype(np.uint8), stride=32, bits=2, zero=1)
"""TQ2_0 of GGUF, with the codes -1, 0 and 1, four per byte, 32 elements apart."""


def pack(codes: jax.Array, layout: Layout, *, axis: int = -1) -> jax.Array:
    """Packs codes into words.

    Args:
      codes: int2, int4, int8, float4_e2m1fn or float8 of any shape, such as the codes
        of a `QuantizedArray`.
      layout: the order of the codes in the words.
      axis: the axis along which codes are packed.

    Returns:
      Words of dtype `layout.word`, with the shape of `codes` except along `axis`, where
      each word replaces the codes it holds.

    Raises:
      TypeError: if the codes have another dtype.
      ValueError: if `codes` lack the axis, or the axis has no whole number of words and
        the format does not pad.

    Example:
      >>> import jax.numpy as jnp
      >>> from cage_jax import packing
      >>> codes = jnp.array([[-8, -7, 0, 7, 1, 2, 3, 4]], jnp.int4)
      >>> packing.pack(codes, packing.COMPRESSED_TENSORS).tolist()
      [[-878053360]]
      >>> packing.pack(codes, packing.FP4)[0].tolist()
      [16, 248, 169, 203]
    """
    bits, count = _bits(codes.dtype, layout, "codes")
    axis = _axis(axis, codes, "codes")
    length, block = codes.shape[axis], count * layout.stride
    short = -length % block
    if short and not layout.pads:
        raise ValueError(
            f"`codes` must have a multiple of {block} along axis {axis}; got {length}, "
            f"shape {codes.shape}. Pack along the axis of the groups, or leave the "
            f"array unquantized: the format does not pad."
        )
    stored = _stored(codes, layout, bits)
    if short:
        stored = jnp.pad(stored, [(0, short * (i == axis)) for i in range(codes.ndim)])

    def together(stored):
        before, size, after = _around(stored, axis)
        split = (*before, -1, count, layout.stride, *after)

        def part(i):
            if layout.stride == 1:  # a TPU does slices in one pass, but not the other
                return lax.slice_in_dim(stored, i, None, stride=count, axis=axis)
            return lax.index_in_dim(stored.reshape(split), i, axis + 1, keepdims=False)

        words = part(0)
        for i in range(1, count):
            words = words | (part(i) << (bits * i))
        return words.reshape(*before, size // count, *after).astype(layout.word)

    return across_shards(together, stored, {axis: block})


def unpack(
    words: jax.Array,
    layout: Layout,
    dtype: jax.typing.DTypeLike,
    *,
    axis: int = -1,
    length: int | None = None,
) -> jax.Array:
    """Unpacks the codes that `pack` put into words.

    Args:
      words: words of dtype `layout.word`, of any shape.
      layout: the order of the codes in the words.
      dtype: dtype of the codes.
      axis: the axis along which codes were packed.
      length: number of codes along `axis`; None for all that the words hold.

    Raises:
      TypeError: if words or codes have another dtype.
      ValueError: if `words` lack the axis, or cannot hold `length` codes.

    Example:
      >>> import jax.numpy as jnp
      >>> from cage_jax import packing
      >>> codes = jnp.array([0.5, -6, 1, 3], jnp.float4_e2m1fn)
      >>> words = packing.pack(codes, packing.FP4)
      >>> packing.unpack(words, packing.FP4, codes.dtype).tolist()
      [0.5, -6.0, 1.0, 3.0]
    """
    words, dtype = jnp.asarray(words), jnp.dtype(dtype)
    if words.dtype != layout.word:
        raise TypeError(
            f"`words` must be {layout.word} in this layout; got {words.dtype}. Use "
            f"words.view({layout.word.name!r}) of the file's bytes."
        )
    bits, count = _bits(dtype, layout, "dtype")
    axis = _axis(axis, words, "words")
    held, block = words.shape[axis] * count, count * layout.stride
    length = held if length is None else length
    least = held - (block - 1) * layout.pads
    if not max(least, 0) <= length <= held or words.shape[axis] % layout.stride:
        raise ValueError(
            f"`length` must be the number of codes along axis {axis}, from {least} to "
            f"{held}, in whole blocks of {block} unless padded; got {length}, words of "
            f"shape {words.shape}. Use None for all of them."
        )

    def apart(words):
        before, size, after = _around(words, axis)
        words = words.reshape(*before, size // layout.stride, layout.stride, *after)
        split = (*before, size // layout.stride, count, layout.stride, *after)
        wide = jnp.expand_dims(words.astype(jnp.int32), axis + 1)
        wide = jnp.broadcast_to(wide, split)
        shifts = np.arange(count, dtype=np.int32) * bits
        shifts = shifts.reshape(count, *[1] * (1 + len(after)))
        shifts = jnp.broadcast_to(shifts, split)
        parts = lax.shift_right_logical(wide, shifts) & (2**bits - 1)
        return parts.reshape(*before, size * count, *after)

    codes = across_shards(apart, words, {axis: layout.stride})
    codes = lax.slice_in_dim(codes, 0, length, axis=axis)
    if jnp.issubdtype(dtype, jnp.floating):
        return lax.bitcast_convert_type(codes.astype(f"uint{bits}"), dtype)
    return (codes - _zero(layout, bits)).astype(jnp.int8).astype(dtype)


def _stored(codes, layout, bits):
    """Returns the bits of each code, int32."""
    if jnp.issubdtype(codes.dtype, jnp.floating):
        return lax.bitcast_convert_type(codes, f"uint{bits}").astype(jnp.int32)
    return codes.astype(jnp.int32) + _zero(layout, bits)


def _zero(layout, bits):
    return 2 ** (bits - 1) if layout.zero is None else layout.zero


def _around(x, axis):
    return x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]


def _axis(axis, x, name):
    remedy = f"Use an axis of `{name}`, of shape {x.shape}."
    check_int("axis", axis, remedy, least=-x.ndim, most=x.ndim - 1)
    return axis % x.ndim


def _bits(dtype, layout, name):
    """Returns the width of a code, and the number of codes in a word."""
    bits = 0
    if jnp.issubdtype(dtype, jnp.signedinteger):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    if bits not in (2, 4, 8) or layout.bits not in (None, bits):
        wanted = f"{layout.bits or '2, 4 or 8'} bits"
        raise TypeError(
            f"`{name}` must be signed integers or floats of {wanted} in this layout; "
            f"got {dtype}. Use the `codes` of a QuantizedArray, or their dtype."
        )
    return bits, 8 * layout.word.itemsize // bits


def pack_bits(numbers: Any, bits: int) -> Any:
    """Packs numbers of `bits` bits into bytes; zeros fill the last byte.

    Args:
      numbers: uint8 of shape (count,), below 2**bits; a NumPy or JAX array.
      bits: 1 to 8.

    Returns:
      uint8 of shape (ceil(count * bits / 8),), a NumPy or JAX array like `numbers`.

    Example:
      >>> import numpy as np
      >>> from cage_jax.arrays.packing import pack_bits, unpack_bits
      >>> data = pack_bits(np.array([1, 2, 7], np.uint8), 3)
      >>> [f"{byte:08b}" for byte in data], unpack_bits(data, 3, 3).tolist()
      (['11010001', '00000001'], [1, 2, 7])
    """
    count, width = _period(bits)
    xp = _library(numbers)
    size = numbers.shape[0]
    rows = xp.pad(numbers, (0, -size % count)).reshape(-1, count)

    def byte(place):
        found = xp.zeros_like(rows[:, 0])
        for i in range(count):
            shift = bits * i - 8 * place
            if 0 <= shift < 8:
                found = found | rows[:, i] << np.uint8(shift)
            elif -bits < shift < 0:
                found = found | rows[:, i] >> np.uint8(-shift)
        return found

    found = xp.stack([byte(place) for place in range(width)], axis=1)
    return found.reshape(-1)[: -(-size * bits // 8)]


def unpack_bits(data: Any, bits: int, count: int) -> Any:
    """Unpacks the first `count` numbers that `pack_bits` put into bytes.

    Args:
      data: uint8 of shape (ceil(count * bits / 8),), a NumPy or JAX array.
      bits: 1 to 8.
      count: number of numbers.

    Returns:
      uint8 of shape (count,), a NumPy or JAX array like `data`.
    """
    together, width = _period(bits)
    xp = _library(data)
    rows = xp.pad(data, (0, -data.shape[0] % width)).reshape(-1, width)

    def number(i):
        place, shift = divmod(bits * i, 8)
        found = rows[:, place] >> np.uint8(shift)
        if shift + bits > 8:
            found = found | rows[:, place + 1] << np.uint8(8 - shift)
        return found & np.uint8(2**bits - 1)

    found = xp.stack([number(i) for i in range(together)], axis=1)
    return found.reshape(-1)[:count]


def _period(bits):
    """Returns the fewest numbers that fill whole bytes, and the number of bytes."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _library(array):
    return jnp if isinstance(array, jax.Array) else np
