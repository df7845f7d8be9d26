"""The report of a model: what fits its grid and what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax import Rules, int2, int4, int8
from cage_jax.diagnostics import report
from cage_jax.scales import AbsMax, Calibrated

PATHS = ["b", "e", "s", "w"]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def model(params, x):
    h = jnp.maximum(x @ params["w"] + params["b"][None], 0)
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["s"])
    return h @ params["e"].T


@pytest.fixture
def params(rng):
    return {
        "w": normal(rng, 4, 8),
        "b": normal(rng, 8),
        "s": normal(rng, 2, 8, 8),
        "e": normal(rng, 10, 8),
    }


def figures(x, scale, low, high):
    """Error, clipped and dead of integers, in float64."""
    x = np.float64(x)
    codes = np.clip(np.round(x / scale), low, high)
    beyond = (x / scale > high + 0.5) | (x / scale < low - 0.5)
    used = len(np.unique(codes)) / (high - low + 1)
    error = np.linalg.norm(x - codes * scale) / np.linalg.norm(x)
    return error, beyond.mean(), 1 - used


def test_figures_of_weights_and_inputs(params, rng):
    x = normal(rng, 64, 4)
    clipped = int4(axis=None, scale=AbsMax(0.3))
    rules = Rules([("w", int4(axis=None), clipped), ("e", int2())])
    found = report(model, rules, params, x)
    assert [layer.weight.path for layer in found.layers] == PATHS
    b, e, s, w = found.layers
    scale = np.abs(np.float64(params["w"])).max() / 7
    np.testing.assert_allclose(
        w.measured, figures(params["w"], scale, -7, 7), atol=1e-5
    )
    scale = 0.3 * np.abs(np.float64(x)).max() / 7
    (each,) = w.inputs
    assert each.quantizer == clipped and each.product.shape == (64, 4)
    np.testing.assert_allclose(each.measured, figures(x, scale, -7, 7), atol=1e-5)
    assert b.measured is None and b.inputs == () and b.weight.reason
    assert s.measured is None and s.inputs[0].product.repeats == (2,)
    assert e.measured.error > 0.2 and e.inputs[0].quantizer is None


def test_inputs_are_those_behind_quantized_layers(params, rng):
    x = normal(rng, 64, 4)
    rules = Rules([("w", int2(), int2(axis=-1)), ("e", None, int8(axis=-1))])
    found = {
        layer.weight.path: layer for layer in report(model, rules, params, x).layers
    }
    q = cage.fake_quant(x, int2(axis=-1)) @ cage.fake_quant(params["w"], int2())
    h = jnp.maximum(q + params["b"][None], 0)
    for w in params["s"]:
        h = jnp.tanh(h @ w)
    error = cage.quantization_error(h, int8(axis=-1))
    expected = float(jnp.linalg.norm(error) / jnp.linalg.norm(h))
    assert found["e"].inputs[0].measured.error == pytest.approx(expected, rel=1e-4)


def test_the_text(params, rng):
    x = normal(rng, 64, 4) * jnp.array([[1.0, 1, 1, 100]])
    rules = Rules([("w", int4(), int4(axis=None)), ("s", int4(), int8(axis=-1))])
    text = str(report(model, rules, params, x))
    lines = text.splitlines()
    head = "path shape weight inputs error clipped dead input error clipped dead"
    assert lines[0].split() == head.split()
    assert (
        len([line for line in lines if line.startswith(("b ", "e ", "s ", "w "))]) == 4
    )
    assert "- in no product with data" in text and "- as it is" in text
    assert text.endswith(".")


def finding(text, *words):
    assert any(all(word in line for word in words) for line in text), (words, text)


def test_what_is_wrong_is_said(params, rng):
    x = normal(rng, 4096, 4)
    good = Rules([("w", int4(), int4(axis=-1))])
    assert report(model, good, params, x).findings == ()
    assert str(report(model, good, params, x)).endswith("Nothing looks wrong.")
    # An outlier stretches the grid of a tensor: few levels are used.
    outlier = x.at[0, 0].set(1000.0)
    tensor = Rules([("w", None, int8(axis=None))])
    found = report(model, tensor, params, outlier).findings
    finding(found, "w, input", "levels are not used", "groups")
    # Most of the values lie beyond.
    narrow = Rules([("w", None, int4(axis=None, scale=AbsMax(0.1)))])
    finding(report(model, narrow, params, x).findings, "w, input", "beyond the grid")
    # Of the weights too, and more than normal numbers have.
    spiked = params | {"w": params["w"].at[0, :].set(100.0)}
    found = report(model, Rules([("w", int2())]), spiked, x).findings
    assert all(line.startswith("w, weight") for line in found)


def test_rules_that_do_nothing_are_found(params, rng):
    x = normal(rng, 64, 4)
    found = report(model, Rules([("W", int4(axis=None))]), params, x).findings
    finding(found, "the rule 'W' matches no parameter", "'w'")
    finding(found, "nothing is quantized")
    rules = Rules([("w", None, int8(axis=-1)), ("b", None, int8(axis=-1))])
    found = report(model, rules, params, x).findings
    finding(found, "b: a rule quantizes its input, but it is in no product with data")
    assert not any("nothing is quantized" in line for line in found)


def test_scales_that_cost_more_than_codes(rng):
    attention = {"w": normal(rng, 128, 4, 32)}

    def apply(params, x):
        return jnp.einsum("td,dhk->thk", x, params["w"])

    x = normal(rng, 512, 128)
    found = report(apply, Rules([("w", int4())]), attention, x).findings
    # A float32 scale for each four weights.
    finding(found, "w, weight: its scales cost 8.0 bits a weight", "(128, 1, 32)")
    good = Rules([("w", int4(axis=0))])
    assert report(apply, good, attention, x).findings == ()


@pytest.mark.parametrize(
    ("equation", "shape", "axis", "right"),
    [
        ("td,dh->th", (64, 48), -1, 0),
        ("td,dhk->thk", (64, 4, 32), -2, 0),
        ("thk,hkd->td", (4, 32, 48), 0, (0, 1)),
        ("td,hd->th", (48, 64), -2, 1),
    ],
)
def test_scales_across_what_is_summed_over(equation, shape, axis, right, rng):
    params, inputs = {"w": normal(rng, *shape)}, equation.split(",")[0]
    sizes = dict(zip(equation.split(",")[1].split("->")[0], shape)) | {"t": 512}
    x = normal(rng, *(sizes[letter] for letter in inputs))

    def apply(params, x):
        return jnp.einsum(equation, x, params["w"])

    def findings(axis):
        return report(apply, Rules([("w", int4(axis=axis))]), params, x).findings

    finding(findings(axis), "w, weight: its product sums over", f"Use axis={right}.")
    assert findings(right) == () and findings(None) == ()


def test_scales_of_a_convolution_across_what_is_summed_over(rng):
    params, x = {"w": normal(rng, 3, 3, 16, 32)}, normal(rng, 4, 8, 8, 16)

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers
        )

    found = report(apply, Rules([("w", int4())]), params, x).findings
    finding(found, "sums over axis (0, 1, 2) of (3, 3, 16, 32)", "Use axis=(0, 1, 2).")
    good = Rules([("w", int4(axis=(0, 1, 2)))])
    assert report(apply, good, params, x).findings == ()


def test_values_that_are_all_the_same_are_worth_a_word(params):
    rules = Rules([("w", int4(), int8(axis=-1))])
    for x in (jnp.zeros((8, 4)), jnp.ones((4096, 4))):
        found = report(model, rules, params, x).findings
        finding(found, "w, input", "all values are the same")


def test_nan_is_worth_a_word(params, rng):
    x = normal(rng, 256, 4)
    broken = params | {"w": params["w"].at[0, 0].set(jnp.nan)}
    finding(
        report(model, Rules([("w", int4())]), broken, x).findings, "w, weight", "NaNs"
    )


def test_learned_calibrated_and_stochastic(params, rng):
    x = normal(rng, 64, 4)
    static = int8(axis=None, scale=Calibrated())
    stochastic = dataclasses.replace(int4(), rounding="stochastic")
    rules = Rules([("w", cage.lsq(4), static), ("e", stochastic)])
    variables = cage.calibrate(model, rules, cage.with_grids(params, rules), [(x,)])
    found = {
        layer.weight.path: layer for layer in report(model, rules, variables, x).layers
    }
    grid = variables["grids"]["w"]
    expected = figures(params["w"], float(grid.scale[0, 0]), -8, 7)
    np.testing.assert_allclose(found["w"].measured, expected, atol=1e-5)
    assert found["w"].inputs[0].measured.clipped == 0
    plain = report(model, Rules([("e", int4())]), params, x).layers[1].measured
    np.testing.assert_allclose(found["e"].measured, plain)
    with pytest.raises(ValueError, match="`w`: `grid` must be given"):
        report(model, rules, params, x)


def test_what_is_out_of_reach_is_in_the_table(params, rng):
    def conditional(p, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x @ p["w"] * 2)

    rules = Rules([("w", int4(), int8(axis=-1))])
    text = str(report(conditional, rules, params, normal(rng, 64, 4)))
    assert "- out of reach in cond" in text
