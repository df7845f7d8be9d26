"""Quantization vectors: exact differences of weights, and other trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises

from cage_jax import contrib

SMALLEST = 2.0**-103  # below it, remainders are subnormal numbers


@pytest.fixture
def any_floats(rng):
    """Draws floats of all sizes, most of them with all bits of the mantissa in use."""

    def draw(dtype=np.float32):
        x = rng.normal(size=4096) * 2.0 ** rng.integers(-60, 60, 4096)
        x[::9] = 0
        return x.astype(dtype)

    return draw


def bits(x):
    return np.asarray(x).view(f"int{8 * x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_donor_gets_its_own_weights_to_the_bit(any_floats, dtype):
    full = {"kernel": jnp.asarray(np.clip(any_floats(), -6e4, 6e4), dtype)}
    near = full["kernel"] * jnp.asarray(1.01, dtype)  # as training leaves them
    for qat in (near, full["kernel"][::-1], jnp.full(4096, 2 * SMALLEST, dtype)):

        @jax.jit
        def there_and_back(full, qat):
            return contrib.apply_vector(full, contrib.quantization_vector(qat, full))

        found = there_and_back(full, {"kernel": qat})["kernel"]
        eager = contrib.quantization_vector({"kernel": qat}, full)
        assert found.dtype == dtype
        for each in (found, contrib.apply_vector(full, eager)["kernel"]):
            np.testing.assert_array_equal(bits(each + 0), bits(qat + 0))
    # One array of differences is not enough.
    full, qat = (np.asarray(x, np.float32) for x in (full["kernel"], near[::-1]))
    if dtype == "float32":
        assert np.mean(full + (qat - full) != qat) > 0.1


def test_a_donor_of_float64_gets_its_own_weights(x64, any_floats):
    full, qat = (jnp.asarray(any_floats(np.float64)) for _ in range(2))
    vector = contrib.quantization_vector(qat, full)
    found = contrib.apply_vector(full, vector)
    np.testing.assert_array_equal(bits(found), bits(qat))


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_a_receiver_gets_the_scaled_difference(any_floats, scale):
    qat, full, params = (np.cbrt(np.cbrt(any_floats())) for _ in range(3))
    vector = contrib.quantization_vector(*map(jnp.asarray, (qat, full)))
    found = np.float64(contrib.apply_vector(jnp.asarray(params), vector, scale))
    step = scale * (np.float64(qat) - np.float64(full))
    want = params + step
    # The result is rounded, the part that is lost once more, and a product too.
    rounded = 2.0**-24 * np.abs(want) + 2.0**-46 * (np.abs(params) + np.abs(step))
    rounded += (scale != 1) * 2.0**-23 * np.abs(step)
    assert (np.abs(found - want) <= rounded).all()


def test_vectors_add_and_other_leaves_stay():
    full = {"steps": jnp.arange(3), "x": jnp.ones(3, jnp.bfloat16), "gone": None}
    qat = {"steps": jnp.arange(3) + 1, "x": 1.5 * full["x"], "gone": None}
    vector = contrib.quantization_vector(qat, full)
    twice = jax.tree.map(jnp.add, vector, vector)
    found = contrib.apply_vector(full, twice)
    assert found["x"].dtype == jnp.bfloat16
    assert found["x"].tolist() == [2.0] * 3
    assert found["steps"].tolist() == [0, 1, 2]


def test_other_trees_are_errors():
    params = {"backbone": jnp.ones((4, 2)), "head": jnp.ones((4, 3))}
    vector = contrib.quantization_vector(params, params)
    other = {**params, "head": jnp.ones((4, 5))}
    without = {"backbone": params["backbone"]}
    text = "^`head`: `{}` must be a tree like `{}`, which has {}; got {}. Leave out"
    shapes = [rf"shape \(4, {n}\)" for n in (3, 5)]
    none = "no such parameter"
    assert_raises(
        [
            (
                lambda: contrib.quantization_vector(params, other),
                ValueError,
                text.format("full", "qat", *shapes),
            ),
            (
                lambda: contrib.apply_vector(other, vector),
                ValueError,
                text.format("vector", "params", *shapes[::-1]),
            ),
            (
                lambda: contrib.apply_vector(without, vector),
                ValueError,
                text.format("vector", "params", none, shapes[0]),
            ),
            (
                lambda: contrib.quantization_vector(params, without),
                ValueError,
                text.format("full", "qat", shapes[0], none),
            ),
            (
                lambda: contrib.quantization_vector(
                    [params["head"]], (params["head"],)
                ),
                ValueError,
                "^`full` must have the nodes of `qat`",
            ),
            (
                lambda: contrib.apply_vector(params, params),
                TypeError,
                "^`vector` must be a QuantizationVector; got dict",
            ),
        ]
    )
