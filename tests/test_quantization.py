import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, KERNEL, QUANTIZERS

from cage_jax import (
    QuantizedArray,
    Quantizer,
    Rules,
    cage_adamw,
    cage_sgd,
    dequantize,
    fake_quant,
    fp8,
    int2,
    int4,
    int8,
    lsq,
    mxfp4,
    quantization_error,
    quantize,
    quest,
    with_grids,
)
from cage_jax.formats import Integer, MidRise
from cage_jax.products import scan_counts
from cage_jax.rounding import error_from, fit_for_error, fit_grid
from cage_jax.scales import AbsMax, Fixed, Gaussian, Grid, MinMax, SignedMax

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)

# QuEST's published clipping points, and the minimum for the three levels of int2.
CLIP = {
    Integer(2): 1.2240063747,
    MidRise(1): 0.7978845587,
    MidRise(2): 1.4935346200,
    MidRise(3): 2.0510683541,
    MidRise(4): 2.5139305786,
}

each_case = pytest.mark.parametrize(
    ("shape", "quantizer"), CASES.values(), ids=list(CASES)
)


def each(*names):
    return pytest.mark.parametrize(
        "quantizer", [QUANTIZERS[name] for name in names], ids=names
    )


def normal(rng, shape, dtype=np.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def normal_off_ties(rng, quantizer):
    """Numbers of which none can fall to either side, so that values are compared."""
    while oracle(x := normal(rng, KERNEL), quantizer).tie.any():
        pass
    return x


compiled = jax.jit(fake_quant, static_argnums=1)
compiled_quantize = jax.jit(quantize, static_argnums=1)
compiled_dequantize = jax.jit(dequantize)


# --- the oracle: group by group, in float64 -------------------------------------------


def rotated(x, quantizer):
    block = quantizer.hadamard
    x = np.asarray(x, np.float64)
    if block is None:
        return x
    matrix = np.array(
        [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    ) / np.sqrt(block)
    moved = np.moveaxis(x, quantizer.axis, -1)
    turned = (moved.reshape(*moved.shape[:-1], -1, block) @ matrix).reshape(moved.shape)
    return np.moveaxis(turned, -1, quantizer.axis)


def group_slices(shape, quantizer):
    """The index of each group's scale, and the slices of its values."""
    axes = range(len(shape)) if quantizer.axis is None else quantizer.axis
    axes = [axes] if isinstance(axes, int) else list(axes)
    sizes = quantizer.group_size
    sizes = sizes if isinstance(sizes, tuple) else [sizes] * len(axes)
    lengths = [1] * len(shape)
    for axis, size in zip(axes, sizes):
        lengths[axis] = shape[axis] if size is None else size
    for index in np.ndindex(*(n // k for n, k in zip(shape, lengths))):
        yield index, tuple(slice(i * k, i * k + k) for i, k in zip(index, lengths))


def oracle(x, quantizer):
    x = rotated(x, quantizer)
    format, rule = quantizer.format, quantizer.scale
    top = 2 ** (format.bits - 1)
    if isinstance(format, MidRise):
        levels = np.arange(-top, top) + 0.5
    else:
        levels = np.arange(-top + format.narrow, top) + 0.0
    half_range = (levels[-1] - levels[0]) / 2
    position, nearest = np.zeros(x.shape), np.zeros(x.shape)
    scales, zeros, tie = np.zeros(x.shape), np.zeros(x.shape), np.zeros(x.shape, bool)
    for _, part in group_slices(x.shape, quantizer):
        group = x[part]
        zero = 0.0
        match rule:
            case AbsMax(clip):
                scale = clip * np.abs(group).max() / half_range
            case Gaussian():
                scale = CLIP[format] * np.sqrt(np.mean(group**2)) / half_range
            case Fixed(scale):
                pass
            case MinMax():
                low, high = min(group.min(), 0), max(group.max(), 0)
                scale = (high - low) / (2 * half_range)
                zero = np.clip(np.round(levels[0] - low / scale), -top, top - 1)
        distances = np.abs((group / scale + zero)[..., None] - levels)
        two = np.sort(distances)[..., :2]
        position[part] = group / scale + zero
        nearest[part] = levels[distances.argmin(-1)]
        scales[part], zeros[part] = scale, zero
        # Ties are taken up to the rounding of a position in float32: that of the scale,
        # of a quotient, and of a rotation where there is one.
        tie[part] = two[..., 1] - two[..., 0] < 40 * EPS * max(top, 4)
    edge = 0.5 if quantizer.gradient == "trust" else 0.0
    # An end of the grid belongs to it, however float32 rounds the position there.
    slack = 8 * EPS * top
    passes = (levels[0] - edge - slack <= position) & (
        position <= levels[-1] + edge + slack
    )
    if quantizer.gradient == "identity":
        passes[:] = True
    return types.SimpleNamespace(
        nearest=nearest,
        codes=np.floor(nearest).astype(int),
        tie=tie,
        scale=scales,
        zero_point=zeros,
        passes=passes,
        value=lambda levels: rotated((levels - zeros) * scales, quantizer),
        step=scales.max(),
        size=np.abs(x).max(),
    )


def spread(of_groups, shape, quantizer):
    """One entry a group, repeated over the values of the group."""
    full = np.zeros(shape)
    for index, part in group_slices(shape, quantizer):
        full[part] = np.asarray(of_groups)[index]
    return full


# --- values ---------------------------------------------------------------------------


@each_case
def test_codes_scales_and_values(shape, quantizer, rng):
    x = normal(rng, shape)
    expected = oracle(x, quantizer)
    quantized = compiled_quantize(x, quantizer)
    # Reductions of up to 2048 numbers, and the rotation before them.
    chex.assert_trees_all_close(
        spread(quantized.scale, shape, quantizer), expected.scale, rtol=20 * EPS
    )
    codes = np.asarray(quantized.codes, int)
    wrong = codes != expected.codes
    assert not np.any(wrong & ~expected.tie)
    assert np.abs(codes - expected.codes).max() <= 1
    assert wrong.mean() < 0.01
    if quantizer.asymmetric:
        zero_point = spread(quantized.zero_point.astype(jnp.int8), shape, quantizer)
        np.testing.assert_array_equal(zero_point, expected.zero_point)
    levels = codes + 0.5 if isinstance(quantizer.format, MidRise) else codes
    # The scale's rounding, the product's, and those of the rotation back.
    chex.assert_trees_all_close(
        np.float64(compiled(x, quantizer)),
        expected.value(levels),
        atol=40 * EPS * expected.size,
        rtol=0,
    )


@each_case
def test_a_quantized_array(shape, quantizer, rng):
    quantized = compiled_quantize(normal(rng, shape), quantizer)
    assert isinstance(quantized, QuantizedArray)
    chex.assert_shape(quantized.codes, shape)
    chex.assert_shape(quantized.scale, quantizer.scale_shape(shape))
    chex.assert_type(quantized.scale, jnp.float32)
    assert quantized.codes.dtype == quantizer.format.code_dtype
    assert (quantized.shape, quantized.bits) == (shape, quantizer.bits)
    assert (quantized.quantizer, quantized.dtype) == (quantizer, jnp.float32)
    if quantizer.asymmetric:
        chex.assert_shape(quantized.zero_point, quantizer.scale_shape(shape))
        assert quantized.zero_point.dtype == quantizer.format.code_dtype
    else:
        assert quantized.zero_point is None
    leaves, structure = jax.tree.flatten(quantized)
    assert len(leaves) == 2 + quantizer.asymmetric
    assert jax.tree.unflatten(structure, leaves) is not None


@each_case
def test_dequantize_of_quantize_is_fake_quant_to_the_bit(shape, quantizer, rng):
    x = normal(rng, shape)
    expected = compiled(x, quantizer)
    chex.assert_type(expected, jnp.float32)
    two = compiled_dequantize(compiled_quantize(x, quantizer))
    chex.assert_trees_all_equal(two, expected)
    one = jax.jit(lambda x: dequantize(quantize(x, quantizer)))(x)
    chex.assert_trees_all_equal(one, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each("int4 groups", "int4 asymmetric", "int4 tiles", "quest4", "quest3 groups")
def test_the_same_bits_in_narrow_dtypes(quantizer, dtype, rng):
    x = normal(rng, KERNEL, dtype)
    result = compiled(x, quantizer)
    chex.assert_type(result, jnp.dtype(dtype))
    quantized = compiled_quantize(x, quantizer)
    chex.assert_type(quantized.scale, jnp.float32)
    chex.assert_trees_all_equal(compiled_dequantize(quantized), result)
    # Only the result is rounded to the narrow dtype.
    wide = oracle(x, quantizer)
    close = ~rotated(wide.tie, quantizer).astype(bool)
    tolerance = 40 * EPS * wide.size + wide.size * float(jnp.finfo(dtype).eps)
    error = np.abs(np.float64(result) - wide.value(wide.nearest))
    assert np.all(error[close] <= tolerance)


@each("int4 asymmetric", "int4 clipped", "int4 hadamard", "int4 tiles", "midrise")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_with_and_without_jit(quantizer, dtype, rng):
    # What is exported is what was trained, whichever way each was compiled.
    x = normal(rng, KERNEL, dtype)
    result = fake_quant(x, quantizer)
    chex.assert_trees_all_equal(dequantize(quantize(x, quantizer)), result)
    chex.assert_trees_all_equal(compiled(x, quantizer), result)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_same_bits_of_a_large_array(axis, group_size, rng):
    # Large enough for sums in place of a product; a group may be less than a block.
    x = normal(rng, (256, 128))
    quantizer = int4(axis=axis, hadamard=128, group_size=group_size)
    result = fake_quant(x, quantizer)
    chex.assert_trees_all_equal(compiled(x, quantizer), result)
    quantized = quantize(x, quantizer)
    chex.assert_trees_all_equal(dequantize(quantized), result)
    chex.assert_trees_all_equal(compiled_quantize(x, quantizer), quantized)
    chex.assert_trees_all_equal(compiled_dequantize(quantized), result)
    one = jax.jit(lambda x: dequantize(quantize(x, quantizer)))(x)
    chex.assert_trees_all_equal(one, result)


def test_the_same_bits_without_jit_where_the_scale_is_a_mean(rng):
    # A mean may be summed in another order under jit, so that is not compared.
    x = normal(rng, KERNEL)
    quantizer = QUANTIZERS["quest4"]
    chex.assert_trees_all_equal(
        dequantize(quantize(x, quantizer)), fake_quant(x, quantizer)
    )


@each("int4 asymmetric", "int4 tiles", "quest4")
def test_float64_is_computed_in_float64(quantizer, rng, x64):
    x = jnp.asarray(rng.standard_normal(KERNEL))
    expected = oracle(x, quantizer)
    result = compiled(x, quantizer)
    chex.assert_type(result, jnp.float64)
    # The rounding of float64, some tens of times; no tie is that near.
    chex.assert_trees_all_close(result, expected.value(expected.nearest), atol=1e-13)
    quantized = compiled_quantize(x, quantizer)
    chex.assert_type(quantized.scale, jnp.float64)
    chex.assert_trees_all_equal(compiled_dequantize(quantized), result)


@each("int4", "int4 asymmetric", "int4 clipped", "int4 hadamard", "quest4")
def test_error_is_what_is_left_and_a_constant(quantizer, rng):
    x = normal(rng, KERNEL)

    def loss(x):
        error = quantization_error(x, quantizer)
        return jnp.sum(error * x), error

    gradient, error = jax.jit(jax.grad(loss, has_aux=True))(x)
    expected = np.float64(x) - np.float64(compiled(x, quantizer))
    # The difference is rounded once more, and may use an unrounded product.
    tolerance = 4 * EPS * float(jnp.abs(x).max())
    chex.assert_trees_all_close(np.float64(error), expected, atol=tolerance)
    chex.assert_trees_all_equal(gradient, error)


# --- gradients ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def pulled_back(x, cotangent, quantizer):
    return jax.vjp(lambda x: fake_quant(x, quantizer), x)[1](cotangent)[0]


@each_case
def test_gradient_is_the_written_rule(shape, quantizer, rng):
    x, cotangent = normal(rng, shape), normal(rng, shape)
    gradient = pulled_back(x, cotangent, quantizer)
    chex.assert_type(gradient, jnp.float32)
    passes = oracle(x, quantizer).passes
    if quantizer.gradient == "identity":
        np.testing.assert_array_equal(gradient, cotangent)
    elif quantizer.hadamard is None:
        np.testing.assert_array_equal(gradient, np.where(passes, cotangent, 0))
    else:
        expected = rotated(passes * rotated(cotangent, quantizer), quantizer)
        # Two rotations in float32 of numbers below 10.
        chex.assert_trees_all_close(np.float64(gradient), expected, atol=40 * EPS)


@pytest.mark.parametrize(
    ("quantizer", "inside", "outside"),
    [
        (int4(scale=Fixed(0.5), axis=0), [-3.5, 0.0, 3.5], [-3.6, 3.6]),
        (
            int4(scale=Fixed(0.5), axis=0, gradient="trust"),
            [-3.75, 3.75],
            [-3.76, 3.76],
        ),
        (
            int4(scale=Fixed(0.5), axis=0, narrow=False),
            [-4.0, 3.5],
            [-4.01, 3.51],
        ),
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
    ],
    ids=str,
)
def test_where_a_mask_ends(quantizer, inside, outside):
    def gradient(x):
        x = jnp.asarray(x, jnp.float32)
        return jax.grad(lambda x: fake_quant(x, quantizer).sum())(x)

    np.testing.assert_array_equal(gradient(inside), np.ones(len(inside)))
    np.testing.assert_array_equal(gradient(outside), np.zeros(len(outside)))


def test_where_a_mask_ends_around_a_zero_point():
    quantizer = int4(axis=0, symmetric=False, gradient="clip")
    grid = Grid(jnp.array([0.5]), zero_point=jnp.array([3.0]))

    def gradient(x):
        x = jnp.asarray(x, jnp.float32)
        return jax.grad(lambda x: fake_quant(x, quantizer, grid=grid).sum())(x)

    # Codes from -8 to 7, of which 3 is zero.
    np.testing.assert_array_equal(gradient([-5.5, 0.0, 2.0]), np.ones(3))
    np.testing.assert_array_equal(gradient([-5.6, 2.1]), np.zeros(2))


def test_a_mask_of_a_negative_scale():
    quantizer = Quantizer(Integer(4), SignedMax(), axis=0, gradient="clip")
    x = jnp.array([7.0, -3.0])
    assert fit_grid(x, quantizer).scale < 0
    found = jax.grad(lambda x: fake_quant(x, quantizer).sum())(x)
    np.testing.assert_array_equal(found, np.ones(2))


@pytest.mark.parametrize("gradient", ["clip", "trust"])
def test_the_largest_value_of_an_absmax_group_is_inside(gradient, rng):
    x = normal(rng, KERNEL)
    quantizer = int4(group_size=8, gradient=gradient)
    result = jax.grad(lambda x: fake_quant(x, quantizer).sum())(x)
    np.testing.assert_array_equal(result, np.ones(KERNEL))


TREE_RULES = Rules(
    [
        ("up/kernel", int4(group_size=16)),
        ("down/kernel", int4(scale=AbsMax(0.7), group_size=32)),
        ("out/kernel", quest(4, hadamard=32)),
        (".*", None),
    ]
)


def tree(rng):
    params = {
        name: {"kernel": normal_off_ties(rng, TREE_RULES.match(f"{name}/kernel"))}
        for name in ("up", "down", "out")
    }
    return params | {"norm": normal(rng, KERNEL)}


def quartic(params):
    """A loss whose gradient, x^3, and Hessian, 3 x^2, are known."""
    return sum(jnp.sum(x**4) / 4 for x in jax.tree.leaves(params))


def masked(tangent, x, quantizer):
    return rotated(oracle(x, quantizer).passes * rotated(tangent, quantizer), quantizer)


def test_gradient_of_a_loss_is_that_at_the_quantized_parameters(rng):
    params = tree(rng)
    gradients = jax.grad(lambda p: quartic(fake_quant(p, TREE_RULES)))(params)
    at_quantized = jax.grad(quartic)(fake_quant(params, TREE_RULES))
    for path, (quantizer, x) in TREE_RULES.quantized(params).items():
        name = path.split("/")[0]
        reference = oracle(x, quantizer)
        expected = masked(reference.value(reference.nearest) ** 3, x, quantizer)
        # Cubes of numbers below 5 with a few float32 roundings each.
        chex.assert_trees_all_close(
            np.float64(gradients[name]["kernel"]), expected, atol=500 * EPS * 10
        )
    np.testing.assert_array_equal(
        gradients["up"]["kernel"], at_quantized["up"]["kernel"]
    )
    np.testing.assert_array_equal(gradients["norm"], at_quantized["norm"])


@each("int4", "int4 clipped", "quest4", "quest2 trust", "int4 asymmetric")
def test_hessian_vector_product_is_that_at_the_quantized_value(quantizer, rng):
    x, v = normal_off_ties(rng, quantizer), normal(rng, KERNEL)
    reference = oracle(x, quantizer)

    def product(x, v):
        gradient = jax.grad(lambda x: quartic(fake_quant(x, quantizer)))
        return jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)

    result = jax.jit(product)(x, v)
    hessian = 3 * reference.value(reference.nearest) ** 2
    expected = masked(hessian * masked(v, x, quantizer), x, quantizer)
    assert np.abs(expected).max() > 1
    # Numbers up to 3 * 4^2 * 4 with some ten float32 roundings, rotated twice.
    chex.assert_trees_all_close(np.float64(result), expected, atol=200 * 40 * EPS)


def test_hessian_vector_product_of_a_quadratic(rng):
    x, v = normal(rng, KERNEL), normal(rng, KERNEL)

    def gradient(x):
        return jax.grad(lambda x: 1.5 * jnp.sum(fake_quant(x, int4()) ** 2))(x)

    product = jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)
    np.testing.assert_array_equal(product, 3 * v)


# --- under transformations ------------------------------------------------------------


@each("int4", "int4 clipped", "quest4")
def test_under_jit_and_remat(quantizer, rng):
    x = normal(rng, KERNEL)

    def loss(x):
        return quartic(fake_quant(x, quantizer))

    expected = jax.grad(loss)(x)
    for wrapped in (loss, jax.remat(loss)):
        # A compiler may fuse products into sums, and cubes amplify that.
        chex.assert_trees_all_close(
            jax.jit(jax.grad(wrapped))(x), expected, rtol=100 * EPS, atol=100 * EPS
        )


@each("int4 groups", "int4 clipped", "quest4")
def test_vmap_and_scan_are_one_after_the_other(quantizer, rng):
    stack, cotangents = normal(rng, (2, *KERNEL)), normal(rng, (2, *KERNEL))

    def both(x, cotangent):
        value, pull_back = jax.vjp(lambda x: fake_quant(x, quantizer), x)
        return value, *pull_back(cotangent)

    singly = jax.jit(both)
    expected = [singly(x, c) for x, c in zip(stack, cotangents)]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *expected)
    # A batched rotation and a batched mean may sum in another order.
    close = functools.partial(chex.assert_trees_all_close, atol=40 * EPS, rtol=0)
    close(jax.jit(jax.vmap(both))(stack, cotangents), expected)
    scan = jax.jit(
        lambda *pairs: jax.lax.scan(lambda _, pair: (None, both(*pair)), None, pairs)[1]
    )
    scanned = scan(stack, cotangents)
    close(scanned, expected)
    # A stack of kernels is quantized layer by layer.
    close(compiled(stack, quantizer), expected[0])


@each("int4 groups", "int4 clipped", "quest4")
def test_a_loop_is_handed_no_arrays_of_constants(quantizer):
    def loss(x):
        return jax.lax.scan(lambda x, _: (fake_quant(x, quantizer), None), x, length=3)[
            0
        ].sum()

    equations = jax.make_jaxpr(jax.grad(loss))(jnp.ones(KERNEL)).eqns
    loop = next(each for each in equations if each.primitive.name == "scan")
    constants = loop.invars[: scan_counts(loop)[0]]
    # The rotation's matrix is one, once for all turns.
    sizes = [each.aval.size for each in constants]
    assert all(size <= (quantizer.hadamard or 0) ** 2 for size in sizes), sizes


def test_shapes_without_arrays(rng):
    x = jax.ShapeDtypeStruct(KERNEL, jnp.bfloat16)
    result = jax.eval_shape(lambda x: fake_quant(x, int4()), x)
    assert (result.shape, result.dtype) == (KERNEL, jnp.bfloat16)


# --- values that are not numbers, and nothing -----------------------------------------

each_rule = pytest.mark.parametrize(
    "quantizer",
    [
        int4(group_size=4),
        int4(group_size=4, symmetric=False),
        int4(group_size=4, scale=Gaussian()),
        int4(group_size=4, scale=Fixed(0.25)),
        quest(2, group_size=4, hadamard=None),
        quest(4, group_size=4, hadamard=4),
    ],
    ids=str,
)


@each_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given", [False, True], ids=["fitted", "given"])
def test_a_bad_value_spoils_its_group_and_no_other(quantizer, bad, given, rng):
    x = np.asarray(normal(rng, (8, 3))).copy()
    grid = None
    if given:
        scale = jnp.full((2, 3), 0.25)
        grid = Grid(scale, jnp.zeros((2, 3)) if quantizer.asymmetric else None)
    before = fake_quant(x, quantizer, grid=grid)
    x[5, 1] = bad
    spoilt = np.zeros((8, 3), bool)
    spoilt[4:, 1] = True
    expected = np.where(spoilt, np.nan, before)
    chex.assert_trees_all_equal(
        np.asarray(fake_quant(x, quantizer, grid=grid)), expected
    )
    restored = dequantize(quantize(x, quantizer, grid=grid))
    chex.assert_trees_all_equal(np.asarray(restored), expected)
    error = quantization_error(x, quantizer, grid=grid)
    np.testing.assert_array_equal(np.isnan(error), spoilt)


@each_rule
def test_zeros(quantizer, rng):
    x = np.asarray(normal(rng, (8, 3))).copy()
    x[:4, 2] = 0
    result = np.asarray(fake_quant(x, quantizer))
    if quantizer.format.has_zero:
        np.testing.assert_array_equal(result[:4, 2], np.zeros(4))
    else:
        # The least level, half the least normal number, which is flushed to zero.
        assert np.abs(result[:4, 2]).max() <= 4 * TINY
    assert np.all(result[4:, 2] != 0) or quantizer.format.has_zero
    chex.assert_trees_all_equal(np.asarray(dequantize(quantize(x, quantizer))), result)


@pytest.mark.parametrize("quantizer", [int4(), quest(4), int8(group_size=4)], ids=str)
def test_an_array_without_elements(quantizer):
    x = jnp.zeros((0, 3))
    chex.assert_shape(fake_quant(x, quantizer), (0, 3))
    chex.assert_shape(dequantize(quantize(x, quantizer)), (0, 3))
    chex.assert_shape(quantization_error(x, quantizer), (0, 3))


def test_scalars_and_arrays_without_elements_pass_through_trees():
    params = {"empty": jnp.zeros((0, 3)), "scalar": jnp.float32(0.3), "none": None}
    rules = Rules([(".*", int4())])
    for function in (fake_quant, quantize):
        result = function(params, rules)
        assert result["empty"] is params["empty"]
        assert result["scalar"] is params["scalar"]
        assert result["none"] is None
    error = quantization_error(params, rules)
    chex.assert_trees_all_equal(error, jax.tree.map(jnp.zeros_like, params))


def test_a_scalar_is_its_own_group():
    assert float(fake_quant(jnp.float32(3.0), int4(axis=None))) == 3.0


def test_a_numpy_array_is_taken_as_jax_takes_it(rng):
    x = rng.standard_normal(KERNEL)  # float64, which jax narrows
    expected = fake_quant(jnp.asarray(x), int4())
    chex.assert_trees_all_equal(fake_quant(x, int4()), expected)
    chex.assert_trees_all_equal(dequantize(quantize(x, int4())), expected)
    chex.assert_type(quantization_error(x, int4()), jnp.float32)
    assert fake_quant([[1.0], [2.0]], int4()).tolist() == [[pytest.approx(6 / 7)], [2]]


# --- a given grid ---------------------------------------------------------------------


@each("int4", "int4 groups", "int4 asymmetric", "int4 tiles", "quest4", "int8 tensor")
def test_the_grid_that_is_found_may_be_given(quantizer, rng):
    x = normal(rng, KERNEL)
    grid = fit_grid(x, quantizer)
    chex.assert_shape(grid.scale, quantizer.scale_shape(KERNEL))
    chex.assert_trees_all_equal(
        fake_quant(x, quantizer, grid=grid), fake_quant(x, quantizer)
    )
    other = fake_quant(0.9 * x, quantizer, grid=grid)
    quantized = quantize(0.9 * x, quantizer, grid=grid)
    chex.assert_trees_all_equal(dequantize(quantized), other)
    chex.assert_trees_all_equal(quantized.scale, grid.scale)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        (int4(), None),
        (int4(symmetric=False, group_size=32), None),
        (int4(hadamard=64), "int16"),
        (int4(hadamard=64, group_size=16), "float32"),
        (int8(hadamard=128), "int16"),
        (int8(hadamard=128, symmetric=False), "int16"),
        (quest(1), "int16"),
        (quest(8), "int16"),
    ],
    ids=str,
)
def test_the_error_in_two_halves_is_the_error(quantizer, dtype, rows, jit, rng):
    x = normal(rng, (rows, 3)).at[0, 1].set(jnp.nan)
    fit = jax.jit(fit_for_error, static_argnums=1) if jit else fit_for_error
    rest = jax.jit(error_from, static_argnums=1) if jit else error_from
    grid, turned_back = fit(x, quantizer)
    assert (turned_back if dtype is None else str(turned_back.dtype)) == dtype
    # A compiler may contract the last product and difference, so not to the bit.
    np.testing.assert_allclose(
        rest(x, quantizer, grid, turned_back),
        quantization_error(x, quantizer),
        rtol=0,
        atol=2 * EPS * float(jnp.nanmax(jnp.abs(x))),
    )


