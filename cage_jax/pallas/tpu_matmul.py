"""TPU kernel that multiplies inputs by codes, reading codes and scales as stored.

A compiler widens codes on their way into a product. But it first writes 8-bit and
16-bit scales to memory as float32, and also weights that are scaled before the product.
Here both stay on the chip.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.tiling import ProductTiling
from cage_jax.quantizers.formats import Float

# Limit for the memory of the blocks; chips have at least twice that.
_VMEM_BYTES = 2**26


def product(
    inputs: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    offset: jax.Array | None,
    tensor_divisor: jax.Array | None,
    *,
    tiling: ProductTiling,
    dtype,
) -> jax.Array:
    """Multiplies `inputs`, rounded to bfloat16, by quantized weights; float32 sums.

    Args:
      inputs: (tokens, in).
      codes: (in, out).
      scale: (groups, out), as it is stored.
      zero_point: codes of the shape of `scale`, or None.
      offset: an array like `scale`, or None.
      tensor_divisor: (1, 1), or None.
      tiling: the blocks and strips of all arrays.
      dtype: dtype of the result.

    Returns:
      (tokens, out).
    """
    (tokens, length), out = inputs.shape, codes.shape[1]
    start = tiling.format.code_offset or 0
    shifted = zero_point is not None or offset is not None or start != 0
    blocks = pl.cdiv(tokens, tiling.tokens)
    inputs, codes, scale, zero_point, offset, tensor_divisor = _varying_alike(
        inputs, codes, scale, zero_point, offset, tensor_divisor
    )
    x = inputs.astype(jnp.bfloat16)
    x = jnp.pad(x, ((0, blocks * tiling.tokens - tokens), (0, 0)))
    x_block, of_groups = (
        pl.BlockSpec((tiling.tokens, length), lambda i, j: (i, 0)),
        None,
    )
    if not tiling.scaled:
        if shifted:
            of_groups = x.astype(jnp.float32).reshape(len(x), -1, tiling.group).sum(-1)
        x = _in_rows(x, tiling)
        x_block = pl.BlockSpec((None, *x.shape[1:]), lambda i, j: (i, 0, 0, 0))
    stored = [_readable(array) for array in (scale, zero_point, offset)]

    def kernel(x_ref, of_groups_ref, divisor_ref, codes_ref, *refs):
        *stored_refs, out_ref, step_ref, shift_ref, total_ref = refs
        scale_ref, zero_ref, offset_ref = stored_refs
        step = _numbers(scale_ref, scale.dtype)
        # A weight is step * code + shift.
        shift = step * (
            start if zero_ref is None else -zero_ref[...].astype(step.dtype)
        )
        if offset is not None:
            shift = shift + _numbers(offset_ref, offset.dtype)
        step_ref[...], shift_ref[...] = step, shift
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        if of_groups_ref is not None:
            total_ref[...] = lax.dot(
                of_groups_ref[...], shift, precision=lax.Precision.HIGHEST
            )

        def strip(i, carry):
            here = pl.ds(pl.multiple_of(i * tiling.strip, tiling.strip), tiling.strip)
            codes = _widened(codes_ref, here, tiling)
            first = lax.div(i * tiling.strip, tiling.group)
            if tiling.scaled:
                weights = [
                    _scaled(piece, first + k, step_ref, shift_ref if shifted else None)
                    for k, piece in enumerate(_pieces(codes, tiling.group))
                ]
                total_ref[...] += _product(x_ref[:, here], jnp.concatenate(weights))
                return carry
            total = total_ref[...]
            for k, piece in enumerate(_pieces(codes, LANES)):
                sums = _product(x_ref[i * (tiling.strip // LANES) + k], piece)
                group = first + k * LANES // tiling.group
                for n, rows in enumerate(_pieces(sums, tiling.tokens)):
                    total = total + rows * step_ref[pl.ds(group + n, 1)]
            total_ref[...] = total
            return carry

        lax.fori_loop(0, length // tiling.strip, strip, 0)
        total = total_ref[...] * tiling.unit
        if divisor_ref is not None:
            total = total / divisor_ref[0, 0]
        out_ref[...] = total[: len(out_ref)].astype(dtype)

    weights = [codes, *(each for each in stored if each is not None)]
    bits = sum(each.size * jax.dtypes.itemsize_bits(each.dtype) for each in weights)
    moved = blocks * bits // 8 + 2 * x.size + tokens * out * jnp.dtype(dtype).itemsize
    per_group = pltpu.VMEM((len(scale), tiling.out), jnp.float32)

    def columns(array):
        if array is None:
            return None
        return pl.BlockSpec((len(array), tiling.out), lambda i, j: (0, j))

    return pl.pallas_call(
        kernel,
        grid=(blocks, out // tiling.out),
        in_specs=[
            x_block,
            None
            if of_groups is None
            else pl.BlockSpec((tiling.tokens, len(scale)), lambda i, j: (i, 0)),
            None if tensor_divisor is None else pl.BlockSpec(memory_space=pltpu.SMEM),
            *(columns(array) for array in (codes, *stored)),
        ],
        out_specs=pl.BlockSpec(
            (min(tokens, tiling.tokens), tiling.out), lambda i, j: (i, j)
        ),
        out_shape=jax.ShapeDtypeStruct(
            (tokens, out), dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        scratch_shapes=[
            per_group,
            per_group,
            pltpu.VMEM((tiling.tokens, tiling.out), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * length * out, bytes_accessed=moved, transcendentals=0
        ),
        name="cage_product",
    )(x, of_groups, tensor_divisor, codes, *stored)


def _varying_alike(*arrays):
    """Marks all arrays in a `shard_map` as varying along every axis that one varies."""
    present = [array for array in arrays if array is not None]
    own = [jax.typeof(array).manual_axis_type.varying for array in present]
    every = frozenset().union(*own)
    cast = iter(
        lax.pcast(array, tuple(every - axes), to="varying") if every - axes else array
        for array, axes in zip(present, own)
    )
    return [None if array is None else next(cast) for array in arrays]


def _in_rows(x, tiling):
    """Reshapes to (blocks, units of 128, rows, 128).

    Each group of a unit has rows of its own, which are zero outside of the group.
    """
    groups = max(1, LANES // tiling.group)
    x = x.reshape(-1, tiling.tokens, x.shape[1] // LANES, LANES).swapaxes(1, 2)
    own = np.repeat(np.eye(groups, dtype=bool), LANES // groups, axis=1)
    rows = jnp.where(own[:, None], x[:, :, None], 0)
    return rows.reshape(*x.shape[:2], groups * tiling.tokens, LANES)


def _pieces(array, length):
    """Splits the first axis."""
    return [array[i : i + length] for i in range(0, len(array), length)]


def _product(x, weights):
    return lax.dot(x, weights, preferred_element_type=jnp.float32)


def _scaled(codes, group, step_ref, shift_ref):
    """Dequantizes codes of one group, rounded to bfloat16."""
    row = pl.ds(group, 1)
    values = codes.astype(jnp.float32) * step_ref[row]
    if shift_ref is not None:
        values = values + shift_ref[row]
    return values.astype(jnp.bfloat16)


def _widened(codes_ref, here, tiling):
    """Returns a strip of codes in units of `tiling.unit`, bfloat16; code 0 is 0."""
    if tiling.format == Float("e2m1"):
        return _halves(pltpu.bitcast(codes_ref[here], jnp.int4)).astype(jnp.bfloat16)
    return codes_ref[here].astype(jnp.bfloat16)


def _halves(codes):
    """Converts the bits of E2M1, held in int4, to the number of halves, int8.

    It converts four codes at once. Bits 0 to 2 are the number of halves up to 4, and
    larger ones count for more; bit 3 is the sign.
    """
    ones = 0x01010101
    words = pltpu.bitcast(codes.astype(jnp.int8), jnp.int32)
    size = words & (7 * ones)
    large = (size >> 2) & ones
    more = size & (3 * large)
    value = size + more + 2 * (more & (more >> 1) & ones)
    negative = (size | (size >> 1) | large) & (words >> 3) & ones  # there is no -0
    value = (value ^ ((negative << 8) - negative)) + negative
    return pltpu.bitcast(value, jnp.int8)


def _readable(array):
    """Returns float16 as its bits, because Mosaic does not support the dtype."""
    if array is None or array.dtype != jnp.float16:
        return array
    return lax.bitcast_convert_type(array, jnp.int16)


def _numbers(ref, dtype):
    """Converts the stored numbers of groups from `dtype` to float32."""
    if dtype in (jnp.float32, jnp.bfloat16):
        return ref[...].astype(jnp.float32)
    info, width = ml_dtypes.finfo(dtype), 8 * dtype.itemsize
    bits = ref[...] if width == 16 else pltpu.bitcast(ref[...], jnp.uint8)
    words = bits.astype(jnp.int32)
    size = words & (2 ** (info.nexp + info.nmant) - 1)
    signed = info.nexp + info.nmant < width
    bias = 1 - int(info.minexp) if signed else 127
    normal = (size << (23 - info.nmant)) + ((127 - bias) << 23)
    numbers = jnp.where(
        size < 2**info.nmant,
        size.astype(jnp.float32) * 2.0 ** (1 - bias - info.nmant),
        lax.bitcast_convert_type(normal, jnp.float32),
    )
    largest = int(np.array(info.max, dtype).view(f"uint{width}"))
    numbers = jnp.where(size > largest, jnp.nan, numbers)
    return (
        jnp.where(words & 2 ** (width - 1) == 0, numbers, -numbers)
        if signed
        else numbers
    )
