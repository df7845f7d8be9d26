"""Kernels for TPU, each of which reads an array once and writes its results once.

Only groups that do not fit on the chip are read twice.

The arithmetic on a strip is in `strips`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.exact import times
from cage_jax.arrays.factors import Factors
from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.strips import TERMS, Joined, Strip, joined_grid, place, product
from cage_jax.pallas.tiling import Tiling
from cage_jax.pallas.tpu_launch import (
    Operand,
    launch,
    like,
    one_per_block,
    read_blocks,
    read_vector,
    written_blocks,
)
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.rounding import Rounding
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
    inputs = {"x": read_blocks(x, tiling)}
    outputs = {"value": written_blocks(x, x.dtype, tiling)}
    if masked:
        outputs["mask"] = written_blocks(x, jnp.int8, tiling)
    if tiling.quantizer.scale_type.has_tensor_divisor:
        spec = pl.BlockSpec((None, 8, LANES), lambda stack, *_: (stack, 0, 0))
        inputs["largest"] = Operand(_largest_bounds(x, tiling), spec)

    def kernel(refs):
        known = {"largest": refs.largest[:1, :1]} if "largest" in inputs else {}

        def write(i, strip):
            _store(refs.value, i, strip.value(x.dtype), tiling)
            if masked:
                _store(refs.mask, i, strip.mask(), tiling)

        read = partial(_filled, refs.x, tiling=tiling)
        _quantized(refs, read, write, tiling, keep_rotated=True, **known)

    found = launch("fake_quant", kernel, tiling, inputs, outputs, _scratch(tiling))
    each = tuple(like(x, found[name], tiling) for name in outputs)
    return each if masked else each[0]


def _largest_bounds(x, tiling):
    """Computes each matrix's largest bound: (stack, 8, 128), one number per matrix."""
    quantizer = tiling.quantizer

    def kernel(refs):
        rotate = _rotation(refs, tiling)

        @pl.when(pl.program_id(3) == 0)
        def _():
            refs.largest[...] = jnp.zeros(refs.largest.shape, jnp.float32)

        def one(i):
            rotated = rotate(_filled(refs.x, i, tiling))
            sized = times(rotated, quantizer.basis(rotated.shape).factor)
            bounds = quantizer.blocks(sized.shape).reduce(quantizer.scale.bounds, sized)
            largest = largest_of(bounds, (0, 1))
            refs.largest[...] = lax.max(
                refs.largest[...], jnp.broadcast_to(largest, refs.largest.shape)
            )

        _each_strip(one, tiling)

    outputs = {"largest": one_per_block(x, tiling)}
    found = launch(
        "largest_bounds", kernel, tiling, {"x": read_blocks(x, tiling)}, outputs
    )
    return jnp.max(found["largest"], axis=1)


def masked_gradient(
    mask: jax.Array, cotangent: jax.Array, *, tiling: Tiling
) -> jax.Array:
    """Masks a cotangent in the rotated basis: rotates it, masks it, rotates it back.

    Args:
      mask: int8, as returned by `fake_quant`.
      cotangent: an array like the quantized one.
      tiling: the blocks and strips of both.
    """
    # No block depends on another.
    tiling = dataclasses.replace(tiling, group_is_axis=False)

    def kernel(refs):
        rotate = _rotation(refs, tiling)
        square = Basis(tiling.quantizer.hadamard).factor ** 2

        def one(i):
            passing = _strip(refs.mask, i, tiling).astype(jnp.float32)
            gradient = rotate(_filled(refs.cotangent, i, tiling))
            gradient = rotate(jnp.where(passing != 0, gradient, 0)) * square
            _store(refs.gradient, i, gradient, tiling)

        _each_strip(one, tiling)

    inputs = {
        "mask": read_blocks(mask, tiling),
        "cotangent": read_blocks(cotangent, tiling),
    }
    outputs = {"gradient": written_blocks(cotangent, cotangent.dtype, tiling)}
    found = launch("masked_gradient", kernel, tiling, inputs, outputs)
    return like(cotangent, found["gradient"], tiling)


# --- a step of AdamW ------------------------------------------------------------------