@pytest.mark.parametrize("block", [128, 256])
def test_the_largest_sums_of_codes_are_turned_back_exactly(block):
    x = jnp.zeros((block, 1)).at[0].set(1.0)  # rotated, all alike
    beyond = Fixed(1e-4)
    quantizer = dataclasses.replace(quest(8), scale=beyond, hadamard=block)
    grid, turned_back = fit_for_error(x, quantizer)
    assert turned_back.dtype == (jnp.int16 if block == 128 else jnp.float32)
    np.testing.assert_allclose(
        error_from(x, quantizer, grid, turned_back),
        np.float64(x) * (1 - 127.5 * 1e-4 * np.sqrt(block)),
        rtol=1e-6,
    )


def test_where_the_scale_is_zero_the_grid_is_found(rng):
    x = normal(rng, (8, 3))
    quantizer = int4(group_size=4, symmetric=False)
    scale = jnp.zeros((2, 3)).at[1, 2].set(0.5)
    zero_point = jnp.full((2, 3), -2.0)
    result = np.float64(fake_quant(x, quantizer, grid=Grid(scale, zero_point)))
    part = np.float64(x)[4:, 2]
    expected = 0.5 * (np.clip(np.round(part / 0.5 - 2), -8, 7) + 2)
    np.testing.assert_array_equal(result[4:, 2], expected)
    found = np.float64(fake_quant(x, quantizer))
    found[4:, 2] = result[4:, 2]
    np.testing.assert_array_equal(result, found)
    kept = fit_grid(x, quantizer, Grid(scale, zero_point))
    assert (float(kept.scale[1, 2]), float(kept.zero_point[1, 2])) == (0.5, -2.0)
    assert np.all(np.asarray(kept.scale) > 0)


