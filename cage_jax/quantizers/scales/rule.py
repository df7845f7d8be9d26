"""The base class of scale rules."""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from cage_jax.arrays.blocks import Blocks
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.scale_types import FULL, ScaleType


@dataclasses.dataclass(frozen=True)
class ScaleRule(abc.ABC):
    """Reduces groups of values to their grid.

    Attributes:
      asymmetric: whether the rule gives a zero point.
      has_offset: whether the rule gives an offset.
      signed: whether the scale takes the sign of the group.
      learned: whether the grid is trained, starting from the one that the rule finds.
      needs_grid: whether quantizing needs a grid that was found before.
      ignores_zeros: whether adding zeros to each group leaves the result of `fit`
        unchanged.
    """

    asymmetric = False
    has_offset = False
    signed = False
    learned = False
    needs_grid = False
    ignores_zeros = False

    @abc.abstractmethod
    def fit(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        format: Format,
        scale_type: ScaleType = FULL,
        tensor_axes: tuple[int, ...] = (),
    ) -> Grid:
        """Finds the grid of each group of `x`.

        Args:
          x: float32 or float64.
          axes: the axes that a group spans; they are kept with size 1.
          format: the format whose codes the groups will be rounded to.
          scale_type: which numbers a scale can be.
          tensor_axes: the axes that a tensor spans, for scale types with one more
            scale per tensor.

        Returns:
          A `Grid`. An all-zero group gets scale 1 (or the smallest normal number if
          the format has no zero, so that zeros stay close to zero). A group with a
          NaN or an infinity gets a NaN scale, so all of its values become NaN.
        """

    def fit_groups(
        self, x: jax.Array, blocks: Blocks, format: Format, scale_type: ScaleType
    ) -> Grid:
        """Does `fit` for an array that `blocks` divides into groups."""
        tensor_axes = blocks.split_tensor_axes
        return blocks.reduce(
            lambda x, axes: self.fit(x, axes, format, scale_type, tensor_axes),
            x,
            ignores_zeros=self.ignores_zeros and not scale_type.has_tensor_divisor,
        )

    def check(self, format: Format, scale_type: ScaleType) -> None:
        """Raises ValueError if the rule does not suit the format or scale type."""

    def merged(self, before: Grid, now: Grid, format: Format) -> Grid:
        """Combines the grids of two batches; a scale of 0 means no data.

        By default the first grid that has data is kept.
        """
        return where(before.scale == 0, now, before)

    def clips(self, format: Format) -> bool:
        """Returns whether values of a group can lie beyond the ends of its grid."""
        return True

    def idempotent(self, format: Format, scale_type: ScaleType = FULL) -> bool:
        """Returns whether fitting quantized values gives the same grid again."""
        return True


def where(condition: jax.Array, grid: Grid, other: Grid) -> Grid:
    """Selects each entry of two grids, as `jnp.where` does."""
    return jax.tree.map(functools.partial(jnp.where, condition), grid, other)
