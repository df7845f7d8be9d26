"""Learned scales as they are stored, and where they start, against float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_llama import CONFIG, params_of

import cage_jax as cage
from cage_jax import mxfp4, nvfp4, scale_types
from cage_jax.quantizers.formats import Codebook, Float, Integer
from cage_jax.quantizers.rounding import fit_grid
from cage_jax.quantizers.scale_types import Float8, Full, Narrow, PowerOfTwo
from cage_jax.quantizers.scales import (
    AbsMax,
    AbsMean,
    Calibrated,
    FourOverSix,
    Grid,
    Learned,
    MinMax,
    Searched,
    SignedMax,
)

FROM_ABSMAX = Learned(start=AbsMax())


def typed(quantizer, scale_type):
    return dataclasses.replace(quantizer, scale_type=scale_type)


# By name: the quantizer, and the dtype of its stored scales.
STORED = {
    "float16": (typed(cage.lsq(3, axis=0, group_size=16), Narrow()), "float16"),
    "bfloat16": (
        typed(cage.int4(scale=FROM_ABSMAX, group_size=16), Narrow("bfloat16")),
        "bfloat16",
    ),
    "bfloat16 with an offset": (
        typed(cage.lsq(4, axis=0, group_size=16, offset=True), Narrow("bfloat16")),
        "bfloat16",
    ),
    "e8m0": (mxfp4(scale=FROM_ABSMAX), "float8_e8m0fnu"),
    "e8m0 up": (mxfp4(rounding="up", scale=Learned()), "float8_e8m0fnu"),
    "e4m3": (nvfp4(tensor_divisor=False, scale=FROM_ABSMAX), "float8_e4m3fn"),
    "e4m3 and one a tensor": (nvfp4(scale=FROM_ABSMAX), "float8_e4m3fn"),
    "e4m3 of integers": (
        typed(cage.lsq(3, axis=0, group_size=16, narrow=True), Float8()),
        "float8_e4m3fn",
    ),
}
each_type = pytest.mark.parametrize(("quantizer", "dtype"), STORED.values(), ids=STORED)


def weights(rng, shape=(32, 6)):
    """Normal numbers, of another size in each column."""
    return rng.standard_normal(shape) * 2.0 ** rng.uniform(-4, 4, shape[-1])


def moved(grid, rng):
    """A learned grid after some training."""
    grid = jax.tree.map(np.asarray, grid)
    scale = grid.scale * np.exp(rng.uniform(-0.5, 0.5, grid.scale.shape))
    found = grid._replace(scale=scale.astype(grid.scale.dtype))
    if grid.offset is None:
        return found
    return found._replace(offset=grid.offset + grid.offset.dtype.type(0.013))


def stored_grid(grid, dtype):
    """The stored scales, divisor and offset of a learned grid, by `ml_dtypes`."""
    scale, divisor = np.float64(grid.scale), np.float64(1)
    if grid.tensor_divisor is not None:
        # Powers of two until the largest scale is just below 464, which becomes 448.
        power = 2.0 ** np.floor(np.log2(464 / scale.max()))
        scale, divisor = scale * power, np.float64(grid.tensor_divisor) * power
    dtype = jnp.dtype(dtype)
    found = np.float32(scale).astype(dtype).astype(np.float64)
    offset = 0.0
    if grid.offset is not None:
        offset = np.float32(grid.offset).astype(dtype).astype(np.float64)
    return found, divisor, offset


def per_value(x, of_groups):
    return np.repeat(of_groups, x.shape[0] // of_groups.shape[0], 0)


def nearest(position, format):
    """The nearest values of a format; no position of a test is a tie."""
    far = np.abs(position[..., None] - format.values)
    return format.values[far.argmin(-1)]


@functools.partial(jax.jit, static_argnums=0)
def everything(quantizer, x, grid, cotangent):
    value, pull = jax.vjp(lambda x, g: cage.fake_quant(x, quantizer, grid=g), x, grid)
    codes = cage.quantize(x, quantizer, grid=grid)
    error = cage.quantization_error(x, quantizer, grid=grid)
    return value, pull(cotangent), codes, cage.dequantize(codes), error


@each_type
def test_values_and_gradients_are_those_of_the_formula(quantizer, dtype, rng, x64):
    x, cotangent = weights(rng), rng.standard_normal((32, 6))
    format, spread = quantizer.format, functools.partial(per_value, x)
    grid = moved(fit_grid(x, quantizer), rng)
    stored, divisor, offset = stored_grid(grid, dtype)
    step = spread(stored / divisor)
    at = spread(np.broadcast_to(offset, stored.shape))
    position = (x - at) / step
    inside = (position >= format.low) & (position <= format.high)
    rounded = nearest(np.clip(position, format.low, format.high), format)
    assert 0 < inside.mean() < 1  # some values lie beyond the grid

    value, (of_x, of_grid), codes, _, _ = everything(quantizer, x, grid, cotangent)
    np.testing.assert_allclose(value, rounded * step + at, rtol=1e-14)
    np.testing.assert_array_equal(of_x, cotangent * inside)
    # The scale is the step times the learned divisor, which is no parameter.
    count = x.shape[0] // stored.shape[0]
    parts = cotangent * np.where(inside, rounded - position, rounded)

    def total(parts):
        parts = parts.reshape(stored.shape[0], count, -1).sum(1)
        return parts / np.sqrt(count * format.high)

    expected = total(parts)
    if grid.tensor_divisor is not None:
        expected /= grid.tensor_divisor
        assert 1 <= grid.tensor_divisor.item() < 2
        np.testing.assert_array_equal(of_grid.tensor_divisor, [[0]])
    np.testing.assert_allclose(of_grid.scale, expected, rtol=1e-9, atol=1e-12)
    if grid.offset is not None:
        np.testing.assert_allclose(of_grid.offset, total(cotangent * ~inside), 1e-9)
    assert codes.scale.dtype == dtype
    np.testing.assert_array_equal(np.float64(codes.scale), stored)


@each_type
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_codes_have_the_values_of_training(quantizer, dtype, x_dtype, rng):
    x = jnp.asarray(weights(rng), x_dtype)
    grid = moved(fit_grid(x, quantizer), rng)
    assert grid.scale.dtype == "float32"
    found = everything(quantizer, x, grid, jnp.ones_like(x))
    value, (_, gradient), codes, decoded, error = found
    assert gradient.scale.dtype == "float32"
    np.testing.assert_array_equal(value, decoded)
    np.testing.assert_array_equal(error, x - value)
    assert codes.scale.dtype == dtype
    if codes.offset is not None:
        assert codes.offset.dtype == dtype
    # As it is stored, the grid stays as it is.
    again = Grid(
        *(
            None if part is None else part.astype(jnp.float32)
            for part in (codes.scale, None, codes.offset, codes.tensor_divisor)
        )
    )
    same = cage.quantize(x, quantizer, grid=again)
    jax.tree.map(np.testing.assert_array_equal, same, codes)


def test_a_calibrated_scale_is_used_as_it_is_stored(rng):
    rule = Calibrated(decay=0.9)
    x = jnp.asarray(weights(rng), jnp.float32)
    for kind in (Narrow("bfloat16"), PowerOfTwo()):
        quantizer = cage.Quantizer(Integer(4), rule, axis=0, scale_type=kind)
        grids = (fit_grid(factor * x, quantizer) for factor in (1, 1.37))
        grid = rule.merged(*grids, quantizer.format)
        value, _, codes, decoded, _ = everything(quantizer, x, grid, x)
        np.testing.assert_array_equal(value, decoded)
        stored = np.float32(grid.scale).astype(kind.dtype)
        np.testing.assert_array_equal(codes.scale, stored)


def test_any_learned_scale_can_be_stored(rng):
    # Of all sizes, with NaN where one is not positive.
    scale = np.float32(2.0 ** rng.uniform(-126, 127, (64, 1)))
    scale[:4, 0] = 0, -1, np.nan, np.inf
    types = Narrow(), Narrow("bfloat16"), PowerOfTwo(), Float8(), Float8(False)
    for kind in types:
        quantizer = typed(cage.lsq(2, axis=1), kind)
        one = np.float32([[1.7]]) if kind.has_tensor_divisor else None

        @jax.jit
        def codes_of(grid, quantizer=quantizer):
            return cage.quantize(jnp.ones((64, 8)), quantizer, grid=grid)

        codes = codes_of(Grid(scale, tensor_divisor=one))
        stored = np.float32(codes.scale)
        assert np.isnan(stored[:3]).all(), kind
        assert np.isfinite(stored[4:]).all() and (stored[4:] > 0).all(), kind
        if one is not None:
            assert 0 < codes.tensor_divisor.item() < np.inf
    # The first scales of a tensor of zeros are the smallest of all.
    zeros = jnp.zeros((64, 8))
    quantizer = cage.Quantizer(Integer(8), FROM_ABSMAX, axis=0, scale_type=Float8())
    grid = fit_grid(zeros, quantizer)
    values = cage.fake_quant(zeros, quantizer, grid=grid)
    np.testing.assert_array_equal(values, zeros)


def test_the_largest_e4m3_scale_may_grow_and_shrink(rng):
    quantizer = nvfp4(axis=0, scale=FROM_ABSMAX)
    grid = jax.tree.map(np.asarray, fit_grid(weights(rng).astype("float32"), quantizer))
    x = jnp.ones((32, 6))
    codes_of = jax.jit(lambda grid: cage.quantize(x, quantizer, grid=grid))
    first = codes_of(grid)
    steps = np.float64(first.scale) / np.float64(first.tensor_divisor)
    assert np.float32(first.scale).max() == 448
    top = np.unravel_index(grid.scale.argmax(), grid.scale.shape)
    for factor in np.float32([1e-3, 0.5, 0.9, 1.01, 1.1, 2, 7, 16]):
        scale = grid.scale.copy()
        scale[top] *= factor
        codes = codes_of(grid._replace(scale=scale))
        stored = np.float64(codes.scale)
        assert 240 <= stored.max() <= 448
        found = stored / np.float64(codes.tensor_divisor)
        # To the nearest of E4M3's numbers of four digits, and the others stay.
        exact = scale[top] / np.float64(grid.tensor_divisor.item())
        np.testing.assert_allclose(found[top], exact, rtol=1 / 16)
        found[top] = steps[top]
        np.testing.assert_array_equal(found, steps)


def test_each_matrix_of_a_stack_has_its_own_scale_of_e4m3_scales(rng):
    quantizer = nvfp4(axis=-2, scale=FROM_ABSMAX)
    stack = jnp.asarray(weights(rng, (2, 32, 3)) * [[[1]], [[600]]], jnp.float32)

    @jax.jit
    def codes_of(x):
        return cage.quantize(x, quantizer, grid=fit_grid(x, quantizer))

    found = codes_of(stack)
    for number, layer in enumerate(stack):
        for name in ("codes", "scale", "tensor_divisor"):
            one = getattr(found, name)[number]
            np.testing.assert_array_equal(one, getattr(codes_of(layer), name))


STARTS = [
    nvfp4(scale=AbsMax()),
    nvfp4(scale=FourOverSix()),
    nvfp4(scale=Searched(20, most=1.5)),
    nvfp4(tensor_divisor=False),
    mxfp4(),
    mxfp4(rounding="nearest"),
    mxfp4(rounding="up", scale=Searched(8)),
    cage.int4(group_size=16, scale=AbsMax(0.8)),
    cage.Quantizer(Integer(3), AbsMean(), axis=0, scale_type=Narrow()),
]


def test_a_start_has_the_values_of_its_rule(rng):
    x = weights(rng).astype("float32")
    x[:16, 2] = 0

    @jax.jit
    def compared(x):
        found = []
        for quantizer in STARTS:
            learned = dataclasses.replace(
                quantizer, scale=Learned(start=quantizer.scale)
            )
            codes = cage.quantize(x, learned, grid=fit_grid(x, learned))
            found.append((codes, cage.quantize(x, quantizer)))
        return found

    for one, other in compared(x):
        np.testing.assert_array_equal(*map(cage.dequantize, (one, other)))
        for part in ("codes", "scale"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


def test_the_start_of_lsq_is_the_same_for_all_types(rng):
    x = weights(rng).astype("float32")
    grid = fit_grid(x, cage.lsq(4, axis=0))
    for kind in (Narrow(), PowerOfTwo(), Float8()):
        quantizer = typed(cage.lsq(4, axis=0), kind)
        found = fit_grid(x, quantizer)
        np.testing.assert_array_equal(found.scale, grid.scale)
    np.testing.assert_array_equal(found.tensor_divisor, [[1]])


# --- ParetoQ --------------------------------------------------------------------------


def seq_oracle(w, a, cotangent, levels):
    """Values and gradients of ParetoQ's quantizer, as in its code, in float64."""
    n, shift = (1.5, 0.0) if levels == 3 else (2, 0.5)
    q = (np.round(np.clip(w / a, -0.99, 0.99) * n - shift) + shift) / n
    inside = np.abs(w / a) <= 0.99
    # Of ternary weights the code has 1 here, which is not the slope of their value.
    end = 0.75 if levels == 4 else 2 / 3
    slope = np.where(inside, q - w / a, np.sign(w) * end)
    return q * a, cotangent * inside, (cotangent * slope).sum(0, keepdims=True)