def test_a_grid_receives_no_gradient(rng):
    x = normal(rng, (8, 3))
    grid = Grid(jnp.full((1, 3), 0.25))
    gradient = jax.grad(lambda grid: fake_quant(x, int4(), grid=grid).sum())(grid)
    chex.assert_trees_all_equal(gradient, Grid(jnp.zeros((1, 3))))


def test_the_mask_is_that_of_the_given_grid():
    x = jnp.array([[1.0], [2.0], [8.0]])
    quantizer = int4(gradient="clip")
    grid = Grid(jnp.full((1, 1), 0.5))
    gradient = jax.grad(lambda x: fake_quant(x, quantizer, grid=grid).sum())(x)
    np.testing.assert_array_equal(gradient, [[1.0], [1.0], [0.0]])
    assert fake_quant(x, quantizer, grid=grid).ravel().tolist() == [1.0, 2.0, 3.5]


def test_grids_of_a_tree(rng):
    params = tree(rng)
    grids = {
        path: fit_grid(x, quantizer)
        for path, (quantizer, x) in TREE_RULES.quantized(params).items()
    }
    moved = jax.tree.map(lambda x: 0.9 * x, params)
    for function in (fake_quant, quantize, quantization_error):
        result = function(moved, TREE_RULES, grid=grids)
        for path, (quantizer, x) in TREE_RULES.quantized(moved).items():
            expected = function(x, quantizer, grid=grids[path])
            chex.assert_trees_all_equal(result[path.split("/")[0]]["kernel"], expected)


