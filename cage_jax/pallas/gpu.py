"""Kernels for GPU, written in Triton: one program for each block of an array.

The arithmetic on a strip is in `strips`; a strip stays in registers. Triton's division
and square root are approximate, and its lowering has no rounding. So these are PTX
instructions here, except where a kernel is interpreted.

JAX deprecates this backend from 0.11 on; Mosaic GPU is to replace it, through
`plgpu.kernel` of `jax.experimental.pallas.mosaic_gpu`. Kernels written for it were
tried with JAX 0.10.2 and compile for an H200 that is not here, but not these:

- A strip's grid is a reduction along one axis of an array. Lane-level code has none
  ("No support for axes yet"), and warpgroup-level code lacks `is_finite`.
- The program holds MLIR that is compiled once a GPU loads it, so no registers and
  spills can be counted without one, and these counts are how kernels are checked.

The arithmetic in `strips` and `quantizers` knows neither backend. What has to be
written anew is in this file: `_call`, `_each`, `_rotation` and `_instruction`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.factors import Factors
from cage_jax.arrays.jaxprs import called, evaluate, unchanged
from cage_jax.pallas.strips import (
    TERMS,
    Joined,
    Strip,
    joined_grid,
    place,
    product,
    result_like,
    rotation,
)
from cage_jax.pallas.tiling import Tiling
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.rounding import Rounding

# Exact by IEEE 754 for float32; rounding is to the nearest, half to even.
_INSTRUCTIONS = {
    lax.div_p: "div.rn.f32 $0, $1, $2;",
    lax.sqrt_p: "sqrt.rn.f32 $0, $1;",
    lax.round_p: "cvt.rni.f32.f32 $0, $1;",
}
# Elements of a strip per warp, 16 per thread: twice as many spill in a rotation.
_PER_WARP = 512


def fake_quant(
    x: jax.Array, *, tiling: Tiling, masked: bool, interpret: bool = False
) -> Any:
    """Quantizes and dequantizes `x`, as `tpu.fake_quant` does.

    With `interpret`, this and the other kernels run as a `jax.numpy` program.
    """
    exactly = _exactly(interpret)

    def kernel(x_ref, matrix_ref, *written):
        strip_of = _strip_of(x_ref, matrix_ref, tiling, exactly)

        def found(x):
            strip = strip_of(x)
            value = strip.value(x.dtype)
            return (value, strip.mask()) if masked else (value,)

        _each(exactly(found), (x_ref,), written, tiling)

    dtypes = (x.dtype, jnp.int8) if masked else (x.dtype,)
    found = _call(kernel, tiling, "fake_quant", (x,), dtypes, interpret=interpret)
    return found if masked else found[0]


def masked_gradient(
    mask: jax.Array, cotangent: jax.Array, *, tiling: Tiling, interpret: bool = False
) -> jax.Array:
    """Masks a cotangent in the rotated basis, as `tpu.masked_gradient` does."""

    def kernel(mask_ref, cotangent_ref, matrix_ref, gradient_ref):
        rotate = _rotation(matrix_ref, tiling)
        square = Basis(tiling.quantizer.hadamard).factor ** 2

        def passed(mask, cotangent):
            gradient = rotate(cotangent.astype(jnp.float32), terms=_terms(cotangent))
            gradient = jnp.where(mask.astype(jnp.int32) != 0, gradient, 0)
            return (rotate(gradient, terms=TERMS) * square,)

        _each(passed, (mask_ref, cotangent_ref), (gradient_ref,), tiling)

    arrays, dtypes = (mask, cotangent), (cotangent.dtype,)
    (gradient,) = _call(
        kernel, tiling, "masked_gradient", arrays, dtypes, interpret=interpret
    )
    return gradient


def adamw_step(
    gradient: jax.Array,
    first: jax.Array,
    second: jax.Array,
    x: jax.Array,
    numbers: StepNumbers,
    previous: None = None,
    weights: Factors | None = None,
    *,
    tiling: Tiling,
    adamw: AdamW,
    at_updated: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes a step of AdamW with the pull to the grid, as `tpu.adamw_step` does.

    There are no statistics. With `at_updated`, each strip must hold whole groups.
    """
    exactly, dtypes = _exactly(interpret), Dtypes(x.dtype, first.dtype)
    vectors = () if weights is None else _column_and_row(weights, tiling)

    def kernel(*refs):
        *read, numbers_ref, matrix_ref, first_ref, second_ref, new_ref = refs
        written, x_ref = (first_ref, second_ref, new_ref), read[3]
        numbers = StepNumbers(*(numbers_ref[i] for i in range(len(numbers_ref))))

        def step(error_of):
            def after(gradient, first, second, x, *factors):
                *moments, update = adamw.step(
                    gradient, first, second, x, numbers, dtypes
                )
                wide = x.astype(jnp.float32)
                at = (wide + update).astype(x.dtype) if at_updated else x
                return *moments, wide + (update + numbers.pull * error_of(at, *factors))

            _each(exactly(after), read, written, tiling)

        @pl.when(numbers.pull != 0)
        def _():
            strip_of = _strip_of(x_ref, matrix_ref, tiling, exactly)

            def error(x, *factors):
                error = x.astype(jnp.float32) - strip_of(x).value()
                if weights is None:
                    return error
                inputs, outputs = factors
                return Factors(inputs, outputs, weights.largest).product() * error

            step(error)

        @pl.when(numbers.pull == 0)
        def _():
            step(lambda x, *factors: 0.0)

    return _call(
        kernel,
        tiling,
        "adamw_step",
        (gradient, first, second, x),
        (first.dtype, second.dtype, x.dtype),
        vectors=vectors,
        numbers=jnp.stack(numbers),
        aliases={1: 0, 2: 1, 3: 2},
        interpret=interpret,
    )


