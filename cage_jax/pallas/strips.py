"""Arithmetic on one strip, shared by the kernels of all platforms.

It is the arithmetic of `rounding`, except for the rotation. A matrix unit multiplies
16-bit numbers, so float32 numbers are split into three of them; a rounded value is one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.hadamard import hadamard_matrix
from cage_jax.quantizers.rounding import Rounding, scaled, scaled_last, unrotated_codes

PARTS = 3  # a float32 (24 bits of mantissa) is the sum of three bfloat16 (8 bits each)


class Strip(NamedTuple):
    """A strip and its grid.

    Attributes:
      kept: the strip itself; None if only its rotated form was kept.
      rounding: the strip in the basis of its quantizer, and the grid of its groups.
      poison: per group, 0, or NaN if an element is not finite.
      rotate: function that rotates a strip whose numbers have `parts` parts.
    """

    kept: jax.Array | None
    rounding: Rounding
    poison: jax.Array
    rotate: Callable

    def value(self) -> jax.Array:
        """Quantizes and dequantizes the strip, float32."""
        return self.restored(self.values())

    def values(self) -> jax.Array:
        """Rounds the strip to the grid, in units of the grid, float32."""
        return self.rounding.code_values()

    def codes(self, values: jax.Array) -> jax.Array:
        """Returns the codes of `values`, as `encode` does, int32."""
        offset = self.rounding.quantizer.format.code_offset
        assert offset is not None  # statistics exist only for such formats
        return jnp.where(jnp.isnan(values), 0, values - offset).astype(jnp.int32)

    def restored(self, values: jax.Array) -> jax.Array:
        """Dequantizes the strip from its `values`, float32."""
        quantizer, grid = self.rounding.quantizer, self.rounding.grid
        shape = values.shape
        # A rounded value has at most 8 bits of mantissa, unless it is scaled first.
        parts = 1 if scaled_last(quantizer, shape) else PARTS
        rotate = functools.partial(self.rotate, parts=parts)
        unrotated = unrotated_codes(values, quantizer, grid, rotate)
        like = jax.ShapeDtypeStruct(shape, jnp.float32)
        value = scaled(unrotated, quantizer, grid, like)
        # This keeps NaN even where a maximum or a clip dropped it.
        return value + quantizer.blocks(shape).spread(self.poison)

    def mask(self) -> jax.Array:
        """Returns 1 where the gradient passes and 0 elsewhere, int32."""
        return jnp.where(self.rounding.gradient_mask(), jnp.int32(1), jnp.int32(0))


def poison_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns 0, or NaN if an element is not finite, which a maximum might drop."""
    return jnp.sum(x - x, axis=axes, keepdims=True)


def rotation(block: int, times: int) -> jax.Array:
    """Returns the bfloat16 matrix that rotates `times` neighbouring blocks."""
    return jnp.asarray(np.kron(np.eye(times), hadamard_matrix(block)), jnp.bfloat16)


def product(matrix: jax.Array, x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Multiplies `axis` of float32 `x`, in `parts`, by a symmetric bfloat16 matrix."""

    def times_matrix(part):
        left, right = (matrix, part) if axis == 0 else (part, matrix)
        return lax.dot(left, right, preferred_element_type=jnp.float32)

    part = x.astype(jnp.bfloat16)
    total = times_matrix(part)
    for _ in range(parts - 1):
        x = x - part.astype(jnp.float32)
        part = x.astype(jnp.bfloat16)
        total = total + times_matrix(part)
    return total