# --- trees ----------------------------------------------------------------------------


def test_the_four_functions_on_a_tree(rng):
    params = tree(rng)
    value, codes = fake_quant(params, TREE_RULES), quantize(params, TREE_RULES)
    error = quantization_error(params, TREE_RULES)
    for path, (quantizer, x) in TREE_RULES.quantized(params).items():
        name = path.split("/")[0]
        chex.assert_trees_all_equal(value[name]["kernel"], fake_quant(x, quantizer))
        chex.assert_trees_all_equal(codes[name]["kernel"], quantize(x, quantizer))
        chex.assert_trees_all_equal(
            error[name]["kernel"], quantization_error(x, quantizer)
        )
    assert value["norm"] is params["norm"]
    assert codes["norm"] is params["norm"]
    np.testing.assert_array_equal(error["norm"], np.zeros(KERNEL))
    chex.assert_trees_all_equal_structs(value, error, params)
    for back in (dequantize(codes), dequantize(codes, TREE_RULES)):
        chex.assert_trees_all_equal(back, value)
    chex.assert_trees_all_equal(jax.jit(dequantize)(codes)["norm"], params["norm"])


def test_codes_know_their_quantizer(rng):
    codes = quantize(normal(rng, (8, 3)), int4())
    chex.assert_trees_all_equal(dequantize(codes, int4()), dequantize(codes))
    with pytest.raises(ValueError, match=r"^`quantizer` must be .* int4 .*; got int8"):
        dequantize(codes, int8())
    with pytest.raises(ValueError, match=r"^`mlp/up`: `quantizer` must be "):
        dequantize({"mlp": {"up": codes}}, Rules([(".*", int8())]))
    with pytest.raises(TypeError, match=r"^`x` must be a QuantizedArray, .*Use "):
        dequantize(jnp.ones((8, 3)), int4())


