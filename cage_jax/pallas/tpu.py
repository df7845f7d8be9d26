"""Kernels for TPU, each of which reads an array once and writes its results once.

The arithmetic on a strip is in `strips`.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cage_jax.arrays.adamw import AdamW, StepNumbers
from cage_jax.arrays.exact import times
from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.strips import PARTS, Strip, poison_of, product, rotation
from cage_jax.pallas.tiling import Tiling
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.rounding import Rounding, fit
from cage_jax.quantizers.scale_types import largest_of


def fake_quant(x: jax.Array, *, tiling: Tiling, masked: bool) -> Any:
    """Quantizes and dequantizes `x`.

    Args:
      x: the array that `tiling` was made for.
      tiling: the blocks and strips of `x`.
      masked: whether to return the mask of the gradient too.

    Returns:
      The values, like `x`. If `masked`, the values and the mask, int8: 1 where the
      gradient passes and 0 elsewhere.
    """
    largest = None
    if tiling.quantizer.scale_type.has_tensor_divisor:
        largest = _largest_bounds(x, tiling)

    def kernel(x_ref, largest_ref, matrix_ref, value_ref, *refs):
        mask_ref, *scratch = refs if masked else (None, *refs)
        known = {}
        if largest_ref is not None:
            known["largest"] = largest_ref[:1, :1]

        def write(i, strip):
            _store(value_ref, i, strip.value(), tiling)
            if masked:
                _store(mask_ref, i, strip.mask(), tiling)

        read = partial(_strip, x_ref, tiling=tiling)
        _quantized(read, matrix_ref, scratch, tiling, write, keep_rotated=True, **known)

    found = _call(
        kernel,
        tiling,
        "fake_quant",
        first=(x,),
        of_stack=largest,
        dtypes=(x.dtype, jnp.int8) if masked else (x.dtype,),
        scratch=_kept(tiling),
    )
    return found if masked else found[0]


def _largest_bounds(x, tiling):
    """Computes each matrix's largest bound: (stack, 8, 128), one number per matrix."""

    def kernel(x_ref, _known_ref, matrix_ref, largest_ref):
        rotate = partial(_rotate, matrix_ref=matrix_ref, tiling=tiling, parts=PARTS)
        quantizer = tiling.quantizer

        @pl.when(pl.program_id(3) == 0)
        def _():
            largest_ref[...] = jnp.zeros(largest_ref.shape, jnp.float32)

        def one(i, carry):
            rotated = rotate(_strip(x_ref, i, tiling).astype(jnp.float32))
            sized = times(rotated, quantizer.basis(rotated.shape).factor)
            bounds = quantizer.blocks(sized.shape).reduce(quantizer.scale.bounds, sized)
            largest = largest_of(bounds, (0, 1))
            largest_ref[...] = lax.max(
                largest_ref[...], jnp.broadcast_to(largest, largest_ref.shape)
            )
            return carry

        lax.fori_loop(0, tiling.strips, one, 0)

    (found,) = _call(kernel, tiling, "largest_bounds", first=(x,), dtypes=(), sums=True)
    return jnp.max(found, axis=1)


def masked_gradient(
    mask: jax.Array, cotangent: jax.Array, *, tiling: Tiling
) -> jax.Array:
    """Masks a cotangent in the rotated basis: rotates it, masks it, rotates it back.

    Args:
      mask: int8, as returned by `fake_quant`.
      cotangent: an array like the quantized one.
      tiling: the blocks and strips of both.
    """
    tiling = dataclasses.replace(tiling, whole=False)  # no block depends on another

    def kernel(mask_ref, cotangent_ref, _known_ref, matrix_ref, gradient_ref):
        rotate = partial(_rotate, matrix_ref=matrix_ref, tiling=tiling, parts=PARTS)
        square = Basis(tiling.quantizer.hadamard).factor ** 2

        def one(i, carry):
            passing = _strip(mask_ref, i, tiling).astype(jnp.float32)
            gradient = rotate(_strip(cotangent_ref, i, tiling).astype(jnp.float32))
            gradient = rotate(jnp.where(passing != 0, gradient, 0)) * square
            _store(gradient_ref, i, gradient, tiling)
            return carry

        lax.fori_loop(0, tiling.strips, one, 0)

    (gradient,) = _call(
        kernel,
        tiling,
        "masked_gradient",
        first=(mask, cotangent),
        dtypes=(cotangent.dtype,),
    )
    return gradient