def adamw_step(
    gradient: jax.Array,
    first: jax.Array,
    second: jax.Array,
    x: jax.Array,
    numbers: StepNumbers,
    previous: jax.Array | None = None,
    weights: Factors | None = None,
    *,
    tiling: Tiling,
    adamw: AdamW,
    at_updated: bool,
) -> tuple:
    """Takes a step of AdamW with the pull to the grid, in place for donated arrays.

    Args:
      gradient, first, second: the gradient and the moments of the parameter.
      x: the parameter, which `tiling` was made for.
      numbers: the numbers of this step.
      previous: the codes at the step before, int8, for statistics; None for no
        statistics.
      weights: weights of the error, or None. Statistics are those of the error without
        them.
      tiling: the blocks and strips of all arrays.
      adamw: the optimizer.
      at_updated: whether the error is that of the updated parameter.

    Returns:
      The moments and the parameter after the step. For statistics, also the codes, and
      a float32 array of shape (4,): the sums of squares of the error, of the parameter
      that the error is computed from, and of the update, and the number of codes that
      differ.
    """
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    inputs = {
        "numbers": Operand(jnp.stack(numbers), scalars),
        "x": read_blocks(x, tiling),
    }
    # The moments move in the read that finds the update, once for each block.
    for name, array in (("gradient", gradient), ("first", first), ("second", second)):
        inputs[name] = read_blocks(array, tiling, first=at_updated)
    if weights is not None:
        inputs["along"] = read_vector(weights.inputs, tiling, along=True)
        inputs["across"] = read_vector(weights.outputs, tiling, along=False)
    outputs = {
        "new_first": written_blocks(x, first.dtype, tiling, first=at_updated),
        "new_second": written_blocks(x, second.dtype, tiling, first=at_updated),
        "new_x": written_blocks(x, x.dtype, tiling),
    }
    aliases = {"first": "new_first", "second": "new_second", "x": "new_x"}
    scratch = _scratch(tiling)
    if at_updated:
        shape = tiling.scratch_shape if tiling.group_is_axis else tiling.block
        scratch = {"rest": pltpu.VMEM(shape, jnp.float32)} | scratch
    if previous is not None:
        inputs["previous"] = read_blocks(previous, tiling, first=False)
        outputs["codes"] = written_blocks(x, previous.dtype, tiling)
        outputs["sums"] = one_per_block(x, tiling)
        aliases["previous"] = "codes"

    def kernel(refs):
        count = len(StepNumbers._fields)
        numbers = StepNumbers(*(refs.numbers[i] for i in range(count)))
        begin = pl.program_id(3) * tiling.strips if tiling.group_is_axis else 0
        measured = previous is not None
        largest = None if weights is None else weights.largest
        options = tiling, adamw, at_updated, measured, largest
        _Step(refs, numbers, begin, *options).run()

    found = launch("adamw_step", kernel, tiling, inputs, outputs, scratch, aliases)
    sums = found.pop("sums", None)
    after = tuple(like(x, array, tiling) for array in found.values())
    return after if sums is None else (*after, jnp.sum(sums, axis=(0, 1))[:4, 0])


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step of AdamW on one block, strip by strip; `i` is the index of a strip.

    `refs` has references to all arrays by their names in `adamw_step`. If a group is
    longer than the block, its strips are stored from index `begin` on. `largest` is the
    bound of the weights of the error, or None without weights.
    """

    refs: Any
    numbers: StepNumbers
    begin: Any
    tiling: Tiling
    adamw: AdamW
    at_updated: bool
    measured: bool
    largest: float | None

    def run(self):
        """Steps all strips, with the error only if it is needed."""
        refs, tiling = self.refs, self.tiling
        with_error = partial(
            _quantized, refs, self._read, self._pull, tiling, keep_rotated=False
        )
        if self.measured:

            @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
            def _():
                refs.sums[...] = jnp.zeros(refs.sums.shape, jnp.float32)

            with_error()
            return
        pl.when(self.numbers.pull != 0)(with_error)

        @pl.when(self.numbers.pull == 0)
        def _():
            write = partial(self._write, correction=0.0)
            _unquantized(refs, self._read, write, tiling)

    def _read(self, i):
        """Returns a strip of the parameter that the error is computed from."""
        x = _filled(self.refs.x, i, self.tiling)
        if not self.at_updated:
            return x
        update = self._update(i, x)
        updated = (x + update).astype(self.refs.x.dtype).astype(jnp.float32)
        # Store what rounding took away from the update. Then everything is added to
        # `x` at once, as by `apply_updates`; otherwise the two forms would drift
        # apart with each step.
        here = self.begin + i
        _store(self.refs.rest, here, update - (updated - x), self.tiling)
        return _within(updated, i, self.tiling)

    def _update(self, i, x):
        """Returns the update of a strip and stores the strip's moments."""
        refs, tiling = self.refs, self.tiling
        gradient, first, second = (
            _strip(ref, i, tiling) for ref in (refs.gradient, refs.first, refs.second)
        )
        dtypes = Dtypes(refs.x.dtype, refs.first.dtype)
        first, second, update = self.adamw.step(
            gradient, first, second, x, self.numbers, dtypes
        )
        _store(refs.new_first, i, first, tiling)
        _store(refs.new_second, i, second, tiling)
        if self.measured:
            self._add(2, i, jnp.square(update))
        return update

    def _pull(self, i, strip):
        """Steps a strip, with the correction."""
        values = strip.rounding.code_values()
        error = strip.x - strip.dequantized(values)
        if self.measured:
            codes = strip.codes(values)
            flipped = codes != _strip(self.refs.previous, i, self.tiling)
            _store(self.refs.codes, i, codes, self.tiling)
            self._add(0, i, jnp.square(error))
            self._add(1, i, jnp.square(strip.x))
            self._add(3, i, jnp.where(flipped, 1.0, 0.0))
            error = jnp.where(self.numbers.pull != 0, error, 0)
        self._write(i, strip.x, self.numbers.pull * self._weighted(i, error))

    def _weighted(self, i, error):
        """Weights the error of a strip, if there are weights."""
        if self.largest is None:
            return error
        along, across = self.refs.along[pl.ds(i, 1)], self.refs.across[...]
        is_upright = self.tiling.along == 1 or self.tiling.transposed
        column, row = (along, across) if is_upright else (across, along)
        column = jnp.broadcast_to(column, (row.size, column.size)).T
        return jnp.minimum(column * row, self.largest) * error

    def _write(self, i, x, correction):
        """Stores a strip after the step; `x` is what `_read` returned."""
        if self.at_updated:
            rest = _strip(self.refs.rest, self.begin + i, self.tiling)
        else:
            rest = self._update(i, x)
        _store(self.refs.new_x, i, x + (rest + correction), self.tiling)

    def _add(self, row, i, part):
        """Adds the sum of what comes from a strip to a row of the sums."""
        sums, part = self.refs.sums, _within(part, i, self.tiling)
        rows = lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        sums[...] += jnp.where(rows == row, jnp.sum(part, keepdims=True), 0)


