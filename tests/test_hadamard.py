"""The block-Hadamard transform against its matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from cases import normal

from cage_jax.arrays.hadamard import _by_factors, _by_product, transform

BLOCKS = [2, 4, 8, 16, 32, 64, 128, 256]

# Each of log2(block) sums of two float32 rounds once; so does the last product.
ROUNDING = 10 * float(np.finfo(np.float32).eps)


def rotate(x, block, axis):
    return transform(x, block, axis) * block**-0.5


def test_is_the_matrix_its_own_inverse_and_keeps_the_norm(rng):
    arrays = {block: normal(rng, 2 * block, 3) for block in BLOCKS}

    @jax.jit
    def turn(arrays):
        return {block: rotate(x, block, 0) for block, x in arrays.items()}

    once = turn(arrays)
    twice = turn(once)
    for block, x in arrays.items():
        assert once[block].dtype == jnp.float32
        expected = oracles.rotate(x, block, 0)
        for actual, wanted, times in ((once, expected, 4), (twice, x, 8)):
            np.testing.assert_allclose(
                np.float64(actual[block]),
                wanted,
                rtol=0,
                atol=times * ROUNDING,
                err_msg=f"block {block}",
            )
        norms = [np.linalg.norm(np.float64(a)) for a in (once[block], x)]
        np.testing.assert_allclose(*norms, rtol=ROUNDING, err_msg=f"block {block}")


def test_axes(rng):
    shapes = (16,), (16, 3), (3, 16), (2, 16, 3), (2, 3, 16)
    arrays = [normal(rng, *shape) for shape in shapes]

    @jax.jit
    def turn(arrays):
        return [rotate(x, 8, x.shape.index(16)) for x in arrays]

    for x, found in zip(arrays, turn(arrays)):
        expected = oracles.rotate(x, 8, x.shape.index(16))
        np.testing.assert_allclose(
            np.float64(found), expected, rtol=0, atol=4 * ROUNDING, err_msg=f"{x.shape}"
        )


def test_codes_are_exact(rng):
    # Few and many columns behind the axis: it is moved to the end, or stays in place.
    kinds = [(a, b, c) for a in (0, 1, 2) for b in (16, 128) for c in (3, 128)]
    arrays = {}
    for axis, block, columns in kinds:
        shape = [columns] * 3
        shape[axis] = 2 * block
        shape[axis - 1] = 5
        arrays[axis, block, columns] = rng.integers(-128, 128, shape).astype(np.float32)

    @jax.jit
    def turn(arrays):
        return {key: transform(x, key[1], key[0]) for key, x in arrays.items()}

    for (axis, block, columns), found in turn(arrays).items():
        x = arrays[axis, block, columns]
        exact = np.round(oracles.rotate(x, block, axis) * np.sqrt(block))
        text = f"axis {axis}, block {block}, {columns} columns"
        np.testing.assert_array_equal(found, exact, text)
    # Called alone, it is compiled in its own program.
    np.testing.assert_array_equal(transform(x, block, axis), exact)


def test_both_ways_agree(rng):
    # A processor with a matrix unit takes the one product, which no CPU would run.
    arrays = [normal(rng, 2, b, columns) for b in BLOCKS for columns in (3, 128)]

    @jax.jit
    def both(arrays):
        return [(_by_product(x, 1), _by_factors(x, 1)) for x in arrays]

    for x, found in zip(arrays, both(arrays)):
        # Sums of `block` numbers, in another order.
        np.testing.assert_allclose(
            *found, rtol=1e-6, atol=x.shape[1] * ROUNDING, err_msg=f"{x.shape}"
        )


def test_a_product_before_it_changes_no_bit(rng):
    # A compiler must not contract the sums with the product that they add up.
    pairs = {
        (block, axis): [normal(rng, 512, 512) for _ in range(2)]
        for block in (32, 128, 256)
        for axis in (0, 1)
    }

    @jax.jit
    def of_products(pairs):
        return {key: transform(a * b, *key) for key, (a, b) in pairs.items()}

    @jax.jit
    def of_arrays(arrays):
        return {key: transform(x, *key) for key, x in arrays.items()}

    separate = of_arrays({key: a * b for key, (a, b) in pairs.items()})
    for key, found in of_products(pairs).items():
        np.testing.assert_array_equal(found, separate[key], f"block, axis: {key}")


def test_is_its_own_transpose(rng):
    x, y = normal(rng, 16, 3), normal(rng, 16, 3)

    @jax.jit
    def transposed(x, y):
        return jax.vjp(lambda x: rotate(x, 8, 0), x)[1](y)[0]

    np.testing.assert_allclose(
        np.float64(transposed(x, y)),
        oracles.rotate(y, 8, 0),
        rtol=0,
        atol=4 * ROUNDING,
    )


def test_spreads_an_outlier():
    x = np.zeros((64, 1), np.float32)
    x[5] = 8.0
    found = jax.jit(rotate, static_argnums=(1, 2))(x, 64, 0)
    np.testing.assert_array_equal(np.abs(found), np.ones((64, 1)))


def test_float64_is_not_narrowed(x64, rng):
    x = rng.standard_normal((32, 3))
    result = jax.jit(rotate, static_argnums=(1, 2))(x, 32, 0)
    assert result.dtype == jnp.float64
    # The rounding of float64, 20 times over.
    np.testing.assert_allclose(result, oracles.rotate(x, 32, 0), atol=5e-15, rtol=0)