def adamw_step(
    gradient: jax.Array,
    first: jax.Array,
    second: jax.Array,
    x: jax.Array,
    numbers: StepNumbers,
    previous: jax.Array | None,
    *,
    tiling: Tiling,
    adamw: AdamW,
    at_updated: bool,
) -> tuple:
    """Takes a step of AdamW with the pull to the grid, in place for donated arrays.

    Args:
      gradient: the gradient of the parameter.
      first: the first moment.
      second: the second moment.
      x: the parameter, which `tiling` was made for.
      numbers: the numbers of this step.
      previous: the codes at the step before, int8, for statistics; None for no
        statistics.
      tiling: the blocks and strips of all arrays.
      adamw: the optimizer.
      at_updated: whether the error is that of the updated parameter.

    Returns:
      The moments and the parameter after the step. For statistics, also the codes, and
      a float32 array of shape (4,): the sums of squares of the error, of the parameter
      that the error is computed from, and of the update, and the number of codes that
      differ.
    """
    codes = [] if previous is None else [previous]
    measured = previous is not None

    def kernel(numbers_ref, x_ref, gradient_ref, *refs):
        numbers = StepNumbers(
            *(numbers_ref[i] for i in range(len(StepNumbers._fields)))
        )
        left: Any = iter(refs)
        for_statistics: Any = left if measured else itertools.repeat(None)
        moments = next(left), next(left)
        previous_ref = next(for_statistics)
        next(left)  # `of_stack`, which is None
        matrix_ref = next(left)
        moments_after, x_after_ref = (next(left), next(left)), next(left)
        codes_ref, sums_ref = next(for_statistics), next(for_statistics)
        rest_ref = next(left) if at_updated else None
        scratch = list(left)
        begin = pl.program_id(3) * tiling.strips if tiling.whole else 0

        def add(row, part):
            rows = lax.broadcasted_iota(jnp.int32, sums_ref.shape, 0)
            sums_ref[...] += jnp.where(rows == row, jnp.sum(part, keepdims=True), 0)

        def update_of(i, x):
            """Returns the update of a strip and stores the strip's moments."""
            gradient = _strip(gradient_ref, i, tiling)
            first, second = (_strip(ref, i, tiling) for ref in moments)
            *new, update = adamw.step(gradient, first, second, x, numbers)
            for ref, strip in zip(moments_after, new, strict=True):
                _store(ref, i, strip, tiling)
            if measured:
                add(2, jnp.square(update))
            return update

        def read(i):
            x = _strip(x_ref, i, tiling)
            if not at_updated:
                return x
            update = update_of(i, x)
            updated = x + update
            # Store what rounding took away from the update. Then everything is added to
            # `x` at once, as by `apply_updates`; otherwise the two forms would drift
            # apart with each step.
            _store(rest_ref, begin + i, update - (updated - x), tiling)
            return updated

        def write(i, x, correction):
            rest = (
                _strip(rest_ref, begin + i, tiling) if at_updated else update_of(i, x)
            )
            _store(x_after_ref, i, x + (rest + correction), tiling)

        def pulled(i, strip):
            values = strip.values()
            error = strip.kept - strip.restored(values)
            if measured:
                codes = strip.codes(values)
                flipped = codes != _strip(previous_ref, i, tiling)
                _store(codes_ref, i, codes, tiling)
                add(0, jnp.square(error))
                add(1, jnp.square(strip.kept))
                add(3, jnp.where(flipped, 1.0, 0.0))
                error = jnp.where(numbers.pull != 0, error, 0)
            write(i, strip.kept, numbers.pull * error)

        def with_error():
            _quantized(read, matrix_ref, scratch, tiling, pulled, keep_rotated=False)

        if measured:

            @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
            def _():
                sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

            with_error()
            return
        pl.when(numbers.pull != 0)(with_error)

        @pl.when(numbers.pull == 0)
        def _():
            _plain(read, scratch, tiling, lambda i, x: write(i, x, 0.0))

    kept = tiling.kept if tiling.whole else tiling.block
    rest = [pltpu.VMEM(kept, jnp.float32)] if at_updated else []
    # The moments are written in the pass that finds the update, once for each block.
    early = gradient, first, second
    found = _call(
        kernel,
        tiling,
        "adamw_step",
        numbers=jnp.stack(numbers),
        first=(x, *early) if at_updated else (x,),
        last=(*codes,) if at_updated else (*early, *codes),
        early=2 if at_updated else 0,
        dtypes=(first.dtype, second.dtype, x.dtype, *(code.dtype for code in codes)),
        sums=measured,
        scratch=[*rest, *_kept(tiling)],
        # Each result replaces its own argument. Arguments 0 and 2 are the numbers and
        # the gradient.
        aliases={3: 0, 4: 1, 1: 2} | ({5: 3} if measured else {}),
    )
    if not measured:
        return found
    *after, sums = found
    return *after, jnp.sum(sums, axis=(0, 1))[:4, 0]


