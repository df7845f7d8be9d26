import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax.hadamard import _by_factors, _by_product, transform

BLOCKS = [2, 4, 8, 16, 32, 64, 128, 256]

# Each of log2(block) sums of two float32 rounds once; so does the last product.
ROUNDING = 10 * float(np.finfo(np.float32).eps)


def matrix(block):
    """Entry (i, j) is (-1)^(number of ones that i and j share) / sqrt(block)."""
    return np.array(
        [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    ) / np.sqrt(block)


def rotate(x, block, axis):
    return transform(x, block, axis) * block**-0.5


def rotated(x, block, axis):
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    blocks = x.reshape(*x.shape[:-1], -1, block)
    return np.moveaxis((blocks @ matrix(block)).reshape(x.shape), -1, axis)


@pytest.mark.parametrize("block", BLOCKS)
def test_is_the_matrix(block, rng):
    x = rng.standard_normal((2 * block, 3)).astype(np.float32)
    result = rotate(jnp.asarray(x), block, 0)
    chex.assert_type(result, jnp.float32)
    chex.assert_trees_all_close(
        np.float64(result), rotated(x, block, 0), atol=4 * ROUNDING, rtol=0
    )


@pytest.mark.parametrize("shape", [(16,), (16, 3), (3, 16), (2, 16, 3), (2, 3, 16)])
def test_axes(shape, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    axis = shape.index(16)
    chex.assert_trees_all_close(
        np.float64(rotate(jnp.asarray(x), 8, axis)),
        rotated(x, 8, axis),
        atol=4 * ROUNDING,
        rtol=0,
    )


# Few and many columns behind the axis: it is moved to the end, or stays where it is.
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("columns", [3, 128])
def test_codes_are_exact(block, axis, columns, rng):
    shape = [columns] * 3
    shape[axis] = 2 * block
    shape[axis - 1] = 5
    codes = jnp.asarray(rng.integers(-128, 128, shape), jnp.float32)
    exact = np.round(rotated(codes, block, axis) * np.sqrt(block))
    np.testing.assert_array_equal(transform(codes, block, axis), exact)
    compiled = jax.jit(transform, static_argnums=(1, 2))
    np.testing.assert_array_equal(compiled(codes, block, axis), exact)


@pytest.mark.parametrize("columns", [3, 128])
@pytest.mark.parametrize("block", BLOCKS)
def test_both_ways_agree(block, columns, rng):
    # A processor with a matrix unit takes the one product, which no CPU would run.
    x = jnp.asarray(rng.standard_normal((2, block, columns)), jnp.float32)
    # Sums of `block` numbers, in another order.
    chex.assert_trees_all_close(
        _by_product(x, 1), _by_factors(x, 1), atol=block * ROUNDING, rtol=0
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_is_its_own_inverse_and_keeps_the_norm(block, rng):
    x = jnp.asarray(rng.standard_normal((2 * block, 3)), jnp.float32)
    once = rotate(x, block, 0)
    chex.assert_trees_all_close(rotate(once, block, 0), x, atol=8 * ROUNDING, rtol=0)
    norms = [np.linalg.norm(np.float64(a)) for a in (once, x)]
    assert norms[0] == pytest.approx(norms[1], rel=ROUNDING)


def test_is_its_own_transpose(rng):
    x, y = (jnp.asarray(rng.standard_normal((16, 3)), jnp.float32) for _ in range(2))
    _, pull_back = jax.vjp(lambda x: rotate(x, 8, 0), x)
    (transposed,) = pull_back(y)
    chex.assert_trees_all_close(
        np.float64(transposed), rotated(y, 8, 0), atol=4 * ROUNDING, rtol=0
    )


def test_spreads_an_outlier():
    x = jnp.zeros((64, 1)).at[5].set(8.0)
    np.testing.assert_array_equal(np.abs(rotate(x, 64, 0)), np.ones((64, 1)))


def test_float64_is_not_narrowed(x64, rng):
    x = jnp.asarray(rng.standard_normal((32, 3)))
    result = rotate(x, 32, 0)
    chex.assert_type(result, jnp.float64)
    # The rounding of float64, 20 times over.
    chex.assert_trees_all_close(result, rotated(x, 32, 0), atol=5e-15, rtol=0)
