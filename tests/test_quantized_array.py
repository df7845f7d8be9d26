"""Codes and scales: stored, placed, packed, and the same values again."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cage_jax as cage
from cage_jax import QuantizedArray, int4, quantize, quantized_array
from cage_jax.formats import Codebook, Integer, MidRise
from cage_jax.scales import AbsMax, MinMax

# Of every kind of code, scale, zero point, offset and divisor.
QUANTIZERS = {
    "int4": int4(group_size=16),
    "int2": cage.int2(),
    "int3 asymmetric": cage.int3(symmetric=False, group_size=32),
    "uint4 asymmetric": cage.Quantizer(
        Integer(4, narrow=False, signed=False), MinMax(), group_size=32
    ),
    "int8 tensor": cage.int8(axis=None),
    "int8 tiles": cage.int8(axis=(-2, -1), group_size=(16, 8)),
    "quest": cage.quest(4, hadamard=32),
    "midrise 1": cage.Quantizer(MidRise(1)),
    "fp8": cage.fp8(),
    "fp8 e5m2": cage.fp8("e5m2"),
    "mxfp8": cage.mxfp8(),
    "mxfp6": cage.mxfp6(),
    "mxfp4": cage.mxfp4(),
    "nvfp4": cage.nvfp4(),
    "nf4": cage.nf4(),
    "five levels": cage.Quantizer(Codebook((-2.0, -0.5, 0.0, 1.0, 2.0)), AbsMax()),
    "ternary": cage.ternary(),
    "binary": cage.binary(),
    "q4_0": cage.q4_0(),
    "q4_1": cage.q4_1(),
    "q8_0": cage.q8_0(),
    "ct_w4a16": cage.ct_w4a16(scale_dtype="bfloat16", group_size=32),
}
each = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def assert_same(actual, expected):
    """The same arrays to the bit, of the same dtypes, made by the same quantizer."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)


@each
def test_orbax_gives_it_back(quantizer, x, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = {"kernel": x, "bias": jnp.ones(3)}
    codes = quantize(params, cage.Rules([("kernel", quantizer)]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "codes", codes)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), codes)
        restored = checkpointer.restore(tmp_path / "codes", like)
    assert isinstance(restored["kernel"], QuantizedArray)
    assert_same(restored, codes)


@each
@pytest.mark.parametrize("spec", [P("rows"), P(None, "rows")], ids=str)
def test_it_is_placed_on_devices(quantizer, spec, x):
    mesh = jax.make_mesh((2,), ("rows",))
    codes = quantize(x, quantizer)

    def fitting(array):
        # A dimension of 1, such as that of a tensor's scale, is not divided.
        along = spec.index("rows")
        divides = array.shape[along] % 2 == 0
        return NamedSharding(mesh, spec if divides else P())

    placed = jax.device_put(codes, jax.tree.map(fitting, codes))
    assert placed.codes.sharding.spec == spec
    assert_same(placed, codes)
    value = jax.jit(cage.dequantize)(placed)
    # A product with the rotation may be summed in another order by shards.
    tolerance = 1e-6 if quantizer.hadamard else 0
    chex.assert_trees_all_close(
        jax.device_get(value), jax.device_get(cage.dequantize(codes)), atol=tolerance
    )


@each
def test_it_passes_through_jit_vmap_and_scan(quantizer, x):
    codes = quantize(x, quantizer)
    assert_same(jax.jit(lambda codes: codes)(codes), codes)
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), codes, codes)
    expected = cage.dequantize(codes)
    for values in (
        jax.vmap(cage.dequantize)(stack),
        jax.lax.scan(lambda _, one: (None, cage.dequantize(one)), None, stack)[1],
    ):
        for layer in values:
            chex.assert_trees_all_equal(layer, expected)


