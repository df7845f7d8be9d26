"""Every kind of quantizer against its oracle, and in every program to the bit."""

import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import (
    CASES,
    KERNEL,
    PRESETS,
    along_inputs,
    assert_same,
    awkward,
    normal,
)

from cage_jax import (
    QuantizedArray,
    Rules,
    dequantize,
    fake_quant,
    int4,
    int8,
    quantization_error,
    quantize,
    quest,
)
from cage_jax.quantizers.scales import AbsMean, Gaussian

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)

EVERY = CASES | {name: (KERNEL, quantizer) for name, quantizer in PRESETS.items()}
quantizer_of = {name: along_inputs(quantizer) for name, (_, quantizer) in EVERY.items()}


class Found(NamedTuple):
    """All that one program finds in a case."""

    value: jax.Array
    gradient: jax.Array
    codes: QuantizedArray
    restored: jax.Array
    error: jax.Array
    error_gradient: jax.Array


@functools.partial(jax.jit, static_argnums=2)
def everything(x, cotangent, quantizer):
    """One program for each case, so that any input of its shape costs no other."""

    def product(x):
        error = quantization_error(x, quantizer)
        return jnp.sum(error * x), error

    value, pull_back = jax.vjp(lambda x: fake_quant(x, quantizer), x)
    codes = quantize(x, quantizer)
    error_gradient, error = jax.grad(product, has_aux=True)(x)
    return Found(
        value,
        *pull_back(cotangent),
        codes,
        dequantize(codes),
        error,
        error_gradient,
    )


@pytest.fixture(scope="module", params=EVERY)
def case(request):
    """A case; all tests of it run one after another, and share its program."""
    shape, quantizer = EVERY[request.param]
    return types.SimpleNamespace(
        shape=shape,
        quantizer=quantizer,
        find=lambda x: everything(
            jnp.asarray(x, jnp.float32), jnp.ones(shape), quantizer
        ),
    )


def assert_codes(quantized, expected):
    """Compares codes; at a tie a neighbour will do."""
    codes = np.asarray(quantized.codes).astype(np.float64)
    index = np.searchsorted(expected.codes, codes)
    np.testing.assert_array_equal(expected.codes[index], codes)
    steps = np.abs(index - np.searchsorted(expected.levels, expected.nearest))
    assert not np.any((steps > 0) & ~expected.tie)
    assert steps.max() <= 1
    assert (steps > 0).mean() < 0.01
    return expected.levels[index]


# --- each case ------------------------------------------------------------------------


def test_codes_values_error_and_gradient(case, rng):
    shape, quantizer = case.shape, case.quantizer
    x, cotangent = normal(rng, *shape), normal(rng, *shape)
    expected = oracles.quantized(x, quantizer)
    found = everything(x, cotangent, quantizer)
    # Reductions of up to 2048 numbers, and the rotation before them.
    np.testing.assert_allclose(
        oracles.spread(found.codes.scale, shape, quantizer),
        expected.scale,
        rtol=20 * EPS,
    )
    levels = assert_codes(found.codes, expected)
    if quantizer.asymmetric:
        zeros = oracles.spread(found.codes.zero_point, shape, quantizer)
        index = np.searchsorted(expected.codes, zeros)
        np.testing.assert_array_equal(expected.levels[index], expected.zero_point)
    if quantizer.scale.has_offset:
        offset = oracles.spread(found.codes.offset, shape, quantizer)
        np.testing.assert_allclose(offset, expected.offset, rtol=EPS)
    # The scale's rounding, the product's, and those of the rotation back.
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    value = np.float64(found.value)
    close(value, expected.value(levels), atol=40 * EPS * expected.size)
    # The difference is rounded once more, and may use an unrounded product.
    size = float(np.abs(x).max())
    close(found.error, np.float64(x) - value, atol=4 * EPS * size)
    # It is a constant: the gradient of `error * x` is the error.
    np.testing.assert_array_equal(found.error_gradient, found.error)
    assert found.gradient.dtype == found.value.dtype == found.error.dtype == jnp.float32
    if quantizer.gradient == "identity":
        np.testing.assert_array_equal(found.gradient, cotangent)
    elif quantizer.hadamard is None:
        gradient = np.where(expected.passes, cotangent, 0)
        np.testing.assert_array_equal(found.gradient, gradient)
    else:
        # Two rotations in float32 of numbers below 10.
        gradient = oracles.masked(cotangent, expected.passes, quantizer)
        close(np.float64(found.gradient), gradient, atol=40 * EPS)


