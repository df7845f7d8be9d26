"""Training of the scales of frozen codes, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import moved, params_of, rules_of
from cases import assert_raises

import cage_jax as cage
from cage_jax import finetuning

PLAIN = {
    "int4": cage.int4(group_size=8),
    "zero points": cage.int4(group_size=8, symmetric=False),
    "ternary": cage.ternary(),
    "nf4": cage.nf4(group_size=8),
    "q4_1": cage.q4_1(),
    "mxfp4": cage.mxfp4(),
    "nvfp4": cage.nvfp4(),
}
QUANTIZERS = PLAIN | {"rotated": cage.quest(4), "groups": cage.quest(4, hadamard=16)}


def codes_of(rng, quantizer, **options):
    return cage.quantize(params_of(rng, **options), rules_of(quantizer))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_start_is_what_the_codes_are(rng, name):
    codes = codes_of(rng, QUANTIZERS[name])
    scales, frozen = finetuning.only_scales(codes)
    values = cage.dequantize(codes)
    compiled = jax.jit(finetuning.weights)(scales, frozen)
    for found in (compiled, finetuning.weights(scales, frozen)):
        jax.tree.map(np.testing.assert_array_equal, found, values)
    kernel, merged = (
        each["up"]["kernel"] for each in (codes, finetuning.merge(scales, frozen))
    )
    np.testing.assert_array_equal(merged.codes, kernel.codes)
    assert merged.scale.dtype == kernel.scale.dtype and merged.nbytes == kernel.nbytes


@pytest.mark.parametrize("name", QUANTIZERS)
def test_merged_codes_have_the_values_of_the_forward_pass_to_the_bit(rng, name):
    codes = codes_of(rng, QUANTIZERS[name])
    scales, frozen = finetuning.only_scales(codes)
    # More than by a half, so that powers of two change too.
    trained = jax.tree.map(lambda x: 1.6 * x, moved(scales, rng))
    found = jax.jit(finetuning.weights)(trained, frozen)["up"]["kernel"]
    merged = finetuning.merge(trained, frozen)["up"]["kernel"]
    np.testing.assert_array_equal(found, cage.dequantize(merged))
    np.testing.assert_array_equal(merged.codes, codes["up"]["kernel"].codes)
    assert (found != cage.dequantize(codes)["up"]["kernel"]).any()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_gradient_of_a_scale_is_that_of_codes_that_stay(rng, name):
    """The value is linear in each scale, so a doubled one shows the slope."""
    codes = codes_of(rng, QUANTIZERS[name])
    scales, frozen = finetuning.only_scales(codes)
    cotangent = rng.standard_normal((128, 8)).astype(np.float32)
    weights = jax.jit(finetuning.weights)

    def loss(scales):
        return jnp.vdot(weights(scales, frozen)["up"]["kernel"], cotangent)

    found = jax.jit(jax.grad(loss))(scales)["up/kernel"]["scale"]
    scale = scales["up/kernel"]["scale"]
    start = np.float64(weights(scales, frozen)["up"]["kernel"])
    numbers = rng.choice(scale.size, min(3, scale.size), replace=False)
    for index in zip(*np.unravel_index(numbers, scale.shape)):
        parts = scales["up/kernel"] | {"scale": scale.at[index].multiply(2)}
        more = weights({"up/kernel": parts}, frozen)["up"]["kernel"]
        slope = np.sum((np.float64(more) - start) * cotangent) / float(scale[index])
        np.testing.assert_allclose(found[index], slope, rtol=1e-4, atol=1e-4)


def test_offsets_are_trained_and_zero_points_are_not(rng):
    scales, frozen = finetuning.only_scales(codes_of(rng, cage.q4_1()))
    assert set(scales["up/kernel"]) == {"scale", "offset"}

    def loss(scales):
        return jnp.sum(finetuning.weights(scales, frozen)["up"]["kernel"])

    gradient = jax.jit(jax.grad(loss))(scales)["up/kernel"]["offset"]
    np.testing.assert_allclose(gradient, np.full(gradient.shape, 32.0))
    zero, _ = finetuning.only_scales(codes_of(rng, PLAIN["zero points"]))
    assert set(zero["up/kernel"]) == {"scale"}


@pytest.mark.usefixtures("standard_promotion")
def test_scales_alone_recover_a_part_of_the_error(rng):
    """From codes that are on the grid, where LSQ has no gradient."""
    rules, params = rules_of(cage.int2(group_size=32)), params_of(rng)
    x = rng.standard_normal((256, 128)).astype(np.float32)
    codes = {"up": {"kernel": cage.quantize(params, rules)["up"]["kernel"]}}
    scales, frozen = finetuning.only_scales(codes)

    def loss(params, x):
        return jnp.mean(jnp.square(x @ (params["up"]["kernel"] - kernel)))

    kernel, of_scales = params["up"]["kernel"], finetuning.adapted(loss)
    tx = optax.adam(1e-2)

    @jax.jit
    def train(scales, frozen):
        def step(carry, _):
            scales, state = carry
            now, gradient = jax.value_and_grad(of_scales)(scales, frozen, x)
            updates, state = tx.update(gradient, state, scales)
            return (optax.apply_updates(scales, updates), state), now

        (scales, _), losses = jax.lax.scan(step, (scales, tx.init(scales)), length=50)
        return scales, losses

    trained, losses = train(scales, frozen)
    merged = finetuning.merge(trained, frozen)
    after = float(loss(cage.dequantize(merged), x))

    # Inputs are independent, so this is the least that scales of groups can reach.
    weight, code = (
        np.float64(each).reshape(4, 32, 8)
        for each in (kernel, codes["up"]["kernel"].codes)
    )
    best = np.sum(weight * code, axis=1) / np.sum(code * code, axis=1)
    least = np.sum(np.square(weight - best[:, None] * code)) / 8
    assert after < 1.05 * least < 0.85 * float(losses[0])


def test_layers_in_a_stack_are_made_one_by_one(rng):
    kernel = rng.standard_normal((3, 16, 16)).astype(np.float32)
    rules = rules_of(cage.int4(axis=-2))
    scales, frozen = finetuning.only_scales(cage.quantize({"kernel": kernel}, rules))
    x = rng.standard_normal((4, 16)).astype(np.float32)

    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])
        return jnp.sum(x)

    found = jax.jit(jax.grad(finetuning.adapted(loss)))(scales, frozen, x)
    plain = jax.grad(lambda scales: loss(finetuning.weights(scales, frozen), x))(scales)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found,
        plain,
    )


def test_arguments(rng):
    text = r"`codes` must have at least one QuantizedArray; got a tree of 2 other"
    mixed = finetuning.only_scales(codes_of(rng, cage.int4()))
    other, _ = finetuning.only_scales({"kernel": mixed[1]["up"]["kernel"].store})
    assert_raises(
        [
            (lambda: finetuning.only_scales(params_of(rng)), ValueError, text),
            (
                lambda: finetuning.weights(other, mixed[1]),
                ValueError,
                r"entry for each frozen weight, such as \['up/kernel'\]; got \['kern",
            ),
        ]
    )