@each
def test_its_bytes_are_as_many_as_it_says(quantizer, x):
    codes = quantize(x, quantizer)
    data = codes.to_bytes()
    assert len(data) == codes.nbytes
    assert_same(QuantizedArray.from_bytes(data, quantizer, x.shape), codes)
    # Packed: bits of codes and zero points, then what the arrays of the grid take.
    numbers = codes.codes.size
    if codes.zero_point is not None:
        numbers += codes.zero_point.size
    grid = (codes.scale, codes.offset, codes.tensor_divisor)
    stored = sum(a.size * a.dtype.itemsize for a in grid if a is not None)
    assert len(data) == -(-numbers * codes.bits // 8) + stored


@pytest.mark.parametrize(
    "use",
    [
        lambda codes: jnp.ones((2, 8)) @ codes,
        lambda codes: codes @ jnp.ones((3, 2)),
        lambda codes: 2.0 * codes,
        lambda codes: jnp.ones(3) * codes,
        np.asarray,
    ],
)
def test_it_is_no_array_and_says_so(use):
    codes = cage.quantize(jnp.ones((8, 3)), cage.int4(group_size=4))
    with pytest.raises(TypeError, match=r"dequantize\(codes\).*low_bit\(apply\)"):
        use(codes)
    assert repr(codes).startswith("QuantizedArray((8, 3), int4 absmax, group 4")
    assert len(repr(codes)) < 100


def test_the_layout_of_its_bytes():
    x = jnp.array([[-7.0, 7.0, 1.0], [2.0, 3.0, -1.0]]) / 2
    codes = quantize(x, int4(axis=None))
    # Two to a byte, the first one low; -7, 7, 1, 2, 3, -1; then 0.5 in float32.
    assert codes.to_bytes() == bytes.fromhex("7921f3") + np.float32(0.5).tobytes()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_dequantize_is_fake_quant_to_the_bit(data):
    quantizer = data.draw(st.sampled_from(list(QUANTIZERS.values())))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    axes = quantizer.axis if isinstance(quantizer.axis, tuple) else (quantizer.axis,)
    shape = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    if axes != (None,):
        # Any axis, of the length of one block or two.
        chosen = data.draw(st.permutations(range(len(shape))))[: len(axes)]
        sizes = quantizer.group_size
        sizes = sizes if isinstance(sizes, tuple) else (sizes,) * len(axes)
        for axis, size in zip(chosen, sizes):
            shape[axis] = (size or 8) * data.draw(st.integers(1, 2))
            if quantizer.hadamard:
                shape[axis] = max(shape[axis], quantizer.hadamard)
        axis = tuple(chosen) if len(chosen) > 1 else chosen[0]
        quantizer = dataclasses.replace(quantizer, axis=axis)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = 10.0 ** data.draw(st.integers(-44, 37))
    values = np.float64(rng.standard_normal(shape)) * size
    values[rng.random(shape) < 0.2] = data.draw(
        st.sampled_from([0.0, -0.0, 1.0, -65504.0, 1e-40, 3e38, np.nan, np.inf])
    )
    with np.errstate(over="ignore"):
        x = jnp.asarray(values.astype(np.float32)).astype(dtype)
    value = cage.fake_quant(x, quantizer)
    chex.assert_shape(value, tuple(shape))
    assert value.dtype == x.dtype
    again = np.asarray(cage.dequantize(quantize(x, quantizer)))
    # But for the payload of a NaN, which no program keeps.
    np.testing.assert_array_equal(np.isnan(again), np.isnan(np.asarray(value)))
    numbers = ~np.isnan(again)
    assert again[numbers].tobytes() == np.asarray(value)[numbers].tobytes()


@pytest.mark.parametrize("cut", [-1, 1])
def test_bytes_of_another_length(cut):
    quantized = quantize(jnp.ones((32, 2)), int4())
    data = quantized.to_bytes()
    data = data[:cut] if cut < 0 else data + b"0"
    with pytest.raises(ValueError, match=r"`data` must have 40 bytes.*got (39|41)"):
        QuantizedArray.from_bytes(data, int4(), (32, 2))


def test_many_codes_are_packed_in_parts(monkeypatch, rng):
    x = jnp.asarray(rng.standard_normal((64, 40)), jnp.float32)
    quantizer = cage.int3(symmetric=False, group_size=32)
    codes = quantize(x, quantizer)
    whole = codes.to_bytes()
    monkeypatch.setattr(quantized_array, "_AT_ONCE", 2**8)
    assert codes.to_bytes() == whole
    assert_same(QuantizedArray.from_bytes(whole, quantizer, x.shape), codes)