def test_the_same_bits_alone_and_together(case, rng):
    # What is exported is what was trained, whichever way each was compiled.
    quantizer = case.quantizer
    for x in (normal(rng, *case.shape), awkward(rng, *case.shape)):
        together = case.find(x)
        codes = quantize(x, quantizer)
        value = fake_quant(x, quantizer)
        assert_same(together.codes, codes)
        assert_same(dequantize(codes), value)
        assert_same(together.value, value)
        assert_same(together.restored, value)
    assert isinstance(codes, QuantizedArray)
    assert (codes.shape, codes.bits) == (case.shape, quantizer.bits)
    assert (codes.quantizer, codes.dtype) == (along_inputs(quantizer), jnp.float32)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), codes)
    assert like == QuantizedArray.abstract(quantizer, case.shape)
    assert codes.codes.dtype == quantizer.format.code_dtype
    assert codes.scale.shape == quantizer.blocks(case.shape).scale_shape
    assert codes.scale.dtype == (quantizer.scale_type.dtype or jnp.float32)
    assert (codes.zero_point is not None) == quantizer.asymmetric
    if quantizer.asymmetric:
        assert codes.zero_point.shape == codes.scale.shape
        assert codes.zero_point.dtype == codes.codes.dtype


def spoilt_with(place, shape, quantizer):
    """Where values share a group with a place, or a block of a rotation."""
    size, block = quantizer.group_size, quantizer.hadamard
    if size is not None and block is not None:
        quantizer = dataclasses.replace(quantizer, group_size=max(size, block))
    spoilt = np.zeros(shape, bool)
    for _, part in oracles.group_slices(shape, quantizer):
        if all(each.start <= i < each.stop for i, each in zip(place, part)):
            spoilt[part] = True
    return spoilt


