"""Presets and packed words against compressed-tensors, which needs PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import awkward
from test_packing import DTYPES, random_codes
from test_presets import SHAPE, assert_same_bits

import cage_jax as cage
from cage_jax import packing

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
    x = np.array(awkward(rng, *SHAPE))
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
    quantized = cage.quantize(x, quantizer)
    assert_same_bits(
        np.asarray(quantized.scale).astype(np.float32).T, scale.float().numpy()
    )
    if divisor is not None:
        assert float(quantized.tensor_divisor[0, 0]) == divisor.item()
    assert_same_bits(np.asarray(cage.fake_quant(x, quantizer)).T, expected)
    assert_same_bits(np.asarray(cage.dequantize(quantized)).T, expected)


def test_packed_words_are_the_same(rng):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers"
    )
    layout = packing.COMPRESSED_TENSORS
    arrays = {
        f"{length} {dtype.__name__}": random_codes(rng, dtype, (3, length))
        for dtype in DTYPES
        for length in (64, 37, 1)
    }

    @jax.jit
    def both(arrays):
        packed, again = {}, {}
        for name, codes in arrays.items():
            packed[name] = words = packing.pack(codes, layout)
            dtype, length = codes.dtype, codes.shape[-1]
            again[name] = packing.unpack(words, layout, dtype, length=length)
        return packed, again

    packed, again = both(arrays)
    for name, codes in arrays.items():
        bits = jnp.iinfo(codes.dtype).bits
        expected = helpers.pack_to_int32(torch.tensor(np.int8(codes)), bits)
        np.testing.assert_array_equal(packed[name], expected.numpy(), name)
        assert packed[name].dtype == jnp.int32, name
        assert again[name].dtype == codes.dtype, name
        np.testing.assert_array_equal(np.int8(again[name]), np.int8(codes), name)


def test_packed_fp4_is_the_same(rng):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    x = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    codes = cage.quantize(x, cage.nvfp4(axis=-1)).codes
    values = torch.tensor(np.float32(codes))
    expected = helpers.pack_fp4_to_uint8(values).numpy()

    @jax.jit
    def both(codes):
        words = packing.pack(codes, packing.FP4)
        return words, packing.unpack(words, packing.FP4, codes.dtype)

    words, again = both(codes)
    # It writes the zero that was negative as such; a code has one zero or the other.
    np.testing.assert_array_equal(words, expected)
    np.testing.assert_array_equal(np.float32(again), np.float32(codes))
