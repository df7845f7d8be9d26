"""Matrices of one parameter in the basis of their quantizer, as they are rounded."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.finetuning.gptq.columns import (
    Grids,
    forced_values,
    largest,
    round_columns,
)
from cage_jax.finetuning.gptq.matrices import arranged
from cage_jax.quantizers.basis import Basis
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import Rounding, fit
from cage_jax.quantizers.scale_types import Float8


class Part:
    """All matrices of a parameter, or some of a stack.

    Args:
      x: the array.
      quantizer: its quantizer.
      grid: the grid that was given for it, or None.
      axes: its axes along the stack, the inputs and the outputs.
    """

    def __init__(
        self,
        x: jax.Array,
        quantizer: Quantizer,
        grid: Grid | None,
        axes: Sequence[Sequence[int]],
    ):
        self._quantizer, self._grid, self._axes = quantizer, grid, axes
        self._shape = x.shape
        # Rotated, with the grid of the whole.
        self._found = _fitted(x, quantizer, grid)

    def round(
        self, which: np.ndarray | slice, sums: jax.Array, damping: float
    ) -> tuple[jax.Array, jax.Array, Grid | None]:
        """Rounds matrices.

        Args:
          which: their numbers here.
          sums: the sums of products of their inputs, (stack, inputs, inputs).
          damping: as in `gptq`.

        Returns:
          What `round_columns` returns; the weights before without a divisor.
        """
        known, divisor = self._known, self._divisor
        values, before, grid = round_columns(
            self._arranged[which],
            self._rotated(sums),
            jax.tree.map(lambda part: part[which], known),
            damping,
            quantizer=self._cell,
            group=self._group,
        )
        if divisor is not None:
            before = before / divisor[which]
        return values, before, grid

    @functools.cached_property
    def _group(self):
        """How many neighbouring inputs share a scale; None if the grid is kept."""
        blocks, inputs = self._blocks, self._axes[1]
        if self._grid is not None or not set(blocks.axes) <= set(inputs):
            return None
        sizes = [blocks.by_axis.get(axis, 1) for axis in inputs]
        lengths = [self._shape[axis] for axis in inputs]
        parts = [n for n, size in enumerate(sizes) if size > 1]
        neighbours = sizes[parts[0] + 1 :] == lengths[parts[0] + 1 :] if parts else True
        return math.prod(sizes) if neighbours and sizes != lengths else None

    @property
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
        """The matrices, times their divisor."""
        x = self._in_order(self._found.rotated)
        return x if self._divisor is None else x * self._divisor

    @functools.cached_property
    def _divisor(self):
        """Multiplier of matrices whose scales have a divisor."""
        divisor = self._found.grid.tensor_divisor
        if divisor is None or self._group is None:
            return None
        return self._in_order(jnp.broadcast_to(divisor, self._shape))

    @functools.cached_property
    def _known(self) -> Grids | None:
        """Grids as `round_columns` must know them."""
        found, blocks = self._found, self._blocks
        forced = forced_values(found)
        if self._grid is not None:
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
        """Rotates sums of products of inputs into the basis."""
        basis, inputs = self._quantizer.basis(self._shape), self._axes[1]
        if basis.block is None or basis.axis not in inputs:
            return sums
        lengths = [self._shape[axis] for axis in inputs]
        each = sums.reshape(-1, *lengths, *lengths)
        for begin in (1, 1 + len(lengths)):
            at = Basis(basis.block, begin + inputs.index(basis.axis), basis.seed)
            each = at.rotate(each)
        return each.reshape(sums.shape)

    @property
    def _blocks(self):
        return self._found.quantizer.blocks(self._shape)

    def _in_order(self, x):
        return arranged(x, *self._axes)


@functools.partial(jax.jit, static_argnums=1)
def _fitted(x, quantizer, grid) -> Rounding:
    """Rotates an array into the basis of its quantizer, and fits its grid there."""
    rotated = quantizer.basis(x.shape).rotate(jnp.asarray(x)).astype(jnp.float32)
    quantizer = dataclasses.replace(quantizer, hadamard=None, hadamard_seed=None)
    return fit(rotated, quantizer, grid)
