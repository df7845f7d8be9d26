"""Quantized inputs of programs of codes: every product, as in the trained model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import cage_jax as cage


def convolved(layout=("NHWC", "HWIO", "NHWC"), **options):
    def run(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=layout, **options
        )

    return run


def matmul(of):
    return lambda params, x: x @ of(params["w"])


# By name: a function, and the shapes of its weight and input.
PRODUCTS = {
    "conv": (convolved(), (3, 3, 8, 16), (2, 6, 6, 8)),
    "grouped": (convolved(feature_group_count=4), (3, 3, 2, 16), (2, 6, 6, 8)),
    "dilated": (convolved(rhs_dilation=(2, 2)), (3, 3, 8, 16), (2, 6, 6, 8)),
    "batch groups": (convolved(batch_group_count=2), (3, 3, 8, 16), (2, 6, 6, 8)),
    "channels first": (
        convolved(("NCHW", "OIHW", "NCHW")),
        (16, 8, 3, 3),
        (2, 8, 6, 6),
    ),
    "ragged": (
        lambda params, x: lax.ragged_dot(x, params["w"], jnp.array([2, 4])),
        (2, 32, 16),
        (6, 32),
    ),
    "reshaped": (matmul(lambda w: w.reshape(32, 16)), (32, 4, 4), (6, 32)),
    "part": (matmul(lambda w: w[1]), (2, 32, 16), (6, 32)),
    "computed": (matmul(jnp.tanh), (32, 16), (6, 32)),
    "nothing summed": (
        lambda params, x: jnp.einsum("ti,o->tio", x, params["w"]),
        (16,),
        (6, 8),
    ),
    "two axes": (
        lambda params, x: jnp.einsum("tab,abo->to", x, params["w"]),
        (4, 8, 16),
        (6, 4, 8),
    ),
    "weights first": (
        lambda params, x: jnp.einsum("io,ti->ot", params["w"], x),
        (32, 16),
        (6, 32),
    ),
    "stack": (
        lambda params, x: lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0],
        (2, 32, 32),
        (6, 32),
    ),
}


def check_as_trained(function, params, x, inputs):
    weights = cage.int4(axis=None)
    rules = cage.Rules([(r".*(w|kernel)", weights, inputs), (r".*", None)])
    codes = cage.quantize(params, rules)

    @jax.jit
    def all_of(codes, x):
        values = cage.dequantize(codes)
        return (
            cage.low_bit(function, rules)(codes, x),
            cage.quantize_activations(function, rules)(values, x),
            function(values, x),
        )

    found, trained, unquantized = all_of(codes, x)
    scale = abs(trained).max()
    np.testing.assert_allclose(found, trained, atol=1e-6 * scale)
    assert abs(trained - unquantized).max() > 1e-3 * scale


@pytest.mark.parametrize("name", PRODUCTS)
def test_inputs_are_those_of_the_trained_model(name, rng):
    function, of_weight, of_input = PRODUCTS[name]
    params = {"w": rng.standard_normal(of_weight).astype(np.float32)}
    x = rng.standard_normal(of_input).astype(np.float32)
    # Whole numbers of int4 times int4 are often halfway between two of int4.
    check_as_trained(function, params, x, cage.int8(axis=None))
    if name != "nothing summed":
        check_as_trained(function, params, x, cage.int2(axis=-1))


def test_weights_in_full_precision(rng):
    params = {"w": rng.standard_normal((32, 16)).astype(np.float32)}
    x = rng.standard_normal((6, 32)).astype(np.float32)
    rules = cage.Rules([("w", None, cage.int4(axis=-1))])
    function = matmul(lambda w: w)
    found = cage.low_bit(function, rules)(params, x)
    trained = cage.quantize_activations(function, rules)(params, x)
    np.testing.assert_array_equal(found, trained)
    assert abs(found - x @ params["w"]).max() > 0.01


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_flax(groups, key, rng):
    x = rng.standard_normal((2, 6, 6, 4)).astype(np.float32)
    linen = nn.Conv(8, (3, 3), feature_group_count=groups)
    check_as_trained(linen.apply, linen.init(key, x), x, cage.int8(axis=None))
    model = nnx.Conv(4, 8, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    check_as_trained(
        lambda params, x: nnx.merge(graphdef, params)(x), params, x, cage.int2(axis=-1)
    )


def test_a_product_out_of_reach_is_an_error():
    def loop(params, x):
        return lax.while_loop(lambda h: (h @ params["w"]).sum() < 9, lambda h: 2 * h, x)

    rules = cage.Rules([("w", cage.int4(), cage.int8(axis=-1))])
    codes = cage.quantize({"w": jnp.eye(4)}, rules)
    with pytest.raises(ValueError, match=r"`w`: its input .* is inside `while`"):
        cage.low_bit(loop, rules)(codes, jnp.ones((2, 4)))
