"""Kernels for TPU: one reads an array once and writes what comes of it once.

What they compute on a strip is what `rounding` computes on an array. Only the rotation
is theirs, since a matrix unit multiplies numbers of 16 bits: float32 numbers are three
such parts, and rounded values are such numbers.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cage_jax.hadamard import hadamard_matrix
from cage_jax.operations import times
from cage_jax.pallas.tiles import LANES, Tiles
from cage_jax.rounding import (
    apply_scale,
    basis_factor,
    fit_in_basis,
    of_groups,
    passes,
    round_in_basis,
    scaled_last,
    to_elements,
    turn_back,
)

_PARTS = 3  # numbers of 8 bits of mantissa that a float32 number of 24 is the sum of


def fake_quant(x: jax.Array, *, tiles: Tiles, masked: bool) -> Any:
    """`x` quantized and dequantized.

    Args:
      x: the array that `tiles` was made for.
      tiles: how it is cut.
      masked: whether to tell where the gradient passes.

    Returns:
      The values, like `x`; if `masked`, these and the mask, int8 of 1 and 0.
    """
    kept = tiles.whole and tiles.quantizer.hadamard is not None
    out = (jnp.int8,) if masked else ()
    found = _call(
        partial(_fake_quant, tiles=tiles, masked=masked, kept=kept),
        tiles,
        "fake_quant",
        (x,),
        (x.dtype, *out),
        [pltpu.VMEM(tiles.block, jnp.float32)] if kept else [],
    )
    return found if masked else found[0]


def masked_gradient(
    mask: jax.Array, cotangent: jax.Array, *, tiles: Tiles
) -> jax.Array:
    """What passes of a cotangent: rotated, masked, rotated back.

    Args:
      mask: int8, as `fake_quant` gives it.
      cotangent: an array like the quantized one.
      tiles: how both are cut.
    """
    (gradient,) = _call(
        partial(_masked_gradient, tiles=tiles),
        tiles,
        "masked_gradient",
        (mask, cotangent),
        (cotangent.dtype,),
    )
    return gradient


def _call(kernel, tiles, name, arrays, dtypes, scratch=()):
    """Runs a kernel over all blocks; with a rotation it gets the matrix, too."""
    shape, matrix = tiles.shape, _matrix(tiles)
    spec = pl.BlockSpec((None, *tiles.block), lambda *place: place)
    fixed = [] if matrix is None else [pl.BlockSpec(matrix.shape, lambda *_: (0, 0))]
    elements = math.prod(shape)
    read = sum(array.dtype.itemsize for array in arrays)
    written = sum(jnp.dtype(dtype).itemsize for dtype in dtypes)
    products = 0 if matrix is None else 2 * (_PARTS + 1) * len(matrix)
    found = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[spec] * len(arrays) + fixed,
        out_specs=[spec] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=elements * (products + 30),
            bytes_accessed=elements * (read + written),
            transcendentals=0,
        ),
        name=f"cage_{name}",
    )(
        *(array.reshape(shape) for array in arrays),
        *([] if matrix is None else [matrix]),
    )
    return tuple(each.reshape(arrays[-1].shape) for each in found)


def _matrix(tiles):
    """That which rotates as many neighbours as a matrix unit takes at once."""
    block = tiles.quantizer.hadamard
    if block is None:
        return None
    times = max(1, math.gcd(LANES, tiles.strip) // block)
    whole = np.kron(np.eye(times), hadamard_matrix(block))
    return jnp.asarray(whole, jnp.bfloat16)


def _fake_quant(x_ref, *others, tiles, masked, kept):
    refs = iter(others)
    matrix_ref = next(refs) if tiles.quantizer.hadamard is not None else None
    value_ref = next(refs)
    mask_ref = next(refs) if masked else None
    kept_ref = next(refs) if kept else None
    quantizer = tiles.quantizer
    rotate = partial(_rotate, matrix_ref=matrix_ref, tiles=tiles)

    def in_basis(i):
        return rotate(_strip(x_ref, i, tiles).astype(jnp.float32), parts=_PARTS)

    def finish(i, transformed, grid, poison):
        values = round_in_basis(transformed, quantizer, grid)
        # A rounded value has at most 8 bits of mantissa, unless it is scaled first.
        parts = 1 if scaled_last(quantizer, values.shape) else _PARTS
        back = turn_back(
            values,
            quantizer,
            grid,
            values.shape,
            back=lambda values, _: rotate(values, parts=parts),
        )
        like = jax.ShapeDtypeStruct(values.shape, jnp.float32)
        value = apply_scale(back, quantizer, grid, like)
        value = value + to_elements(poison, quantizer, values.shape)
        _store(value_ref, i, value.astype(value_ref.dtype), tiles)
        if masked:
            passing = passes(transformed, quantizer, grid)
            passing = jnp.where(passing, jnp.int32(1), jnp.int32(0))
            _store(mask_ref, i, passing, tiles)

    if not tiles.whole:

        def one(i, carry):
            transformed = in_basis(i)
            grid = fit_in_basis(transformed, quantizer, None)
            poison = of_groups(_poison, transformed, quantizer)
            finish(i, transformed, grid, poison)
            return carry

        lax.fori_loop(0, tiles.strips, one, 0)
        return

    axis = tiles.along - 1
    count = tiles.block[axis]

    def find(i, found):
        whole, poison = found
        transformed = in_basis(i)
        if kept:
            _store(kept_ref, i, transformed, tiles)
        # As `fit_in_basis` does with all of it.
        sized = times(transformed, basis_factor(quantizer))
        part = quantizer.scale.part(sized, (axis,), count)
        poison = poison + _poison(transformed, (axis,))
        return quantizer.scale.joined(whole, part), poison

    empty = [1 if place == axis else size for place, size in enumerate(tiles.block)]
    zero = jnp.zeros(empty, jnp.float32)
    whole, poison = lax.fori_loop(0, tiles.strips, find, (zero, zero))
    grid = quantizer.scale.stored(whole, count, quantizer.format, quantizer.scale_type)

    def apply(i, carry):
        transformed = _strip(kept_ref, i, tiles) if kept else in_basis(i)
        finish(i, transformed, grid, poison)
        return carry

    lax.fori_loop(0, tiles.strips, apply, 0)


def _masked_gradient(mask_ref, cotangent_ref, *refs, tiles):
    *matrix_refs, gradient_ref = refs
    quantizer = tiles.quantizer
    rotate = partial(
        _rotate, matrix_ref=matrix_refs[0] if matrix_refs else None, tiles=tiles
    )

    def one(i, carry):
        cotangent = _strip(cotangent_ref, i, tiles).astype(jnp.float32)
        passing = _strip(mask_ref, i, tiles).astype(jnp.float32)
        gradient = rotate(cotangent, parts=_PARTS)
        gradient = jnp.where(passing != 0, gradient, 0)
        gradient = rotate(gradient, parts=_PARTS) * basis_factor(quantizer) ** 2
        _store(gradient_ref, i, gradient, tiles)
        return carry

    lax.fori_loop(0, tiles.strips, one, 0)


def _poison(x, axes):
    """0, or NaN where something is not finite, whatever a maximum makes of that."""
    return jnp.sum(x - x, axis=axes, keepdims=True)


def _strip(ref, i, tiles):
    strip = ref[_place(i, tiles)]
    return strip.astype(jnp.float32).T if tiles.transposed else strip


def _store(ref, i, strip, tiles):
    strip = strip.T if tiles.transposed else strip
    ref[_place(i, tiles)] = strip.astype(ref.dtype)


def _place(i, tiles):
    here = pl.ds(pl.multiple_of(i * tiles.strip, tiles.strip), tiles.strip)
    return (here, slice(None)) if tiles.along == 1 else (slice(None), here)


def _rotate(x, *, matrix_ref, tiles, parts):
    """Each piece of `x` along the axis of the groups times the matrix."""
    if matrix_ref is None:
        return x
    matrix, axis = matrix_ref[...], tiles.quantizer.axis + 2
    size = len(matrix)
    pieces = [
        _product(matrix, lax.slice_in_dim(x, i, i + size, axis=axis), axis, parts)
        for i in range(0, x.shape[axis], size)
    ]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)


def _product(matrix, x, axis, parts):
    def times_matrix(part):
        left, right = (matrix, part) if axis == 0 else (part, matrix)
        return lax.dot(left, right, preferred_element_type=jnp.float32)

    total = None
    for _ in range(parts):
        part = x.astype(jnp.bfloat16)
        x = x - part.astype(jnp.float32)
        product = times_matrix(part)
        total = product if total is None else total + product
    return total
