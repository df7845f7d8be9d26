"""The block-Hadamard transform of one axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LEAST_FOR_ADDITIONS = 2**14
_NEAR = 32


def transform(
    x: jax.Array, block: int, axis: int, *, additions: bool = True
) -> jax.Array:
    """Multiplies each block of `axis` by the Hadamard matrix of entries 1 and -1.

    The matrix is Sylvester's. Times `block**-0.5` this is a rotation, which is its own
    inverse and transpose; without the factor it is exact for small whole numbers, such
    as codes.

    Args:
      x: any float array.
      block: a power of two that divides `x.shape[axis]`.
      axis: the axis to transform, from 0.
      additions: whether sums and differences may be used where they are faster. A
        compiler may contract them with a product that `x` comes from; the product
        with a matrix takes `x` as it is.

    Returns:
      An array like `x`.
    """
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    blocks = x.reshape(*before, size // block, block, *after)
    by_product = functools.partial(_by_product, axis=axis + 1)
    by_additions = functools.partial(
        _by_additions if after else _by_product_and_additions, axis=axis + 1
    )
    # A matrix unit multiplies by the matrix fastest; a CPU adds and subtracts faster,
    # but compiles longer, which small arrays do not repay.
    if x.size < _LEAST_FOR_ADDITIONS or (after and not additions):
        transformed = by_product(blocks)
    else:
        transformed = lax.platform_dependent(
            blocks, cpu=by_additions, default=by_product
        )
    return transformed.reshape(x.shape)


def _by_product_and_additions(x, axis):
    """The fast transform of the last axis, whose near neighbours cannot be added fast.

    The sums are of products with a matrix, which a compiler cannot contract with them.
    """
    block = x.shape[axis]
    near = min(block, _NEAR)
    x = _by_product(x.reshape(*x.shape[:-1], block // near, near), axis + 1)
    if block > near:
        x = _by_additions(x, axis)
    return x.reshape(*x.shape[:-2], block)


def _by_product(x, axis):
    matrix = jnp.asarray(_hadamard_matrix(x.shape[axis]), x.dtype)
    product = jnp.tensordot(x, matrix, ((axis,), (0,)), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(product, -1, axis)


def _by_additions(x, axis):
    """The fast transform, two or three of its stages fused to a pass over memory."""
    block = x.shape[axis]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    stride = 1
    for radix in _radices(block):
        x = x.reshape(*before, block // (radix * stride), radix, stride, *after)
        rows = [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(radix)]
        step = 1
        while step < radix:
            for i in range(radix):
                if not i & step:
                    a, b = rows[i], rows[i | step]
                    rows[i], rows[i | step] = a + b, a - b
            step *= 2
        x = jnp.stack(rows, axis + 1)
        stride *= radix
    return x.reshape(*before, block, *after)


def _radices(block):
    """The factors of `block`, each 8, 4 or 2, as alike as they can be."""
    stages = block.bit_length() - 1
    passes = -(-stages // 3)
    short = passes * 3 - stages
    return [4] * short + [8] * (passes - short) if stages > 1 else [2]


@functools.cache
def _hadamard_matrix(block: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
