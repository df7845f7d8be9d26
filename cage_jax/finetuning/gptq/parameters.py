"""One parameter while its matrices are rounded, in the order of the program."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.quantize import fake_quant
from cage_jax.core.quantized_array import QuantizedArray, decoded, encoded, grid_of
from cage_jax.finetuning.gptq.columns import (
    Grids,
    forced_values,
    largest,
    round_columns,
)
from cage_jax.finetuning.gptq.matrices import Places, arranged, put_back
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.rounding import Rounding, fit
from cage_jax.quantizers.scale_types import Float8

# Weights near a tie may be rounded otherwise after a rotation there and back.
_RIGHT = 0.999


class Parameter:
    """A parameter, rounded to the nearest at first.

    Args:
      x: the array.
      codes: its codes, rounded to the nearest.
      grid: the grid that was given for it, or None.
      keeps: whether what is rounded is kept, for `unrounded`.

    Attributes:
      codes: its present codes.
    """

    def __init__(
        self,
        x: jax.Array,
        codes: QuantizedArray,
        grid: Grid | None,
        keeps: bool = False,
    ):
        self.x, self.codes, self.grid, self._keeps = x, codes, grid, keeps
        self._places: Any = None  # of the matrices that were rounded
        self._done = np.zeros((1, 1), bool)  # of each matrix and output
        self._before: Any = None  # what was rounded, in the order of the matrices

    @functools.cached_property
    def values(self) -> jax.Array:
        """The present values."""
        return decoded(self.codes)

    @functools.cached_property
    def numbers(self) -> jax.Array:
        """The numbers of its elements."""
        shape = self.codes.shape
        return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)

    @property
    def count(self) -> int:
        """How many of its weights are rounded."""
        return round(self._done.mean() * math.prod(self.codes.shape))

    def takes(self, places: Places) -> bool:
        """Tells whether matrices lie along the same axes as those that were rounded."""
        return self._places is None or self._places.axes == places.axes

    def is_done(self, places: Places | None = None) -> bool:
        """Tells whether all matrices, or those in `places`, are rounded."""
        if places is None or self._places is None:
            return bool(self._done.all())
        return bool(self._done[np.ix_(places.matrices, places.columns)].all())

    def finished(self) -> QuantizedArray:
        """Returns the codes, with the scales that will be found in their values.

        A scale times the last code, over the last code, may differ from it in the last
        bit; it does not a second or third time.
        """
        if self.grid is not None:
            return self.codes
        codes, most = self.codes, 1e-6 * float(jnp.max(jnp.abs(self.values)))
        for _ in range(3):
            codes = encoded(decoded(codes), codes.quantizer, None, None)
            if not jnp.allclose(decoded(codes), self.values, rtol=1e-6, atol=most):
                return self.codes
        return codes

    def unrounded(self) -> jax.Array:
        """Returns the weights that were rounded to the codes, so that they still are.

        A weight beyond the ends of its grid is at its end. All are on the grid where
        the scales found in them would be others.
        """
        if self._before is None:
            return self.x
        codes = self.finished()
        values, quantizer = decoded(codes), codes.quantizer
        before = self._before / self._divisor
        before = put_back(before, self.x.shape, self._places.axes)
        basis, grid = quantizer.basis(self.x.shape), grid_of(codes)
        found = Rounding(before / basis.factor, grid, None, quantizer)
        on_grid = basis.rotate(values)
        same = found.code_values() == quantizer.format.decode(codes.codes, before.dtype)
        start = jnp.where(same & found.is_inside(0.0), before, on_grid)
        start = basis.unrotate(start).astype(self.x.dtype)
        known = grid if quantizer.scale.needs_grid else self.grid
        again = fake_quant(start, quantizer, grid=known)
        most = 1e-5 * jnp.max(jnp.abs(values))
        right = jnp.isclose(again, values, rtol=1e-5, atol=most)
        if jnp.mean(right) < _RIGHT:
            return values
        return start if basis.block else jnp.where(right, start, values)

    def round(
        self, places: Places, matrices: np.ndarray, sums: jax.Array, damping: float
    ) -> None:
        """Rounds matrices.

        Args:
          places: where the matrices lie; those of `takes`.
          matrices: the number of the matrix of each of `sums`.
          sums: the sums of products of inputs, (stack, inputs, inputs).
          damping: as in `gptq`.
        """
        if self._places is None:
            self._places = places
            shape = self._arranged.shape
            self._done = np.zeros((shape[0], shape[2]), bool)
        which, owners = np.unique(matrices, return_inverse=True)
        mask = np.zeros(self._done[which].shape, bool)
        mask[:, places.columns] = True
        mask &= ~self._done[which]
        self._done[which] |= mask
        order = np.argsort(places.rows)
        sums = jax.ops.segment_sum(sums, owners, len(which))[:, order][:, :, order]
        values, before, grid = round_columns(
            self._arranged[which],
            self._rotated(sums),
            jax.tree.map(lambda part: part[which], self._known),
            damping,
            quantizer=self._cell,
            group=self._group,
        )
        if not bool(jnp.isfinite(values).all()):
            raise ValueError(
                f"`damping` must be larger, so that the products of the inputs can be "
                f"inverted; got {damping}. Use 0.01, or 0.1."
            )
        self.codes = _replaced(self.codes, values, grid, which, mask, places.axes)
        if self._keeps:
            old = self._arranged if self._before is None else self._before
            self._before = _put(old, before, which, mask)
        self.__dict__.pop("values", None)
        if self.is_done():
            for name in ("numbers", "_found", "_arranged", "_known"):
                self.__dict__.pop(name)

    # --- in the basis of the quantizer ------------------------------------------------

    @property
    def _quantizer(self):
        return self.codes.quantizer

    @functools.cached_property
    def _found(self) -> Rounding:
        """The rotated array with the grid of the whole."""
        return _fitted(self.x, self._quantizer, self.grid)

    @functools.cached_property
    def _group(self) -> int | None:
        """How many neighbouring inputs share a scale; None if the grid is kept."""
        blocks, shape = self._found.quantizer.blocks(self.x.shape), self.x.shape
        inputs = self._places.inputs
        if self.grid is not None or not set(blocks.axes) <= set(inputs):
            return None
        sizes = [blocks.by_axis.get(axis, 1) for axis in inputs]
        lengths = [shape[axis] for axis in inputs]
        parts = [n for n, size in enumerate(sizes) if size > 1]
        neighbours = sizes[parts[0] + 1 :] == lengths[parts[0] + 1 :] if parts else True
        return math.prod(sizes) if neighbours and sizes != lengths else None

    @functools.cached_property
    def _cell(self):
        """The quantizer of a matrix; the divisor of a tensor multiplies its values."""
        quantizer = dataclasses.replace(
            self._quantizer, axis=0, group_size=None, hadamard=None, hadamard_seed=None
        )
        if not quantizer.scale_type.has_tensor_divisor:
            return quantizer
        return dataclasses.replace(quantizer, scale_type=Float8(tensor_divisor=False))

    @functools.cached_property
    def _arranged(self):
        x = self._found.rotated
        return self._in_order(x) * self._divisor

    @functools.cached_property
    def _divisor(self):
        """What multiplies a matrix whose scales have a divisor."""
        divisor = self._found.grid.tensor_divisor
        if divisor is None or self._group is None:
            return 1.0
        return self._in_order(jnp.broadcast_to(divisor, self.x.shape))

    def _in_order(self, x):
        return arranged(x, *self._places.axes)

    @functools.cached_property
    def _known(self) -> Grids | None:
        """What `round_columns` must know of the grid."""
        found, blocks = self._found, self._found.quantizer.blocks(self.x.shape)
        forced = forced_values(found)
        if self.grid is not None:
            forced = jnp.full_like(forced, jnp.nan)
        if self._group is not None and found.grid.tensor_divisor is None:
            return None
        if self._group is not None:
            # The group with the largest number sets the divisor of its tensor.
            sizes = blocks.reduce(largest, jnp.abs(found.rotated))
            sets = sizes == largest(sizes, blocks.tensor_axes)
            scale = jnp.where(sets, found.grid.scale, 0)
            kept = found.grid._replace(scale=scale, tensor_divisor=None)
            return jax.tree.map(self._in_order, Grids(kept, None, forced))
        step = found.grid._replace(scale=found.grid.step, tensor_divisor=None)
        step, rounding_step = jax.tree.map(blocks.spread, (step, found.rounding_grid))
        return jax.tree.map(self._in_order, Grids(step, rounding_step, forced))

    def _rotated(self, sums):
        """Rotates sums of products into the basis."""
        basis = self._quantizer.basis(self.x.shape)
        inputs = self._places.inputs
        if basis.block is None or basis.axis not in inputs:
            return sums
        lengths = [self.x.shape[axis] for axis in inputs]
        each = sums.reshape(-1, *lengths, *lengths)
        for begin in (1, 1 + len(lengths)):
            at = Basis(basis.block, begin + inputs.index(basis.axis), basis.seed)
            each = at.rotate(each)
        return each.reshape(sums.shape)


@functools.partial(jax.jit, static_argnums=1)
def _fitted(x, quantizer, grid):
    """Rotates an array into the basis of its quantizer, and fits its grid there."""
    rotated = quantizer.basis(x.shape).rotate(jnp.asarray(x)).astype(jnp.float32)
    quantizer = dataclasses.replace(quantizer, hadamard=None, hadamard_seed=None)
    return fit(rotated, quantizer, grid)


@jax.jit
def _put(stack, found, which, mask):
    """Replaces the columns of matrices where the mask holds."""
    rows = jnp.where(mask[:, None, :], found.astype(stack.dtype), stack[which])
    return stack.at[which].set(rows)


@functools.partial(jax.jit, static_argnums=5)
def _replaced(codes, values, grid, which, mask, axes):
    """Replaces codes where the mask holds, and scales if they were found anew."""

    def put(old, found):
        stack = _put(arranged(old, *axes), found, which, mask)
        return put_back(stack, old.shape, axes)

    encode = codes.quantizer.format.encode
    changes = {"codes": put(codes.codes, encode(values))}
    if grid is not None:
        changes["scale"] = put(codes.scale, grid.scale)
        if grid.zero_point is not None:
            changes["zero_point"] = put(codes.zero_point, encode(grid.zero_point))
        if grid.offset is not None:
            changes["offset"] = put(codes.offset, grid.offset)
    return dataclasses.replace(codes, **changes)
