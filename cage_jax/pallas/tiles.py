"""Division of an array for a kernel: blocks for the chip, strips for registers.

A kernel receives one block at a time and computes one strip of it at a time. Both hold
whole groups, except where a group is all of an axis: then they may hold a part of it.
"""

import dataclasses
import math

import jax.numpy as jnp

from cage_jax.arrays.tile_order import LANES, SMALLEST, is_large
from cage_jax.quantizers.formats import Float, Format, Integer, MidRise
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scale_types import Narrow
from cage_jax.quantizers.scales import ReducedScale

# Rows of a tile of 8-bit masks, which have the highest tiles.
_SUBLANES = 32
# Rows of a tile of 16-bit numbers.
_HALF_SUBLANES = 16
_LARGEST_ROTATION = 128
_LARGEST_STRIP = 512
# In a long strip, other work goes on while one part waits for its result. A rotated
# channel takes a fifth longer in strips of 128.
_LONG_STRIP = 256
# Bytes that a kernel may keep of groups longer than a block; each chip has twice that.
_KEPT_BYTES = 2**23
# Elements of a strip on a GPU, or of a row at most; and the fewest neighbours that it
# reads efficiently.
_STRIP = 2**12
_SECTOR = 16
# Bytes of codes, inputs and outputs that a product holds; each chip has a multiple.
_CODES_BYTES = 2**20
_INPUTS_BYTES = 2**23
_OUTPUTS_BYTES = 2**21


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The blocks and strips of an array of shape (stack, rows, columns).

    A kernel passes over the blocks along the groups before it goes on across them. If a
    group is all of the axis, it passes twice: once to find the grid, once to use it.

    Attributes:
      quantizer: quantizer of one strip: its axis is that of the groups, and its group
        size is None if a strip is a part of a group, or all of one.
      shape: (stack, rows, columns) of the array.
      along: axis of the groups, 1 or 2.
      block: (rows, columns) of a block.
      strip: length of a strip along the axis of the groups.
      whole: whether a group is all of the axis; a block may then be a part of it.
      transposed: whether strips are transposed, so that groups lie along their first
        axis.
    """

    quantizer: Quantizer
    shape: tuple[int, int, int]
    along: int
    block: tuple[int, int]
    strip: int
    whole: bool
    transposed: bool

    @property
    def strips(self) -> int:
        """Number of strips in a block."""
        return self.block[self.along - 1] // self.strip

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Grid of the kernel: (stack, blocks across groups, passes, blocks along)."""
        across = 2 - self.along
        return (
            self.shape[0],
            math.ceil(self.shape[across + 1] / self.block[across]),
            2 if self.whole else 1,
            self.length // self.block[self.along - 1],
        )

    @property
    def exact(self) -> bool:
        """Whether no block reaches beyond the array."""
        across = 2 - self.along
        return self.shape[across + 1] % self.block[across] == 0

    @property
    def length(self) -> int:
        """Length of the axis of the groups."""
        return self.shape[self.along]

    @property
    def kept(self) -> tuple[int, int]:
        """Shape of what a kernel keeps of groups that are all of the axis."""
        across = self.block[2 - self.along]
        return (self.length, across) if self.along == 1 else (across, self.length)

    @property
    def per_group(self) -> tuple[int, int]:
        """Shape of one number for each of these groups."""
        across = self.block[2 - self.along]
        return (1, across) if self.along == 1 else (across, 1)


