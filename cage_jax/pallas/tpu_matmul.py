"""TPU kernel that multiplies inputs by codes, reading codes and scales as stored.

A compiler widens codes on their way into a product. But it first writes 8-bit and
16-bit scales to memory as float32, and also weights that are scaled before the product.
Here both stay on the chip.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cage_jax.arrays.sharding import varying_alike
from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.strips import result_like
from cage_jax.pallas.tiling import ProductTiling
from cage_jax.pallas.tpu_launch import Operand, references
from cage_jax.quantizers.formats import Float

# Limit for the memory of the blocks. Chips have more, where XLA keeps scales meanwhile.
_VMEM_BYTES = 2**25
_OPTIONAL = "group_sums", "divisor", "zero_point", "offset"


def product(
    inputs: jax.Array, weights: Any, *, tiling: ProductTiling, dtype
) -> jax.Array:
    """Multiplies `inputs`, rounded to bfloat16, by quantized weights; float32 sums.

    Args:
      inputs: (tokens, in).
      weights: a `QuantizedArray` (in, out), whose scales are (groups, out).
      tiling: the blocks and strips of all arrays.
      dtype: dtype of the result.

    Returns:
      (tokens, out).
    """
    (tokens, length), out = inputs.shape, weights.shape[1]
    start = tiling.format.code_offset or 0
    inputs, codes, scale, zero_point, offset, divisor = varying_alike(
        inputs,
        weights.codes,
        weights.scale,
        weights.zero_point,
        weights.offset,
        weights.tensor_divisor,
    )
    shifted = zero_point is not None or offset is not None or start != 0
    blocks = pl.cdiv(tokens, tiling.tokens)
    x = inputs.astype(jnp.bfloat16)
    x = jnp.pad(x, ((0, blocks * tiling.tokens - tokens), (0, 0)))
    read = _inputs(x, tiling, with_sums=shifted)
    if divisor is not None:
        read["divisor"] = Operand(divisor, pl.BlockSpec(memory_space=pltpu.SMEM))
    stored = {"scale": scale, "zero_point": zero_point, "offset": offset}
    for name, array in ({"codes": codes} | stored).items():
        if array is not None:
            columns = pl.BlockSpec((len(array), tiling.out), lambda i, j: (0, j))
            read[name] = Operand(_readable(array), columns)
    per_group = pltpu.VMEM((len(scale), tiling.out), jnp.float32)
    total = pltpu.VMEM((tiling.tokens, tiling.out), jnp.float32)
    scratch = {"step": per_group, "shift": per_group, "total": total}

    def kernel(*refs):
        own = references([*read, "out", *scratch], refs, optional=_OPTIONAL)
        _prepare(own, start, stored)
        add = partial(
            _add_product if tiling.scaled else _add_sums, own, tiling, shifted
        )
        lax.fori_loop(0, length // tiling.strip, lambda i, carry: add(i) or carry, 0)
        total = own.total[...] * tiling.unit
        if own.divisor is not None:
            total = total / own.divisor[0, 0]
        own.out[...] = total[: len(own.out)].astype(dtype)

    arrays, specs = zip(*read.values())
    held = [read[name].array for name in ("codes", *stored) if name in read]
    bits = sum(each.size * jax.dtypes.itemsize_bits(each.dtype) for each in held)
    moved = blocks * bits // 8 + 2 * arrays[0].size
    moved += tokens * out * jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        kernel,
        grid=(blocks, out // tiling.out),
        in_specs=specs,
        out_specs=pl.BlockSpec(
            (min(tokens, tiling.tokens), tiling.out), lambda i, j: (i, j)
        ),
        out_shape=result_like(x, (tokens, out), dtype),
        scratch_shapes=[*scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * length * out, bytes_accessed=moved, transcendentals=0
        ),
        name="cage_product",
    )(*arrays)


def _inputs(x, tiling, with_sums):
    """Returns the inputs in blocks and, `with_sums`, the sums of their groups."""
    if tiling.scaled:
        spec = pl.BlockSpec((tiling.tokens, x.shape[1]), lambda i, j: (i, 0))
        return {"x": Operand(x, spec)}
    rows = _in_rows(x, tiling)
    spec = pl.BlockSpec((None, *rows.shape[1:]), lambda i, j: (i, 0, 0, 0))
    found = {"x": Operand(rows, spec)}
    if with_sums:
        sums = x.astype(jnp.float32).reshape(len(x), -1, tiling.group).sum(-1)
        spec = pl.BlockSpec((tiling.tokens, sums.shape[1]), lambda i, j: (i, 0))
        found["group_sums"] = Operand(sums, spec)
    return found


def _prepare(refs, start, stored):
    """Finds `step` and `shift` of each group, and the part of the sums due to `shift`.

    A weight is step * code + shift. `start` is the code of zero without a zero point.
    """
    step = _numbers(refs.scale, stored["scale"].dtype)
    zero = refs.zero_point
    shift = step * (start if zero is None else -zero[...].astype(step.dtype))
    if refs.offset is not None:
        shift = shift + _numbers(refs.offset, stored["offset"].dtype)
    refs.step[...], refs.shift[...] = step, shift
    refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    if refs.group_sums is not None:
        refs.total[...] = lax.dot(
            refs.group_sums[...], shift, precision=lax.Precision.HIGHEST
        )


def _add_product(refs, tiling, shifted, i):
    """Adds the product with a strip of weights, scaled and rounded to bfloat16."""
    here = pl.ds(pl.multiple_of(i * tiling.strip, tiling.strip), tiling.strip)
    codes = _widened(refs.codes, here, tiling)
    group = lax.div(i * tiling.strip, tiling.group)
    shift = refs.shift if shifted else None
    weights = [
        _scaled(part, group + k, refs.step, shift)
        for k, part in enumerate(_slices(codes, tiling.group))
    ]
    refs.total[...] += _product(refs.x[:, here], jnp.concatenate(weights))


def _add_sums(refs, tiling, shifted, i):
    """Adds the sums of each group of a strip of codes, scaled."""
    here = pl.ds(pl.multiple_of(i * tiling.strip, tiling.strip), tiling.strip)
    codes = _widened(refs.codes, here, tiling)
    first = lax.div(i * tiling.strip, tiling.group)
    total = refs.total[...]
    for k, each in enumerate(_slices(codes, LANES)):
        sums = _product(refs.x[i * (tiling.strip // LANES) + k], each)
        group = first + k * LANES // tiling.group
        for n, rows in enumerate(_slices(sums, tiling.tokens)):
            total = total + rows * refs.step[pl.ds(group + n, 1)]
    refs.total[...] = total


def _in_rows(x, tiling):
    """Reshapes to (blocks, units of 128, rows, 128).

    Each group of a unit has rows of its own, which are zero outside of the group: one
    product of the matrix unit, which takes 128 at once, gives the sums of all groups.
    """
    groups = max(1, LANES // tiling.group)
    x = x.reshape(-1, tiling.tokens, x.shape[1] // LANES, LANES).swapaxes(1, 2)
    own = np.repeat(np.eye(groups, dtype=bool), LANES // groups, axis=1)
    rows = jnp.where(own[:, None], x[:, :, None], 0)
    return rows.reshape(*x.shape[:2], groups * tiling.tokens, LANES)


def _slices(array, length):
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
