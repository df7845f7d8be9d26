"""Packed codes, against the programs that write and read the files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cage_jax as cage
from cage_jax import packing

DTYPES = [jnp.int2, jnp.int4, jnp.int8]


def random_codes(rng, dtype, shape):
    bits = jnp.iinfo(dtype).bits
    return jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape), dtype)


def by_hand(codes, bits, zero, axis, stride=1, word=32):
    """Words in NumPy: code by code, as numbers without a bound."""
    moved = np.moveaxis(np.asarray(codes).astype(int) + zero, axis, -1)
    count = word // bits
    blocks = moved.reshape(*moved.shape[:-1], -1, count, stride).astype(object)
    words = sum(blocks[..., i, :] * 2 ** (bits * i) for i in range(count))
    words = words.reshape(*moved.shape[:-1], -1) % 2**word
    return np.moveaxis(words.astype(np.uint64), -1, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [64, 37, 1])
def test_compressed_tensors(dtype, length, rng):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers"
    )
    codes = random_codes(rng, dtype, (3, length))
    bits = jnp.iinfo(dtype).bits
    expected = helpers.pack_to_int32(torch.tensor(np.int8(codes)), bits)
    words = packing.pack(codes, packing.COMPRESSED_TENSORS)
    np.testing.assert_array_equal(words, expected.numpy())
    assert words.dtype == jnp.int32
    again = packing.unpack(words, packing.COMPRESSED_TENSORS, dtype, length=length)
    assert again.dtype == dtype
    np.testing.assert_array_equal(np.int8(again), np.int8(codes))


def test_fp4_of_compressed_tensors(rng):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    x = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    codes = cage.quantize(x, cage.nvfp4(axis=-1)).codes
    values = torch.tensor(np.float32(codes))
    expected = helpers.pack_fp4_to_uint8(values).numpy()
    words = packing.pack(codes, packing.FP4)
    # It writes the zero that was negative as such; a code has one zero or the other.
    np.testing.assert_array_equal(words, expected)
    again = packing.unpack(words, packing.FP4, codes.dtype)
    np.testing.assert_array_equal(np.float32(again), np.float32(codes))


GGUF = {
    "Q4_0": (cage.q4_0(axis=-1), packing.GGUF_4BIT, 32, slice(2, None)),
    "Q4_1": (cage.q4_1(axis=-1), packing.GGUF_4BIT, 32, slice(4, None)),
    "MXFP4": (cage.mxfp4(axis=-1), packing.GGUF_4BIT, 32, slice(1, None)),
    "TQ2_0": (
        cage.int2(axis=-1, group_size=256),
        packing.GGUF_TQ2_0,
        256,
        slice(0, 64),
    ),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name, rng):
    gguf = pytest.importorskip("gguf")
    quantizer, layout, size, place = GGUF[name]
    kind = gguf.GGMLQuantizationType[name]
    x = rng.normal(size=(4, 512)).astype(np.float32)
    x = np.asarray(cage.fake_quant(jnp.asarray(x), quantizer))
    written = gguf.quants.quantize(x, kind)
    written = written.reshape(4, 512 // size, -1)[..., place].reshape(4, -1)
    codes = packing.unpack(
        jnp.asarray(written), layout, quantizer.format.code_dtype, axis=-1
    )
    np.testing.assert_array_equal(packing.pack(codes, layout), written)
    # What was quantized before has the very values that the file's reader finds.
    read = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    own = cage.quantize(jnp.asarray(x), quantizer)
    if name != "MXFP4":
        np.testing.assert_array_equal(packing.pack(own.codes, layout), written)
    np.testing.assert_allclose(read, x, atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layout", ["COMPRESSED_TENSORS", "GGUF_4BIT"])
def test_any_axis_of_a_stack_under_jit(axis, layout, rng):
    layout = getattr(packing, layout)
    codes = random_codes(rng, jnp.int4, (32, 64, 96))
    words = jax.jit(lambda codes: packing.pack(codes, layout, axis=axis))(codes)
    expected = by_hand(
        codes, 4, 8, axis, stride=layout.stride, word=8 * layout.word.itemsize
    )
    np.testing.assert_array_equal(
        np.asarray(words).view(f"u{layout.word.itemsize}"), expected
    )
    again = packing.unpack(words, layout, jnp.int4, axis=axis)
    np.testing.assert_array_equal(np.int8(again), np.int8(codes))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["COMPRESSED_TENSORS", "FP4", "GGUF_4BIT"])
def test_whole_words_on_each_device_need_no_collective(kind, layout, rng):
    layout = getattr(packing, layout)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    host = random_codes(rng, jnp.int4, (4, 512))
    codes = jax.device_put(host, NamedSharding(mesh, P(None, "x")))
    with jax.set_mesh(mesh):
        packed = jax.jit(lambda c: packing.pack(c, layout))
        words = packed(codes)
        both = jax.jit(lambda c: packing.unpack(packed(c), layout, jnp.int4))
        np.testing.assert_array_equal(np.int8(both(codes)), np.int8(host))
        text = both.lower(codes).compile().as_text()
    assert words.sharding.spec == P(None, "x")
    np.testing.assert_array_equal(words, packing.pack(host, layout))
    kinds = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    assert not any(each in text for each in kinds)


def test_shards_that_cut_words(rng):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    host = random_codes(rng, jnp.int4, (4, 96))  # 12 a device, 8 a word
    with jax.set_mesh(mesh):
        codes = jax.device_put(host, NamedSharding(mesh, P(None, "x")))
        words = jax.jit(lambda c: packing.pack(c, packing.COMPRESSED_TENSORS))(codes)
    expected = packing.pack(host, packing.COMPRESSED_TENSORS)
    np.testing.assert_array_equal(words, expected)


def test_what_cannot_be_packed():
    codes = jnp.zeros((4, 33), jnp.int4)
    with pytest.raises(
        ValueError, match=r"`codes` must have a multiple of 32 .* got 33"
    ):
        packing.pack(codes, packing.GGUF_4BIT)
    with pytest.raises(ValueError, match="multiple of 2 along axis 1; got 33"):
        packing.pack(codes, packing.FP4)
    with pytest.raises(ValueError, match=r"`axis` .* got axis=2, shape \(4, 33\)"):
        packing.pack(codes, packing.FP4, axis=2)
    for dtype in (jnp.int8, jnp.float32, jnp.uint4):
        with pytest.raises(TypeError, match=f"`codes` .* got {jnp.dtype(dtype)}"):
            packing.pack(codes.astype(dtype), packing.FP4)


def test_what_cannot_be_unpacked():
    words = jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(TypeError, match=r"`words` must be uint8 .* got int32"):
        packing.unpack(words, packing.FP4, jnp.int4)
    with pytest.raises(TypeError, match=r"`dtype` .* got int8"):
        packing.unpack(words.astype(jnp.uint8), packing.FP4, jnp.int8)
    for length in (8, 17):
        with pytest.raises(
            ValueError, match=f"`length` .* from 9 to 16 .* got {length}"
        ):
            packing.unpack(words, packing.COMPRESSED_TENSORS, jnp.int4, length=length)
