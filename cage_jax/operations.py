"""`jnp.clip` and `jnp.where` in one operation each.

Those of `jax.numpy` are functions of their own in a program, with broadcasts of their
scalars. A model that is quantized has thousands of them, and compilers spend their time
on operations, however small.
"""

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def clamp(x: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """`x` within two numbers; NaN stays NaN."""
    number = np.dtype(x.dtype).type
    return lax.clamp(number(low), x, number(high))


def select(condition: jax.Array, x: ArrayLike, other: ArrayLike) -> jax.Array:
    """`x` where the condition holds, else `other`; one of them may be a number."""
    if not isinstance(x, jax.Array):
        x = lax.full_like(other, x)
    elif not isinstance(other, jax.Array):
        other = lax.full_like(x, other)
    return lax.select(condition, x, other)