@pytest.mark.parametrize("levels", [3, 4])
def test_seq_is_that_of_paretoq(levels, rng, x64):
    quantizer = cage.seq(levels, axis=0)
    w, cotangent = rng.standard_normal((2, 64, 5))
    grid = jax.tree.map(np.asarray, fit_grid(w, quantizer))
    half = levels / 2  # the scale is a / half
    np.testing.assert_allclose(
        grid.scale * half, np.abs(w).max(0, keepdims=True), rtol=1e-15
    )
    a = 0.7 * half * grid.scale
    w = np.where(np.abs(np.abs(w / a) - 0.995) < 0.006, 0.5 * w, w)
    value, of_w, of_a = seq_oracle(w, a, cotangent, levels)
    assert (np.abs(w) > a).any()
    found, (x_gradient, grid_gradient), codes, _, _ = everything(
        quantizer, w, Grid(a / half), cotangent
    )
    np.testing.assert_allclose(found, value, rtol=1e-14)
    np.testing.assert_array_equal(x_gradient, of_w)
    # Ours is for the scale, times 1 / sqrt(values in a group * highest value).
    share = 1 / np.sqrt(64 * quantizer.format.high)
    np.testing.assert_allclose(grid_gradient.scale, of_a * half * share, rtol=1e-9)
    assert len(np.unique(codes.codes.astype(np.int8))) == levels


