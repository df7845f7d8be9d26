"""The grid of each group: its scale, zero point and offset."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.exact import divide
from cage_jax.arrays.reprs import brief_repr


@brief_repr
class Grid(NamedTuple):
    """The grid of each group: scale, zero point and offset.

    value = step * (code value - zero_point) + offset, step = scale / tensor_divisor

    Attributes:
      scale: stored scale, at least float32; one entry per group. 0 means "not known
        yet", see `fake_quant`.
      zero_point: code of real zero, a whole number stored as a float, or None.
      offset: value of code 0, or None.
      tensor_divisor: number that divides the scales of a tensor, one entry per tensor,
        or None.
    """

    scale: jax.Array
    zero_point: jax.Array | None = None
    offset: jax.Array | None = None
    tensor_divisor: jax.Array | None = None

    @property
    def step(self) -> jax.Array:
        """Distance between neighbouring integers of the format."""
        if self.tensor_divisor is None:
            return self.scale
        divisor = jnp.broadcast_to(self.tensor_divisor, self.scale.shape)
        return divide(self.scale, divisor)
