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
from cage_jax.finetuning.gptq.matrices import Places, arranged, put_back
from cage_jax.finetuning.gptq.parts import Part
from cage_jax.quantizers.axes import from_the_end
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.rounding import Rounding

# Weights near a tie may be rounded otherwise after a rotation there and back.
_RIGHT = 0.999


class Parameter:
    """A parameter, rounded to the nearest at first.

    The layers of a stack are decoded, rounded and changed one at a time, unless they
    share scales, so that this takes the memory of one.

    Args:
      x: the array.
      codes: its codes, rounded to the nearest; their memory is taken.
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
        self._part: Any = None  # the numbers of matrices at work, and their `Part`
        self._decoded: Any = None  # the layer that was read last, and its values

    def values(self, layer: tuple[int, ...] = ()) -> jax.Array:
        """Returns the present values, or those of a layer by its place in a stack."""
        if not self._are_apart(len(layer)):
            return self.values()[layer]
        if self._decoded is None or self._decoded[0] != layer:
            which = np.array([self._number_of(layer)])
            found = decoded(self._codes_of(which, len(layer)))
            self._decoded = layer, found[0] if layer else found
        return self._decoded[1]

    def numbers(self, layer: tuple[int, ...] = ()) -> tuple[jax.Array, int]:
        """Returns the numbers of the elements of a layer, and what to add to them."""
        shape = self.x.shape[len(layer) :]
        size = math.prod(shape)
        numbers = jnp.arange(size, dtype=jnp.int32).reshape(shape)
        return numbers, self._number_of(layer) * size

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
        """Returns the codes, with the scales that will be found in their values."""
        if self.grid is None:
            for which in self._layers():
                found = _refitted(self._codes_of(which, self._lead))
                found = dataclasses.replace(found, quantizer=self.codes.quantizer)
                if self._lead:
                    found = _with_rows(self.codes, found, which, self._lead)
                self.codes = found
        return self.codes

    def unrounded(self) -> jax.Array:
        """Returns the weights that were rounded to the codes, so that they still are.

        A weight beyond the ends of its grid is at its end. All are on the grid where
        the scales found in them would be others.
        """
        if self._before is None:
            return self.x
        self.finished()
        before, self._before = self._before, None  # whose memory is taken
        for which in self._layers():
            codes = self._codes_of(which, self._lead)
            grid = _rows(self.grid, which, self._lead)
            rows = put_back(before[which], codes.shape, self._axes)
            rows = arranged(_start(rows, codes, grid), *self._axes)
            before = _with_rows(before, rows, which, 1) if self._lead else rows
        return put_back(before, self.x.shape, self._places.axes).astype(self.x.dtype)

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
            sizes = [
                math.prod(self.x.shape[axis] for axis in axes)
                for axes in (places.stack, places.outputs)
            ]
            self._done = np.zeros(sizes, bool)
        which, owners = np.unique(matrices, return_inverse=True)
        mask = np.zeros(self._done[which].shape, bool)
        mask[:, places.columns] = True
        mask &= ~self._done[which]
        self._done[which] |= mask
        order = np.argsort(places.rows)
        sums = jax.ops.segment_sum(sums, owners, len(which))[:, order][:, :, order]
        within = slice(None) if self._lead else which
        values, before, grid = self._part_of(which).round(within, sums, damping)
        if not bool(jnp.isfinite(values).all()):
            raise ValueError(
                f"`damping` must be larger, so that the products of the inputs can be "
                f"inverted; got {damping}. Use 0.01, or 0.1."
            )
        codes, scales = self.codes.codes, dataclasses.replace(self.codes, codes=None)  # type: ignore[arg-type]
        self.codes = _replaced(codes, scales, values, grid, which, mask, places.axes)
        if self._keeps:
            if self._before is None:
                quantizer = self.codes.quantizer
                self._before = _all_rotated(self.x, quantizer, places.axes)
            self._before = _put(self._before, before, which, mask)
        self._decoded = None
        if self._done[which].all():
            self._part = None

    # --- layers of a stack ------------------------------------------------------------

    def _number_of(self, layer):
        stack = self.x.shape[: len(layer)]
        return int(np.ravel_multi_index(layer, stack)) if layer else 0

    def _are_apart(self, lead):
        """Tells whether no two layers, along as many first axes, share anything."""
        blocks = self.codes.quantizer.blocks(self.x.shape)
        return all(axis >= lead for axis in blocks.tensor_axes)

    @property
    def _lead(self) -> int:
        """Number of first axes along which layers are rounded apart."""
        stack = () if self._places is None else self._places.stack
        first = stack == tuple(range(len(stack)))
        return len(stack) if first and self._are_apart(len(stack)) else 0

    @property
    def _axes(self):
        """The axes of some layers, or of the whole, as those of `Places`."""
        if not self._lead:
            return self._places.axes
        moved = self._lead - 1
        return (0,), *(tuple(a - moved for a in part) for part in self._places.axes[1:])

    def _layers(self):
        """Returns the numbers of the matrices of each part that is finished alone."""
        if not self._lead:
            return [slice(None)]
        return np.arange(len(self._done))[:, None]

    def _codes_of(self, which, lead):
        """Returns the codes of some layers; the whole without such axes."""
        codes = _rows(self.codes, which, lead)
        if not lead:
            return codes
        quantizer = from_the_end(codes.quantizer, self.x.ndim)
        return dataclasses.replace(codes, quantizer=quantizer)

    def _part_of(self, which):
        key = which.tolist() if self._lead else None
        if self._part is None or self._part[0] != key:
            self._part = None  # the last one is not kept beside it
            quantizer = self.codes.quantizer
            if self._lead:
                quantizer = from_the_end(quantizer, self.x.ndim)
            x, grid = _rows((self.x, self.grid), which, self._lead)
            self._part = key, Part(x, quantizer, grid, self._axes)
        return self._part[1]


def _rows(tree, which, lead):
    """Takes layers of stacks, by numbers along as many first axes."""
    return _jitted_rows(tree, which, lead) if lead else tree


@functools.partial(jax.jit, static_argnums=2)
def _jitted_rows(tree, which, lead):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:])[which], tree)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _with_rows(tree, rows, which, lead):
    """Replaces layers of stacks, in the memory of these."""

    def put(x, rows):
        flat = x.reshape(-1, *x.shape[lead:])
        return flat.at[which].set(rows.astype(x.dtype)).reshape(x.shape)

    return jax.tree.map(put, tree, rows)


def _refitted(codes):
    """Returns the codes of the same values, with the scales found in these.

    A scale times the last code, over the last code, may differ from it in the last
    bit; it does not a second or third time.
    """
    first, values = codes, decoded(codes)
    most = 1e-6 * float(jnp.max(jnp.abs(values)))
    for _ in range(3):
        codes = encoded(decoded(codes), codes.quantizer, None, None)
        if not jnp.allclose(decoded(codes), values, rtol=1e-6, atol=most):
            return first
    return codes


def _start(before, codes, grid):
    """Returns the weights in `before`, in the basis, where they get these codes."""
    values, quantizer, known = decoded(codes), codes.quantizer, grid_of(codes)
    basis = quantizer.basis(codes.shape)
    found = Rounding(before / basis.factor, known, None, quantizer)
    on_grid = basis.rotate(values)
    same = found.code_values() == quantizer.format.decode(codes.codes, before.dtype)
    start = jnp.where(same & found.is_inside(0.0), before, on_grid)
    start = basis.unrotate(start).astype(codes.dtype)
    again = fake_quant(
        start, quantizer, grid=known if quantizer.scale.needs_grid else grid
    )
    most = 1e-5 * jnp.max(jnp.abs(values))
    right = jnp.isclose(again, values, rtol=1e-5, atol=most)
    if jnp.mean(right) < _RIGHT:
        return values
    return start if basis.block else jnp.where(right, start, values)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _all_rotated(x, quantizer, axes):
    """Rotates an array into its basis; a copy of it, in the order of matrices."""
    rotated = quantizer.basis(x.shape).rotate(x).astype(jnp.float32)
    return jnp.copy(arranged(rotated, *axes))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, found, which, mask):
    """Replaces the columns of matrices where the mask holds."""
    rows = jnp.where(mask[:, None, :], found.astype(stack.dtype), stack[which])
    return stack.at[which].set(rows)


@functools.partial(jax.jit, static_argnums=6, donate_argnums=0)
def _replaced(codes, scales, values, grid, which, mask, axes):
    """Replaces codes where the mask holds, and scales if they were found anew."""

    def put(old, found):
        stack = _put(arranged(old, *axes), found, which, mask)
        return put_back(stack, old.shape, axes)

    encode = scales.quantizer.format.encode
    changes = {"codes": put(codes, encode(values))}
    if grid is not None:
        changes["scale"] = put(scales.scale, grid.scale)
        if grid.zero_point is not None:
            changes["zero_point"] = put(scales.zero_point, encode(grid.zero_point))
        if grid.offset is not None:
            changes["offset"] = put(scales.offset, grid.offset)
    return dataclasses.replace(scales, **changes)