def tiles_of(
    quantizer: Quantizer,
    shape: tuple[int, ...],
    dtype,
    *,
    block_bytes: int = 2**20,
    kept: int = 1,
) -> Tiles | None:
    """Returns the tiles of an array for a TPU, or None if no kernel suits it.

    Args:
      quantizer: quantizer of the array.
      shape: shape of the array.
      dtype: dtype of the array.
      block_bytes: most bytes in a block of a float32 array.
      kept: number of float32 numbers that a kernel keeps for each element of groups
        that are all of an axis.
    """
    if len(shape) < 2 or not is_large(shape, SMALLEST) or not _suits(quantizer, dtype):
        return None
    if shape[-1] % LANES or shape[-2] % _SUBLANES:
        return None  # the compiler may use another layout, and would copy the array
    ((axis, group),) = quantizer.blocks(shape).by_axis.items()
    if axis < len(shape) - 2:
        return None
    stack, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    along = axis - len(shape) + 3
    length = shape[axis]
    unit = math.lcm(quantizer.hadamard or 1, _SUBLANES if along == 1 else LANES)
    strip = math.lcm(unit, group)
    whole = group == length and strip > unit
    if whole:
        strip = math.gcd(length, max(unit, LANES))
    if strip % unit or strip > _LARGEST_STRIP or length % strip:
        return None
    if along == 1 or whole or group % LANES:  # else a row would hold several groups
        most = max(1, _LONG_STRIP // strip)
        strip *= max(n for n in range(1, most + 1) if length // strip % n == 0)
    if whole and quantizer.scale_type.has_tensor_divisor:
        return None
    across = min(LANES, (rows, columns)[2 - along])
    if whole and 4 * kept * length * across > _KEPT_BYTES:
        return None
    most = max(1, block_bytes // (4 * strip * LANES))
    strips = max(n for n in range(1, most + 1) if length // strip % n == 0)
    block = (strips * strip, across) if along == 1 else (across, strips * strip)
    transposed = along == 2 and group % LANES != 0
    if transposed and across != LANES:
        return None
    own = dataclasses.replace(
        quantizer,
        axis=-2 if along == 1 or transposed else -1,
        group_size=None if whole or group == strip else group,
    )
    cut = Tiles(own, (stack, rows, columns), along, block, strip, whole, transposed)
    if quantizer.scale_type.has_tensor_divisor and not cut.exact:
        return None  # an element beyond the array might be the largest
    return cut


def _suits(quantizer, dtype):
    format, scale_type = quantizer.format, quantizer.scale_type
    return (
        dtype in (jnp.float32, jnp.bfloat16)
        and isinstance(format, Integer | MidRise | Float)
        and isinstance(quantizer.scale, ReducedScale)
        and not isinstance(scale_type, Narrow)
        and isinstance(quantizer.axis, int)
        and (quantizer.hadamard or 1) <= _LARGEST_ROTATION
        and quantizer.hadamard_seed is None
        and quantizer.rounding == "nearest"
    )


def tiles_for_gpu(quantizer: Quantizer, shape: tuple[int, ...], dtype) -> Tiles | None:
    """Returns the tiles of an array for a GPU, whose strips are powers of two.

    A group that is all of an axis is one strip if it is short enough. Otherwise the
    kernel passes twice over it in one block, and the second pass reads memory again
    unless a cache holds the data. Without a rotation the compiler's form does the same,
    so columns are left to the compiler then.

    Args:
      quantizer: quantizer of the array.
      shape: shape of the array.
      dtype: dtype of the array.

    Returns:
      Tiles, never transposed, or None if no kernel suits the array.
    """
    if len(shape) < 2 or not is_large(shape, SMALLEST) or not _suits(quantizer, dtype):
        return None
    ((axis, group),) = quantizer.blocks(shape).by_axis.items()
    if axis < len(shape) - 2 or quantizer.scale_type.has_tensor_divisor:
        return None
    stack, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    along = axis - len(shape) + 3
    length, width = (rows, columns) if along == 1 else (columns, rows)
    rotation = quantizer.hadamard or 1
    unit = rotation if group == length else math.lcm(group, rotation)
    most = _STRIP if along == 2 and group == length else LANES
    strip = min(_power_of_two(length), max(most, unit))
    whole = group == length and strip < length
    across = min(_power_of_two(width), max(1, _STRIP // strip))
    if strip % unit or unit & (unit - 1) or (whole and along == 1 and rotation == 1):
        return None
    if strip * across < _STRIP // 2 or (along == 1 and across < _SECTOR):
        return None
    strips = length // strip
    if not whole:  # so the matrix is read once for several strips
        strips = math.gcd(strips, 8) if quantizer.hadamard else 1
    block = (strips * strip, across) if along == 1 else (across, strips * strip)
    own = dataclasses.replace(
        quantizer, axis=along - 3, group_size=None if group >= strip else group
    )
    return Tiles(own, (stack, rows, columns), along, block, strip, whole, False)


def _power_of_two(n):
    """Returns the largest power of two that divides `n`."""
    return n & -n


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """The blocks of a product of inputs (tokens, in) and codes (in, out).

    A kernel takes all of `in` at once, and widens codes strip by strip.

    Attributes:
      format: format of the codes.
      group: number of codes along `in` that share a scale.
      tokens: rows of a block of inputs.
      out: columns of a block of codes.
      strip: length of a strip along `in`.
      scaled: whether weights are scaled and rounded to bfloat16 before they are
        multiplied; otherwise the sums of each group are scaled.
    """

    format: Format
    group: int
    tokens: int
    out: int
    strip: int
    scaled: bool

    @property
    def unit(self) -> float:
        """Unit of the integers that the kernel multiplies: value = unit * integer."""
        return 0.5 if self.format == Float("e2m1") else 1.0


def product_tiles_of(
    quantizer: Quantizer, shape: tuple[int, ...], tokens: int, *, scaled: bool
) -> ProductTiles | None:
    """Returns the tiles of a product with quantized weights, or None without a kernel.

    Args:
      quantizer: quantizer of the weights.
      shape: shape of the weights.
      tokens: number of rows of the inputs.
      scaled: see `ProductTiles`.
    """
    if len(shape) != 2 or not is_large(shape, SMALLEST) or shape[1] % LANES:
        return None
    if not isinstance(tokens, int):  # symbolic, while a program is exported
        return None
    groups, format = quantizer.blocks(shape).by_axis, quantizer.format
    shifted = quantizer.asymmetric or quantizer.scale.has_offset
    if format.of_zero_code is None and (shifted or not isinstance(format, Float)):
        return None
    if shifted and quantizer.scale_type.has_tensor_divisor:
        return None
    length, group = shape[0], groups.get(0, 1)
    if [*groups] != [0] or group % _HALF_SUBLANES or (LANES % group and group % LANES):
        return None
    strips = (n for n in (512, 256, LANES) if length % n == 0)
    strip = next((n for n in strips if group % n == 0 or n % group == 0), None)
    rows = _INPUTS_BYTES // (2 * length) // 8 * 8 if scaled else 256
    rows = min(rows, 1024, math.ceil(tokens / 8) * 8)
    fits = (
        n
        for n in (1024, 512, 256, LANES)
        if shape[1] % n == 0
        and quantizer.bits * length * n <= 8 * _CODES_BYTES
        and 4 * rows * n <= _OUTPUTS_BYTES
    )
    out = next(fits, None)
    if strip is None or out is None or rows == 0:
        return None
    return ProductTiles(format, group, rows, out, strip, scaled)