# --- bad input ------------------------------------------------------------------------

ONES = jnp.ones((8, 3))
BAD = [
    (
        ONES,
        int4,
        TypeError,
        "`quantizer` must be a Quantizer",
        "function",
        "int4(...).",
    ),
    (ONES, "int4", TypeError, "`quantizer` must be a Quantizer", "'int4'", "int4()"),
    (ONES, None, TypeError, "`quantizer` must be a Quantizer", "None", "Rules(["),
    (ONES, {"a": int4()}, TypeError, "`quantizer` must be", "{'a'", "Rules(["),
    (ONES.astype(int), int4(), TypeError, "`x` must be", "int32", "Convert it"),
    (ONES.astype(bool), int4(), TypeError, "`x` must be", "bool", "float32, bfloat16"),
    (ONES.astype(complex), int4(), TypeError, "`x` must be", "complex64", "Convert it"),
    (ONES, int4(axis=2), ValueError, "`axis` must be", "axis=2", "from -2 to 1"),
    (ONES, int4(group_size=3), ValueError, "`group_size` must", "3,", "divisor of 8"),
    (ONES, quest(4), ValueError, "`hadamard` must", "128", "Use 8 or less"),
]


@pytest.mark.parametrize(
    ("x", "quantizer", "error", "start", "value", "remedy"),
    BAD,
    ids=[f"{start} {value}" for _, _, _, start, value, _ in BAD],
)
@pytest.mark.parametrize("function", [fake_quant, quantize, quantization_error])
def test_bad_arguments(function, x, quantizer, error, start, value, remedy):
    with pytest.raises(error) as caught:
        function(x, quantizer)
    message = str(caught.value)
    assert message.startswith(start)
    assert value in message.split("got ", 1)[1]
    assert remedy in message
    if isinstance(quantizer, Quantizer):
        with pytest.raises(error, match=r"^`mlp/up`: ") as caught:
            function({"mlp": {"up": x}}, Rules([("mlp/.*", quantizer)]))
        assert value in str(caught.value)