def _call(
    kernel,
    tiling,
    name,
    *,
    numbers=None,
    first,
    last=(),
    of_stack=None,
    early=0,
    dtypes,
    sums=False,
    scratch=(),
    aliases=None,
):
    """Runs a kernel over all blocks.

    Args:
      kernel: receives references to `numbers`, if any, to the blocks of `first` and
        `last`, to `of_stack` and the matrix of the rotation (each None if absent), to
        the blocks of the results, to an (8, 128) block for sums, if any, and to
        `scratch`.
      tiling: the blocks.
      name: name of the kernel in a program.
      numbers: a vector that every block receives, or None.
      first: arrays that the first pass reads.
      last: arrays that the last pass reads.
      of_stack: an array of shape (stack, 8, 128), or None; a block receives the part of
        its own matrix.
      early: number of results that the first pass writes; the last pass writes the
        others.
      dtypes: dtypes of the results.
      sums: whether there are sums; each block across the groups has its own.
      scratch: memory that is kept from one block to the next.
      aliases: maps the index of an argument to that of the result that replaces it.
    """
    shape, matrix = tiling.shape, _matrix(tiling)
    passes_count, end = tiling.grid[2], tiling.grid[3] - 1

    def place(stack, across, along):
        if tiling.along == 1:
            return stack, along, across
        return stack, across, along

    def in_first(stack, across, number, along):
        # Later passes stay at the last block of the first, so nothing is read again.
        return place(stack, across, jnp.where(number == 0, along, end))

    def in_last(stack, across, number, along):
        return place(stack, across, jnp.where(number == passes_count - 1, along, 0))

    block = None, *tiling.block
    scalars = [] if numbers is None else [pl.BlockSpec(memory_space=pltpu.SMEM)]
    fixed = [] if matrix is None else [pl.BlockSpec(matrix.shape, lambda *_: (0, 0))]
    elements = math.prod(shape)
    moved = [*(array.dtype.itemsize for array in (*first, *last))]
    moved += (jnp.dtype(dtype).itemsize for dtype in dtypes)
    written = [pl.BlockSpec(block, in_first)] * early
    written += [pl.BlockSpec(block, in_last)] * (len(dtypes) - early)
    # Inside a `shard_map`, the results must name the mesh axes along which they differ.
    struct = partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(first[-1]).manual_axis_type
    )
    shapes = [struct(shape, dtype) for dtype in dtypes]
    if sums:
        tile = None, None, 8, LANES
        written.append(
            pl.BlockSpec(tile, lambda stack, across, *_: (stack, across, 0, 0))
        )
        shapes.append(struct((*tiling.grid[:2], 8, LANES), jnp.float32))
    read = len(scalars) + len(first) + len(last)
    if of_stack is not None:
        fixed.insert(0, pl.BlockSpec((None, 8, LANES), lambda i, *_: (i, 0, 0)))
    products = 0 if matrix is None else 2 * (PARTS + 1) * len(matrix)

    def run(*refs):
        others = iter(refs[read:])
        stacked = None if of_stack is None else next(others)
        rotating = None if matrix is None else next(others)
        kernel(*refs[:read], stacked, rotating, *others)

    found = pl.pallas_call(
        run,
        grid=tiling.grid,
        in_specs=[
            *scalars,
            *[pl.BlockSpec(block, in_first)] * len(first),
            *[pl.BlockSpec(block, in_last)] * len(last),
            *fixed,
        ],
        out_specs=written,
        out_shape=shapes,
        scratch_shapes=list(scratch),
        input_output_aliases=aliases or {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=elements * (products + 30),
            bytes_accessed=elements * sum(moved),
            transcendentals=0,
        ),
        name=f"cage_{name}",
    )(
        *([] if numbers is None else [numbers]),
        *(array.reshape(shape) for array in (*first, *last)),
        *(each for each in (of_stack, matrix) if each is not None),
    )
    like = first[-1].shape
    return (
        *(each.reshape(like) for each in found[: len(dtypes)]),
        *found[len(dtypes) :],
    )


