"""Kernels for TPU, interpreted: values, masks and gradients against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from kernel_oracle import checked, rotate

import cage_jax as cage
from cage_jax import formats, scale_types, scales
from cage_jax.pallas import tiles, tpu

pytestmark = pytest.mark.usefixtures("standard_promotion")

# By name the quantizer, and along which of the last two axes.
QUANTIZERS = {
    "quest": cage.quest(4),
    "quest 1 bit": cage.quest(1),
    "quest 64": cage.quest(4, hadamard=64),
    "quest groups": cage.quest(4, group_size=256),
    "int4 channel": cage.int4(),
    "int4 groups": cage.int4(group_size=32, gradient="clip", scale=scales.AbsMax(0.9)),
    "int4 up": cage.Quantizer(formats.Integer(4, narrow=False, ties="up")),
    "int8 absmean": cage.Quantizer(formats.Integer(8), scales.AbsMean()),
    "int4 groups in a rotation": cage.int4(group_size=32, hadamard=128),
    "int4 rotations in a group": cage.int4(group_size=128, hadamard=32),
    "mxfp4": cage.mxfp4(),
    "mxfp8": cage.mxfp8(),
    "e4m3 scales": cage.Quantizer(
        formats.Float("e2m1"),
        group_size=64,
        scale_type=scale_types.Float8(tensor_divisor=False),
    ),
    "nvfp4": cage.nvfp4(),
    "nvfp4 in a rotation": dataclasses.replace(cage.nvfp4(), hadamard=128),
}
EACH = [
    pytest.param(dataclasses.replace(quantizer, axis=axis), id=f"{name}, axis {axis}")
    for name, quantizer in QUANTIZERS.items()
    for axis in (-2, -1)
]


@pytest.fixture(autouse=True)
def small_arrays_too(monkeypatch):
    monkeypatch.setattr(tiles, "SMALLEST", 0)


def interpreted():
    """Reads and writes out of bounds, races and what is not written show."""
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    )


def kernel(x, quantizer, masked=True):
    found = tiles.tiles_of(quantizer, x.shape, x.dtype)
    assert found is not None
    with interpreted():
        return tpu.fake_quant(x, tiles=found, masked=masked)


def check(x, quantizer):
    return checked(x, quantizer, *kernel(x, quantizer))


@pytest.mark.parametrize("quantizer", EACH)
def test_values_and_masks(quantizer, rng):
    shape = (256, 128) if quantizer.axis == -2 else (128, 256)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    values, mask = check(x, quantizer)
    expected, back = jax.vjp(
        lambda x: cage.fake_quant(x, quantizer, implementation="xla"), x
    )
    sums = isinstance(quantizer.scale, scales.Gaussian | scales.AbsMean)
    if sums or quantizer.hadamard:
        near = np.abs(values - expected) <= 1e-5 * np.abs(expected).max()
        assert np.mean(near) > 0.99
        return
    # Without sums it is the default to the bit.
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(kernel(x, quantizer, False), expected)
    if quantizer.gradient != "identity":
        (passed,) = back(jnp.ones_like(x))
        np.testing.assert_array_equal(mask, passed)


@pytest.mark.parametrize("name", ["quest", "int4 groups", "mxfp4"])
def test_bfloat16(name, rng):
    x = jnp.asarray(rng.normal(size=(256, 128)), jnp.bfloat16)
    check(x, QUANTIZERS[name])


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    stack=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.sampled_from([128, 256, 384]),
    columns=st.sampled_from([128, 256, 640]),
    axis=st.sampled_from([-2, -1]),
    name=st.sampled_from(["quest", "int4 channel", "int4 groups", "mxfp4", "nvfp4"]),
)
def test_shapes(stack, rows, columns, axis, name):
    rng = np.random.default_rng(rows + columns)
    x = jnp.asarray(rng.normal(size=(*stack, rows, columns)), jnp.float32)
    check(x, dataclasses.replace(QUANTIZERS[name], axis=axis))


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", ["quest", "quest 64", "int4 groups", "quest groups"])
def test_the_gradient_of_a_mask(name, axis, rng):
    quantizer = dataclasses.replace(QUANTIZERS[name], axis=axis)
    shape = (256, 128) if quantizer.axis == -2 else (128, 256)
    mask = rng.integers(0, 2, shape).astype(np.int8)
    cotangent = rng.normal(size=shape).astype(np.float32)
    cut = tiles.tiles_of(quantizer, shape, jnp.float32)
    with interpreted():
        found = tpu.masked_gradient(
            jnp.asarray(mask), jnp.asarray(cotangent), tiles=cut
        )
    expected = rotate(mask * rotate(np.float64(cotangent), quantizer), quantizer)
    # Two products of three parts each, of 24 bits.
    np.testing.assert_allclose(found, expected, atol=4e-6)


@pytest.mark.parametrize(
    "name", ["quest", "int4 channel", "int4 groups", "mxfp4", "nvfp4"]
)
@pytest.mark.parametrize("axis", [-2, -1])
def test_what_is_not_finite_makes_its_group_nan(name, axis, rng):
    quantizer = dataclasses.replace(QUANTIZERS[name], axis=axis)
    x = np.float32(rng.normal(size=(256, 256)))
    x[70, 5], x[101, 77], x[200, 150] = np.nan, np.inf, -np.inf
    values = np.asarray(kernel(jnp.asarray(x), quantizer, masked=False))
    expected = cage.fake_quant(jnp.asarray(x), quantizer, implementation="xla")
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    (size,) = quantizer.groups(x.shape).values()
    assert np.isnan(values).sum() == 3 * size


def test_zeros_stay_zeros():
    for name in ("int4 channel", "int4 groups", "mxfp4"):
        values = kernel(jnp.zeros((256, 128)), QUANTIZERS[name], masked=False)
        np.testing.assert_array_equal(values, np.zeros((256, 128)))
        assert not np.signbit(values).any()


FALLS_BACK = {
    "a vector": ((512,), cage.int4(axis=-1)),
    "columns that are not laid out whole": ((256, 200), cage.int4()),
    "rows likewise": ((200, 128), cage.int4(axis=-1)),
    "a channel too long for the chip": ((2**16, 128), cage.quest(4)),
    "two axes": ((256, 128), cage.int4(axis=(0, 1))),
    "a tensor": ((256, 128), cage.int4(axis=None)),
    "an axis before the last two": ((128, 2, 128), cage.int4(axis=0)),
    "random signs": ((256, 128), dataclasses.replace(cage.quest(4), hadamard_seed=0)),
    "a wide rotation": ((256, 128), cage.quest(4, hadamard=256)),
    "a codebook": ((256, 128), cage.nf4()),
    "zero points": ((256, 128), cage.int4(symmetric=False)),
    "a scale of a tensor beyond which blocks reach": (
        (160, 128),
        cage.nvfp4(axis=-1),
    ),
    "a scale of the whole tensor, and channels": (
        (1024, 128),
        dataclasses.replace(cage.nvfp4(), group_size=None),
    ),
    "float16 scales": ((256, 128), cage.q4_0()),
    "stochastic": ((256, 128), dataclasses.replace(cage.int4(), rounding="stochastic")),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_what_no_kernel_is_for(name):
    shape, quantizer = FALLS_BACK[name]
    assert tiles.tiles_of(quantizer, shape, jnp.float32) is None


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_no_kernel_for_other_dtypes(dtype):
    assert tiles.tiles_of(cage.int4(), (256, 128), jnp.dtype(dtype)) is None


def test_small_arrays_are_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr(tiles, "SMALLEST", 256 * 128 + 1)
    assert tiles.tiles_of(cage.int4(), (256, 128), jnp.float32) is None
    assert tiles.tiles_of(cage.int4(), (2, 256, 128), jnp.float32) is not None


@pytest.mark.parametrize("name", ["quest", "int4 channel", "int4 groups", "mxfp4"])
def test_the_error_takes_a_kernel_where_that_moves_less(name):
    quantizer = QUANTIZERS[name]
    x = jax.ShapeDtypeStruct((384, 128), jnp.float32)
    assert tiles.tiles_of(quantizer, x.shape, x.dtype) is not None
    function = jax.jit(lambda x: cage.quantization_error(x, quantizer))
    text = function.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    # A difference is part of what compilers make, not of a kernel.
    assert ("cage_fake_quant" in text) == (name == "quest")
