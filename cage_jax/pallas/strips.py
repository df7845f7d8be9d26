"""Arithmetic on one strip, shared by the kernels of all platforms.

It is the arithmetic of `rounding`, except for the rotation, which a matrix unit does.
Such a unit multiplies numbers of 16 bits. A float32 number rounded to one of them gives
products wrong by 4e-3, so it is split into three terms, whose sum is exact. A rounded
value is one term.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from cage_jax.arrays.exact import times, uncontracted
from cage_jax.arrays.hadamard import hadamard_matrix
from cage_jax.pallas.tiling import PartedScale, Tiling
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import (
    Rounding,
    fit,
    scaled,
    scaled_last,
    unrotated_codes,
)

TERMS = 3  # a float32 (24 bits of mantissa) is the sum of three bfloat16 (8 bits each)


class Strip(NamedTuple):
    """A strip and its grid.

    Attributes:
      x: the strip itself, float32; None if only its rotated form was kept.
      rounding: the strip in the basis of its quantizer, and the grid of its groups.
      poison: per group, 0, or NaN if an element is not finite.
      rotate: function that rotates a strip in which each number is the sum of
        `terms` bfloat16 numbers.
    """

    x: jax.Array | None
    rounding: Rounding
    poison: jax.Array
    rotate: Callable

    @classmethod
    def fitted(
        cls,
        x: jax.Array,
        rotated: jax.Array,
        rotate: Callable,
        quantizer: Quantizer,
        **known: Any,
    ) -> "Strip":
        """Returns a strip of whole groups; `known` goes on to the scale rule."""
        rounding = fit(rotated, quantizer, **known)
        poison = quantizer.blocks(rotated.shape).reduce(poison_of, rotated)
        return cls(x, rounding, poison, rotate)

    def value(self, dtype: Any = jnp.float32) -> jax.Array:
        """Quantizes and dequantizes the strip, float32 in the range of `dtype`."""
        return self.dequantized(self.rounding.code_values(), dtype)

    def codes(self, code_values: jax.Array) -> jax.Array:
        """Returns the codes of code values, as `encode` does, int32."""
        offset = self.rounding.quantizer.format.code_offset
        assert offset is not None  # statistics exist only for such formats
        codes = jnp.where(jnp.isnan(code_values), 0, code_values - offset)
        return codes.astype(jnp.int32)

    def dequantized(
        self, code_values: jax.Array, dtype: Any = jnp.float32
    ) -> jax.Array:
        """Dequantizes code values of the strip, float32 in the range of `dtype`."""
        quantizer, grid = self.rounding.quantizer, self.rounding.grid
        shape = code_values.shape
        # A rounded value has at most 8 bits of mantissa, unless it is scaled first.
        terms = 1 if scaled_last(quantizer, shape) else TERMS
        rotate = partial(self.rotate, terms=terms)
        unrotated = unrotated_codes(code_values, quantizer, grid, rotate)
        like = jax.ShapeDtypeStruct(shape, jnp.float32)
        value = uncontracted(scaled(unrotated, quantizer, grid, like), dtype)
        # This keeps NaN even where a maximum or a clip dropped it: otherwise training
        # would go on and hide the divergence.
        return value + quantizer.blocks(shape).spread(self.poison)

    def mask(self) -> jax.Array:
        """Returns 1 where the gradient passes and 0 elsewhere, int32."""
        return jnp.where(self.rounding.gradient_mask(), jnp.int32(1), jnp.int32(0))


def poison_of(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns 0, or NaN if an element is not finite, which a maximum might drop."""
    return jnp.sum(x - x, axis=axes, keepdims=True)


class Joined(NamedTuple):
    """The reductions of groups that are longer than a strip.

    All strips together do to a group what `fit` does to a whole one.

    Attributes:
      parts: what the scale rule makes of the strips so far, one number per group or
        several.
      poison: as in `Strip`.
    """

    parts: Any
    poison: jax.Array

    @classmethod
    def of_nothing(cls, tiling: Tiling) -> "Joined":
        """Returns the reductions before the first strip."""
        zeros = jnp.zeros(tiling.per_group, jnp.float32)
        group = jax.ShapeDtypeStruct(tiling.scratch_shape, jnp.float32)
        numbers = jax.eval_shape(partial(_part, tiling=tiling), group)
        return cls(jax.tree.map(lambda _: zeros, numbers), zeros)

    def with_strip(self, rotated: jax.Array, tiling: Tiling) -> "Joined":
        """Adds a strip, in the basis."""
        scale = cast(PartedScale, tiling.quantizer.scale)
        joined = scale.joined(self.parts, _part(rotated, tiling))
        return Joined(joined, self.poison + poison_of(rotated, (tiling.along - 1,)))


def _part(rotated, tiling):
    scale = cast(PartedScale, tiling.quantizer.scale)
    sized = times(rotated, tiling.quantizer.basis(rotated.shape).factor)
    return scale.part(sized, (tiling.along - 1,), tiling.length)


def joined_grid(whole: Any, tiling: Tiling) -> Grid:
    """Returns the grid of groups whose strips are all joined."""
    quantizer, scale = tiling.quantizer, cast(PartedScale, tiling.quantizer.scale)
    return scale.stored(whole, tiling.length, quantizer.format, quantizer.scale_type)


def place(i: jax.Array, tiling: Tiling) -> tuple:
    """Returns the index of a block's strip `i` in a reference to the block."""
    here = pl.ds(pl.multiple_of(i * tiling.strip, tiling.strip), tiling.strip)
    return (here, slice(None)) if tiling.along == 1 else (slice(None), here)


def rotation(tiling: Tiling, size: int) -> jax.Array | None:
    """Returns the bfloat16 matrix that rotates about `size` elements, or None."""
    if (block := tiling.quantizer.hadamard) is None:
        return None
    repeated = np.kron(np.eye(max(1, size // block)), hadamard_matrix(block))
    return jnp.asarray(repeated, jnp.bfloat16)


def product(matrix: jax.Array, x: jax.Array, axis: int, terms: int) -> jax.Array:
    """Multiplies `axis` of float32 `x`, in `terms`, by a symmetric bfloat16 matrix."""

    def times_matrix(term):
        left, right = (matrix, term) if axis == 0 else (term, matrix)
        return lax.dot(left, right, preferred_element_type=jnp.float32)

    term = x.astype(jnp.bfloat16)
    total = times_matrix(term)
    for _ in range(terms - 1):
        x = x - term.astype(jnp.float32)
        term = x.astype(jnp.bfloat16)
        total = total + times_matrix(term)
    return total


def result_like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Describes a result of a kernel that varies over a mesh as `x` does.

    Inside a `shard_map`, results must name the mesh axes along which they differ.
    """
    manual = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)
