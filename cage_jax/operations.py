"""`jnp.clip`, `jnp.where` and others in as few operations as there can be.

Those of `jax.numpy` are functions of their own in a program, with broadcasts of their
scalars. A model that is quantized has thousands of them, and tracing and compilers
spend their time on operations, however small. And a loop over layers is handed what is
broadcast in it as an array, for memory to read again and again: so numbers are operands
of products and sums here, where they can be.
"""

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def clamp(x: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """`x` within two numbers; NaN stays NaN."""
    number = np.dtype(x.dtype).type
    return lax.clamp(number(low), x, number(high))


def times(x: jax.Array, factor: float) -> jax.Array:
    """`x` times a number."""
    return x if factor == 1 else lax.mul(x, np.dtype(x.dtype).type(factor))


def finite(value: jax.Array, x: jax.Array) -> jax.Array:
    """`value`, but NaN where `x` is NaN or an infinity."""
    return lax.select(lax.is_finite(x), value, lax.sub(x, x))


def select(condition: jax.Array, x: ArrayLike, other: ArrayLike) -> jax.Array:
    """`x` where the condition holds, else `other`; one of them may be a number."""
    if not isinstance(x, jax.Array):
        x = lax.full_like(other, x)
    elif not isinstance(other, jax.Array):
        other = lax.full_like(x, other)
    return lax.select(condition, x, other)
