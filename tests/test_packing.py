"""Packed codes, against the programs that write and read the files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cage_jax as cage
from cage_jax import packing

DTYPES = [jnp.int2, jnp.int4, jnp.int8]


def random_codes(rng, dtype, shape):
    top = 2 ** (jnp.iinfo(dtype).bits - 1)
    return jnp.asarray(rng.integers(-top, top, shape).astype(jnp.dtype(dtype)))


def by_hand(codes, bits, zero, axis, stride=1, word=32):
    """Words in NumPy: code by code, as numbers without a bound."""
    moved = np.moveaxis(np.asarray(codes).astype(int) + zero, axis, -1)
    count = word // bits
    blocks = moved.reshape(*moved.shape[:-1], -1, count, stride).astype(object)
    words = sum(blocks[..., i, :] * 2 ** (bits * i) for i in range(count))
    words = words.reshape(*moved.shape[:-1], -1) % 2**word
    return np.moveaxis(words.astype(np.uint64), -1, axis)


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

    @jax.jit
    def there_and_back(written):
        code_dtype = quantizer.format.code_dtype
        return pack(packing.unpack(written, layout, code_dtype, axis=-1))

    pack = jax.jit(lambda codes: packing.pack(codes, layout))
    np.testing.assert_array_equal(there_and_back(written), written)
    # What was quantized before has the very values that the file's reader finds.
    read = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    own = cage.quantize(jnp.asarray(x), quantizer)
    if name != "MXFP4":
        np.testing.assert_array_equal(pack(own.codes), written)
    np.testing.assert_allclose(read, x, atol=2e-3)


@pytest.mark.parametrize("name", ["COMPRESSED_TENSORS", "GGUF_4BIT"])
def test_any_axis_of_a_stack_under_jit(name, rng):
    layout = getattr(packing, name)
    codes = random_codes(rng, jnp.int4, (32, 64, 96))

    @jax.jit
    def both(codes):
        packed = {axis: packing.pack(codes, layout, axis=axis) for axis in (0, 1, -1)}
        return packed, {
            axis: packing.unpack(words, layout, jnp.int4, axis=axis)
            for axis, words in packed.items()
        }

    packed, again = both(codes)
    bits = 8 * layout.word.itemsize
    for axis, words in packed.items():
        expected = by_hand(codes, 4, 8, axis, stride=layout.stride, word=bits)
        found = np.asarray(words).view(f"u{layout.word.itemsize}")
        np.testing.assert_array_equal(found, expected, f"axis {axis}")
        np.testing.assert_array_equal(np.int8(again[axis]), np.int8(codes), f"{axis}")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_whole_words_on_each_device_need_no_collective(kind, rng):
    layouts = packing.COMPRESSED_TENSORS, packing.FP4, packing.GGUF_4BIT
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    host = random_codes(rng, jnp.int4, (4, 512))
    codes = jax.device_put(host, NamedSharding(mesh, P(None, "x")))

    def pack(codes):
        return [packing.pack(codes, layout) for layout in layouts]

    @jax.jit
    def both(codes):
        packed = pack(codes)
        again = [packing.unpack(w, at, jnp.int4) for w, at in zip(packed, layouts)]
        return packed, again

    with jax.set_mesh(mesh):
        packed, again = both(codes)
        text = both.lower(codes).compile().as_text()
    for layout, words, back, alone in zip(layouts, packed, again, jax.jit(pack)(host)):
        np.testing.assert_array_equal(np.int8(back), np.int8(host), f"{layout}")
        np.testing.assert_array_equal(words, alone, f"{layout}")
        assert words.sharding.spec == P(None, "x"), layout
    kinds = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    assert not any(each in text for each in kinds)


def test_shards_that_cut_words(rng):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    host = random_codes(rng, jnp.int4, (4, 96))  # 12 a device, 8 a word
    with jax.set_mesh(mesh):
        codes = jax.device_put(host, NamedSharding(mesh, P(None, "x")))
        words = jax.jit(lambda c: packing.pack(c, packing.COMPRESSED_TENSORS))(codes)
    expected = by_hand(host, 4, 8, -1).astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(words, expected)


def test_what_cannot_be_packed_or_unpacked():
    codes = jnp.asarray(np.zeros((4, 33)), jnp.int4)
    words = np.zeros((4, 2), np.int32)

    def pack_as(dtype):
        return packing.pack(jnp.asarray(np.zeros((4, 33)), dtype), packing.FP4)

    def unpack_of(length):
        layout = packing.COMPRESSED_TENSORS
        return packing.unpack(words, layout, jnp.int4, length=length)

    assert_raises(
        [
            (
                lambda: packing.pack(codes, packing.GGUF_4BIT),
                ValueError,
                r"`codes` must have a multiple of 32 .* got 33",
            ),
            (
                lambda: packing.pack(codes, packing.FP4),
                ValueError,
                "multiple of 2 along axis 1; got 33",
            ),
            (
                lambda: packing.pack(codes, packing.FP4, axis=2),
                ValueError,
                r"`axis` must be from -2 to 1; got 2.*shape \(4, 33\)",
            ),
            (lambda: pack_as(jnp.int8), TypeError, "`codes` .* got int8"),
            (lambda: pack_as(jnp.float32), TypeError, "`codes` .* got float32"),
            (lambda: pack_as(jnp.uint4), TypeError, "`codes` .* got uint4"),
            (
                lambda: packing.unpack(words, packing.FP4, jnp.int4),
                TypeError,
                r"`words` must be uint8 .* got int32",
            ),
            (
                lambda: packing.unpack(words.astype(np.uint8), packing.FP4, jnp.int8),
                TypeError,
                r"`dtype` .* got int8",
            ),
            (lambda: unpack_of(8), ValueError, "`length` .* from 9 to 16, .* got 8"),
            (lambda: unpack_of(17), ValueError, "`length` .* from 9 to 16, .* got 17"),
        ]
    )
