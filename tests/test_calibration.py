"""Grids of inputs, found in batches and kept with the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage
from cage_jax import Rules, calibrate, fake_quant, int4, int8, quantize_activations
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scale_types import Float8
from cage_jax.quantizers.scales import (
    AbsMax,
    Calibrated,
    Learned,
    MinMax,
    Percentile,
    SignedMax,
)

STATIC = int8(axis=None, scale=Calibrated())


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def inputs_of(pattern, inputs=STATIC):
    return Rules([(pattern, None, inputs)])


def multiply(p, x):
    return x @ p["w"]


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0]


@pytest.fixture
def params(rng):
    return {"w": normal(rng, 8, 4), "stack": normal(rng, 3, 8, 8)}


@pytest.fixture
def x(rng):
    return normal(rng, 5, 8)


def test_calibrated_on_batches(params, rng):
    batches = [(normal(rng, 5, 8),) for _ in range(3)]
    largest = [np.abs(x).max() for (x,) in batches]

    def scale_of(rule):
        rules = inputs_of("w", int8(axis=None, scale=rule))
        variables = calibrate(multiply, rules, params, batches)
        assert variables["params"] is params
        return float(variables["grids"]["w/inputs"].scale)

    assert scale_of(Calibrated()) == pytest.approx(max(largest) / 127, rel=1e-6)
    moving = 0.9 * (0.9 * largest[0] + 0.1 * largest[1]) + 0.1 * largest[2]
    assert scale_of(Calibrated(decay=0.9)) == pytest.approx(moving / 127, rel=1e-6)
    percentiles = [np.percentile(np.abs(x), 90, method="higher") for (x,) in batches]
    found = scale_of(Calibrated(Percentile(90.0)))
    assert found == pytest.approx(max(percentiles) / 127, rel=1e-6)


def test_calibrated_inputs_have_that_grid(params, x):
    rules = inputs_of("w")
    variables = calibrate(multiply, rules, params, [(0.5 * x,)])
    apply = quantize_activations(multiply, rules)

    def loss(x):
        outputs = apply(variables, x)
        return outputs.sum(), outputs

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(x)
    scale = 0.5 * np.abs(np.float64(x)).max() / 127
    expected = np.clip(np.round(np.float64(x) / scale), -127, 127) * scale
    np.testing.assert_allclose(
        found, expected @ np.float64(params["w"]), rtol=0, atol=1e-4
    )
    # What lies beyond the grid receives no gradient.
    outside = np.abs(np.float64(x)) > 127.01 * scale
    assert outside.any() and np.all((np.asarray(gradient) == 0) == outside)


def test_one_sided_inputs_with_a_zero_point(params, rng):
    asymmetric = cage.Quantizer(
        Integer(8, narrow=False), Calibrated(MinMax()), axis=None
    )
    rules = inputs_of("w", asymmetric)
    batches = [
        (np.maximum(normal(rng, 5, 8), 0) + np.float32(shift),) for shift in (0, 1)
    ]
    variables = calibrate(multiply, rules, params, batches)
    grid = variables["grids"]["w/inputs"]
    top = max(float(x.max()) for (x,) in batches)
    assert float(grid.scale) == pytest.approx(top / 255, rel=1e-5)
    assert float(grid.zero_point) == -128
    apply = quantize_activations(multiply, rules)
    found = jax.jit(apply)(variables, batches[0][0])
    np.testing.assert_allclose(
        found, batches[0][0] @ params["w"], atol=float(grid.scale) * 8 * 2
    )


def test_each_repetition_of_a_scan_has_its_own_grid(params, x):
    rules = inputs_of("stack")
    variables = calibrate(scanned, rules, params, [(x,)])
    h, expected = np.float64(x), []
    for w in np.float64(params["stack"]):
        expected.append(np.abs(h).max() / 127)
        h = np.tanh(h @ w)
    found = variables["grids"]["stack/inputs"].scale
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    apply = quantize_activations(scanned, rules)
    h = np.float64(x)
    for w, scale in zip(np.float64(params["stack"]), expected):
        h = np.tanh(np.clip(np.round(h / scale), -127, 127) * scale @ w)
    np.testing.assert_allclose(jax.jit(apply)(variables, x), h, atol=1e-4)


def test_batches_of_zeros_say_nothing(params, x):
    rules = inputs_of("w")
    for batches in ([x, 0 * x], [0 * x, x]):
        found = calibrate(multiply, rules, params, [(each,) for each in batches])
        scale = float(found["grids"]["w/inputs"].scale)
        assert scale == pytest.approx(float(np.abs(x).max()) / 127, rel=1e-6)
    found = calibrate(multiply, rules, params, [(0 * x,)])
    assert float(found["grids"]["w/inputs"].scale) == 1


def test_learned_grids_of_inputs_are_trained(params, rng):
    # Small weights, where tanh is not flat, and tokens enough to learn from.
    params, x = {"stack": params["stack"] / 2}, normal(rng, 64, 8)
    rules = Rules([("stack", int4(axis=-2), cage.lsq(4))])
    variables = calibrate(scanned, rules, params, [(x,)])
    start = np.asarray(variables["grids"]["stack/inputs"].scale)
    first = 2 * np.abs(np.float64(x)).mean() / np.sqrt(7)
    assert float(start[0]) == pytest.approx(first, rel=1e-5)
    apply = quantize_activations(scanned, rules)
    tx = cage.cage_adamw(0.01, rules, strength=1.0)

    def loss(variables, target):
        return jnp.mean((apply(fake_quant(variables, rules), x) - target) ** 2)

    @jax.jit
    def train(variables, state):
        target = scanned(params, x)

        def step(carry, _):
            variables, state = carry
            value, gradient = jax.value_and_grad(loss)(variables, target)
            updates, state = tx.update(gradient, state, variables)
            return (optax.apply_updates(variables, updates), state), value

        (variables, _), losses = jax.lax.scan(step, (variables, state), length=31)
        return variables, losses

    with jax.numpy_dtype_promotion("standard"):
        variables, losses = train(variables, tx.init(variables))
    assert losses[-1] < 0.8 * losses[0]
    assert np.all(np.asarray(variables["grids"]["stack/inputs"].scale) != start)


def test_learned_weights_and_calibrated_inputs_lie_beside_each_other(params, x):
    params = {"w": params["w"]}
    rules = Rules([("w", cage.lsq(4), STATIC)])
    variables = calibrate(multiply, rules, cage.with_grids(params, rules), [(x,)])
    assert sorted(variables["grids"]) == ["w", "w/inputs"]

    def pair(variables, x):
        found = quantize_activations(multiply, rules)(fake_quant(variables, rules), x)
        w = fake_quant(params["w"], cage.lsq(4), grid=variables["grids"]["w"])
        return found, fake_quant(x, int8(axis=None)) @ w

    found, expected = jax.jit(pair)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_calibrated_is_what_it_wraps():
    rule = Calibrated(AbsMax(), decay=0.5)
    assert str(rule) == "calibrated absmax, average of decay 0.5"
    assert rule.needs_grid and not rule.learned and not rule.asymmetric
    assert Calibrated(MinMax()).asymmetric


def test_what_cannot_be_calibrated(params, x):
    def call(batches, inputs=STATIC):
        rules = inputs_of("w", inputs)
        return lambda: calibrate(multiply, rules, params, batches)

    # Tokens differ.
    per_token = int8(axis=-1, scale=Calibrated())
    nan = np.where(x == x[0, 0], np.float32(np.nan), x)
    table = [
        (call([x]), TypeError, r"`batches` must be tuples .*Use \[\(x,\)"),
        (
            call([(x,)], per_token),
            ValueError,
            "`w/inputs`: `inputs` must not have a calibrated",
        ),
        (
            call(
                [(x,)],
                cage.Quantizer(Integer(8), Calibrated(), axis=0, scale_type=Float8()),
            ),
            ValueError,
            "`w/inputs`: `inputs` must not have .* per feature and one more",
        ),
        (call([]), ValueError, "`batches` must have a batch"),
        (
            call([(x,)], int8(axis=-1)),
            ValueError,
            "`rules` must have inputs with a calibrated",
        ),
        (call([(nan,)]), ValueError, "`w`: `batches` must give finite inputs"),
        (lambda: Calibrated(Learned()), TypeError, "`rule` must be a rule"),
        (lambda: Calibrated(SignedMax()), ValueError, "`rule` must give positive scal"),
        (lambda: Calibrated("absmax"), TypeError, "`rule` must be a rule"),
        (lambda: Calibrated(decay=1.0), ValueError, "`decay` .* below 1; got 1"),
        (lambda: Calibrated(decay=0.0), ValueError, "`decay` must be above 0"),
        (
            lambda: cage.Quantizer(Integer(8), Calibrated(MinMax())),
            ValueError,
            "MinMax needs an integer format of full",
        ),
    ]
    assert_raises(table)