def test_nan_infinities_zeros_huge_and_tiny_numbers(case, rng):
    shape, quantizer = case.shape, case.quantizer
    x = rng.standard_normal(shape).astype(np.float32)
    x[(0,) * len(shape)] = 10  # the largest, upon which a tensor's divisor depends
    before = case.find(x)
    place = tuple(3 * n // 4 for n in shape)
    spoilt = spoilt_with(place, shape, quantizer)
    for bad in (np.nan, np.inf, -np.inf):
        x_bad = x.copy()
        x_bad[place] = bad
        found = case.find(x_bad)
        scales = oracles.spread(found.codes.scale, shape, quantizer)
        np.testing.assert_array_equal(np.isnan(scales), spoilt)
        np.testing.assert_array_equal(
            found.value, np.where(spoilt, np.nan, before.value)
        )
        np.testing.assert_array_equal(found.restored, found.value)
        np.testing.assert_array_equal(np.isnan(found.error), spoilt)
    x[spoilt] = 0
    zeros = case.find(x)
    np.testing.assert_array_equal(zeros.restored, zeros.value)
    of_zeros = np.asarray(zeros.value)[spoilt]
    if quantizer.format.has_zero:
        np.testing.assert_array_equal(of_zeros, np.zeros_like(of_zeros))
    else:
        # The least level, half the least normal number, which is flushed to zero.
        assert np.abs(of_zeros).max() <= 4 * TINY
        if quantizer.hadamard is None:
            assert np.all(np.asarray(zeros.value)[~spoilt] != 0)
    # Never NaN from finite numbers, unless what the grid is found from is none itself:
    # a sum of a rotation, or a bound over less than 1.
    largest = float(np.finfo(np.float32).max) / (quantizer.hadamard or 1)
    largest *= min(1.0, quantizer.format.half_range)
    pattern = np.where(rng.random(shape) < 0.5, -0.4, 1)
    pattern[..., 1::2] *= rng.random(pattern[..., 1::2].shape)
    for size in (largest, 1e30, 1e10, 1e-10, 1e-30, 2e-38, 1e-42, 0.0):
        found = case.find(np.float32(size * pattern))
        assert np.all(np.isfinite(found.value)), size
        np.testing.assert_array_equal(found.restored, found.value, f"{size}")


def test_idempotent_and_symmetric_as_it_says(case, rng):
    x = rng.standard_normal(case.shape).astype(np.float32)
    once = case.find(x)
    twice = case.find(once.value).value
    close = np.allclose(twice, once.value, rtol=1e-5, atol=1e-6)
    assert close == case.quantizer.idempotent
    mirrored = np.array_equal(case.find(-x).value, -once.value)
    assert mirrored or not case.quantizer.symmetric
    codes = np.asarray(once.codes.codes).astype(np.float32)
    assert len(np.unique(codes)) <= case.quantizer.levels


# --- many cases in one program --------------------------------------------------------

NARROW = (
    *("int4 groups", "int4 asymmetric", "int4 tiles", "quest4", "quest3 groups"),
    *("uint4 asymmetric", "midrise 1", "five levels", "nf4", "ternary", "binary"),
    *("fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "nvfp4 alone"),
    *("q4_0", "q4_1", "q8_0", "ct_w4a16", "ct_w8a8 bfloat16"),
)


@jax.jit
def fake_of_all(arrays):
    return {name: fake_quant(x, quantizer_of[name]) for name, x in arrays.items()}


@jax.jit
def codes_of_all(arrays):
    return {name: quantize(x, quantizer_of[name]) for name, x in arrays.items()}


values_of_all = jax.jit(dequantize)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_bits_in_narrow_dtypes(dtype, rng):
    normals = {name: normal(rng, *KERNEL, dtype=dtype) for name in NARROW}
    largest = float(jnp.finfo(dtype).max)
    edges = jnp.asarray(largest * rng.choice([-1, 0.5, 1], KERNEL), dtype)
    assert np.isfinite(np.float64(edges)).all()
    shared = (awkward(rng, *KERNEL, dtype=dtype), edges)
    for arrays in (normals, *(dict.fromkeys(NARROW, x) for x in shared)):
        values, codes = fake_of_all(arrays), codes_of_all(arrays)
        # A level above the largest number becomes that number. A rotation may be NaN.
        assert not any(np.isinf(np.float64(value)).any() for value in values.values())
        assert_same(values_of_all(codes), values)
        assert {str(value.dtype) for value in values.values()} == {dtype}
        for name, each in codes.items():
            scale_dtype = quantizer_of[name].scale_type.dtype
            assert each.scale.dtype == (scale_dtype or jnp.float32), name
    values = fake_of_all(normals)
    for name, x in normals.items():
        # Only the result is rounded to the narrow dtype.
        quantizer = quantizer_of[name]
        wide = oracles.quantized(x, quantizer)
        open_ = wide.tie
        if quantizer.hadamard is not None:
            open_ = (
                oracles.rotate(
                    wide.tie,
                    quantizer.hadamard,
                    oracles.rotated_axis(quantizer, x.ndim),
                )
                != 0
            )
        tolerance = 40 * EPS * wide.size + wide.size * float(jnp.finfo(dtype).eps)
        error = np.abs(np.float64(values[name]) - wide.value(wide.nearest))
        assert np.all(error[~open_] <= tolerance), name


def test_a_stack_is_quantized_like_its_layers(rng):
    names = (
        *("int4 groups", "int4 clipped", "int4 asymmetric", "quest4", "midrise 1"),
        *("uint4 asymmetric", "nf4", "binary", "fp8", "mxfp4", "nvfp4"),
        *("q4_0", "q4_1", "ct_w4a16"),
    )
    layers = [normal(rng, *KERNEL), awkward(rng, *KERNEL)]
    expected = [fake_of_all(dict.fromkeys(names, layer)) for layer in layers]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *expected)

    def both(layer):
        return dequantize(codes_of_all(dict.fromkeys(names, layer)))

    @jax.jit
    def stacked(stack):
        whole = fake_of_all(dict.fromkeys(names, stack))
        scanned = jax.lax.scan(lambda _, layer: (None, both(layer)), None, stack)[1]
        return whole, jax.vmap(both)(stack), scanned

    for found in stacked(jnp.asarray(np.stack(layers))):
        for name in names:
            # A batched rotation and a batched mean may sum in another order. A value
            # differs by as large a part of itself as the scale: some are above 100.
            sums = isinstance(quantizer_of[name].scale, (Gaussian, AbsMean))
            tolerance = 40 * EPS if sums else 0
            np.testing.assert_allclose(
                found[name],
                expected[name],
                rtol=tolerance,
                atol=tolerance,
                err_msg=name,
            )


def test_the_same_bits_of_a_large_array(rng):
    # Large enough for sums in place of a product; a group may be less than a block.
    x = normal(rng, 256, 128)
    quantizers = [
        int4(axis=axis, hadamard=128, group_size=group_size)
        for axis in (-2, -1)
        for group_size in (None, 32)
    ]
    each = lambda function: lambda x: [function(x, q) for q in quantizers]  # noqa: E731
    values, codes = each(fake_quant)(x), each(quantize)(x)
    assert_same(jax.jit(each(fake_quant))(x), values)
    assert_same([dequantize(one) for one in codes], values)
    assert_same(jax.jit(lambda x: dequantize(each(quantize)(x)))(x), values)


def test_float64_is_computed_in_float64(rng, x64):
    for name in ("int4 asymmetric", "int4 tiles", "quest4"):
        quantizer = quantizer_of[name]
        x = jnp.asarray(rng.standard_normal(KERNEL))
        expected = oracles.quantized(x, quantizer)
        value, codes = fake_quant(x, quantizer), quantize(x, quantizer)
        # The rounding of float64, some tens of times; no tie is that near.
        np.testing.assert_allclose(
            value, expected.value(expected.nearest), atol=1e-13, err_msg=name
        )
        assert value.dtype == codes.scale.dtype == jnp.float64
        assert_same(dequantize(codes), value)


@pytest.mark.parametrize(
    "name", ["int4 hadamard", "quest4", "quest3 groups", "int4 hadamard groups"]
)
def test_random_signs_are_part_of_the_rotation(name, rng):
    quantizer = quantizer_of[name]
    x, cotangent = rng.standard_normal((2, *KERNEL)).astype(np.float32)
    signed = dataclasses.replace(quantizer, hadamard_seed=3)
    signs = np.random.default_rng(3).integers(0, 2, (KERNEL[0], 1)) * 2 - 1
    signs = signs.astype(np.float32)
    plain = everything(x, cotangent, quantizer)
    turned = everything(signs * x, signs * cotangent, quantizer)
    found = everything(x, cotangent, signed)
    # A mean may be summed in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(found.value, signs * turned.value, atol=4 * EPS * np.abs(x).max())
    assert np.any(np.asarray(found.value) != np.asarray(plain.value))
    tolerance = 40 * EPS * np.abs(cotangent).max()
    close(found.gradient, signs * turned.gradient, atol=tolerance)
    assert_same(found.restored, found.value)
    assert_same(dequantize(quantize(x, signed)), fake_quant(x, signed))


# --- nothing, and one number ----------------------------------------------------------


def test_an_array_without_elements():
    quantizers = int4(), quest(4), int8(group_size=4)

    @jax.jit
    def find(x):
        return [
            (
                fake_quant(x, quantizer),
                dequantize(quantize(x, quantizer)),
                quantization_error(x, quantizer),
            )
            for quantizer in quantizers
        ]

    found = find(np.zeros((0, 3), np.float32))
    assert {part.shape for part in jax.tree.leaves(found)} == {(0, 3)}


def test_scalars_and_arrays_without_elements_pass_through_trees():
    scalar = jnp.asarray(np.float32(0.3))
    params = {"empty": jnp.asarray(np.zeros((0, 3))), "scalar": scalar, "none": None}
    rules = Rules([(".*", int4())])
    for function in (fake_quant, quantize):
        result = function(params, rules)
        assert result["empty"] is params["empty"]
        assert result["scalar"] is params["scalar"]
        assert result["none"] is None
    error = quantization_error(params, rules)
    assert_same(error, jax.tree.map(np.zeros_like, params))


def test_a_scalar_is_its_own_group():
    assert float(fake_quant(np.float32(3.0), int4(axis=None))) == 3.0


def test_a_numpy_array_is_taken_as_jax_takes_it(rng):
    x = rng.standard_normal(KERNEL)  # float64, which jax narrows
    expected = fake_quant(jnp.asarray(x), int4())
    assert_same(fake_quant(x, int4()), expected)
    assert_same(dequantize(quantize(x, int4())), expected)
    assert quantization_error(x, int4()).dtype == jnp.float32
    assert fake_quant([[1.0], [2.0]], int4()).tolist() == [[pytest.approx(6 / 7)], [2]]


def test_shapes_without_arrays():
    x = jax.ShapeDtypeStruct(KERNEL, jnp.bfloat16)
    result = jax.eval_shape(lambda x: fake_quant(x, int4()), x)
    assert (result.shape, result.dtype) == (KERNEL, jnp.bfloat16)
