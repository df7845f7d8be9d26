"""Quantizers that find the quantized values themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Halves, assert_raises

import cage_jax as cage
from cage_jax.program.model_report import report
from cage_jax.quantizers.grid import Grid

RULES = cage.Rules([("w", Halves())])


def test_values_gradient_and_error(rng):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.standard_normal((6, 5)), dtype)
        expected = np.round(2 * np.float32(x)) / 2

        @jax.jit
        def both(x):
            value = cage.fake_quant(x, Halves())
            gradient = jax.grad(lambda x: jnp.sum(cage.fake_quant(x, Halves()) ** 2))(x)
            return value, gradient, cage.quantization_error(x, Halves())

        value, gradient, error = both(x)
        assert value.dtype == gradient.dtype == error.dtype == dtype
        np.testing.assert_array_equal(np.float32(value), expected)
        np.testing.assert_array_equal(np.float32(gradient), 2 * expected)
        np.testing.assert_array_equal(error, x - jnp.asarray(expected, dtype))


def test_every_placement_pulls_to_the_values(rng):
    x = rng.standard_normal((6, 5)).astype(np.float32)
    error = x - np.round(2 * x) / 2
    params, zeros = {"w": jnp.asarray(x)}, {"w": jnp.zeros_like(x)}
    options = {"strength": 0.5, "learning_rate": 1.0}
    # The step of the optimizer itself is 0.
    for tx, sign in (
        (cage.coupled(RULES, strength=0.5), 1),
        (cage.decoupled(optax.sgd(1.0), RULES, **options), -1),
        (cage.post_step(optax.sgd(1.0), RULES, **options), -1),
    ):
        updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
        # Halves are exact, and so are products with one.
        np.testing.assert_array_equal(updates["w"], sign * 0.5 * error)


def test_reports(rng):
    params = {"w": rng.standard_normal((6, 5)).astype(np.float32)}
    (row,) = RULES.report(params).rows
    assert (row.quantized_bits, row.quantizer) == (8 * 30, Halves())
    found = report(lambda p, x: x @ p["w"], RULES, params, np.ones((2, 6), np.float32))
    assert found.findings == ()
    error = params["w"] - np.round(2 * params["w"]) / 2
    expected = np.linalg.norm(error) / np.linalg.norm(params["w"])
    assert found.layers[0].measured.error == pytest.approx(expected, rel=1e-5)
    assert found.layers[0].measured[1:] == (0, 0, 0)


def test_what_needs_codes_says_so():
    params = {"w": np.ones((4, 2), np.float32)}
    grid = Grid(np.ones((1, 2), np.float32))
    assert_raises(
        (function, ValueError, rf"^`w`: `{name}` needs .* its own; got halves\. Use ")
        for name, function in (
            ("quantize", lambda: cage.quantize(params, RULES)),
            ("grid", lambda: cage.fake_quant(params, RULES, grid={"w": grid})),
            (
                "statistics",
                lambda: cage.coupled(RULES, strength=1.0, statistics=True).init(params),
            ),
            (
                "freeze_scale",
                lambda: cage.coupled(RULES, strength=1.0, freeze_scale=True).init(
                    params
                ),
            ),
            ("lotion", lambda: cage.contrib.lotion(RULES, strength=1.0).init(params)),
            ("freezing", lambda: cage.contrib.freezing(RULES, 0.1).init(params)),
            ("parq", lambda: cage.contrib.parq(params, RULES, 0.5)),
            ("ewgs", lambda: cage.contrib.ewgs(params, RULES, 0.1)),
        )
    )
