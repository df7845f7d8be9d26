"""Division of an array for a kernel: blocks for the chip, strips for registers.

A kernel receives one block at a time, while the next one is on its way. The block must
be large enough that memory is never idle, and several must fit on the chip. The kernel
computes one strip of it at a time, because the intermediate values of a whole block
would spill from the registers. Both hold whole groups, except where a group is all of
an axis: then they may hold less of it.
"""

import dataclasses
import math

import jax.numpy as jnp

from cage_jax.arrays.tile_order import LANES, stored_order
from cage_jax.quantizers.formats import Float, Format, Integer, MidRise
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scale_types import Narrow
from cage_jax.quantizers.scales import MinMax, ReducedScale

# Rows of a tile of 8-bit masks, which have the highest tiles.
_SUBLANES = 32
# Rows of a tile of 16-bit numbers.
_HALF_SUBLANES = 16
_LARGEST_ROTATION = 128
_LARGEST_STRIP = 512
# In a long strip, other work goes on while some values wait for a result. A rotated
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


# Rules whose groups may be longer than a strip.
PartedScale = ReducedScale | MinMax


class NoKernelError(Exception):
    """No kernel suits an array; the message is the reason, the end of a sentence."""


def require(condition: bool, why: str) -> None:
    """Raises `NoKernelError` unless a condition of a kernel is met."""
    if not condition:
        raise NoKernelError(why)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The blocks and strips of an array of shape (stack, rows, columns).

    A kernel reads the blocks along the groups before it goes on across them. If a group
    is all of the axis, it reads them twice: once to find the grid, once to use it.

    Attributes:
      quantizer: quantizer of one strip: its axis is that of the groups, and its group
        size is None if a strip is all of a group, or less.
      shape: (stack, rows, columns) of the array.
      along: axis of the groups, 1 or 2.
      block: (rows, columns) of a block.
      strip: length of a strip along the axis of the groups.
      group_is_axis: whether a group is all of the axis; a block may then hold less than
        one.
      transposed: whether strips are transposed, so that groups lie along their first
        axis.
      merged: shape of the array with all axes that share a scale merged into one.
      order: the axes of that, in the order of `shape`.
      kept: whether groups that are all of the axis fit on the chip; otherwise the last
        read reads them from memory again.
    """

    quantizer: Quantizer
    shape: tuple[int, int, int]
    along: int
    block: tuple[int, int]
    strip: int
    group_is_axis: bool
    transposed: bool
    merged: tuple[int, ...]
    order: tuple[int, ...]
    kept: bool

    @property
    def strips(self) -> int:
        """Number of strips in a block."""
        return self.block[self.along - 1] // self.strip

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Grid of the kernel: (stack, blocks across groups, reads, blocks along)."""
        blocks = math.ceil(self.shape[3 - self.along] / self.across)
        reads = 2 if self.group_is_axis else 1
        along = math.ceil(self.length / self.block[self.along - 1])
        return self.shape[0], blocks, reads, along

    @property
    def length(self) -> int:
        """Length of the axis of the groups."""
        return self.shape[self.along]

    @property
    def across(self) -> int:
        """Length of a block across the groups."""
        return self.block[2 - self.along]

    @property
    def scratch_shape(self) -> tuple[int, int]:
        """Shape of what a kernel keeps of groups that are all of the axis."""
        kept = self.grid[3] * self.strips * self.strip
        return _rows_and_columns(self.along, kept, self.across)

    @property
    def per_group(self) -> tuple[int, int]:
        """Shape of one number for each of these groups."""
        return _rows_and_columns(self.along, 1, self.across)


def _rows_and_columns(along, length, across):
    return (length, across) if along == 1 else (across, length)


