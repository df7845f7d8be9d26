"""Tests of the basis in which an array is rounded, against float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import hadamard

from cage_jax import int4
from cage_jax.quantizers.basis import Basis


def matrix_of(basis, size):
    """The rotation as a float64 matrix that multiplies columns."""
    signs = np.ones(size)
    if basis.seed is not None:
        signs = 2.0 * np.random.default_rng(basis.seed).integers(0, 2, size) - 1
    return np.kron(np.eye(size // basis.block), hadamard(basis.block)) * signs


@pytest.mark.parametrize("seed", [None, 3])
def test_rotates_columns_and_back(rng, seed):
    x, basis = normal(rng, 64, 5), Basis(32, 0, seed)
    matrix = matrix_of(basis, 64)
    rotated = basis.rotate(x)
    np.testing.assert_allclose(rotated, matrix @ np.float64(x), rtol=1e-5, atol=1e-6)
    back = basis.unrotate(rotated)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-6)
    by_hand = matrix.T @ (3 * (matrix @ np.float64(x)))
    found = basis.within(lambda rotated: 3 * rotated, x)
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)


def test_without_a_rotation_only_the_dtype_changes(rng):
    x = normal(rng, 8, 4).astype(jnp.bfloat16)
    basis = int4().basis(x.shape)
    assert basis == Basis() and basis.factor == 1.0
    for found in (basis.rotate(x), basis.unrotate(x.astype(jnp.float32))):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.float32(x))


def test_codes_are_rotated_exactly(rng):
    codes = jnp.asarray(rng.integers(-128, 128, (128, 3)), jnp.float32)
    basis = Basis(128, 0, 0)
    again = jax.jit(lambda x: basis.transpose(basis.transform(x)))(codes)
    np.testing.assert_array_equal(again, 128 * codes)
