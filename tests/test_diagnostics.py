"""The report of a model: what fits its grid and what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import absmax_round

import cage_jax as cage
from cage_jax import Rules, int2, int4, int8
from cage_jax.program.model_report import report
from cage_jax.quantizers.scales import AbsMax, Calibrated

PATHS = ["b", "e", "s", "w"]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


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


@pytest.fixture
def x(rng, params):
    """Enough numbers for each level of int8; one shape for all compiled programs."""
    return normal(rng, 4096, 4)


def figures(x, scale, low, high):
    """Error, clipped and unused of integers, in float64."""
    x = np.float64(x)
    codes = np.clip(np.round(x / scale), low, high)
    beyond = (x / scale > high + 0.5) | (x / scale < low - 0.5)
    used = len(np.unique(codes)) / (high - low + 1)
    error = np.linalg.norm(x - codes * scale) / np.linalg.norm(x)
    return error, beyond.mean(), 1 - used


def test_figures_of_weights_and_inputs(params, x):
    clipped = int4(axis=None, scale=AbsMax(0.3))
    rules = Rules([("w", int4(axis=None), clipped), ("e", int2())])
    found = report(model, rules, params, x)
    assert [layer.weight.path for layer in found.layers] == PATHS
    b, e, s, w = found.layers
    scale = np.abs(np.float64(params["w"])).max() / 7
    np.testing.assert_allclose(
        w.measured[:3], figures(params["w"], scale, -7, 7), atol=1e-5
    )
    scale = 0.3 * np.abs(np.float64(x)).max() / 7
    (each,) = w.inputs
    assert each.quantizer == clipped and each.product.shape == (4096, 4)
    np.testing.assert_allclose(each.measured[:3], figures(x, scale, -7, 7), atol=1e-5)
    assert b.measured is None and b.inputs == () and b.weight.reason
    assert s.measured is None and s.inputs[0].product.repeats == (2,)
    assert e.measured.error > 0.2 and e.inputs[0].quantizer is None


def test_inputs_are_those_behind_quantized_layers(params, x):
    rules = Rules([("w", int2(), int2(axis=-1)), ("e", None, int8(axis=-1))])
    found = {
        layer.weight.path: layer for layer in report(model, rules, params, x).layers
    }
    h = absmax_round(x, top=1, axis=-1) @ absmax_round(params["w"], top=1)
    h = np.maximum(h + params["b"], 0)
    for w in np.float64(params["s"]):
        h = np.tanh(h @ w)
    h = h[h.any(-1)]  # rows of zeros have no error
    error = h - absmax_round(h, top=127, axis=-1)
    expected = np.linalg.norm(error) / np.linalg.norm(h)
    assert found["e"].inputs[0].measured.error == pytest.approx(expected, rel=1e-4)


def test_the_text(params, x):
    x = x * np.array([1, 1, 1, 100], np.float32)
    rules = Rules([("w", int4(), int4(axis=None)), ("s", int4(axis=-2), int8(axis=-1))])
    text = str(report(model, rules, params, x))
    lines = text.splitlines()
    head = "path shape weight inputs error clipped unused input error clipped unused"
    assert lines[0].split() == head.split()
    assert (
        len([line for line in lines if line.startswith(("b ", "e ", "s ", "w "))]) == 4
    )
    assert "- in no matrix product" in text and "- not quantized" in text
    assert text.endswith(".")


def finding(text, *words):
    assert any(all(word in line for word in words) for line in text), (words, text)


def test_what_is_wrong_is_said(params, x):
    good = Rules([("w", int4(), int8(axis=-1))])
    nothing = report(model, good, params, x)
    assert nothing.findings == ()
    assert str(nothing).endswith("Nothing looks wrong.")
    # An outlier stretches the grid of a tensor: few levels are used.
    outlier = x.copy()
    outlier[0, 0] = 1000
    tensor = Rules([("w", None, int8(axis=None))])
    found = report(model, tensor, params, outlier).findings
    finding(found, "w, input", "levels are not used", "groups")
    # Most of the values lie beyond.
    narrow = Rules([("w", None, int4(axis=None, scale=AbsMax(0.1)))])
    finding(report(model, narrow, params, x).findings, "w, input", "beyond the grid")
    # Of the weights too, and more than normal numbers have.
    spiked = params["w"].copy()
    spiked[0] = 100
    rules = Rules([("w", int2())])
    found = report(model, rules, params | {"w": spiked}, x).findings
    assert all(line.startswith("w, weight") for line in found)


def test_values_that_are_all_the_same_and_nan_are_worth_a_word(params, x):
    rules = Rules([("w", int4(), int8(axis=-1))])
    for same in (np.zeros_like(x), np.ones_like(x)):
        found = report(model, rules, params, same).findings
        finding(found, "w, input", "all values are the same")
    broken = params["w"].copy()
    broken[0, 0] = np.nan
    found = report(model, rules, params | {"w": broken}, x).findings
    finding(found, "w, weight", "NaNs")


def test_rules_that_do_nothing_are_found(params, x):
    found = report(model, Rules([("W", int4(axis=None))]), params, x).findings
    finding(found, "the rule 'W' matches no parameter", "'w'")
    finding(found, "nothing is quantized")
    rules = Rules([("w", None, int8(axis=-1)), ("b", None, int8(axis=-1))])
    found = report(model, rules, params, x).findings
    finding(found, "b: no parameter of the rule 'b' is in a product with data")
    assert not any("nothing is quantized" in line for line in found)


# An einsum, the shape of its weight, an axis of scales across what is summed over, and
# the right one.
EQUATIONS = {
    "dense": ("td,dh->th", (64, 48), -1, 0),
    "heads": ("td,dhk->thk", (128, 4, 32), -2, 0),
    "out": ("thk,hkd->td", (4, 32, 48), 0, (0, 1)),
    "turned": ("td,hd->th", (48, 64), -2, 1),
}


def test_scales_across_what_is_summed_over(rng):
    params = {name: normal(rng, *row[1]) for name, row in EQUATIONS.items()}
    data = {"dense": (512, 64), "heads": (512, 128), "out": (512, 4, 32)}
    data = {name: normal(rng, *shape) for name, shape in data.items()}
    data |= {"turned": data["dense"], "conv": normal(rng, 4, 8, 8, 16)}
    params["conv"] = normal(rng, 3, 3, 16, 32)

    @jax.jit
    def apply(params, data):
        numbers = ("NHWC", "HWIO", "NHWC")
        found = [
            jnp.einsum(row[0], data[name], params[name])
            for name, row in EQUATIONS.items()
        ]
        convolved = jax.lax.conv_general_dilated(
            data["conv"], params["conv"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return [*found, convolved]

    def findings(axes, resolve=False):
        rules = Rules([(name, int4(axis=axis)) for name, axis in axes.items()])
        if resolve:
            rules = cage.resolve(rules, apply, params, data)
        return report(apply, rules, params, data).findings

    found = findings({name: row[2] for name, row in EQUATIONS.items()} | {"conv": -2})
    for name, (_, _, _, right) in EQUATIONS.items():
        finding(
            found, f"{name}, weight: its product sums over", f"Use axis={right}, or"
        )
    text = "conv, weight: its product sums over axis (0, 1, 2) of (3, 3, 16, 32)"
    finding(found, text, "Use axis=(0, 1, 2), or cage.resolve.")
    # A float32 scale for each four weights.
    finding(found, "`heads`: its scales cost 8.0 bits a weight", "(128, 1, 32)")
    right = {name: row[3] for name, row in EQUATIONS.items()}
    assert findings(right | {"conv": (0, 1, 2)}) == ()
    for axis in (None, "contracted"):
        assert findings(dict.fromkeys(params, axis), resolve=True) == ()
    # Of a stack without more, a scale for each matrix of the last two axes.
    heads, out = findings(dict.fromkeys(EQUATIONS))
    assert heads.startswith("heads, weight: its product sums over axis 0")
    assert out.startswith("out, weight: its product sums over axis (0, 1)")


def latents(p, x):
    return jnp.tanh(p["latents"] @ p["w"]) @ x.T


def low_rank(p, x):
    return x @ (p["w"] + p["down"] @ p["up"])


def mixed_matrices(p, x):
    gates = jax.nn.softmax(x.mean(0) @ p["router"])
    return x @ jnp.einsum("e,eio->io", gates, p["w"])


def added_experts(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    hidden = jnp.broadcast_to(x[:, None], (6, 4, 32))
    return jnp.einsum("te,tef,efd->td", gates, hidden, p["w"])


# A program, its parameters, whose input is quantized, and what is said of which one.
ROLES = [
    (latents, {"latents": (6, 32), "w": (32, 32)}, "latents", "an input itself"),
    (low_rank, {"w": (32, 32), "down": (32, 4), "up": (4, 32)}, "down", "LoRA"),
    (low_rank, {"w": (32, 32), "down": (32, 4), "up": (4, 32)}, "w", None),
    (mixed_matrices, {"w": (4, 32, 32), "router": (32, 4)}, "w", "mixes matrices"),
    (added_experts, {"w": (4, 32, 16), "router": (32, 4)}, "w", "use axis=1, or add"),
]


@pytest.mark.parametrize(("program", "shapes", "path", "text"), ROLES)
def test_what_a_parameter_may_be_instead_is_said(program, shapes, path, text):
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    x = jax.ShapeDtypeStruct((6, 32), jnp.float32)

    def found(quantizer):
        rules = Rules([(path, quantizer, int8()), (".*", None)])
        rules = cage.resolve(rules, program, params, x)
        return report(program, rules, params, x).findings

    if text is None:
        assert found(int4()) == ()
        return
    *costs, told = found(int4())
    assert told.startswith(path) and text in told
    assert all("its scales cost" in each for each in costs)
    if program is added_experts:
        assert found(int4(axis=1)) == ()


def test_scales_of_inputs_that_save_nothing(rng):
    shapes = {"conv": (3, 3, 1, 16), "point": (1, 1, 8, 16), "dense": (8, 4)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    data = {"conv": normal(rng, 2, 6, 6, 1), "point": normal(rng, 2, 6, 6, 8)}
    data["dense"] = data["point"]

    def apply(params, data):
        found = [
            jax.lax.conv_general_dilated(
                data[name],
                params[name],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for name in ("conv", "point")
        ]
        return [*found, data["dense"] @ params["dense"]]

    def findings(inputs):
        rules = Rules([(name, None, inputs) for name in shapes])
        return report(apply, rules, params, data).findings

    window, costs = findings(int8(axis=-1))
    finding(
        [window],
        "conv, input",
        "a window of (3, 3) places",
        "Leave `axis` out, or use axis=None",
    )
    finding([costs], "conv, input", "cost 32 bits a value", "(values per scale: 1)")
    # Of 2 bits, 16 values cost what a float32 scale does.
    found = findings(int2(axis=-1))
    finding(found, "dense, input: its scales cost 4 bits a value beside codes of 2")
    finding(found, "point, input: its scales cost 4 bits")
    assert findings(int8(axis=None)) == findings(int8()) == ()


def test_values_of_one_sign_need_a_zero_point(params, x):
    sparse = np.maximum(x, 0)

    def unused(inputs, x):
        rules = Rules([("w", None, inputs)])
        found = report(model, rules, params, x).findings
        return [line for line in found if "levels are not used" in line]

    (found,) = unused(int8(axis=None), sparse)
    assert "all values have one sign" in found and "symmetric=False" in found
    assert unused(int8(axis=None, symmetric=False), sparse) == []
    # An outlier needs something else, whatever the signs.
    sparse[0, 0] = 1000
    for inputs in (int8(axis=None), int8(axis=None, symmetric=False)):
        (found,) = unused(inputs, sparse)
        assert "wider than most values" in found


def test_learned_calibrated_and_stochastic(params, x):
    static = int8(axis=None, scale=Calibrated())
    stochastic = dataclasses.replace(int4(), rounding="stochastic")
    rules = Rules([("w", cage.lsq(4), static), ("e", stochastic)])
    variables = cage.calibrate(model, rules, cage.with_grids(params, rules), [(x,)])
    found = {
        layer.weight.path: layer for layer in report(model, rules, variables, x).layers
    }
    grid = variables["grids"]["w"]
    expected = figures(params["w"], float(grid.scale[0, 0]), -8, 7)
    np.testing.assert_allclose(found["w"].measured[:3], expected, atol=1e-5)
    assert found["w"].inputs[0].measured.clipped == 0
    plain = report(model, Rules([("e", int4())]), params, x).layers[1].measured
    np.testing.assert_allclose(found["e"].measured, plain)
    with pytest.raises(ValueError, match="`w`: `grid` must be given"):
        report(model, rules, params, x)


def test_what_is_out_of_reach_is_in_the_table(params, x):
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda primals, _: (product(*primals),) * 2)
    rules = Rules([("w", int4(), int8(axis=-1))])
    found = report(lambda p, x: product(x, p["w"]), rules, params, x)
    assert "- out of reach in custom_jvp_call" in str(found)
