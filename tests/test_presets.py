"""Presets against the programs that write and read their files."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cage_jax as cage
from cage_jax.rounding import fit_grid

compiled = jax.jit(cage.fake_quant, static_argnums=1)

# Everything that has no random numbers and no grid to be given.
PRESETS = {
    "int4": cage.int4(group_size=32),
    "int8 asymmetric": cage.int8(symmetric=False),
    "quest": cage.quest(4, hadamard=32),
    "fp8": cage.fp8(),
    "fp8 e5m2": cage.fp8("e5m2"),
    "mxfp8": cage.mxfp8(),
    "mxfp8 e5m2": cage.mxfp8("e5m2", rounding="up"),
    "mxfp6": cage.mxfp6(),
    "mxfp6 e3m2": cage.mxfp6("e3m2", rounding="nearest"),
    "mxfp4": cage.mxfp4(),
    "mxfp4 nearest": cage.mxfp4(rounding="nearest"),
    "mxfp4 up": cage.mxfp4(rounding="up"),
    "nvfp4": cage.nvfp4(),
    "nvfp4 alone": cage.nvfp4(tensor_divisor=False),
    "nf4": cage.nf4(),
    "ternary": cage.ternary(),
    "binary": cage.binary(),
    "q4_0": cage.q4_0(),
    "q4_1": cage.q4_1(),
    "q8_0": cage.q8_0(),
    "ct_w4a16": cage.ct_w4a16(group_size=64),
    "ct_w4a16 asymmetric": cage.ct_w4a16(group_size=32, symmetric=False),
    "ct_w8a8": cage.ct_w8a8(scale_dtype="bfloat16"),
}
each = pytest.mark.parametrize("name", list(PRESETS))


def weights(rng, shape=(128, 48)):
    """Normal numbers, with a group of zeros, an outlier, and values on ties."""
    x = rng.standard_normal(shape).astype(np.float32) * 0.05
    x[:64, 3] = 0
    x[5, 5] = 100.0
    x[:32, 7] = np.arange(-16, 16) / 4
    return x


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), expected)


# --- GGUF -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_gguf_writes_the_same_bytes(name, rng):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    x = weights(rng)
    rows = np.ascontiguousarray(x.T)
    blocks = gguf.quants.quantize(rows, kind)
    expected = gguf.quants.dequantize(blocks, kind).T
    quantizer = PRESETS[name]
    assert_same_bits(cage.fake_quant(jnp.asarray(x), quantizer), expected)
    assert_same_bits(compiled(jnp.asarray(x), quantizer), expected)
    quantized = cage.quantize(jnp.asarray(x), quantizer)
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
        np.asarray(quantized.codes.astype(jnp.int8)).T, codes.reshape(48, 128)
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
    x = jnp.asarray(weights(rng))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = qarray.quantize_api(
            x, kind, channelwise_axes=(1,), tiled_axes={0: tile}
        )
        expected = np.asarray(qarray.dequantize(theirs))
    assert_same_bits(cage.fake_quant(x, quantizer), expected)
    assert_same_bits(compiled(x, quantizer), expected)


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
    x = jnp.asarray(weights(rng))
    kind = kind if kind == "int3" else jnp.dtype(kind)
    grid = fit_grid(x, quantizer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        zero_point = grid.zero_point
        if zero_point is not None:
            zero_point = zero_point.astype(kind)
        theirs = qarray.quantize_with_scale_zero_point(x, kind, grid.scale, zero_point)
        expected = np.asarray(qarray.dequantize(theirs))
    nudged = [
        np.asarray(cage.fake_quant(x * (1 + sign * 1e-6), quantizer, grid=grid))
        for sign in (-1, 1)
    ]
    apart = nudged[0] == nudged[1]
    assert apart.mean() > 0.99
    assert_same_bits(np.asarray(cage.fake_quant(x, quantizer))[apart], expected[apart])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_are_those_of_a_division_that_is_rounded_once(bits, rng):
    quantizer = {3: cage.int3, 4: cage.int4, 8: cage.int8}[bits](narrow=False)
    x = weights(rng)
    largest = np.abs(x).max(0, keepdims=True)
    scale = largest / np.float32(2 ** (bits - 1) - 0.5)
    codes = np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for quantize in (cage.quantize, jax.jit(cage.quantize, static_argnums=1)):
        quantized = quantize(jnp.asarray(x), quantizer)
        assert_same_bits(quantized.scale, scale)
        assert_same_bits(quantized.codes.astype(jnp.float32), codes)


# --- compressed-tensors ---------------------------------------------------------------

COMPRESSED = {
    "w4a16": (
        cage.ct_w4a16(group_size=32, scale_dtype="float32"),
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    ),
    "w4a16 float16": (
        cage.ct_w4a16(group_size=32),
        {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "float16",
        },
    ),
    "w4a16 asymmetric": (
        cage.ct_w4a16(group_size=32, symmetric=False, scale_dtype="float32"),
        {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": 32,
            "symmetric": False,
        },
    ),
    "w8a8": (
        cage.ct_w8a8(scale_dtype="float32"),
        {"num_bits": 8, "type": "int", "strategy": "channel"},
    ),
    "mxfp4": (
        cage.mxfp4(rounding="nearest"),
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "uint8",
        },
    ),
    "mxfp8": (
        cage.mxfp8(rounding="nearest"),
        {
            "num_bits": 8,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "uint8",
        },
    ),
    "mxfp6": (
        cage.mxfp6(rounding="nearest"),
        {
            "num_bits": 6,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "uint8",
        },
    ),
    "nvfp4": (
        cage.nvfp4(),
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "float8_e4m3fn",
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(COMPRESSED))
def test_compressed_tensors_has_the_same_values(name, rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
    )

    quantizer, arguments = COMPRESSED[name]
    arguments = dict(arguments)
    if "scale_dtype" in arguments:
        arguments["scale_dtype"] = getattr(torch, arguments["scale_dtype"])
    x = weights(rng)
    if name != "nvfp4":
        x[:64, 3] = x[64:, 3]  # for zeros it has another scale, and the same values
    arguments = QuantizationArgs(**arguments)
    weight = torch.tensor(np.ascontiguousarray(x.T))
    groups = weight.reshape(len(weight), -1, arguments.group_size or x.shape[0])
    divisor = None
    if name == "nvfp4":
        divisor = generate_gparam(weight.amin(), weight.amax())
    scale, zero_point = calculate_qparams(
        groups.amin(-1), groups.amax(-1), arguments, global_scale=divisor
    )
    expected = fake_quantize(
        weight, scale, zero_point, arguments, global_scale=divisor
    ).numpy()
    quantized = cage.quantize(jnp.asarray(x), quantizer)
    assert_same_bits(quantized.scale.astype(jnp.float32).T, scale.float().numpy())
    if divisor is not None:
        assert float(quantized.tensor_divisor[0, 0]) == divisor.item()
    assert_same_bits(cage.fake_quant(jnp.asarray(x), quantizer).T, expected)
    assert_same_bits(compiled(jnp.asarray(x), quantizer).T, expected)
    assert_same_bits(cage.dequantize(quantized).T, expected)


# --- what holds for all ---------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_bytes_and_fake_quant_agree_to_the_bit(name, dtype, rng):
    quantizer = PRESETS[name]
    x = jnp.asarray(weights(rng), dtype)
    expected = cage.fake_quant(x, quantizer)
    chex.assert_type(expected, jnp.dtype(dtype))
    chex.assert_trees_all_equal(compiled(x, quantizer), expected)
    quantized = cage.quantize(x, quantizer)
    chex.assert_trees_all_equal(cage.dequantize(quantized), expected)
    data = quantized.to_bytes()
    assert len(data) == quantized.nbytes
    again = cage.QuantizedArray.from_bytes(data, quantizer, x.shape, dtype)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(quantized)):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    chex.assert_trees_all_equal(cage.dequantize(again), expected)


@each
def test_never_nan_from_finite_numbers(name):
    quantizer = PRESETS[name]
    largest = float(np.finfo(np.float32).max)
    if quantizer.hadamard is not None:
        largest /= quantizer.hadamard  # which are summed
    for size in (largest, 1e30, 1e10, 1e-10, 1e-30, 2e-38, 1e-42, 0.0):
        x = np.full((64, 2), size, np.float32)
        x[::2] *= -0.4
        x[:, 1] *= np.linspace(0, 1, 64, dtype=np.float32)
        result = np.asarray(compiled(jnp.asarray(x), quantizer))
        assert np.all(np.isfinite(result)), size
        assert np.all(
            np.isfinite(
                np.asarray(cage.dequantize(cage.quantize(jnp.asarray(x), quantizer)))
            )
        )


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_spoil_their_group_alone(name, bad, rng):
    quantizer = PRESETS[name]
    x = weights(rng, (128, 8))
    expected = np.asarray(compiled(jnp.asarray(x), quantizer))
    x[70, 2] = bad
    result = np.asarray(compiled(jnp.asarray(x), quantizer))
    spoiled = np.isnan(result)
    assert spoiled[70, 2]
    quantized = cage.quantize(jnp.asarray(x), quantizer)
    groups = np.isnan(np.asarray(quantized.scale.astype(jnp.float32)))
    assert groups.sum() == 1
    assert spoiled.sum() == x.size // groups.size
    assert_same_bits(result[~spoiled], expected[~spoiled])


@each
def test_idempotent_and_symmetric_as_it_says(name, rng):
    quantizer = PRESETS[name]
    x = jnp.asarray(rng.standard_normal((128, 64)), jnp.float32)
    once = compiled(x, quantizer)
    twice = compiled(once, quantizer)
    close = np.allclose(twice, once, rtol=1e-5, atol=1e-6)
    assert close == quantizer.idempotent
    mirrored = np.allclose(compiled(-x, quantizer), -once, rtol=0, atol=0)
    assert mirrored or not quantizer.symmetric
    assert (
        len(
            np.unique(
                np.asarray(cage.quantize(x[:, :1], quantizer).codes.astype(jnp.float32))
            )
        )
        <= quantizer.levels
    )


# But for those with one scale for all layers, as was asked for.
@pytest.mark.parametrize("name", [n for n, q in PRESETS.items() if q.axis is not None])
def test_a_stack_is_quantized_like_its_layers(name, rng):
    quantizer = PRESETS[name]
    x = jnp.asarray(np.stack([weights(rng), 3 * weights(rng)]))
    expected = jnp.stack([cage.fake_quant(layer, quantizer) for layer in x])
    chex.assert_trees_all_equal(cage.fake_quant(x, quantizer), expected)
    by_vmap = jax.vmap(functools.partial(cage.quantize, quantizer=quantizer))(x)
    chex.assert_trees_all_equal(jax.vmap(cage.dequantize)(by_vmap), expected)
    _, scanned = jax.lax.scan(
        lambda _, layer: (None, cage.quantize(layer, quantizer)), None, x
    )
    chex.assert_trees_all_equal(jax.lax.map(cage.dequantize, scanned), expected)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["mxfp4", "nvfp4", "q4_0", "q4_1", "ct_w4a16", "nf4", "fp8"]),
    x=hnp.arrays(
        np.float32,
        st.tuples(st.just(64), st.integers(1, 3)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)
def test_any_finite_array(name, x):
    quantizer = PRESETS[name]
    result = np.asarray(cage.fake_quant(jnp.asarray(x), quantizer))
    assert np.all(np.isfinite(result))
    quantized = cage.quantize(jnp.asarray(x), quantizer)
    assert_same_bits(cage.dequantize(quantized), result)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: cage.fp8("e2m1"), r"`name` must be one of .*'e2m1'.*Use 'e4m3'"),
        (lambda: cage.mxfp8("e8m0"), r"`name` must be one of .*for mxfp8"),
        (lambda: cage.mxfp6("e4m3"), r"`name` must be one of .*for mxfp6"),
        (lambda: cage.mxfp4(rounding="even"), r"`rounding` must be one of .*'even'"),
        (lambda: cage.ct_w4a16(scale_dtype="int8"), r"`name` must be 'float16'"),
        (lambda: cage.lsq(9), r"`bits` must be from 2 to 8"),
    ],
)
def test_bad_arguments(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "q4_0", "q8_0"])
def test_an_axis_too_short_for_a_block(name):
    with pytest.raises(ValueError, match=r"`group_size` must divide axis -2"):
        cage.fake_quant(jnp.ones((8, 4)), PRESETS[name])
