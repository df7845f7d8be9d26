"""Presets against the programs that write and read their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PRESETS, assert_raises, awkward
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cage_jax as cage
from cage_jax.quantizers.rounding import fit_grid

SHAPE = 128, 48


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), expected)


# --- GGUF -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_gguf_writes_the_same_bytes(name, rng):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    x = awkward(rng, *SHAPE)
    rows = np.ascontiguousarray(np.asarray(x).T)
    blocks = gguf.quants.quantize(rows, kind)
    expected = gguf.quants.dequantize(blocks, kind).T
    quantizer = PRESETS[name]
    assert_same_bits(cage.fake_quant(x, quantizer), expected)
    quantized = cage.quantize(x, quantizer)
    assert quantized.nbytes == blocks.nbytes
    # The fields of a block, in the file's order.
    blocks = blocks.reshape(48, 4, -1)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    assert_same_bits(np.asarray(quantized.scale).T, scale)
    skip = 2
    if quantized.offset is not None:
        minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0]
        assert_same_bits(np.asarray(quantized.offset).T, minimum)
        skip = 4
    body = blocks[..., skip:]
    if name == "q8_0":
        codes = body.view(np.int8)
    else:
        codes = np.concatenate([body & 15, body >> 4], axis=-1).astype(np.int8) - 8
    assert_same_bits(
        np.asarray(quantized.codes).astype(np.int8).T, codes.reshape(48, 128)
    )


# --- qwix -----------------------------------------------------------------------------

QWIX = {
    "mxfp4 up": ("mxfp4", 32),
    "mxfp8": ("mxfp8", 32),
    "nvfp4 alone": ("nvfp4", 16),
    "nf4": ("nf4", 64),
}


@pytest.mark.parametrize("name", list(QWIX))
def test_qwix_has_the_same_values(name, rng):
    qarray = pytest.importorskip("qwix._src.core.qarray")
    kind, tile = QWIX[name]
    quantizer = cage.mxfp8(rounding="up") if name == "mxfp8" else PRESETS[name]
    x = awkward(rng, *SHAPE)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = qarray.quantize_api(
            x, kind, channelwise_axes=(1,), tiled_axes={0: tile}
        )
        expected = np.asarray(qarray.dequantize(theirs))
    assert_same_bits(cage.fake_quant(x, quantizer), expected)


@pytest.mark.parametrize(
    ("quantizer", "kind"),
    [
        (cage.int4(narrow=False), "int4"),
        (cage.int8(narrow=False), "int8"),
        (cage.int3(narrow=False), "int3"),
        (cage.fp8(), "float8_e4m3fn"),
        (cage.fp8("e5m2"), "float8_e5m2"),
        (cage.int4(symmetric=False), "int4"),
    ],
    ids=str,
)
def test_qwix_has_the_same_codes_for_the_same_scales(quantizer, kind, rng):
    # Its scales are divided by a constant, and its values by a scale, in a way that a
    # compiler turned around: one bit off what was written. So it is given our scales,
    # and what lies within some bits of a tie is left out.
    qarray = pytest.importorskip("qwix._src.core.qarray")
    x = awkward(rng, *SHAPE)
    kind = kind if kind == "int3" else jnp.dtype(kind)
    grid = fit_grid(x, quantizer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        zero_point = grid.zero_point
        if zero_point is not None:
            zero_point = zero_point.astype(kind)
        theirs = qarray.quantize_with_scale_zero_point(x, kind, grid.scale, zero_point)
        expected = np.asarray(qarray.dequantize(theirs))
    nudged = [
        np.asarray(
            cage.fake_quant(x * np.float32(1 + sign * 1e-6), quantizer, grid=grid)
        )
        for sign in (-1, 1)
    ]
    apart = nudged[0] == nudged[1]
    assert apart.mean() > 0.99
    assert_same_bits(np.asarray(cage.fake_quant(x, quantizer))[apart], expected[apart])


def test_codes_are_those_of_a_division_that_is_rounded_once(rng):
    x = np.asarray(awkward(rng, *SHAPE))
    for bits, preset in ((3, cage.int3), (4, cage.int4), (8, cage.int8)):
        largest = np.abs(x).max(0, keepdims=True)
        scale = largest / np.float32(2 ** (bits - 1) - 0.5)
        codes = np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        quantized = cage.quantize(x, preset(narrow=False))
        assert_same_bits(quantized.scale, scale)
        assert_same_bits(np.asarray(quantized.codes).astype(np.float32), codes)


# --- any numbers, and bad arguments ---------------------------------------------------

ANY = "mxfp4", "nvfp4", "q4_0", "q4_1", "ct_w4a16", "nf4", "fp8"


@jax.jit
def fake_of_all(x):
    return {name: cage.fake_quant(x, PRESETS[name]) for name in ANY}


@jax.jit
def codes_of_all(x):
    return {name: cage.quantize(x, PRESETS[name]) for name in ANY}


dequantize_all = jax.jit(cage.dequantize)


@settings(max_examples=25, deadline=None)
@given(
    x=hnp.arrays(
        np.float32,
        (64, 3),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)
def test_any_finite_array(x):
    values, restored = fake_of_all(x), dequantize_all(codes_of_all(x))
    for name in ANY:
        value = np.asarray(values[name])
        assert np.all(np.isfinite(value)), name
        np.testing.assert_array_equal(restored[name], value, name)


def test_bad_arguments():
    x = jnp.asarray(np.ones((8, 4), np.float32))
    table = [
        (lambda: cage.fp8("e2m1"), r"`name` must be one of .*'e2m1'.*Use 'e4m3'"),
        (lambda: cage.mxfp8("e8m0"), r"`name` must be one of .*'e8m0'.*Use 'e4m3'"),
        (lambda: cage.mxfp6("e4m3"), r"`name` must be one of .*'e4m3'.*Use 'e2m3'"),
        (lambda: cage.mxfp4(rounding="even"), r"`rounding` must be one of .*'even'"),
        (
            lambda: cage.ct_w4a16(scale_dtype="int8"),
            r"`name` must be one of \('float16', ",
        ),
        (lambda: cage.lsq(9), r"`bits` must be from 2 to 8"),
    ]
    for name in ("mxfp4", "nvfp4", "q4_0", "q8_0"):
        short = lambda name=name: cage.fake_quant(x, PRESETS[name])  # noqa: E731
        table.append((short, r"`group_size` must divide axis -2"))
    assert_raises((call, ValueError, text) for call, text in table)
