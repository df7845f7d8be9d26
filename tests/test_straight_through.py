"""Gradients of `fake_quant`, first and second, alone and under transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import KERNEL, QUANTIZERS, along_inputs, normal

from cage_jax import Quantizer, Rules, fake_quant, int4, quest
from cage_jax.arrays.jaxprs import scan_counts
from cage_jax.quantizers.formats import Integer, MidRise
from cage_jax.quantizers.rounding import fit_grid
from cage_jax.quantizers.scales import AbsMax, Fixed, Grid, SignedMax

EPS = float(np.finfo(np.float32).eps)


def each(*names):
    return pytest.mark.parametrize(
        "quantizer", [QUANTIZERS[name] for name in names], ids=names
    )


def normal_off_ties(rng, quantizer):
    """Numbers of which none can fall to either side, so that values are compared."""
    while oracles.quantized(x := normal(rng, *KERNEL), quantizer).tie.any():
        pass
    return x


def gradient_of_sum(x, quantizer, grid=None):
    def total(x):
        return fake_quant(x, quantizer, grid=grid).sum()

    return jax.jit(jax.grad(total))(jnp.asarray(x, jnp.float32))


def quartic(params):
    """A loss whose gradient, x^3, and Hessian, 3 x^2, are known."""
    return sum(jnp.sum(x**4) / 4 for x in jax.tree.leaves(params))


# --- masks ----------------------------------------------------------------------------


def test_where_a_mask_ends():
    for quantizer, inside, outside in [
        (int4(scale=Fixed(0.5), axis=0), [-3.5, 0.0, 3.5], [-3.6, 3.6]),
        (
            int4(scale=Fixed(0.5), axis=0, gradient="trust"),
            [-3.75, 3.75],
            [-3.76, 3.76],
        ),
        (int4(scale=Fixed(0.5), axis=0, narrow=False), [-4.0, 3.5], [-4.01, 3.51]),
        (
            Quantizer(MidRise(2), Fixed(0.5), axis=0, gradient="clip"),
            [-0.75, 0.75],
            [-0.76, 0.76],
        ),
        (
            Quantizer(MidRise(2), Fixed(0.5), axis=0, gradient="trust"),
            [-1.0, 1.0],
            [-1.01, 1.01],
        ),
    ]:
        expected = [1.0] * len(inside) + [0.0] * len(outside)
        found = gradient_of_sum([*inside, *outside], quantizer)
        np.testing.assert_array_equal(found, expected, str(quantizer))


def test_where_a_mask_ends_around_a_zero_point():
    quantizer = int4(axis=0, symmetric=False, gradient="clip")
    grid = Grid(np.float32([0.5]), zero_point=np.float32([3.0]))
    # Codes from -8 to 7, of which 3 is zero.
    found = gradient_of_sum([-5.5, 0.0, 2.0, -5.6, 2.1], quantizer, grid)
    np.testing.assert_array_equal(found, [1, 1, 1, 0, 0])


def test_a_mask_of_a_negative_scale():
    quantizer = Quantizer(Integer(4), SignedMax(), axis=0, gradient="clip")
    x = np.float32([7.0, -3.0])
    assert fit_grid(x, quantizer).scale < 0
    np.testing.assert_array_equal(gradient_of_sum(x, quantizer), np.ones(2))


def test_the_largest_value_of_an_absmax_group_is_inside(rng):
    x = normal(rng, *KERNEL)
    for gradient in ("clip", "trust"):
        found = gradient_of_sum(x, int4(group_size=8, gradient=gradient))
        np.testing.assert_array_equal(found, np.ones(KERNEL), gradient)


# --- losses ---------------------------------------------------------------------------


def test_gradient_of_a_loss_is_that_at_the_quantized_parameters(rng):
    rules = Rules(
        [
            ("up/kernel", int4(group_size=16)),
            ("down/kernel", int4(scale=AbsMax(0.7), group_size=32)),
            ("out/kernel", quest(4, hadamard=32)),
            (".*", None),
        ]
    )
    params = {
        name: {"kernel": normal_off_ties(rng, rules.match(f"{name}/kernel"))}
        for name in ("up", "down", "out")
    }
    params["norm"] = normal(rng, *KERNEL)

    @jax.jit
    def find(params):
        quantized = fake_quant(params, rules)
        gradients = jax.grad(lambda p: quartic(fake_quant(p, rules)))(params)
        return gradients, jax.grad(quartic)(quantized)

    gradients, at_quantized = find(params)
    for path, (quantizer, x) in rules.quantized(params).items():
        reference = oracles.quantized(x, quantizer)
        cubes = reference.value(reference.nearest) ** 3
        expected = oracles.masked(cubes, reference.passes, quantizer)
        # Cubes of numbers below 5 with a few float32 roundings each.
        found = np.float64(gradients[path.split("/")[0]]["kernel"])
        np.testing.assert_allclose(
            found, expected, rtol=1e-6, atol=500 * EPS * 10, err_msg=path
        )
    np.testing.assert_array_equal(
        gradients["up"]["kernel"], at_quantized["up"]["kernel"]
    )
    np.testing.assert_array_equal(gradients["norm"], at_quantized["norm"])


@each("int4", "int4 clipped", "quest4", "quest2 trust", "int4 asymmetric")
def test_hessian_vector_product_is_that_at_the_quantized_value(quantizer, rng):
    x, v = normal_off_ties(rng, quantizer), normal(rng, *KERNEL)
    reference = oracles.quantized(x, quantizer)

    def product(x, v):
        gradient = jax.grad(lambda x: quartic(fake_quant(x, quantizer)))
        return jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)

    result = jax.jit(product)(x, v)
    hessian = 3 * reference.value(reference.nearest) ** 2
    tangent = hessian * oracles.masked(v, reference.passes, quantizer)
    expected = oracles.masked(tangent, reference.passes, quantizer)
    assert np.abs(expected).max() > 1
    # Numbers up to 3 * 4^2 * 4 with some ten float32 roundings, rotated twice.
    np.testing.assert_allclose(
        np.float64(result), expected, rtol=1e-6, atol=200 * 40 * EPS
    )


def test_hessian_vector_product_of_a_quadratic(rng):
    x, v = normal(rng, *KERNEL), normal(rng, *KERNEL)

    def gradient(x):
        return jax.grad(lambda x: 1.5 * jnp.sum(fake_quant(x, int4()) ** 2))(x)

    product = jax.jit(jax.grad(lambda x: jnp.vdot(gradient(x), v)))(x)
    np.testing.assert_array_equal(product, 3 * v)


def test_the_second_derivative_of_a_clipped_rotation(rng):
    quantizer = Quantizer(Integer(3), Fixed(0.2), axis=0, hadamard=8, gradient="clip")
    x, v = rng.standard_normal((2, 8, 3))
    turn = oracles.hadamard(8)
    rotated = turn @ x
    passes = np.abs(rotated) <= 3 * 0.2
    assert 0 < passes.sum() < passes.size
    values = turn @ (np.clip(np.round(rotated / 0.2), -3, 3) * 0.2)

    def straight(gradient):
        return turn @ (passes * (turn @ gradient))

    def loss(x):
        return jnp.sum(fake_quant(x, quantizer) ** 3) / 3

    def along(x):
        return jnp.sum(jnp.asarray(v, jnp.float32) * jax.grad(loss)(x))

    second = jax.jit(jax.grad(along))(jnp.asarray(x, jnp.float32))
    expected = straight(2 * values * straight(v))
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5)


# --- under transformations ------------------------------------------------------------


@each("int4", "int4 clipped", "quest4")
def test_under_jit_and_remat(quantizer, rng):
    x = normal(rng, *KERNEL)

    def loss(x):
        return quartic(fake_quant(x, quantizer))

    expected = jax.grad(loss)(x)
    for wrapped in (loss, jax.remat(loss)):
        # A compiler may fuse products into sums, and cubes amplify that.
        np.testing.assert_allclose(
            jax.jit(jax.grad(wrapped))(x), expected, rtol=100 * EPS, atol=100 * EPS
        )


@each("int4 groups", "int4 clipped", "quest4")
def test_vmap_and_scan_are_one_after_the_other(quantizer, rng):
    quantizer = along_inputs(quantizer)  # of a stack, too
    stack, cotangents = rng.standard_normal((2, 2, *KERNEL)).astype(np.float32)

    def both(x, cotangent):
        value, pull_back = jax.vjp(lambda x: fake_quant(x, quantizer), x)
        return value, *pull_back(cotangent)

    @jax.jit
    def stacked(*pairs):
        scanned = jax.lax.scan(lambda _, pair: (None, both(*pair)), None, pairs)[1]
        return jax.vmap(both)(*pairs), scanned, both(*pairs)

    singly = jax.jit(both)
    expected = [singly(x, c) for x, c in zip(stack, cotangents)]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *expected)
    # A batched rotation and a batched mean may sum in another order; the last of these
    # is a stack of kernels, quantized layer by layer.
    close = functools.partial(np.testing.assert_allclose, atol=40 * EPS, rtol=0)
    for found in stacked(stack, cotangents):
        jax.tree.map(close, found, expected)


def test_a_loop_is_handed_no_arrays_of_constants():
    for name in ("int4 groups", "int4 clipped", "quest4"):
        quantizer = QUANTIZERS[name]

        def turn(x, _, quantizer=quantizer):
            return fake_quant(x, quantizer), None

        def loss(x, turn=turn):
            return jax.lax.scan(turn, x, length=3)[0].sum()

        kernel = jax.ShapeDtypeStruct(KERNEL, jnp.float32)
        equations = jax.make_jaxpr(jax.grad(loss))(kernel).eqns
        loop = next(each for each in equations if each.primitive.name == "scan")
        constants = loop.invars[: scan_counts(loop)[0]]
        # The rotation's matrix is one, once for all turns.
        sizes = [each.aval.size for each in constants]
        most = (quantizer.hadamard or 0) ** 2
        assert all(size <= most for size in sizes), (name, sizes)