def test_lsq_of_ternary_weights(rng):
    quantizer = cage.lsq(2, narrow=True, start=AbsMean())
    assert quantizer.format.values.tolist() == [-1, 0, 1]
    x = rng.standard_normal((8, 4)).astype("float32")
    grid = fit_grid(x, quantizer)
    np.testing.assert_allclose(grid.scale, [[np.abs(x).mean()]], rtol=1e-6)


# --- training -------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "quantizer",
    [
        nvfp4(scale=Learned()),
        typed(cage.lsq(3, axis=0, group_size=32, start=AbsMax(2)), PowerOfTwo()),
        cage.seq(),
    ],
    ids=["nvfp4", "e8m0", "seq"],
)
def test_scales_are_trained_and_shipped(quantizer, rng):
    rules = cage.Rules([("w", quantizer), (".*", None)])
    w = rng.standard_normal((64, 16)).astype("float32")
    x = rng.standard_normal((128, 64)).astype("float32")
    variables = cage.with_grids({"w": w}, rules)
    parts = {"params": optax.set_to_zero(), "grids": optax.adam(1e-2)}
    tx = optax.partition(parts, {"params": "params", "grids": "grids"})

    def apply(params):
        return x @ params["w"]

    def loss(variables):
        quantized = cage.fake_quant(variables, rules)["params"]
        return jnp.mean(jnp.square(apply(quantized) - x @ w))

    @jax.jit
    def train(variables):
        def step(carry, _):
            variables, state = carry
            now, gradient = jax.value_and_grad(loss)(variables)
            updates, state = tx.update(gradient, state, variables)
            return (optax.apply_updates(variables, updates), state), now

        carry, losses = jax.lax.scan(step, (variables, tx.init(variables)), length=60)
        quantized = cage.fake_quant(carry[0], rules)["params"]
        return carry[0], losses, quantized

    trained, losses, quantized = train(variables)
    assert losses[-1] < 0.95 * losses[0]
    np.testing.assert_array_equal(trained["params"]["w"], w)
    codes = cage.quantize(trained, rules)["params"]
    np.testing.assert_array_equal(cage.dequantize(codes["w"]), quantized["w"])