@pytest.mark.parametrize(
    ("quantizer", "grid", "error", "value", "remedy"),
    [
        (int4(), jnp.ones((1, 3)), TypeError, "Array", "Use Grid(scale)"),
        (int4(), 0.5, TypeError, "float", "Use Grid(scale)"),
        (int4(), Grid(jnp.ones((8, 3))), ValueError, "shape (8, 3)", "the state"),
        (int4(), Grid(jnp.ones(3)), ValueError, "shape (3,)", "the state"),
        (
            int4(symmetric=False),
            Grid(jnp.ones((1, 3))),
            ValueError,
            "zero_point=None",
            "the same rules",
        ),
        (
            int4(),
            Grid(jnp.ones((1, 3)), jnp.ones((1, 3))),
            ValueError,
            "zero_point=[[",
            "the same rules",
        ),
        (
            int4(symmetric=False),
            Grid(jnp.ones((1, 3)), jnp.ones((2, 3))),
            ValueError,
            "shape (2, 3)",
            "one zero_point for each group, shape (1, 3)",
        ),
    ],
)
@pytest.mark.parametrize("function", [fake_quant, quantize, quantization_error])
def test_bad_grids(function, quantizer, grid, error, value, remedy):
    with pytest.raises(error, match=r"^`grid` must ") as caught:
        function(ONES, quantizer, grid=grid)
    assert value in str(caught.value).split("got ", 1)[1]
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (Grid(jnp.ones((1, 3))), TypeError, r"`grid` must map .*got Grid\. Use the"),
        ({}, ValueError, r"`grid` must have an entry .*got the paths \[\]\. Add this"),
        ({"a": Grid(jnp.ones(3))}, ValueError, r"`grid` must have one scale .*\(3,\)"),
    ],
)
def test_bad_grids_of_a_tree(grid, error, message):
    with pytest.raises(error, match="^`a`: " + message):
        fake_quant({"a": ONES}, Rules([("a", int4())]), grid=grid)


@pytest.mark.parametrize("function", [fake_quant, quantize, quantization_error])
@pytest.mark.parametrize(
    "tree", [{"kernel": jnp.ones((8, 3))}, [jnp.ones((8, 3))], {}], ids=str
)
def test_a_tree_needs_rules(function, tree):
    with pytest.raises(
        TypeError, match=r"got a tree.*Rules\(\[\('\.\*', quantizer\)\]\)"
    ):
        function(tree, int4())


@pytest.mark.parametrize("function", [fake_quant, quantize])
def test_rules_that_quantize_nothing_are_warned_of(function):
    part = {"kernel": jnp.ones((8, 3))}
    with pytest.warns(UserWarning, match="no parameter is quantized"):
        function(part, Rules([("dense/kernel", int4())]))
    function(part, Rules([(".*", None)]))  # as was asked for


