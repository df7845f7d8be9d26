import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax.arrays.exact import divide, power_below, to_int8, uncontracted

EDGES = [0.0, -0.0, 1.0, 3.0, 1.5e-45, 1e-39, 2.0**-126, 1e38, np.inf, -np.inf, np.nan]


def test_a_quotient_is_rounded_once_in_a_compiled_program(rng):
    x = rng.standard_normal((64, 32)).astype(np.float32)
    scale = rng.random((1, 32)).astype(np.float32) + 0.1

    @jax.jit
    def both(x, scale):
        spread = jnp.broadcast_to(scale, x.shape)
        return divide(x, spread), divide(x, jnp.full_like(x, 7.0))

    # NumPy divides as the standard for floating point has it.
    by_scale, by_seven = both(x, scale)
    np.testing.assert_array_equal(by_scale, x / scale)
    np.testing.assert_array_equal(by_seven, x / np.float32(7))


def test_a_quotient_of_what_is_no_number():
    x = np.float32([np.nan, np.inf, 1.0, 0.0])
    found = jax.jit(divide)(x, np.float32([2, 2, 0, 0]))
    np.testing.assert_array_equal(found, [np.nan, np.inf, np.inf, np.nan])


def test_a_product_is_rounded_before_a_sum(rng):
    a, b, c = (rng.standard_normal(4096).astype(np.float32) for _ in range(3))
    found = jax.jit(lambda a, b, c: uncontracted(a * b) + c)(a, b, c)
    np.testing.assert_array_equal(found, a * b + c)
    # That this is about something: in one operation the bits are others.
    exact = (np.float64(a) * b + c).astype(np.float32)
    assert np.any(exact != a * b + c)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_power_below(dtype, rng, x64):
    x = np.concatenate([rng.standard_normal(1000) * 2.0 ** rng.integers(-80, 80, 1000)])
    x = np.concatenate([x, 2.0 ** np.arange(-20, 20)]).astype(dtype)
    _, exponent = np.frexp(np.abs(x))
    np.testing.assert_array_equal(
        jax.jit(power_below)(jnp.asarray(x)), np.ldexp(1.0, exponent - 1)
    )


def test_power_below_at_the_edges():
    found = np.asarray(jax.jit(power_below)(np.float32(EDGES)))
    largest = 2.0 ** np.floor(np.log2(1e38))
    expected = [0, 0, 1, 2, 0, 0, 2.0**-126, largest, np.inf, np.inf, np.inf]
    np.testing.assert_array_equal(found, np.float32(expected))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_numbers_are_converted_to_int8(dtype, x64):
    numbers = np.arange(-128, 128)
    found = jax.jit(to_int8)(jnp.asarray(numbers, dtype))
    np.testing.assert_array_equal(found, numbers.astype(np.int8), strict=True)
