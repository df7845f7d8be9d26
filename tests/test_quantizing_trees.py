"""The four functions on trees, what they refuse, and stochastic rounding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNEL, assert_raises, assert_same, normal

from cage_jax import (
    Quantizer,
    Rules,
    dequantize,
    fake_quant,
    fp8,
    int2,
    int4,
    int8,
    mxfp4,
    quantization_error,
    quantize,
    quest,
)
from cage_jax.quantizers.rounding import fit_grid
from cage_jax.quantizers.scales import AbsMax, Fixed

ONES = np.ones((8, 3), np.float32)
FUNCTIONS = (fake_quant, quantize, quantization_error)
RULES = Rules(
    [
        ("up/kernel", int4(group_size=16)),
        ("down/kernel", int4(scale=AbsMax(0.7), group_size=32)),
        ("out/kernel", quest(4, hadamard=32)),
        (".*", None),
    ]
)


def tree(rng):
    params = {name: {"kernel": normal(rng, *KERNEL)} for name in ("up", "down", "out")}
    return params | {"norm": normal(rng, *KERNEL)}


def test_the_four_functions_on_a_tree(rng):
    params = tree(rng)
    value, codes = fake_quant(params, RULES), quantize(params, RULES)
    error = quantization_error(params, RULES)
    for path, (quantizer, x) in RULES.quantized(params).items():
        name = path.split("/")[0]
        assert_same(value[name]["kernel"], fake_quant(x, quantizer))
        assert_same(codes[name]["kernel"], quantize(x, quantizer))
        assert_same(error[name]["kernel"], quantization_error(x, quantizer))
    assert value["norm"] is params["norm"]
    assert codes["norm"] is params["norm"]
    np.testing.assert_array_equal(error["norm"], np.zeros(KERNEL))
    structures = {jax.tree.structure(each) for each in (value, error, params)}
    assert len(structures) == 1
    for back in (dequantize(codes), dequantize(codes, RULES)):
        assert_same(back, value)
    assert_same(jax.jit(dequantize)(codes)["norm"], params["norm"])


def test_grids_of_a_tree(rng):
    params = tree(rng)
    quantized = RULES.quantized(params)
    grids = {path: fit_grid(x, quantizer) for path, (quantizer, x) in quantized.items()}
    moved = jax.tree.map(lambda x: jnp.asarray(np.float32(0.9) * x), params)
    for function in FUNCTIONS:
        result = function(moved, RULES, grid=grids)
        for path, (quantizer, x) in RULES.quantized(moved).items():
            expected = function(x, quantizer, grid=grids[path])
            assert_same(result[path.split("/")[0]]["kernel"], expected)


def test_codes_know_their_quantizer(rng):
    codes = quantize(normal(rng, 8, 3), int4())
    assert_same(dequantize(codes, int4()), dequantize(codes))
    assert_raises(
        [
            (
                lambda: dequantize(codes, int8()),
                ValueError,
                r"^`quantizer` must be .* int4 .*; got int8",
            ),
            (
                lambda: dequantize({"mlp": {"up": codes}}, Rules([(".*", int8())])),
                ValueError,
                r"^`mlp/up`: `quantizer` must be ",
            ),
            (
                lambda: dequantize(ONES, int4()),
                TypeError,
                r"^`x` must be a QuantizedArray, .*Use ",
            ),
        ]
    )


# --- bad input ------------------------------------------------------------------------


def test_bad_arguments():
    wrong = "`quantizer` must be a Quantizer"
    table = [
        (ONES, int4, TypeError, wrong, "function", "int4(...)."),
        (ONES, "int4", TypeError, wrong, "'int4'", "int4()"),
        (ONES, None, TypeError, wrong, "None", "Rules(["),
        (ONES, {"a": int4()}, TypeError, "`quantizer` must be", "{'a'", "Rules(["),
        (ONES.astype("int32"), int4(), TypeError, "`x` must be", "int32", "Convert it"),
        (ONES > 0, int4(), TypeError, "`x` must be", "bool", "float32, bfloat16"),
        (
            ONES.astype(ONES.dtype.newbyteorder()),
            int4(),
            ValueError,
            "`x` must be in the byte order of this machine",
            "f4",
            "astype(",
        ),
        (
            ONES.astype("complex64"),
            int4(),
            TypeError,
            "`x` must be",
            "complex64",
            "Convert it",
        ),
        (ONES, int4(axis=2), ValueError, "`axis` must be", "axis=2", "from -2 to 1"),
        (
            ONES,
            int4(group_size=3),
            ValueError,
            "`group_size` must",
            "3,",
            "Use 2, or None",
        ),
        (ONES, quest(4), ValueError, "`hadamard` must", "128", "Use 8 or less"),
    ]

    def in_tree(function, x, quantizer):
        return function({"mlp": {"up": x}}, Rules([("mlp/.*", quantizer)]))

    for function in FUNCTIONS:
        for x, quantizer, error, *texts in table:
            start, value, remedy = map(re.escape, texts)
            text = f"(?=.*{remedy}).*got .*{value}"
            alone = (lambda: function(x, quantizer)), error, f"^{start}{text}"  # noqa: B023
            assert_raises([alone])
            if isinstance(quantizer, Quantizer):
                with pytest.raises(error, match=rf"^`mlp/up`: (?s:.)*{value}"):
                    in_tree(function, x, quantizer)


def test_a_tree_needs_rules():
    text = r"got a tree.*Rules\(\[\('\.\*', quantizer\)\]\)"
    assert_raises(
        ((lambda f=function, t=tree: f(t, int4())), TypeError, text)
        for function in FUNCTIONS
        for tree in ({"kernel": ONES}, [jnp.asarray(ONES)], {})
    )


def test_rules_that_quantize_nothing_are_warned_of():
    part = {"kernel": ONES}
    for function in (fake_quant, quantize):
        text = (
            r"no parameter is quantized by .*\. The rule .* nearest path is 'kernel'\."
        )
        with pytest.warns(UserWarning, match=text):
            function(part, Rules([("dense/kernel", int4())]))
        function(part, Rules([(".*", None)]))  # as was asked for
    rules = Rules([(name, int4()) for name in "abc"])
    with pytest.warns(UserWarning, match=r"by the 3 rules from 'a' on\."):
        fake_quant(part, rules)


def test_codes_are_not_quantized_again():
    rules = Rules([(".*kernel", int4()), (".*", None)])
    codes = quantize({"mlp": {"kernel": ONES}}, rules)
    for function in (fake_quant, quantize):
        with pytest.raises(TypeError, match=r"`mlp/kernel`.*quantized already"):
            function(codes, rules)
        function(codes | {"kernel": ONES}, Rules([("kernel", int4())]))


def test_codes_are_not_differentiated(rng):
    x = normal(rng, 8, 3)
    with pytest.raises(TypeError, match=r"`quantize` has no gradient.*fake_quant"):
        jax.grad(lambda x: dequantize(quantize(x, int4())).sum())(x)
    # What does not reach the loss may be there.
    both = jax.grad(lambda x: (x.sum(), quantize(x, int4())), has_aux=True)(x)
    np.testing.assert_array_equal(both[0], np.ones_like(x))


# --- stochastic rounding --------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer",
    [int4(scale=Fixed(0.5)), quest(2, hadamard=4), fp8(), mxfp4(rounding="up")],
    ids=str,
)
def test_stochastic_rounding_has_the_value_as_its_mean(quantizer, rng, key):
    x = normal(rng, 32, 3) * 0.5
    stochastic = dataclasses.replace(quantizer, rounding="stochastic")
    draws = 4000
    keys = jax.random.split(key, draws)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def draw(x, key):
        value, pull = jax.vjp(lambda x: fake_quant(x, stochastic, key=key), x)
        return value, *pull(jnp.ones_like(x))

    @jax.jit
    def nearest_and_errors(x):
        errors = [quantization_error(x, q) for q in (stochastic, quantizer)]
        return fake_quant(x, quantizer), *errors

    drawn, gradients = draw(x, keys)
    nearest, *errors = nearest_and_errors(x)
    nearest, drawn = np.float64(nearest), np.float64(drawn)
    mean, deviation = drawn.mean(0), drawn.std(0)
    # What lies beyond the grid is clipped, and has no such mean.
    step = np.abs(drawn - nearest).max()
    inside = np.abs(np.float64(x) - nearest) < step
    error = np.abs(mean - np.float64(x))[inside]
    assert np.all(error <= 5 * deviation[inside] / np.sqrt(draws) + 1e-6) or (
        quantizer.hadamard  # clipped in the rotated basis
    )
    assert deviation.max() > 0
    one = fake_quant(x, stochastic, key=keys[0])
    assert_same(fake_quant(x, stochastic, key=keys[0]), one)
    assert_same(dequantize(quantize(x, stochastic, key=keys[0])), one)
    assert np.any(np.asarray(one) != drawn[1])
    if quantizer.gradient == "identity":
        np.testing.assert_array_equal(gradients, np.ones_like(gradients))
    # The pull is to the nearest value.
    assert_same(*errors)


def test_each_parameter_draws_its_own_numbers(rng, key):
    x = normal(rng, 32, 3)
    stochastic = dataclasses.replace(int2(), rounding="stochastic")
    rules = Rules([("[ab]", stochastic), ("c", int2())])
    result = fake_quant({"a": x, "b": x, "c": x}, rules, key=key)
    assert np.any(np.asarray(result["a"]) != np.asarray(result["b"]))
    assert_same(result["c"], fake_quant(x, int2()))


def test_a_key_is_needed_for_stochastic_rounding_alone(key):
    stochastic = dataclasses.replace(int4(), rounding="stochastic")
    params = {"kernel": ONES}
    missing, needless = "`key` must be given", "`key` has no meaning without"
    for function in (fake_quant, quantize):
        for x, with_it, without, path in (
            (ONES, stochastic, int4(), ""),
            (
                params,
                Rules([("kernel", stochastic)]),
                Rules([("kernel", int4())]),
                "`kernel`: ",
            ),
        ):
            with pytest.raises(ValueError, match=path + missing):
                function(x, with_it)
            with pytest.raises(ValueError, match=needless):
                function(x, without, key=key)