def test_shards_store_the_scales_of_the_whole(rng):
    quantizer = nvfp4(scale=FROM_ABSMAX)
    rules = cage.Rules([("w", quantizer)])

    @jax.jit
    def found(variables):
        def loss(variables):
            return jnp.sin(cage.fake_quant(variables, rules)["params"]["w"]).sum()

        return jax.grad(loss)(variables), cage.quantize(variables, rules)

    w = weights(rng, (64, 32)).astype("float32")
    whole = found(cage.with_grids({"w": jnp.asarray(w)}, rules))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, NamedSharding(mesh, P("a", "b")))
        parts = found(cage.with_grids({"w": placed}, rules))
    (gradient, codes), (expected, same) = jax.device_get((parts, whole))
    jax.tree.map(np.testing.assert_array_equal, codes, same)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_files_of_nvfp4_take_them(rng, tmp_path):
    params = params_of(CONFIG)
    rules = {
        ".*(up|gate)/kernel": FourOverSix(),
        "layers/down/kernel": Learned(start=Searched(20, most=2)),
    }
    rules = [(path, nvfp4(axis=-2, scale=scale)) for path, scale in rules.items()]
    rules = cage.Rules([*rules, (".*", None)])
    grid = cage.with_grids(params, rules)["grids"]["layers/down/kernel"]
    grids = {"layers/down/kernel": moved(grid, rng)}
    codes = cage.quantize({"params": params, "grids": grids}, rules)["params"]
    cage.export.compressed_tensors(codes, CONFIG, tmp_path / "model")
    loaded = cage.load(tmp_path / "model").params["layers"]
    for name in ("up", "down"):
        values = cage.dequantize(codes["layers"][name]["kernel"])
        found = cage.dequantize(loaded[name]["kernel"])
        np.testing.assert_array_equal(found, values.astype(found.dtype))


