"""Arithmetic whose results are equal, to the bit, in every program.

In one program and not in another, a compiler turns division by a broadcast into a
product with the reciprocal, or contracts a product and a sum into one operation.

`clamp`, `times`, `finite` and `select` do what `jnp.clip`, `jnp.where` and others do,
in as few operations as possible. The functions of `jax.numpy` become functions of their
own in a program, with broadcasts of their scalars. A quantized model has thousands of
them, and each takes time to trace and compile. A loop over layers also receives each
broadcast as an array, which is read from memory again and again. So numbers are
operands of products and sums here wherever possible.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


@functools.cache
def compute_dtype(dtype) -> np.dtype:
    """Returns the dtype that computes values of `dtype`: float32 or float64."""
    # This uses NumPy's promotion, because JAX's raises where users made it strict.
    return np.promote_types(dtype, np.float32)


def divide(a: jax.Array, b: jax.Array | np.floating) -> jax.Array:
    """Computes `a / b`, rounded once; `b` is like `a` or a number of its dtype."""
    # The comparison makes the divisor depend on `a`: NaN is unequal to itself, so a
    # compiler cannot drop it. A select would need both operands sharded alike, so this
    # multiplies instead.
    one = lax.convert_element_type(lax.eq(a, a), a.dtype)
    return lax.div(a, lax.mul(b, one))


def uncontracted(product: jax.Array, dtype: np.dtype | None = None) -> jax.Array:
    """Returns a product that no compiler contracts with the sum that it goes into.

    It saturates at the largest number of `dtype`, or of its own dtype.
    """
    largest = jnp.finfo(product.dtype if dtype is None else dtype).max
    return clamp(product, -largest, largest)


def power_below(x: jax.Array) -> jax.Array:
    """Returns the largest power of two not above `|x|`.

    Subnormal numbers give 0. Infinities and NaN give infinity.
    """
    limits = jnp.finfo(x.dtype)
    word = {32: jnp.int32, 64: jnp.int64}[limits.bits]
    exponent = ~((1 << limits.nmant) - 1)  # all bits but those of the mantissa
    bits = lax.bitcast_convert_type(jnp.abs(x), word) & jnp.asarray(exponent, word)
    return lax.bitcast_convert_type(bits, x.dtype)


def to_int8(x: jax.Array) -> jax.Array:
    """Converts whole numbers that int8 holds, which takes fewer steps than of any."""
    limits = jnp.finfo(x.dtype)
    word = {32: jnp.int32, 64: jnp.int64}[limits.bits]
    # The last bit of such a large number counts ones.
    shifted = x + x.dtype.type(1.5 * 2**limits.nmant)
    return lax.bitcast_convert_type(shifted, word).astype(jnp.int8)


def clamp(x: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """Limits `x` to the range of two numbers; NaN stays NaN."""
    number = np.dtype(x.dtype).type
    return lax.clamp(number(low), x, number(high))


def times(x: jax.Array, factor: float) -> jax.Array:
    """Multiplies `x` by a number."""
    return x if factor == 1 else lax.mul(x, np.dtype(x.dtype).type(factor))


def finite(value: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `value`, but NaN where `x` is NaN or an infinity."""
    return lax.select(lax.is_finite(x), value, lax.sub(x, x))


def select(condition: jax.Array, x: ArrayLike, other: ArrayLike) -> jax.Array:
    """Selects `x` where the condition holds, else `other`; one may be a number."""
    if not isinstance(x, jax.Array):
        x = lax.full_like(other, x)
    elif not isinstance(other, jax.Array):
        other = lax.full_like(x, other)
    return lax.select(condition, x, other)
