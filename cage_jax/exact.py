"""Arithmetic that comes out the same, to the bit, in every program.

A compiler turns the division by a broadcast into a product with its reciprocal in one
program and not in another, and contracts a product and a sum into one operation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.operations import clamp


def divide(a: jax.Array, b: jax.Array | np.floating) -> jax.Array:
    """`a / b`, rounded once; `b` like `a` or a number of its dtype."""
    # That the divisor depends on `a`, a compiler has to believe: NaN is unequal to
    # itself. A product, since a selection wants both sharded alike.
    one = lax.convert_element_type(lax.eq(a, a), a.dtype)
    return lax.div(a, lax.mul(b, one))


def rounded(product: jax.Array) -> jax.Array:
    """A product that is rounded before it goes into a sum."""
    largest = jnp.finfo(product.dtype).max
    return clamp(product, -largest, largest)


def power_below(x: jax.Array) -> jax.Array:
    """The largest power of two not above `|x|`: 0 below the normal numbers.

    Of an infinity it is infinity, and of NaN too.
    """
    limits = jnp.finfo(x.dtype)
    word = {32: jnp.int32, 64: jnp.int64}[limits.bits]
    exponent = ~((1 << limits.nmant) - 1)  # all bits but those of the mantissa
    bits = lax.bitcast_convert_type(jnp.abs(x), word) & jnp.asarray(exponent, word)
    return lax.bitcast_convert_type(bits, x.dtype)