def _column_and_row(weights, tiling):
    """Returns the factors in the shape of the tiling, with columns or rows of 1."""
    stack, rows, columns = tiling.shape
    along, across = weights.inputs, weights.outputs
    column, row = (along, across) if tiling.along == 1 else (across, along)
    return column.reshape(stack, rows, 1), row.reshape(stack, 1, columns)


def _call(
    kernel,
    tiling,
    name,
    arrays,
    dtypes,
    *,
    vectors=(),
    numbers=None,
    aliases=None,
    interpret,
):
    """Runs a kernel over all blocks.

    Args:
      kernel: receives references to the blocks of `arrays` and of `vectors`, to
        `numbers`, if any, to the matrix of the rotation (None without one), and to the
        blocks of the results.
      tiling: the blocks.
      name: name of the kernel in a program.
      arrays: the arrays that are divided into blocks.
      dtypes: dtypes of the results.
      vectors: nothing, or arrays (stack, rows, 1) and (stack, 1, columns), which are
        divided like the others.
      numbers: a vector that every block receives, or None.
      aliases: maps the index of an argument to that of the result that replaces it.
      interpret: as in `fake_quant`.
    """
    stack, rows, columns = tiling.shape
    height, width = tiling.block
    # It rotates a column of a strip, or one block of a row.
    matrix = rotation(tiling, tiling.strip if tiling.along == 1 else 1)
    fixed = [each for each in (numbers, matrix) if each is not None]
    read = len(arrays) + len(vectors) + len(fixed)

    block = pl.BlockSpec((None, height, width), lambda j, i, k: (k, i, j))
    column = pl.BlockSpec((None, height, 1), lambda j, i, k: (k, i, 0))
    row = pl.BlockSpec((None, 1, width), lambda j, i, k: (k, 0, j))

    def run(*refs):
        if matrix is None:
            refs = *refs[:read], None, *refs[read:]
        kernel(*refs)

    shapes = [result_like(arrays[-1], tiling.shape, dtype) for dtype in dtypes]
    found = pl.pallas_call(
        run,
        # Neighbouring programs take neighbouring columns.
        grid=(columns // width, rows // height, stack),
        in_specs=[
            *[block] * len(arrays),
            *(column, row)[: len(vectors)],
            *(
                pl.BlockSpec(each.shape, lambda *_, n=each.ndim: (0,) * n)
                for each in fixed
            ),
        ],
        out_specs=[block] * len(dtypes),
        out_shape=shapes,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=_warps(tiling), num_stages=1),
        interpret=interpret,
        name=f"cage_{name}",
    )(*(array.reshape(tiling.shape) for array in arrays), *vectors, *fixed)
    return tuple(each.reshape(arrays[-1].shape) for each in found)