def _matrix(tiling):
    """Returns a matrix that rotates as many elements as a matrix unit takes at once."""
    block = tiling.quantizer.hadamard
    if block is None:
        return None
    return rotation(block, max(1, math.gcd(LANES, tiling.strip) // block))


def _kept(tiling):
    """Returns the scratch memory for groups that are all of an axis."""
    if not tiling.whole:
        return []
    per_group = pltpu.VMEM(tiling.per_group, jnp.float32)
    return [pltpu.VMEM(tiling.kept, jnp.float32), per_group, per_group]


def _quantized(read, matrix_ref, scratch, tiling, then, *, keep_rotated, **known):
    """Calls `then` with the index of each strip and the `Strip`, in the last pass.

    Args:
      read: returns a strip of the array by its index; called once for each strip.
      matrix_ref: the matrix of the rotation, or None.
      scratch: the memory of `_kept`.
      tiling: the blocks.
      then: function of the index and the `Strip`.
      keep_rotated: whether the first pass keeps strips rotated, so that the last pass
        need not rotate them again.
      known: arguments for the scale rule that it need not compute.
    """
    quantizer = tiling.quantizer
    rotate = partial(_rotate, matrix_ref=matrix_ref, tiling=tiling)

    def strip_at(i):
        return read(i).astype(jnp.float32)

    def each(act, start):
        return lax.fori_loop(0, tiling.strips, act, start)

    if not tiling.whole:

        def one(i, carry):
            x = strip_at(i)
            rotated = rotate(x, parts=PARTS)
            rounding = fit(rotated, quantizer, **known)
            poison = quantizer.blocks(rotated.shape).reduce(poison_of, rotated)
            then(i, Strip(x, rounding, poison, rotate))
            return carry

        each(one, 0)
        return

    kept_ref, found_ref, poison_ref = scratch
    axis, scale = tiling.along - 1, quantizer.scale
    number, first = pl.program_id(2), pl.program_id(3) * tiling.strips

    def find(i, carry):
        found, poison = carry
        x = strip_at(i)
        rotated = rotate(x, parts=PARTS)
        _store(kept_ref, first + i, rotated if keep_rotated else x, tiling)
        # This repeats what `fit` does with a whole group.
        sized = times(rotated, quantizer.basis(rotated.shape).factor)
        part = scale.part(sized, (axis,), tiling.length)
        return scale.joined(found, part), poison + poison_of(rotated, (axis,))

    @pl.when(number == 0)
    def _():
        @pl.when(first == 0)
        def _():
            found_ref[...] = jnp.zeros(tiling.per_group, jnp.float32)
            poison_ref[...] = jnp.zeros(tiling.per_group, jnp.float32)

        found_ref[...], poison_ref[...] = each(find, (found_ref[...], poison_ref[...]))

    @pl.when(number == 1)
    def _():
        poison = poison_ref[...]
        grid = scale.stored(
            found_ref[...], tiling.length, quantizer.format, quantizer.scale_type
        )

        def use(i, carry):
            kept = _strip(kept_ref, first + i, tiling)
            rotated = kept if keep_rotated else rotate(kept, parts=PARTS)
            x = None if keep_rotated else kept
            rounding = Rounding(rotated, grid, None, quantizer)
            then(i, Strip(x, rounding, poison, rotate))
            return carry

        each(use, 0)


def _plain(read, scratch, tiling, then):
    """Calls `then` with the index of each strip and the strip, in the last pass.

    The arguments are those of `_quantized`.
    """

    def each(act):
        lax.fori_loop(0, tiling.strips, lambda i, carry: act(i) or carry, 0)

    if not tiling.whole:
        each(lambda i: then(i, read(i)))
        return
    kept_ref, number = scratch[0], pl.program_id(2)
    first = pl.program_id(3) * tiling.strips

    @pl.when(number == 0)
    def _():
        each(lambda i: _store(kept_ref, first + i, read(i), tiling))

    @pl.when(number == 1)
    def _():
        each(lambda i: then(i, _strip(kept_ref, first + i, tiling)))


def _strip(ref, i, tiling):
    strip = ref[_place(i, tiling)]
    return strip.astype(jnp.float32).T if tiling.transposed else strip


def _store(ref, i, strip, tiling):
    strip = strip.T if tiling.transposed else strip
    ref[_place(i, tiling)] = strip.astype(ref.dtype)


def _place(i, tiling):
    here = pl.ds(pl.multiple_of(i * tiling.strip, tiling.strip), tiling.strip)
    return (here, slice(None)) if tiling.along == 1 else (slice(None), here)


def _rotate(x, *, matrix_ref, tiling, parts):
    """Multiplies each piece of `x` along the axis of the groups by the matrix."""
    if matrix_ref is None:
        return x
    matrix, axis = matrix_ref[...], tiling.quantizer.axis + 2
    size = len(matrix)
    pieces = [
        product(matrix, lax.slice_in_dim(x, i, i + size, axis=axis), axis, parts)
        for i in range(0, x.shape[axis], size)
    ]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)