def test_many_rules_are_named_by_their_first():
    rules = Rules([(name, int4()) for name in "abc"])
    with pytest.warns(UserWarning, match=r"by the 3 rules from 'a' on\."):
        fake_quant({"kernel": jnp.ones((8, 3))}, rules)


@pytest.mark.parametrize("function", [fake_quant, quantize])
def test_codes_are_not_quantized_again(function):
    rules = Rules([(".*kernel", int4()), (".*", None)])
    codes = quantize({"mlp": {"kernel": jnp.ones((8, 3))}}, rules)
    with pytest.raises(TypeError, match=r"`mlp/kernel`.*quantized already"):
        function(codes, rules)
    function(codes | {"kernel": jnp.ones((8, 3))}, Rules([("kernel", int4())]))


def test_codes_are_not_differentiated(rng):
    x = normal(rng, (8, 3))
    with pytest.raises(TypeError, match=r"`quantize` has no gradient.*fake_quant"):
        jax.grad(lambda x: dequantize(quantize(x, int4())).sum())(x)
    # What does not reach the loss may be there.
    both = jax.grad(lambda x: (x.sum(), quantize(x, int4())), has_aux=True)(x)
    chex.assert_trees_all_equal(both[0], jnp.ones_like(x))


# --- stochastic rounding --------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer",
    [int4(scale=Fixed(0.5)), quest(2, hadamard=4), fp8(), mxfp4(rounding="up")],
    ids=str,
)
def test_stochastic_rounding_has_the_value_as_its_mean(quantizer, rng, key):
    x = normal(rng, (32, 3)) * 0.5
    stochastic = dataclasses.replace(quantizer, rounding="stochastic")
    draws = 4000
    keys = jax.random.split(key, draws)
    drawn = jax.jit(jax.vmap(lambda k: fake_quant(x, stochastic, key=k)))(keys)
    nearest = np.float64(fake_quant(x, quantizer))
    mean, deviation = np.float64(drawn).mean(0), np.float64(drawn).std(0)
    # What lies beyond the grid is clipped, and has no such mean.
    step = np.abs(np.float64(drawn) - nearest).max()
    inside = np.abs(np.float64(x) - nearest) < step
    error = np.abs(mean - np.float64(x))[inside]
    assert np.all(error <= 5 * deviation[inside] / np.sqrt(draws) + 1e-6) or (
        quantizer.hadamard  # clipped in the rotated basis
    )
    assert deviation.max() > 0
    one = fake_quant(x, stochastic, key=keys[0])
    quantized = quantize(x, stochastic, key=keys[0])
    chex.assert_trees_all_equal(dequantize(quantized), one)
    chex.assert_trees_all_equal(fake_quant(x, stochastic, key=keys[0]), one)
    assert np.any(np.asarray(one) != np.asarray(drawn[1]))
    gradient = jax.grad(lambda x: fake_quant(x, stochastic, key=key).sum())(x)
    if quantizer.gradient == "identity":
        chex.assert_trees_all_equal(gradient, jnp.ones_like(x))
    # The pull is to the nearest value.
    chex.assert_trees_all_equal(
        quantization_error(x, stochastic), quantization_error(x, quantizer)
    )


def test_each_parameter_draws_its_own_numbers(rng, key):
    x = normal(rng, (32, 3))
    stochastic = dataclasses.replace(int2(), rounding="stochastic")
    rules = Rules([("[ab]", stochastic), ("c", int2())])
    result = fake_quant({"a": x, "b": x, "c": x}, rules, key=key)
    assert np.any(np.asarray(result["a"]) != np.asarray(result["b"]))
    chex.assert_trees_all_equal(result["c"], fake_quant(x, int2()))


def test_a_key_is_needed_for_stochastic_rounding_alone(key):
    x = jnp.ones((8, 3))
    stochastic = dataclasses.replace(int4(), rounding="stochastic")
    for function in (fake_quant, quantize):
        with pytest.raises(ValueError, match="`key` must be given for stochastic"):
            function(x, stochastic)
        with pytest.raises(ValueError, match="`key` has no meaning without"):
            function(x, int4(), key=key)
        with pytest.raises(ValueError, match="`kernel`: `key` must be given"):
            function({"kernel": x}, Rules([("kernel", stochastic)]))
        with pytest.raises(ValueError, match="`key` has no meaning without"):
            function({"kernel": x}, Rules([("kernel", int4())]), key=key)


# --- random signs ---------------------------------------------------------------------


@each("int4 hadamard", "quest4", "quest3 groups", "int4 hadamard groups")
def test_random_signs_are_part_of_the_rotation(quantizer, rng):
    x, cotangent = normal(rng, KERNEL), normal(rng, KERNEL)
    signed = dataclasses.replace(quantizer, hadamard_seed=3)
    signs = np.random.default_rng(3).integers(0, 2, KERNEL[0]) * 2.0 - 1
    signs = jnp.asarray(signs, jnp.float32)[:, None] * jnp.ones(KERNEL, jnp.float32)
    expected = signs * compiled(signs * x, quantizer)
    # A mean may be summed in another order.
    close = 4 * EPS * float(jnp.abs(x).max())
    chex.assert_trees_all_close(compiled(x, signed), expected, atol=close, rtol=0)
    assert np.any(np.asarray(expected) != np.asarray(compiled(x, quantizer)))
    gradient = signs * pulled_back(signs * x, signs * cotangent, quantizer)
    tolerance = 40 * EPS * float(jnp.abs(cotangent).max())
    chex.assert_trees_all_close(
        pulled_back(x, cotangent, signed), gradient, atol=tolerance, rtol=0
    )
    chex.assert_trees_all_equal(dequantize(quantize(x, signed)), fake_quant(x, signed))


# --- learned grids --------------------------------------------------------------------


