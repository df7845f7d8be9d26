"""What kernels of every platform make of a strip: the arithmetic of `rounding`.

Only the rotation is theirs, since a matrix unit multiplies numbers of 16 bits: float32
numbers are three such parts, and rounded values are such numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.hadamard import hadamard_matrix
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import (
    apply_scale,
    passes,
    round_in_basis,
    scaled_last,
    turn_back,
)
from cage_jax.quantizers.scales import Grid

PARTS = 3  # numbers of 8 bits of mantissa that a float32 number of 24 is the sum of


class Strip(NamedTuple):
    """A strip and its grid.

    Attributes:
      kept: the strip itself; None where it is rotated and was kept so.
      rotated: the strip, up to the factor of the rotation.
      grid: of its groups.
      poison: 0 for each group, or NaN where something is not finite.
      rotate: turns a strip, of so many `parts`.
      quantizer: of the strip.
    """

    kept: jax.Array | None
    rotated: jax.Array
    grid: Grid
    poison: jax.Array
    rotate: Callable
    quantizer: Quantizer

    def value(self) -> jax.Array:
        """The strip quantized and dequantized, float32."""
        return self.restored(self.values())

    def values(self) -> jax.Array:
        """In units of the grid and rounded, float32."""
        return round_in_basis(self.rotated, self.quantizer, self.grid)

    def codes(self, values: jax.Array) -> jax.Array:
        """Those of `values`, as `encode` gives them, int32."""
        zero_code = self.quantizer.format.of_zero_code
        assert zero_code is not None  # there are no statistics of other formats
        return jnp.where(jnp.isnan(values), 0, values - zero_code).astype(jnp.int32)

    def restored(self, values: jax.Array) -> jax.Array:
        """The strip quantized and dequantized, float32, from its `values`."""
        quantizer, shape = self.quantizer, self.rotated.shape
        # A rounded value has at most 8 bits of mantissa, unless it is scaled first.
        parts = 1 if scaled_last(quantizer, shape) else PARTS

        def back(values, _):
            return self.rotate(values, parts=parts)

        turned_back = turn_back(values, quantizer, self.grid, shape, back=back)
        like = jax.ShapeDtypeStruct(shape, jnp.float32)
        value = apply_scale(turned_back, quantizer, self.grid, like)
        # Whatever a maximum or a clip makes of NaN.
        return value + quantizer.blocks(shape).spread(self.poison)

    def mask(self) -> jax.Array:
        """Where the gradient passes: 1, elsewhere 0; int32."""
        passing = passes(self.rotated, self.quantizer, self.grid)
        return jnp.where(passing, jnp.int32(1), jnp.int32(0))


def poison_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """0, or NaN where something is not finite, whatever a maximum makes of that."""
    return jnp.sum(x - x, axis=axes, keepdims=True)


def rotation(block: int, times: int) -> jax.Array:
    """The matrix, bfloat16, that rotates `times` neighbouring blocks."""
    return jnp.asarray(np.kron(np.eye(times), hadamard_matrix(block)), jnp.bfloat16)


def product(matrix: jax.Array, x: jax.Array, axis: int, parts: int) -> jax.Array:
    """The symmetric `matrix`, bfloat16, times `axis` of a float32 `x`, in `parts`."""

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
