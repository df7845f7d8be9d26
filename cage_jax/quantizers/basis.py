"""The basis in which an array is rounded: its own, or a rotated one."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.exact import compute_dtype, times
from cage_jax.arrays.hadamard import transform


@dataclasses.dataclass(frozen=True)
class Basis:
    """A rotation along one axis, or none; see `Quantizer.basis`.

    The rotation multiplies by random signs, if there is a seed, then each block by a
    Hadamard matrix. `rotate` and `unrotate` keep norms. `transform` and `transpose`
    leave out the factor, so that they are exact for small integers such as codes, and
    the factor can be merged with another one.

    Attributes:
      block: number of neighbours that are rotated together, or None for no rotation.
      axis: the rotated axis, not negative.
      seed: seed of the random signs, or None for no signs.
    """

    block: int | None = None
    axis: int = 0
    seed: int | None = None

    @functools.cached_property
    def factor(self) -> float:
        """Number that makes `transform` a rotation when multiplied by it."""
        return 1.0 if self.block is None else self.block**-0.5

    def rotate(self, x: jax.Array) -> jax.Array:
        """Rotates `x` into this basis, in float32 or float64."""
        return times(self.transform(x), self.factor)

    def unrotate(self, x: jax.Array) -> jax.Array:
        """Rotates `x` back from this basis."""
        return times(self.transpose(x), self.factor)

    def within(self, function: Callable, x: jax.Array) -> jax.Array:
        """Rotates `x`, applies an elementwise linear `function`, and rotates back."""
        return times(self.transpose(function(self.transform(x))), self.factor**2)

    def transform(self, x: jax.Array) -> jax.Array:
        """Rotates `x` like `rotate`, without the factor."""
        x = x.astype(compute_dtype(x.dtype))
        return x if self.block is None else self._hadamard(self._with_signs(x))

    def transpose(self, x: jax.Array) -> jax.Array:
        """Rotates `x` back like `unrotate`, without the factor."""
        return x if self.block is None else self._with_signs(self._hadamard(x))

    def _hadamard(self, x):
        return transform(x, self.block, self.axis)

    def _with_signs(self, x):
        if self.seed is None:
            return x
        generator = np.random.default_rng(self.seed)
        along = [1] * x.ndim
        along[self.axis] = -1
        signs = 2 * generator.integers(0, 2, x.shape[self.axis]).reshape(along) - 1
        return x * jnp.broadcast_to(jnp.asarray(signs, x.dtype), x.shape)