def _warps(tiling):
    height, width = tiling.block
    elements = height * width // tiling.strips
    return min(16, max(4, elements // _PER_WARP))


def _rotation(matrix_ref, tiling):
    """Returns a function of a strip and `terms` that rotates the strip.

    Each number of the strip is the sum of `terms` bfloat16 numbers.
    """
    if matrix_ref is None:
        return lambda x, terms: x
    matrix = matrix_ref[...]

    def rotate(x, terms):
        if tiling.along == 1:
            return product(matrix, x, 0, terms)
        # Columns need fewer registers in the matrix unit than rows.
        columns = x.reshape(-1, len(matrix)).T
        return product(matrix, columns, 0, terms).T.reshape(x.shape)

    return rotate


def _terms(x):
    return 1 if x.dtype == jnp.bfloat16 else TERMS


def _strip_of(x_ref, matrix_ref, tiling, exactly):
    """Returns a function that makes a `Strip` of an array, with its groups' grid."""
    rotate = _rotation(matrix_ref, tiling)

    def rotated(x):
        return rotate(x.astype(jnp.float32), terms=_terms(x))

    if not tiling.group_is_axis:

        def fitted(x):
            wide = x.astype(jnp.float32)
            return Strip.fitted(wide, rotated(x), rotate, tiling.quantizer)

        return fitted

    def joined(x, found):
        return found.with_strip(rotated(x), tiling)

    def one(i, found):
        return exactly(joined)(x_ref[place(i, tiling)], found)

    whole = lax.fori_loop(0, tiling.strips, one, Joined.of_nothing(tiling))
    grid = exactly(partial(joined_grid, tiling=tiling))(whole.parts)

    def strip(x):
        rounding = Rounding(rotated(x), grid, None, tiling.quantizer)
        return Strip(x.astype(jnp.float32), rounding, whole.poison, rotate)

    return strip


def _each(function, read, written, tiling):
    """Applies `function` to each strip of a block and writes the results.

    A reference of size 1 along an axis is read whole along it.
    """

    def part(ref, here):
        whole = slice(None)
        return ref[tuple(whole if n == 1 else at for n, at in zip(ref.shape, here))]

    def one(i, carry):
        here = place(i, tiling)
        found = function(*(part(ref, here) for ref in read))
        for ref, strip in zip(written, found, strict=True):
            ref[here] = strip.astype(ref.dtype)
        return carry

    lax.fori_loop(0, tiling.strips, one, 0)


def _exactly(interpret: bool) -> Callable:
    """Replaces div, sqrt and round in a function by IEEE-exact PTX instructions."""
    if interpret:
        return lambda function: function

    def exactly(function):
        def run(*args):
            jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
            values = [*jaxpr.consts, *jax.tree.leaves(args)]
            found = evaluate(jaxpr.jaxpr, values, _exact)
            return jax.tree.unflatten(jax.tree.structure(out), found)

        return run

    return exactly


def _exact(equation, values):
    if equation.primitive in _INSTRUCTIONS:
        return [_instruction(equation, values)]
    if (inner := called(equation, custom_derivatives=True)) is not None:
        return evaluate(inner.jaxpr, [*inner.consts, *values], _exact)
    return unchanged(equation, values)


def _instruction(equation, values):
    (out,) = equation.outvars
    values = [jnp.broadcast_to(value, out.aval.shape) for value in values]
    (found,) = plgpu.elementwise_inline_asm(
        _INSTRUCTIONS[equation.primitive],
        args=values,
        constraints=",".join(["=f", *["f"] * len(values)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(out.aval.shape, out.aval.dtype)],
    )
    return found
