"""Codes and scales: stored, placed, packed, and the same values again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, KERNEL, PRESETS, assert_same, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cage_jax as cage
from cage_jax import QuantizedArray, int4, quantize
from cage_jax.core import quantized_array

# Every kind of code, scale, zero point, offset and divisor.
QUANTIZERS = {
    name: CASES[name][1]
    for name in ("int4 groups", "int2", "int8 tensor", "int4 tiles", "quest4")
} | {
    name: PRESETS[name]
    for name in (
        *("int3 asymmetric", "uint4 asymmetric", "midrise 1", "five levels", "nf4"),
        *("fp8", "fp8 e5m2", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "ternary", "binary"),
        *("q4_0", "q4_1", "q8_0", "ct_w4a16"),
    )
}


@pytest.fixture
def codes(rng):
    """Codes of every kind, for which nothing was compiled."""
    return {name: random_codes(rng, q, KERNEL) for name, q in QUANTIZERS.items()}


def test_orbax_gives_it_back(codes, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = {"codes": codes, "bias": jnp.asarray(np.ones(3, np.float32))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "codes", params)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        restored = checkpointer.restore(tmp_path / "codes", like)
    assert {type(each) for each in restored["codes"].values()} == {QuantizedArray}
    assert_same(restored, params)


def test_it_is_placed_on_devices(codes):
    mesh = jax.make_mesh((2,), ("rows",))
    dequantize = jax.jit(cage.dequantize)
    expected = dequantize(codes)
    for spec in (P("rows"), P(None, "rows")):
        along = spec.index("rows")

        def fitting(array, along=along, spec=spec):
            # A dimension of 1, such as that of a tensor's scale, is not divided.
            divides = array.shape[along] % 2 == 0
            return NamedSharding(mesh, spec if divides else P())

        placed = jax.device_put(codes, jax.tree.map(fitting, codes))
        assert {each.codes.sharding.spec for each in placed.values()} == {spec}
        assert_same(placed, codes)
        for name, value in dequantize(placed).items():
            # A product with the rotation may be summed in another order by shards.
            tolerance = 1e-6 if QUANTIZERS[name].hadamard else 0
            np.testing.assert_allclose(
                value, expected[name], rtol=tolerance, atol=tolerance, err_msg=name
            )


def test_it_passes_through_jit_vmap_and_scan(codes):
    stack = jax.tree.map(lambda part: jnp.asarray(np.stack([part, part])), codes)

    @jax.jit
    def find(codes, stack):
        def turn(_, one):
            return None, cage.dequantize(one)

        scanned = jax.lax.scan(turn, None, stack)[1]
        return codes, cage.dequantize(codes), jax.vmap(cage.dequantize)(stack), scanned

    again, value, *stacked = find(codes, stack)
    assert_same(again, codes)
    expected = jax.tree.map(lambda part: np.stack([part, part]), value)
    for each in stacked:
        for name in codes:
            np.testing.assert_array_equal(each[name], expected[name], name)


def test_its_bytes_are_as_many_as_it_says(codes):
    for name, array in codes.items():
        data = array.to_bytes()
        assert len(data) == array.nbytes, name
        again = QuantizedArray.from_bytes(data, array.quantizer, array.shape)
        assert_same(again, array)
        # Packed: bits of codes and zero points, then what the arrays of the grid take.
        numbers = array.codes.size
        if array.zero_point is not None:
            numbers += array.zero_point.size
        grid = (array.scale, array.offset, array.tensor_divisor)
        stored = sum(a.size * a.dtype.itemsize for a in grid if a is not None)
        assert len(data) == -(-numbers * array.bits // 8) + stored, name


def test_its_bytes_keep_the_dtype(rng):
    for dtype in (jnp.bfloat16, jnp.float16):
        array = random_codes(rng, QUANTIZERS["nvfp4"], KERNEL, dtype)
        data, quantizer = array.to_bytes(), array.quantizer
        assert_same(QuantizedArray.from_bytes(data, quantizer, KERNEL, dtype), array)


def test_it_is_no_array_and_says_so(rng):
    codes = random_codes(rng, cage.int4(group_size=4), (8, 3))
    ones = jnp.asarray(np.ones((3, 8), np.float32))
    remedy = r"dequantize\(codes\).*low_bit\(apply\)"
    for use in (
        lambda codes: ones @ codes,
        lambda codes: codes @ ones,
        lambda codes: ones + codes,
        lambda codes: codes - ones,
        lambda codes: 2.0 * codes,
        lambda codes: ones[0] * codes,
        lambda codes: codes / 2,
        lambda codes: ones / codes,
        lambda codes: codes // 2,
        np.asarray,
    ):
        with pytest.raises(TypeError, match=remedy):
            use(codes)
    for name in ("T", "at", "astype", "ndim"):
        assert not hasattr(codes, name)
        with pytest.raises(AttributeError, match=rf"`\.{name}` like.*{remedy}"):
            getattr(codes, name)
    with pytest.raises(AttributeError, match=r"no attribute 'scales'$"):
        _ = codes.scales
    assert repr(codes).startswith(
        "QuantizedArray((8, 3), float32, int4 absmax, group 4"
    )
    assert len(repr(codes)) < 100


def test_the_layout_of_its_bytes():
    x = np.array([[-7.0, 7.0, 1.0], [2.0, 3.0, -1.0]]) / 2
    codes = quantize(x, int4(axis=None))
    # Two to a byte, the first one low; -7, 7, 1, 2, 3, -1; then 0.5 in float32.
    assert codes.to_bytes() == bytes.fromhex("7921f3") + np.float32(0.5).tobytes()


def test_bytes_of_another_length(rng):
    data = random_codes(rng, int4(), (32, 2)).to_bytes()
    for wrong in (data[:-1], data + b"0"):
        with pytest.raises(ValueError, match=r"`data` must have 40 bytes.*got (39|41)"):
            QuantizedArray.from_bytes(wrong, int4(), (32, 2))


def test_many_codes_are_packed_in_parts(monkeypatch, rng):
    codes = random_codes(rng, PRESETS["int3 asymmetric"], (64, 40))
    whole = codes.to_bytes()
    monkeypatch.setattr(quantized_array, "_AT_ONCE", 2**8)
    assert codes.to_bytes() == whole
    assert_same(QuantizedArray.from_bytes(whole, codes.quantizer, codes.shape), codes)


# --- any numbers, along any axis ------------------------------------------------------


def turned(number, quantizer):
    """A shape, and the quantizer with other axes: what no other test has."""
    shape = [(2,), (1, 3)][number % 2]
    sizes = quantizer.group_sizes or (None,)
    axes = []
    for size in sizes:
        place = number // 2 % (len(shape) + 1)
        length = max((size or 8) * (1 + number // 4 % 2), quantizer.hadamard or 1)
        axes = [axis + (axis >= place) for axis in axes] + [place]
        shape = (*shape[:place], length, *shape[place:])
    if quantizer.axis is None:
        return (3, *shape), quantizer
    axis = tuple(axes) if len(axes) > 1 else axes[0] - len(shape) * (number % 3 == 0)
    return shape, dataclasses.replace(quantizer, axis=axis)


TURNED = {
    f"{name} {['float32', 'bfloat16', 'float16'][number % 3]}": turned(number, each)
    for number, (name, each) in enumerate(QUANTIZERS.items())
}


@jax.jit
def fake_of_all(arrays):
    return {name: cage.fake_quant(x, TURNED[name][1]) for name, x in arrays.items()}


@jax.jit
def codes_of_all(arrays):
    return {name: quantize(x, TURNED[name][1]) for name, x in arrays.items()}


decoded_of_all = jax.jit(cage.dequantize)
special = st.sampled_from([0.0, -0.0, 1.0, -65504.0, 1e-40, 3e38, np.nan, np.inf])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(exponent=st.integers(-44, 37), seed=st.integers(0, 2**32 - 1), value=special)
def test_dequantize_is_fake_quant_to_the_bit(exponent, seed, value):
    rng, arrays = np.random.default_rng(seed), {}
    for name, (shape, _) in TURNED.items():
        values = rng.standard_normal(shape) * 10.0**exponent
        values[rng.random(shape) < 0.2] = value
        with np.errstate(over="ignore"):
            x = jnp.asarray(
                values.astype(np.float32).astype(jnp.dtype(name.split()[-1]))
            )
        arrays[name] = x
    found, restored = fake_of_all(arrays), decoded_of_all(codes_of_all(arrays))
    for name, x in arrays.items():
        value, again = np.asarray(found[name]), np.asarray(restored[name])
        assert (value.shape, value.dtype) == (x.shape, x.dtype), name
        # But for the payload of a NaN, which no program keeps.
        np.testing.assert_array_equal(np.isnan(again), np.isnan(value), name)
        numbers = ~np.isnan(again)
        assert again[numbers].tobytes() == value[numbers].tobytes(), name