def test_scales_of_codes_are_a_start(rng):
    rules = cage.Rules([("w", nvfp4(scale=FROM_ABSMAX))])
    x = jnp.asarray(weights(rng), jnp.float32)
    codes = cage.quantize(0.7 * x, nvfp4(scale=FourOverSix()))
    variables = cage.with_grids({"w": codes}, rules)
    assert 1 <= variables["grids"]["w"].tensor_divisor.item() < 2
    again = cage.quantize(variables, rules)["params"]["w"]
    np.testing.assert_array_equal(again.codes, codes.codes)
    np.testing.assert_array_equal(*map(cage.dequantize, (again, codes)))


def test_no_kernel_takes_learned_scales():
    x, quantizer = jnp.ones((256, 256)), nvfp4(scale=FROM_ABSMAX)
    grid = fit_grid(x, quantizer)
    with pytest.raises(ValueError, match="take a grid, such as a learned one, or noi"):
        cage.fake_quant(x, quantizer, grid=grid, implementation="pallas")


# --- bad arguments --------------------------------------------------------------------


def test_what_does_not_fit_together():
    def learned(format=None, scale=None, scale_type=None):
        scale, scale_type = scale or Learned(), scale_type or Full()
        format = format or Integer(4)
        return lambda: cage.Quantizer(format, scale, scale_type=scale_type)

    unsigned = Integer(4, narrow=False, signed=False)
    offset = Learned(offset=True)
    assert_raises(
        [
            (
                learned(scale_type=Narrow(unrounded=True)),
                ValueError,
                r"`scale_type` of a learned .* by the scale that it stores; got .*"
                r"unrounded=True\)\. Use Narrow\('float16'\)",
            ),
            (
                learned(unsigned, offset, PowerOfTwo()),
                ValueError,
                "`scale_type` of a learned offset .*signs; got e8m0 scales down. Use F",
            ),
            (learned(unsigned, offset, Float8()), ValueError, "of a learned offset"),
            (
                learned(Codebook((-2.0, -1.0))),
                ValueError,
                "Learned needs a format with positive values; got",
            ),
            (
                learned(scale=Learned(start=FourOverSix())),
                ValueError,
                r"FourOverSix needs the format Float\('e2m1'\).*got int4",
            ),
            (learned(scale=FourOverSix()), ValueError, "FourOverSix needs"),
            (lambda: Learned(start=Calibrated()), TypeError, "`start` must be a rule"),
            (lambda: Learned(start=Learned()), TypeError, "`start` must be a rule"),
            (lambda: Learned(start=0.5), TypeError, "`start` must .*got 0.5. Use Abs"),
            (lambda: Learned(start=SignedMax()), ValueError, "`start` .*got start=sig"),
            (lambda: Learned(start=MinMax()), ValueError, "`start` must give positive"),
            (lambda: Learned(True, AbsMax()), ValueError, "`start` .*offset=True"),
            (lambda: cage.seq(5), ValueError, "`levels` must be from 3 to 4; got 5"),
            (lambda: cage.seq("3"), TypeError, "`levels` must be an int"),
            (lambda: Searched(most=0.5), ValueError, "`most` must be at least 1; got"),
            (lambda: cage.lsq(3, offset=True, narrow=True), ValueError, "`narrow`"),
        ]
    )
    assert Float("e2m1") == nvfp4(scale=FourOverSix()).format
    assert scale_types.Full().nearest(Grid(1), None, ()) == Grid(1)
