"""The block-Hadamard transform of one axis."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cage_jax.arrays.sharding import across_shards

# XLA for CPU computes an array in the loop that sums slices of it, anew for each,
# unless there are this many.
_FAR = 16


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def transform(x: jax.Array, block: int, axis: int) -> jax.Array:
    """Multiplies each block of `axis` by the Hadamard matrix of entries 1 and -1.

    The matrix is Sylvester's. Multiplied by `block**-0.5`, the transform is a rotation
    that is its own inverse and transpose. Without the factor it is exact for small
    integers, such as codes. It begins with a product, by a matrix or by signs, because
    a compiler could contract a sum with the product that `x` comes from.

    Args:
      x: any float array.
      block: a power of two that divides `x.shape[axis]`.
      axis: the axis to transform, not negative.

    Returns:
      An array like `x`.
    """
    of_blocks = functools.partial(_of_blocks, block=block, axis=axis)
    if jax.typeof(x).sharding.mesh.empty:
        return of_blocks(x)
    return across_shards(of_blocks, x, {axis: block})


def _of_blocks(x, block, axis):
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    blocks = x.reshape(*before, size // block, block, *after)
    # A matrix unit is fastest with the whole matrix, a CPU with its factors.
    transformed = lax.platform_dependent(
        blocks,
        cpu=functools.partial(_by_factors, axis=axis + 1),
        default=functools.partial(_by_product, axis=axis + 1),
    )
    return transformed.reshape(x.shape)


def _by_product(x, axis):
    return jnp.moveaxis(_times_matrix(x, axis), -1, axis)


def _by_factors(x, axis):
    """Multiplies by the Kronecker factors of the matrix, also Hadamard matrices."""
    before, block, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    stages = block.bit_length() - 1
    far, near = 2 ** (stages - stages // 2), 2 ** (stages // 2)
    if math.prod(after) < near:  # too few columns: small matrices are slow
        return jnp.moveaxis(_of_last_axis(jnp.moveaxis(x, axis, -1)), -1, axis)
    x = x.reshape(*before, far, near, *after)
    # Near rows first: the product of far rows takes near rows and columns as one axis,
    # and a loop that computes `x` along such an axis is not vectorized.
    x = _matrix_times(_matrix_times(x, axis + 1), axis)
    return x.reshape(*before, block, *after)


def _of_last_axis(x):
    """Adds up far rows with their signs, then multiplies near elements by a matrix."""
    block = x.shape[-1]
    near = block // _FAR if block >= 8 * _FAR else block
    far = block // near
    rows = x.reshape(*x.shape[:-1], far, near)
    if far > 1:
        rows = _signed_sums(rows, rows.ndim - 2)
    return _times_matrix(rows, rows.ndim - 1).reshape(x.shape)


def _signed_sums(x, axis):
    """Multiplies `axis` by the matrix, as sums of slices."""
    length = x.shape[axis]
    signs = hadamard_matrix(length).astype(x.dtype)
    signs = signs.reshape(length, *[1] * axis, length, *[1] * (x.ndim - axis - 1))
    terms = (
        lax.mul(lax.slice_in_dim(x, i, i + 1, axis=axis), signs[i])
        for i in range(length)
    )
    return functools.reduce(lax.add, terms)


def _times_matrix(x, axis):
    """Multiplies `axis` by the matrix and moves it to the end."""
    matrix = jnp.asarray(hadamard_matrix(x.shape[axis]), x.dtype)
    return jnp.tensordot(x, matrix, ((axis,), (0,)), precision=lax.Precision.HIGHEST)


def _matrix_times(x, axis):
    """Multiplies `axis` by the matrix in place, batched over the axes before it."""
    matrix = jnp.asarray(hadamard_matrix(x.shape[axis]), x.dtype)
    batch = tuple(range(axis))
    dimensions = (((axis + 1,), (axis,)), (batch, batch))
    matrices = _for_each_before(matrix, x, axis)
    return lax.dot_general(matrices, x, dimensions, precision=lax.Precision.HIGHEST)


def _for_each_before(matrix, x, axis):
    """Repeats the matrix for each index before `axis`, sharded as `x` is there."""
    shape, dimensions = (*x.shape[:axis], *matrix.shape), (axis, axis + 1)
    sharding = jax.typeof(x).sharding
    before = sharding.spec[:axis]
    if not any(before):  # the compiler decides, or nothing is sharded
        return lax.broadcast_in_dim(matrix, shape, dimensions)
    # Outside of a mesh, JAX 0.11 and later ignore `out_sharding`.
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        return lax.broadcast_in_dim(
            matrix,
            shape,
            dimensions,
            out_sharding=NamedSharding(sharding.mesh, P(*before, None, None)),
        )


@functools.cache
def hadamard_matrix(block: int) -> np.ndarray:
    """Returns Sylvester's matrix of entries 1 and -1, float64, (block, block)."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