# --- the strips of a block ------------------------------------------------------------


def _quantized(refs, read, then, tiling, *, keep_rotated, **known):
    """Calls `then` with the index of each strip and the `Strip`, in the last read.

    Args:
      refs: references to the matrix of the rotation and the memory of `_scratch`.
      read: returns a strip of the array by its index; called once for each strip.
      then: function of the index and the `Strip`.
      tiling: the blocks.
      keep_rotated: whether the first read keeps strips rotated, so that the last one
        need not rotate them again.
      known: arguments for the scale rule that it need not compute.
    """
    quantizer, rotate = tiling.quantizer, _rotation(refs, tiling)
    if not tiling.group_is_axis:

        def one(i):
            x = read(i)
            then(i, Strip.fitted(x, rotate(x), rotate, quantizer, **known))

        _each_strip(one, tiling)
        return

    number, begin = pl.program_id(2), pl.program_id(3) * tiling.strips

    joined, structure = jax.tree.flatten(Joined.of_nothing(tiling))
    joined_refs = [getattr(refs, f"joined_{number}") for number in range(len(joined))]

    def find(i, found):
        x = read(i)
        rotated = rotate(x)
        if tiling.kept:
            _store(refs.kept, begin + i, rotated if keep_rotated else x, tiling)
        return found.with_strip(rotated, tiling)

    def so_far():
        return jax.tree.unflatten(structure, [ref[...] for ref in joined_refs])

    def use(i, grid, poison):
        x = _strip(refs.kept, begin + i, tiling) if tiling.kept else read(i)
        rotated = x if tiling.kept and keep_rotated else rotate(x)
        rounding = Rounding(rotated, grid, None, quantizer)
        then(i, Strip(None if keep_rotated else x, rounding, poison, rotate))

    @pl.when(number == 0)
    def _():
        @pl.when(begin == 0)
        def _():
            for ref, nothing in zip(joined_refs, joined):
                ref[...] = nothing

        found = lax.fori_loop(0, tiling.strips, find, so_far())
        for ref, number in zip(joined_refs, jax.tree.leaves(found)):
            ref[...] = number

    @pl.when(number == 1)
    def _():
        whole = so_far()
        grid = joined_grid(whole.parts, tiling)
        _each_strip(partial(use, grid=grid, poison=whole.poison), tiling)


