"""Inputs of products, quantized in programs of every kind."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from oracles import EPS, absmax_round

import cage_jax as cage
from cage_jax import Rules, fake_quant, int4, int8, quantize_activations
from cage_jax.core.inputs import quantize_input
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scales import AbsMax, Calibrated

PER_TOKEN = int8(axis=-1)
STATIC = int8(axis=None, scale=Calibrated())


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def inputs_of(pattern, inputs=PER_TOKEN):
    return Rules([(pattern, None, inputs)])


def quantized_in_numpy(x):
    """Symmetric absmax with a scale per row, int8 in float64."""
    return absmax_round(x, top=127, axis=-1)


def compiled(function, *arguments):
    """What a function returns, from one program."""
    return jax.jit(function)(*arguments)


def assert_close(pairs, **tolerance):
    """Asks that both of each pair are close, by name."""
    for name, (found, expected) in pairs.items():
        np.testing.assert_allclose(found, expected, err_msg=str(name), **tolerance)


@pytest.fixture
def params(rng):
    return {
        "w": normal(rng, 8, 4),
        "stack": normal(rng, 3, 8, 8),
        "heads": normal(rng, 8, 2, 4),
        "out": normal(rng, 2, 4, 8),
        "embed": normal(rng, 16, 8),
        "bias": normal(rng, 8),
    }


@pytest.fixture
def x(rng):
    return normal(rng, 5, 8)


def multiply(p, x):
    return x @ p["w"]


def test_a_product_by_an_operator(params, x):
    """Outside of jit, as nothing else here."""
    found = quantize_activations(multiply, inputs_of("w"))(params, x)
    expected = quantized_in_numpy(x) @ np.float64(params["w"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=40 * EPS)
    assert np.abs(expected - np.float64(x) @ np.float64(params["w"])).max() > 1e-3


Q = functools.partial(fake_quant, quantizer=PER_TOKEN)
COARSE = int4(axis=-1)
Q4 = functools.partial(fake_quant, quantizer=COARSE)
HEADS = int8(axis=(-2, -1))


def transposed(q):
    return lambda p, x: q(x) @ p["embed"].T


def scanned(q):
    def layer(h, w):
        return jnp.tanh(q(h) @ w), None

    return lambda p, x: jax.lax.scan(layer, x, p["stack"])[0]


def scanned_backwards(q):
    def layer(h, row):
        w, i = row
        return jnp.tanh(q(h) @ w) * i, h

    def run(p, x):
        rows = (p["stack"], jnp.arange(3.0))
        h, seen = jax.lax.scan(layer, x, rows, reverse=True, unroll=2)
        return h + seen.sum(0)

    return run


def rematerialized(q):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(h, w):
        return jax.nn.silu(q(h) @ w)

    return lambda p, x: layer(layer(x, p["stack"][0]), p["stack"][1])


def compiled_inside(q):
    return lambda p, x: jax.jit(lambda w, x: q(x) @ w)(p["w"], x) * 2


def by_a_traced_index(q):
    def run(p, x):
        last = jnp.argmax(x[0]) % 3
        return q(x) @ p["stack"][last]

    return run


def one_of_many(q):
    return lambda p, x: jax.vmap(lambda x: q(x) @ p["w"])(x)


def of_a_computed_weight(q):
    def run(p, x):
        w = p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)
        return q(x) @ w.astype(jnp.float32)

    return run


def weight_first(q):
    return lambda p, x: p["w"].T @ q(x).T


def after_a_custom_derivative(q):
    return lambda p, x: optax.losses.safe_softmax_cross_entropy(
        jax.nn.relu(q(jax.nn.relu(x)) @ p["w"]), jnp.ones((5, 4)) / 4
    )


def twice(q):
    return lambda p, x: q(q(x) @ p["stack"][0]) @ p["stack"][0] + p["bias"][None]


def by_einsum(q):
    return lambda p, x: jnp.einsum("td,dnh->tnh", q(x), p["heads"])


PROGRAMS = {
    "operator": ("w", lambda q: lambda p, x: q(x) @ p["w"]),
    "tied embedding": ("embed", transposed),
    "scan": ("stack", scanned),
    "scan backwards": ("stack", scanned_backwards),
    "checkpoint": ("stack", rematerialized),
    "jit inside": ("w", compiled_inside),
    "traced index": ("stack", by_a_traced_index),
    "vmap": ("w", one_of_many),
    "computed weight": ("w", of_a_computed_weight),
    "weight first": ("w", weight_first),
    "custom derivatives": ("w", after_a_custom_derivative),
    "twice": ("stack", twice),
    "einsum": ("heads", by_einsum),
}


@pytest.mark.parametrize(("pattern", "build"), PROGRAMS.values(), ids=PROGRAMS)
def test_programs_are_those_written_with_quantized_inputs(pattern, build, params, x):
    """The same values and gradients, and others than those of the plain program."""
    plain = build(lambda x: x)
    quantized = quantize_activations(plain, inputs_of(pattern, COARSE))

    def squared(function):
        def run(p, x):
            outputs = function(p, x)
            return (outputs**2).sum(), outputs

        return run

    def of(function):
        return jax.value_and_grad(squared(function), argnums=(0, 1), has_aux=True)

    def all_three(p, x):
        return of(quantized)(p, x), of(build(Q4))(p, x), squared(plain)(p, x)[0]

    with jax.numpy_dtype_promotion("standard"):
        found, expected, unquantized = compiled(all_three, params, x)
    (found, outputs), gradient = found
    (expected, expected_outputs), expected_gradient = expected
    # Programs fuse otherwise; a value near a tie may not be among those here.
    chex.assert_trees_all_close(
        (found, gradient), (expected, expected_gradient), rtol=2e-5, atol=2e-5
    )
    chex.assert_trees_all_close(outputs, expected_outputs, rtol=1e-5)
    assert np.abs(unquantized - expected) > 1e-4 * np.abs(unquantized)


def test_several_axes_summed_over(params, x):
    y = np.einsum("td,dnh->tnh", x, params["heads"])
    # With groups and rotations they are one axis, in their order.
    in_order = (int8(axis=-1, group_size=4), int4(axis=-1, hadamard=8))

    def project(p, y):
        return jnp.einsum("tnh,nhd->td", y, p["out"])

    def found(p, y, inputs):
        return quantize_activations(project, inputs_of("out", inputs))(p, y)

    def flat(p, y, inputs):
        return project(p, fake_quant(y.reshape(5, 8), inputs).reshape(y.shape))

    def pairs(p, y):
        together = found(p, y, PER_TOKEN), project(p, fake_quant(y, HEADS))
        return together, {
            str(inputs): (found(p, y, inputs), flat(p, y, inputs))
            for inputs in in_order
        }

    (together, expected), others = compiled(pairs, params, y)
    np.testing.assert_allclose(together, expected, rtol=1e-6, atol=1e-6)
    assert_close(others, rtol=1e-6, atol=1e-5)


def test_what_shares_a_scale(params, rng):
    x = normal(rng, 2, 5, 8)
    shared = {int8(axis=None): None, int8(axis=0): (0, 1), int8(axis=-1): -1}

    def run(p, x):
        return [
            quantize_activations(multiply, inputs_of("w", inputs))(p, x)
            for inputs in shared
        ]

    for found, (inputs, axis) in zip(compiled(run, params, x), shared.items()):
        high = np.abs(np.float64(x)).max(axis, keepdims=True) / 127
        expected = np.round(np.float64(x) / high) * high @ np.float64(params["w"])
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(inputs))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups, rng):
    kernel, x = normal(rng, 3, 3, 4 // groups, 8), normal(rng, 2, 6, 6, 4)
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["kernel"],
            (2, 1),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    def transpose(p, x):
        return jax.lax.conv_transpose(
            x, p["kernel"], (2, 2), "SAME", dimension_numbers=numbers
        )

    def pair(function, inputs, p, x, of_array=None):
        quantized = quantize_activations(function, inputs_of("kernel", inputs))
        return quantized(p, x), function(p, fake_quant(x, of_array or inputs))

    def pairs(p, x):
        quantizers = {
            PER_TOKEN: None,
            int8(axis=None): int8(axis=(0, 1, 2, 3)),
            int8(): int8(axis=(1, 2, 3)),  # one for each example, whose sums overlap
            int4(axis=-1, group_size=2): None,
            int4(group_size=2): int4(axis=-1, group_size=2),
        }
        found = {
            str(inputs): pair(convolve, inputs, p, x, of_array)
            for inputs, of_array in quantizers.items()
        }
        if groups == 1:
            found["transposed"] = pair(transpose, PER_TOKEN, p, x)
        return found

    assert_close(compiled(pairs, {"kernel": kernel}, x), atol=1e-5)


def test_channels_first(rng):
    kernel, x = normal(rng, 8, 4, 3), normal(rng, 2, 4, 6)

    def convolve(p, x):
        return jax.lax.conv_general_dilated(x, p["kernel"], (1,), "VALID")

    def pair(p, x):
        quantized = quantize_activations(convolve, inputs_of("kernel"))
        return quantized(p, x), convolve(p, fake_quant(x, int8(axis=1)))

    found, expected = compiled(pair, {"kernel": kernel}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_and_inputs_in_one_table(params, x):
    rules = Rules([("w", int4(), PER_TOKEN), ("out", int4(axis=-2))])
    apply = quantize_activations(multiply, rules)

    def loss(params):
        return (apply(fake_quant(params, rules), x) ** 2).sum()

    gradient = compiled(jax.grad(loss), params)["w"]
    inputs, weights = quantized_in_numpy(x), absmax_round(params["w"])
    expected = 2 * inputs.T @ (inputs @ weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_weights_quantized_inside_the_function(params, x, key):
    """What rotates them is a product, of a parameter, and none of the model's."""
    quantizers = {
        "plain": int4(group_size=4),
        "rotated": cage.quest(4, hadamard=8),
        "stochastic": cage.Quantizer(
            Integer(4), AbsMax(), hadamard=8, rounding="stochastic"
        ),
    }

    def found_and_rounded(weights, params, x, key):
        rules = Rules([("w", weights, PER_TOKEN), (".*", None)])
        key = key if weights.rounding == "stochastic" else None

        def apply(params, x, key):
            return multiply(fake_quant(params, rules, key=key), x)

        found = quantize_activations(apply, rules)(params, x, key)
        return found, fake_quant(params, rules, key=key)["w"]

    def run(*arguments):
        return {
            name: found_and_rounded(weights, *arguments)
            for name, weights in quantizers.items()
        }

    for name, (found, rounded) in compiled(run, {"w": params["w"]}, x, key).items():
        expected = quantized_in_numpy(x) @ np.float64(rounded)
        np.testing.assert_allclose(found, expected, rtol=0, atol=40 * EPS, err_msg=name)