def lsq_oracle(x, scale, offset, cotangent, low, high, axes):
    """Value and gradients of LSQ and LSQ+, in float64, from the papers."""
    position = (x - offset) / scale
    rounded = np.clip(np.round(position), low, high)
    inside = (position >= low) & (position <= high)
    count = np.prod([x.shape[axis] for axis in axes])
    share = 1 / np.sqrt(count * high)

    def total(parts):
        return (cotangent * parts).sum(axis=axes, keepdims=True) * share

    return (
        rounded * scale + offset,
        cotangent * inside,
        total(np.where(inside, rounded - position, rounded)),
        total(~inside),
    )


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("axis", "axes"), [(None, (0, 1)), (-2, (0,))])
def test_the_gradient_of_a_learned_grid(offset, axis, axes, rng, x64):
    x, cotangent = (jnp.asarray(rng.standard_normal((32, 4))) for _ in range(2))
    quantizer = lsq(3, axis=axis, offset=offset)
    grid = fit_grid(x, quantizer)
    grid = grid._replace(scale=0.6 * grid.scale)
    if offset:
        grid = grid._replace(offset=grid.offset + 0.1)
    value, pull = jax.vjp(lambda x, grid: fake_quant(x, quantizer, grid=grid), x, grid)
    gradient, grid_gradient = pull(cotangent)
    at = 0.0 if grid.offset is None else np.asarray(grid.offset)
    low, high = quantizer.format.low, quantizer.format.high
    expected = lsq_oracle(
        np.asarray(x),
        np.asarray(grid.scale),
        at,
        np.asarray(cotangent),
        low,
        high,
        axes,
    )
    assert np.any(np.abs(expected[3]) > 0)  # some values lie beyond
    found = [value, gradient, grid_gradient.scale]
    if offset:
        found.append(grid_gradient.offset)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_learned_grid_starts_as_in_the_paper(rng):
    x = rng.standard_normal((32, 4)).astype(np.float32)
    grid = fit_grid(jnp.asarray(x), lsq(4))
    expected = 2 * np.abs(x).mean() / np.sqrt(7)
    np.testing.assert_allclose(grid.scale, [[expected]], rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_learned_grids_are_trained_beside_the_weights(rng):
    rules = Rules([(".*kernel", lsq(2, axis=-2)), ("embed", int4())])
    params = {
        "dense": {"kernel": normal(rng, (32, 4)), "bias": jnp.zeros(4)},
        "embed": normal(rng, (8, 4)),
    }
    variables = with_grids(params, rules)
    assert list(variables["grids"]) == ["dense/kernel"]
    target = fake_quant(params["dense"]["kernel"], int2()) * 0.7

    def loss(variables):
        quantized = fake_quant(variables, rules)["params"]
        return jnp.mean((quantized["dense"]["kernel"] - target) ** 2)

    tx = cage_adamw(0.02, rules, 0.5, statistics=True)
    state, start, first = tx.init(variables), variables, loss(variables)

    @jax.jit
    def step(variables, state):
        gradient = jax.grad(loss)(variables)
        updates, state = tx.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state

    for _ in range(100):
        variables, state = step(variables, state)
    assert loss(variables) < 0.5 * first
    grid, before = (v["grids"]["dense/kernel"] for v in (variables, start))
    assert np.all(np.asarray(grid.scale) != np.asarray(before.scale))
    # The correction pulled to the learned grid, and the codes are of that grid.
    error = quantization_error(variables, rules)["params"]["dense"]["kernel"]
    x = variables["params"]["dense"]["kernel"]
    expected = x - fake_quant(x, lsq(2, axis=-2), grid=grid)
    chex.assert_trees_all_equal(error, expected)
    codes = quantize(variables, rules)["params"]["dense"]["kernel"]
    chex.assert_trees_all_equal(codes.scale, grid.scale)
    report = rules.report(variables)
    assert "grids" not in str(report)


def test_the_pull_is_to_the_learned_grid(rng):
    quantizer = lsq(3)
    rules = Rules([("kernel", quantizer)])
    variables = with_grids({"kernel": normal(rng, (16, 4))}, rules)
    grid = variables["grids"]["kernel"]._replace(scale=jnp.full((1, 1), 0.3))
    variables["grids"]["kernel"] = grid
    x = variables["params"]["kernel"]
    zeros = jax.tree.map(jnp.zeros_like, variables)
    for freeze_scale in (False, True):
        tx = cage_sgd(1.0, rules, 0.5, freeze_scale=freeze_scale)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(variables), variables)
        expected = -0.5 * (
            np.float64(x) - np.float64(fake_quant(x, quantizer, grid=grid))
        )
        np.testing.assert_allclose(updates["params"]["kernel"], expected, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan")])
def test_a_learned_scale_that_is_not_positive(scale):
    x = jnp.ones((8, 3))
    grid = Grid(jnp.full((1, 1), scale))
    with pytest.raises(ValueError, match=r"positive scales; got .*with_grids"):
        fake_quant(x, lsq(4), grid=grid)
    result = jax.jit(lambda grid: fake_quant(x, lsq(4), grid=grid))(grid)
    assert np.all(np.isnan(result))


def test_a_learned_grid_must_be_given():
    x = jnp.ones((8, 3))
    for function in (fake_quant, quantize, quantization_error):
        with pytest.raises(ValueError, match="`grid` must be given for a learned"):
            function(x, lsq(4))
    rules = Rules([("kernel", lsq(4))])
    with pytest.raises(ValueError, match="`kernel`: `grid` must be given"):
        fake_quant({"kernel": x}, rules)
    tx = cage_sgd(0.1, rules, 1.0)
    params = {"kernel": x}
    with pytest.raises(ValueError, match="`kernel`: `grid` must be given"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="`rules` must match a parameter with a learn"):
        with_grids({"kernel": x}, Rules([("kernel", int4())]))


def test_the_second_derivative_of_a_clipped_rotation(rng):
    quantizer = Quantizer(Integer(3), Fixed(0.2), axis=0, hadamard=8, gradient="clip")
    x, v = rng.standard_normal((2, 8, 3))
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)]
    turn = np.array(signs) / np.sqrt(8)
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

    second = jax.grad(along)(jnp.asarray(x, jnp.float32))
    expected = straight(2 * values * straight(v))
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5)