def _unquantized(refs, read, then, tiling):
    """Calls `then` with the index of each strip and the strip, in the last read.

    The arguments are those of `_quantized`.
    """
    if not tiling.group_is_axis:
        _each_strip(lambda i: then(i, read(i)), tiling)
        return
    number, begin = pl.program_id(2), pl.program_id(3) * tiling.strips

    def keep(i):
        _store(refs.kept, begin + i, read(i), tiling)

    def use(i):
        then(i, _strip(refs.kept, begin + i, tiling) if tiling.kept else read(i))

    if tiling.kept:
        pl.when(number == 0)(partial(_each_strip, keep, tiling))
    pl.when(number == 1)(partial(_each_strip, use, tiling))


def _each_strip(act, tiling):
    # A loop, and not the whole block at once, whose values would spill from registers
    # and, on v4 and v5, run out of memory.
    lax.fori_loop(0, tiling.strips, lambda i, carry: act(i) or carry, 0)


def _filled(ref, i, tiling):
    """Returns a strip, float32, with zeros beyond the array: no rule counts those."""
    return _within(_strip(ref, i, tiling).astype(jnp.float32), i, tiling)


def _within(strip, i, tiling):
    """Returns what comes from a strip, with zeros where that is beyond the array."""
    along, across = tiling.along - 1, 2 - tiling.along
    start = pl.program_id(3) * tiling.block[along] + i * tiling.strip
    left = {along: tiling.length - start}
    left[across] = tiling.shape[across + 1] - pl.program_id(1) * tiling.across
    for axis, count in left.items():
        if tiling.shape[axis + 1] % tiling.block[axis]:
            place = lax.broadcasted_iota(
                jnp.int32, strip.shape, 1 - axis if tiling.transposed else axis
            )
            strip = jnp.where(place < count, strip, 0)
    return strip


def _strip(ref, i, tiling):
    strip = ref[place(i, tiling)]
    return strip.astype(jnp.float32).T if tiling.transposed else strip


def _store(ref, i, strip, tiling):
    strip = strip.T if tiling.transposed else strip
    ref[place(i, tiling)] = strip.astype(ref.dtype)


def _rotation(refs, tiling):
    """Returns a function of a strip and `terms` that rotates the strip.

    Each number of the strip is the sum of `terms` bfloat16 numbers.
    """

    def rotate(x, terms=TERMS):
        if refs.matrix is None:
            return x
        matrix, axis = refs.matrix[...], tiling.quantizer.axis + 2
        size = len(matrix)
        slices = [
            product(matrix, lax.slice_in_dim(x, i, i + size, axis=axis), axis, terms)
            for i in range(0, x.shape[axis], size)
        ]
        return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis)

    return rotate


def _scratch(tiling):
    """Returns the scratch memory for groups that are all of an axis."""
    if not tiling.group_is_axis:
        return {}
    per_group = pltpu.VMEM(tiling.per_group, jnp.float32)
    joined = jax.tree.leaves(jax.eval_shape(partial(Joined.of_nothing, tiling)))
    scratch = {f"joined_{number}": per_group for number in range(len(joined))}
    if tiling.kept:
        scratch["kept"] = pltpu.VMEM(tiling.scratch_shape, jnp.float32)
    return scratch