def test_the_dtype_is_kept(params, x):
    def apply(p, x):
        return x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)

    def pair(p, x):
        expected = Q(x.astype(jnp.bfloat16)) @ p["w"].astype(jnp.bfloat16)
        return quantize_activations(apply, inputs_of("w"))(p, x), expected

    found, expected = compiled(pair, params, x)
    assert found.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found, expected)


def test_arguments_that_are_no_arrays(params, x):
    def apply(p, x, *, scale=1, kind="plain", nothing=None):
        assert kind in ("plain", "twice") and nothing is None
        return {"y": (x @ p["w"]) * (2 if kind == "twice" else 1) * scale, "n": None}

    apply = quantize_activations(apply, inputs_of("w"))

    def run(p, array):
        # Once an array of jax, once of NumPy.
        return apply(p, array, kind="twice", nothing=None), apply(p, x)["y"]

    twice, once = compiled(run, params, x)
    chex.assert_trees_all_close(twice["y"], 2 * once)
    assert twice["n"] is None


def test_data_that_the_function_closes_over(params, x):
    x = jax.device_put(x)
    apply = quantize_activations(lambda p: x @ p["w"], inputs_of("w"))
    expected = quantized_in_numpy(x) @ np.float64(params["w"])
    np.testing.assert_allclose(compiled(apply, params), expected, atol=1e-5)


