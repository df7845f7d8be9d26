"""One parameter while its matrices are rounded, in the order of the program."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.quantized_array import QuantizedArray, decoded, encoded
from cage_jax.finetuning.columns import Grids, forced_values, largest, round_columns
from cage_jax.finetuning.matrices import Places, arranged, put_back
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.rounding import Rounding, fit
from cage_jax.quantizers.scale_types import Float8


class Parameter:
    """A parameter, rounded to the nearest at first.

    Args:
      x: the array.
      codes: its codes, rounded to the nearest.
      grid: the grid that was given for it, or None.

    Attributes:
      codes: its present codes.
    """

    def __init__(self, x: jax.Array, codes: QuantizedArray, grid: Grid | None):
        self.x, self.codes, self.grid = x, codes, grid
        self._places: Any = None  # of the matrices that were rounded
        self._done = np.zeros((1, 1), bool)  # of each matrix and output

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
        values, grid = round_columns(
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
        x, divisor = self._found.rotated, self._found.grid.tensor_divisor
        if divisor is not None and self._group is not None:
            x = x * divisor
        return self._in_order(x)

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


@functools.partial(jax.jit, static_argnums=5)
def _replaced(codes, values, grid, which, mask, axes):
    """Replaces codes where the mask holds, and scales if they were found anew."""

    def put(old, found):
        stack = arranged(old, *axes)
        rows = jnp.where(mask[:, None, :], found.astype(old.dtype), stack[which])
        return put_back(stack.at[which].set(rows), old.shape, axes)

    encode = codes.quantizer.format.encode
    changes = {"codes": put(codes.codes, encode(values))}
    if grid is not None:
        changes["scale"] = put(codes.scale, grid.scale)
        if grid.zero_point is not None:
            changes["zero_point"] = put(codes.zero_point, encode(grid.zero_point))
        if grid.offset is not None:
            changes["offset"] = put(codes.offset, grid.offset)
    return dataclasses.replace(codes, **changes)