def tiling_for_tpu(
    quantizer: Quantizer,
    shape: tuple[int, ...],
    dtype,
    *,
    block_bytes: int = 2**20,
    floats_per_element: int = 1,
) -> Tiling:
    """Divides an array for a TPU.

    Args:
      quantizer, shape, dtype: those of the array.
      block_bytes: most bytes in a block of a float32 array.
      floats_per_element: number of float32 numbers that a kernel keeps for each element
        of groups that are all of an axis.

    Raises:
      NoKernelError: if no kernel suits the array.
    """
    merged, own = _merged(quantizer, shape)
    why = f"merging its axes {quantizer.axis} would move it to other tiles"
    require(merged == shape or _merge_whole_tiles(merged, shape), why)
    order = stored_order(merged)
    rows, columns, along, group = _checked(own, merged, dtype, order)
    matrix = rows, columns
    length, width = matrix[along - 1], matrix[2 - along]
    strip, group_is_axis = _strip_for_tpu(along, length, group, quantizer.hadamard or 1)
    transposed = along == 2 and group % LANES != 0 and not group_is_axis
    # Blocks consist of whole tiles and may reach beyond the array.
    least = LANES if along == 1 or transposed else _SUBLANES
    across = max(least, min(LANES, _rounded_up(width)))
    kept = not group_is_axis
    if group_is_axis:
        most = _KEPT_BYTES // (4 * floats_per_element * _rounded_up(length, strip))
        kept = most >= least
        why = f"a group of {length} does not fit on the chip, and is not rotated"
        require(kept or quantizer.hadamard is not None, why)
        across = max(least, min(across, most // least * least))
    most = max(1, block_bytes // (4 * strip * across))
    strips = _largest_divisor(math.ceil(length / strip), most)
    block = _rows_and_columns(along, strips * strip, across)
    own = dataclasses.replace(
        own,
        axis=-2 if along == 1 or transposed else -1,
        group_size=None if group_is_axis or group == strip else group,
    )
    if quantizer.scale_type.has_tensor_divisor:
        why = "each group is a whole axis, and the scales share one divisor per tensor"
        require(not group_is_axis, why)
        why = "its scales share one divisor per tensor, whose parts are not neighbours"
        require(not quantizer.asymmetric, "its scales have a divisor and a zero point")
        require({*order[-2:]} == {*range(len(merged))[-2:]}, why)
    stack = math.prod(merged[axis] for axis in order[:-2])
    stored, places = (stack, rows, columns), (strip, group_is_axis, transposed)
    return Tiling(own, stored, along, block, *places, merged, order, kept)


def _merged(quantizer, shape):
    """Merges neighbouring axes that share a scale; returns a shape and its quantizer.

    The elements of a group must be neighbours: it is whole along all axes behind the
    one that it cuts, and has length 1 along those before.
    """
    quantizer = quantizer.at(shape)
    if not isinstance(quantizer.axis, tuple):
        return shape, quantizer
    groups = quantizer.blocks(shape).by_axis
    first = min(groups)
    after = first + len(groups)
    parts = zip(groups.values(), shape[first:after])
    next((size for size, _ in parts if size != 1), None)  # the axis that is cut
    whole = all(size == length for size, length in parts)  # those behind it
    whole &= [*groups] == [*range(first, after)]
    require(whole, f"its groups are cut along one of the axes {quantizer.axis}")
    require(len(groups) < len(shape), "its groups span all axes")
    merged = *shape[:first], math.prod(shape[first:after]), *shape[after:]
    size = math.prod(groups.values())
    return merged, dataclasses.replace(quantizer, axis=first, group_size=size)


def _merge_whole_tiles(merged, shape):
    """Tells whether a TPU stores an array as it would store it with merged axes."""
    plain = tuple(range(len(shape)))
    return (
        stored_order(shape) == plain
        and stored_order(merged) == plain[: len(merged)]
        and merged[-1] == shape[-1]
        and shape[-2] % _SUBLANES == 0
    )


def _strip_for_tpu(along, length, group, rotation):
    """Returns the length of a strip, and whether a group is an axis and longer."""
    unit = math.lcm(rotation, _SUBLANES if along == 1 else LANES)
    strip = math.lcm(unit, group)
    group_is_axis = group == length and strip > unit
    if group_is_axis:
        strip = max(unit, math.gcd(length, LANES))
    why = f"groups of {group} line up with tiles only every {strip} elements"
    require(strip <= _LARGEST_STRIP, why)
    # A row of a strip could otherwise hold several groups.
    if along == 1 or group_is_axis or group % LANES:
        most = max(1, _LONG_STRIP // strip)
        strip *= _largest_divisor(math.ceil(length / strip), most)
    return strip, group_is_axis


def _checked(quantizer, shape, dtype, order):
    """Returns the last two axes in an order, and the place and length of groups."""
    format, scale, scale_type = quantizer.format, quantizer.scale, quantizer.scale_type
    widest = _LARGEST_ROTATION
    for suits, why in (
        (dtype in (jnp.float32, jnp.bfloat16), f"its dtype is {jnp.dtype(dtype)}"),
        (isinstance(format, Integer | MidRise | Float), f"its format is {format}"),
        (isinstance(scale, PartedScale), f"its scale is {scale}"),
        (not scale.has_offset, f"its scale is {scale}"),
        (not isinstance(scale_type, Narrow), f"it has {scale_type}"),
        (isinstance(quantizer.axis, int), "its groups span all axes"),
        ((quantizer.hadamard or 1) <= widest, f"its rotation is wider than {widest}"),
        (quantizer.hadamard_seed is None, "its rotation has random signs"),
        (quantizer.rounding == "nearest", f"its rounding is {quantizer.rounding}"),
        (len(shape) >= 2, "it has only one axis"),
    ):
        require(suits, why)
    ((axis, group),) = quantizer.blocks(shape).by_axis.items()
    along = order.index(axis) - len(shape) + 3
    row, column = order[-2:]
    why = f"its groups lie along axis {axis}, and neighbours along {row} and {column}"
    require(along > 0, why)
    return shape[row], shape[column], along, group


def tiling_for_gpu(quantizer: Quantizer, shape: tuple[int, ...], dtype) -> Tiling:
    """Divides an array for a GPU, into strips that are powers of two, as Triton needs.

    A group that is all of an axis is one strip if it is short enough. Otherwise the
    kernel reads it twice, in one block, and the second time from memory again unless a
    cache holds the data. Without a rotation the compiler's form does the same, so
    columns are left to the compiler then.

    Raises:
      NoKernelError: if no kernel suits the array.
    """
    merged, quantizer = _merged(quantizer, shape)
    if isinstance(quantizer.axis, int):
        # The axes behind that of the groups are one in memory.
        before = len(merged[: quantizer.axis])
        if before < len(merged) - 2:
            merged = *merged[: before + 1], math.prod(merged[before + 1 :])
            quantizer = dataclasses.replace(quantizer, axis=-2)
    order = tuple(range(len(merged)))
    rows, columns, along, group = _checked(quantizer, merged, dtype, order)
    divided = quantizer.scale_type.has_tensor_divisor
    require(not divided, "its scales have one divisor for a tensor")
    length, width = (rows, columns) if along == 1 else (columns, rows)
    rotation = quantizer.hadamard or 1
    unit = rotation if group == length else math.lcm(group, rotation)
    require(unit & (unit - 1) == 0, f"groups of {group} are not a power of two")
    most = _STRIP if along == 2 and group == length else LANES
    strip = min(_power_of_two(length), max(most, unit))
    group_is_axis = group == length and strip < length
    compiled = group_is_axis and along == 1 and rotation == 1
    require(not compiled, "the compiler reads such columns just as few times")
    across = min(_power_of_two(width), max(1, _STRIP // strip))
    require(
        strip * across >= _STRIP // 2 and (along == 2 or across >= _SECTOR),
        f"blocks of {strip} by {across} elements are too small",
    )
    strips = length // strip
    if not group_is_axis:  # so the matrix is read once for several strips
        strips = math.gcd(strips, 8) if quantizer.hadamard else 1
    block = _rows_and_columns(along, strips * strip, across)
    own = dataclasses.replace(
        quantizer, axis=along - 3, group_size=None if group >= strip else group
    )
    stack = math.prod(merged[:-2])
    stored, places = (stack, rows, columns), (strip, group_is_axis, False)
    return Tiling(own, stored, along, block, *places, merged, order, False)


def _largest_divisor(n, most):
    """Returns the largest divisor of `n` that is at most `most`."""
    return max(divisor for divisor in range(1, most + 1) if n % divisor == 0)


def _rounded_up(n, unit=_SUBLANES):
    return math.ceil(n / unit) * unit


def _power_of_two(n):
    """Returns the largest power of two that divides `n`."""
    return n & -n


@dataclasses.dataclass(frozen=True)
class ProductTiling:
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


def product_tiling(
    quantizer: Quantizer, shape: tuple[int, ...], tokens: int, *, scaled: bool
) -> ProductTiling:
    """Divides the arrays of a product with quantized weights.

    Args:
      quantizer: quantizer of the weights.
      shape: shape of the weights.
      tokens: number of rows of the inputs.
      scaled: see `ProductTiling`.

    Raises:
      NoKernelError: if no kernel suits the product.
    """
    require(len(shape) == 2, f"weights must have two axes, and have {len(shape)}")
    length, out = shape
    require(out % LANES == 0, f"an axis of {out} is not a multiple of {LANES}")
    require(isinstance(tokens, int), "the number of inputs is not known yet")
    groups, format = quantizer.blocks(shape).by_axis, quantizer.format
    shifted = quantizer.asymmetric or quantizer.scale.has_offset
    has_integer_codes = format.code_offset is not None or (
        isinstance(format, Float) and not shifted
    )
    require(has_integer_codes, f"its format is {format}")
    divided = shifted and quantizer.scale_type.has_tensor_divisor
    require(not divided, "its scales have a divisor, and its codes a zero point")
    group = groups.get(0, 1)
    require(
        [*groups] == [0]
        and group % _HALF_SUBLANES == 0
        and (LANES % group == 0 or group % LANES == 0),
        f"groups along the first axis must divide {LANES}, or be a multiple of it",
    )
    strips = (n for n in (512, 256, LANES) if length % n == 0)
    strip = next((n for n in strips if group % n == 0 or n % group == 0), None)
    rows = _INPUTS_BYTES // (2 * length) // 8 * 8 if scaled else 256
    rows = min(rows, 1024, math.ceil(tokens / 8) * 8)
    fits = (
        n
        for n in (1024, 512, 256, LANES)
        if out % n == 0
        and quantizer.bits * length * n <= 8 * _CODES_BYTES
        and 4 * rows * n <= _OUTPUTS_BYTES
    )
    columns = next(fits, None)
    if strip is None or columns is None or rows == 0:
        raise NoKernelError(f"a sum over {length} does not fit on the chip")
    return ProductTiling(format, group, rows, columns, strip, scaled)
