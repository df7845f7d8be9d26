"""Groups of neighbours that share a scale, in an array of one shape."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.dispatch import Variant, Variants, dispatch, if_divided
from cage_jax.arrays.sharding import across_shards
from cage_jax.arrays.tile_order import (
    SMALLEST,
    reduce_in_tiles,
    spread_in_tiles,
    tile_pieces,
)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The division of an array into groups; see `Quantizer.blocks`.

    Attributes:
      shape: shape of the array.
      axes: axes that share a scale, not negative and ascending.
      sizes: length of a group along each of `axes`.
      tensor_axes: axes that one tensor of a stack spans, for scale types with one more
        scale per tensor.
      pieces: pairs of an axis and the length that a shard must keep whole: groups,
        blocks of a rotation, or tensors.
      rotated: whether groups are found in a rotated array.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor_axes: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    rotated: bool

    @functools.cached_property
    def by_axis(self) -> dict[int, int]:
        """Length of a group by axis."""
        return dict(zip(self.axes, self.sizes))

    @functools.cached_property
    def count(self) -> int:
        """Number of elements in a group."""
        return math.prod(self.sizes)

    @functools.cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales: as the array, but shared axes count their groups."""
        sizes = [self.by_axis.get(axis, 1) for axis in range(len(self.shape))]
        # An axis without elements has one group of length 0.
        return tuple(n // k if k else 1 for n, k in zip(self.shape, sizes))

    @functools.cached_property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of an array with one number per tensor of a stack."""
        axes = self.tensor_axes
        return tuple(1 if i in axes else n for i, n in enumerate(self.shape))

    @functools.cached_property
    def _split(self) -> dict[int, int]:
        """Length of a group along each axis that has several groups."""
        return {axis: n for axis, n in self.by_axis.items() if n != self.shape[axis]}

    def _place(self, axis: int) -> int:
        """Returns the position of an axis after `split`: that of a group's elements."""
        return axis + sum(other <= axis for other in self._split)

    @functools.cached_property
    def _places(self) -> tuple[int, ...]:
        """Axes that `split` inserts: those of the elements of a group."""
        return tuple(map(self._place, self._split))

    @functools.cached_property
    def split_axes(self) -> tuple[int, ...]:
        """Axes that a group spans after `split`."""
        return tuple(map(self._place, self.axes))

    @functools.cached_property
    def split_tensor_axes(self) -> tuple[int, ...]:
        """Axes that a tensor spans after `split`."""
        places: list[int] = []
        for axis in self.tensor_axes:
            place = self._place(axis)
            places += [place - 1, place] if axis in self._split else [place]
        return tuple(places)

    def split(self, x: jax.Array) -> jax.Array:
        """Reshapes each shared axis to (groups, elements of a group)."""
        # JAX reshapes sharded arrays only one axis at a time, the last one first.
        for axis, size in reversed(self._split.items()):
            parts = x.shape[axis] // size, size
            x = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
        return x

    def reduce(
        self,
        function: Callable,
        x: jax.Array,
        *,
        ignores_zeros: bool = False,
        on_cpu: Callable | None = None,
    ) -> Any:
        """Reduces each group to one number, or to a tree of numbers.

        Args:
          function: takes the split array and the axes of a group, and keeps these axes
            with size 1.
          x: an array of `shape`.
          ignores_zeros: whether adding zeros to a group leaves the result of `function`
            unchanged; a TPU then has a faster form.
          on_cpu: another form of `function`, which is faster on a CPU; or None.

        Returns:
          Arrays of `scale_shape`.
        """

        def whole(function, x):
            found = function(self.split(x), self.split_axes)
            return jax.tree.map(lambda each: jnp.squeeze(each, self._places), found)

        def default(x):
            if jax.typeof(x).sharding.mesh.empty:
                return whole(function, x)
            return across_shards(functools.partial(whole, function), x, self._split)

        variants: tuple[Variant, ...] = ()
        if ignores_zeros:
            variants += self._in_tiles(functools.partial(reduce_in_tiles, function), x)
        # What a kernel reduces is never large, and it takes no variants.
        if on_cpu is not None and self._is_large:
            other = functools.partial(whole, on_cpu)
            variants += (Variant("cpu", other, if_divided(pieces=1)),)
        return dispatch(default, Variants(variants), x)

    def spread(self, per_group: jax.Array) -> jax.Array:
        """Repeats the number of each group, of `scale_shape`, for all its elements."""
        variants = Variants(self._in_tiles(spread_in_tiles, per_group))
        return dispatch(self._repeat, variants, per_group)

    def _repeat(self, per_group):
        per_group = jnp.expand_dims(per_group, self._places)
        split = list(self.shape)
        for axis, size in reversed(self._split.items()):
            split[axis : axis + 1] = self.shape[axis] // size, size
        found = jnp.broadcast_to(per_group, split)
        for axis in self._split:
            found = found.reshape(*self.shape[: axis + 1], *found.shape[axis + 2 :])
        return found

    def _in_tiles(self, form, x) -> tuple[Variant, ...]:
        """Returns the form for a TPU if groups are parts of tiles."""
        may_be = self._is_large and len(self.axes) == 1 and not self.rotated
        if not (may_be and self._split):
            return ()
        ((axis, size),) = self._split.items()
        axis -= len(self.shape)
        pieces = tile_pieces(self.shape, axis, size, jax.typeof(x).sharding)
        if not pieces:
            return ()
        form = functools.partial(form, axis=axis, size=size)
        return (Variant("tpu", form, if_divided(pieces)),)

    @functools.cached_property
    def _is_large(self):
        """Whether an array is worth another form; symbolic shapes have no size yet."""
        known = all(isinstance(length, int) for length in self.shape)
        return known and math.prod(self.shape) >= SMALLEST