def test_an_input_of_one_token(rng):
    x = normal(rng, 8)
    found, expected = compiled(
        lambda x: (quantize_input(x, (0,), PER_TOKEN, None), Q(x)), x
    )
    chex.assert_trees_all_equal(found, expected)


# --- bad input ------------------------------------------------------------------------


def test_inputs_that_cannot_be_quantized(params, x):
    def apply(p, x):
        return x @ p["w"] + p["bias"][None, :4]

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: saved)

    def custom(p, x):
        return product(x, p["w"])

    def call(pattern, inputs, function=apply):
        quantized = quantize_activations(function, inputs_of(pattern, inputs))
        return lambda: jax.eval_shape(quantized, params, x)

    stochastic = cage.Quantizer(Integer(8), axis=-1, rounding="stochastic")
    where = "`w/inputs`: `inputs` "
    beyond = (
        "`w`: its input cannot be quantized: its product is inside `custom_vjp_call`"
    )
    table = [
        (
            call("bias", PER_TOKEN),
            "`bias`: its input .* no parameter of the rule 'bias' is in a product",
        ),
        (call("w", int8(axis=-2)), where + r"must be .*axis -1.*int8\(axis"),
        (call("w", int8(axis=0, group_size=5)), "0 without groups"),
        (call("w", int8(axis=-1, group_size=3)), "`w/inputs`: `group_size` must"),
        (call("w", STATIC), where + "of this weight must be calib.*int8 calibrated"),
        (call("w", cage.lsq(8)), where + "of this weight must be calib.*learned"),
        (call("w", stochastic), where + "must be rounded"),
        (call("w", PER_TOKEN, custom), beyond),
        (lambda: quantize_input(x[0], (0,), int8(axis=0), None), r"of shape \(8,\)"),
    ]
    assert_raises([(call, ValueError, text) for call, text in table])
    with pytest.raises(TypeError, match=r"`rules` must be Rules; got dict"):
        quantize_activations(apply, {"w": int8()})


def test_a_pattern_of_another_naming_is_warned_of(params, x):
    rules = Rules([("W/kernel", None, PER_TOKEN), ("w", None, PER_TOKEN)])
    with pytest.warns(UserWarning, match=r"'W/kernel' matches no parameter"):
        jax.eval_shape(quantize_activations(multiply, rules), params, x)
