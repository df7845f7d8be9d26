"""Kernels for TPU, interpreted: values, masks and gradients against float64 NumPy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_oracle import check_kernel, rotate

import cage_jax as cage
from cage_jax import formats, scale_types, scales
from cage_jax.pallas import candidates, tiling, tpu

pytestmark = pytest.mark.usefixtures("standard_promotion", "small_arrays_too")

QUANTIZERS = {
    "quest": cage.quest(4),
    "quest 1 bit": cage.quest(1),
    "quest 64": cage.quest(4, hadamard=64),
    "quest groups": cage.quest(4, group_size=256),
    "not rotated": cage.quest(4, hadamard=None),
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
    "zero points": cage.int4(symmetric=False, group_size=32, gradient="clip"),
    "zero point": cage.int8(symmetric=False),
    "zero points in a rotation": cage.int8(symmetric=False, hadamard=64),
    "nvfp4": cage.nvfp4(),
    "nvfp4 in a rotation": dataclasses.replace(cage.nvfp4(), hadamard=128),
}
# Along one of the last two axes, and along both where kernels differ; the others are in
# programs/test_every_kernel.py.
CASES = [
    ("quest", -2, (2, 384, 256)),
    ("quest", -1, (128, 256)),
    ("quest 64", -1, (3, 128, 256)),
    ("not rotated", -2, (256, 128)),
    ("int4 channel", -2, (4096, 128)),  # two blocks along a channel
    ("int4 channel", -1, (128, 640)),
    ("int4 groups", -2, (2, 2, 256, 128)),
    ("int4 groups", -1, (256, 640)),
    ("int4 up", -2, (256, 128)),
    ("int8 absmean", -1, (128, 256)),
    ("int4 groups in a rotation", -1, (128, 256)),
    ("int4 rotations in a group", -2, (256, 128)),
    ("mxfp4", -1, (1, 128, 256)),
    ("e4m3 scales", -1, (128, 256)),
    ("nvfp4", -2, (3, 256, 128)),
    ("nvfp4", -1, (256, 384)),
    ("nvfp4 in a rotation", -2, (256, 128)),
    ("zero points", -1, (128, 256)),
    ("zero point", -2, (384, 128)),
    ("zero points in a rotation", -1, (128, 192)),
    # Blocks that reach beyond the array, along its groups or across or both.
    ("quest 64", -1, (40, 576)),
    ("int4 channel", -2, (40, 200)),
    ("int4 groups", -1, (72, 288)),
    ("nvfp4", -1, (2, 72, 208)),
    # Those that are stored with their axes in another order.
    ("quest", -2, (256, 72)),
    ("int8 absmean", -2, (128, 100)),
    ("mxfp4", -1, (128, 33, 32)),
    ("int4 channel", 0, (192, 32, 32)),
]

SHAPES = {-2: (256, 128), -1: (128, 256)}


def quantizer_of(name, axis):
    return dataclasses.replace(QUANTIZERS[name], axis=axis)


def interpreted(function, *args):
    """A compiled function whose kernels are interpreted.

    Reads and writes out of bounds, races and what is not written show.
    """
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        return jax.jit(function).lower(*args).compile()


def check(name, axis, shape, rng, dtype="float32"):
    x = rng.standard_normal(shape).astype(dtype)
    quantizer = quantizer_of(name, axis)
    cut = tiling.tiling_for_tpu(quantizer, shape, x.dtype)
    assert cut is not None
    kernel = interpreted(partial(tpu.fake_quant, tiling=cut, masked=True), x)
    check_kernel(kernel, x, quantizer)


@pytest.mark.parametrize("name, axis, shape", CASES)
def test_values_and_masks(name, axis, shape, rng):
    check(name, axis, shape, rng)


MERGED = [
    ((0, 1), None, (3, 64, 192)),
    ((1, 0), (None, 2), (4, 64, 128)),
    ((1, 2), None, (2, 3, 32, 128)),
]


@pytest.mark.parametrize("axes, group_size, shape", MERGED)
def test_axes_that_share_a_scale_are_one(axes, group_size, shape, rng):
    """Compares a kernel with float64 on the array with these axes merged."""
    x = rng.standard_normal(shape).astype(np.float32)
    quantizer = cage.int4(axis=axes, group_size=group_size)
    cut = tiling.tiling_for_tpu(quantizer, shape, x.dtype)
    kernel = interpreted(partial(tpu.fake_quant, tiling=cut, masked=False), x)
    both = np.sort(axes)
    shared = [group_size[axes.index(i)] if group_size else None for i in both]
    sizes = [size or shape[i] for i, size in zip(both, shared)]
    split = [n for i, n in enumerate(shape) if i not in both]
    split.insert(both[0], -1)
    split.insert(both[0] + 1, np.prod(sizes))
    groups = np.float64(x).reshape(split)
    step = np.abs(groups).max(both[0] + 1, keepdims=True) / 7
    expected = (np.round(groups / step) * step).reshape(shape)
    np.testing.assert_allclose(kernel(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name, axis, shape", [("quest", -2, (2, 384, 200)), ("quest 64", -1, (40, 576))]
)
def test_groups_that_do_not_fit_on_the_chip(name, axis, shape, rng, monkeypatch):
    monkeypatch.setattr(tiling, "_KEPT_BYTES", 2**14)
    check(name, axis, shape, rng)


def test_long_rows_are_kept_in_lower_blocks():
    quantizer = cage.quest(4, axis=-1)
    cut = tiling.tiling_for_tpu(quantizer, (256, 28672), jnp.float32)
    assert cut.kept and cut.block[0] == 64
    assert np.prod(cut.scratch_shape) * 4 <= 2**23


def test_bfloat16(rng):
    check("quest", -2, (256, 128), rng, jnp.bfloat16)


def check_without_a_mask(name, axis, rng):
    x = rng.standard_normal(SHAPES[axis]).astype(np.float32)
    cut = tiling.tiling_for_tpu(quantizer_of(name, axis), x.shape, x.dtype)

    def both(x):
        values, _ = tpu.fake_quant(x, tiling=cut, masked=True)
        return tpu.fake_quant(x, tiling=cut, masked=False), values

    np.testing.assert_array_equal(*interpreted(both, x)(x))


def test_without_a_mask_the_values_are_the_same(rng):
    check_without_a_mask("int4 channel", -1, rng)


def check_gradient(name, axis, rng):
    quantizer, shape = quantizer_of(name, axis), SHAPES[axis]
    mask = rng.integers(0, 2, shape).astype(np.int8)
    cotangent = rng.standard_normal(shape).astype(np.float32)
    cut = tiling.tiling_for_tpu(quantizer, shape, jnp.float32)
    function = partial(tpu.masked_gradient, tiling=cut)
    found = interpreted(function, mask, cotangent)(mask, cotangent)
    expected = rotate(mask * rotate(np.float64(cotangent), quantizer), quantizer)
    # Two products of three parts each, of 24 bits.
    np.testing.assert_allclose(found, expected, atol=4e-6)


@pytest.mark.parametrize(
    "name, axis",
    [("quest", -2), ("quest 64", -1), ("int4 groups", -1), ("quest groups", -2)],
)
def test_the_gradient_of_a_mask(name, axis, rng):
    check_gradient(name, axis, rng)


FALLS_BACK = {
    "it has only one axis": ((512,), cage.int4(axis=-1)),
    "65536 does not fit on the chip, and is not": ((2**16, 128), cage.int8()),
    "line up with tiles only every 640": (
        (128, 1280),
        cage.int4(group_size=160, axis=-1),
    ),
    "span all axes": ((256, 128), cage.int4(axis=(0, 1))),
    "its groups span all axes": ((256, 128), cage.int4(axis=None)),
    "cut along one of": (
        (4, 64, 128),
        cage.int4(axis=(0, 1), group_size=(2, 32)),
    ),
    "cut along one of the": ((4, 4, 64, 128), cage.int4(axis=(0, 2))),
    "would move it to other tiles": ((4, 4, 20, 128), cage.int4(axis=(1, 2))),
    "along axis 0, and neighbours along 1 and 2": ((128, 8, 128), cage.int4(axis=0)),
    "whose parts are not neighbours": ((128, 3, 32), cage.nvfp4(axis=-1)),
    "random signs": ((256, 128), dataclasses.replace(cage.quest(4), hadamard_seed=0)),
    "wider than 128": ((256, 128), cage.quest(4, hadamard=256)),
    "its format is nf4": ((256, 128), cage.nf4()),
    "its scale is minmax with an offset": ((256, 128), cage.q4_1()),
    "share one divisor per tensor": (
        (1024, 128),
        dataclasses.replace(cage.nvfp4(), group_size=None),
    ),
    "its scale is signed max": ((256, 128), cage.q4_0()),
    "it has float16 scales": ((256, 128), cage.q8_0()),
    "its rounding is stochastic": (
        (256, 128),
        dataclasses.replace(cage.int4(), rounding="stochastic"),
    ),
}


def test_what_no_kernel_is_for():
    for why, (shape, quantizer) in FALLS_BACK.items():
        with pytest.raises(tiling.NoKernelError, match=why):
            tiling.tiling_for_tpu(quantizer, shape, jnp.float32)
    for dtype in ("float16", "float64"):
        with pytest.raises(tiling.NoKernelError, match=f"its dtype is {dtype}"):
            tiling.tiling_for_tpu(cage.int4(), (256, 128), jnp.dtype(dtype))


def test_small_arrays_are_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr(candidates, "SMALLEST", 2 * 256 * 128)
    quantizer = cage.int4(axis=-2, group_size=32)
    small, large = (
        candidates.fake_quant_kernels(
            quantizer, jnp.ones(shape), None, None, masked=False
        )
        for shape in ((256, 128), (2, 256, 128))
    )
    assert {each.platform for each in large.found} == {"tpu", "cuda"}
    assert not small.found
    assert dict(small.missing)["tpu"] == "32768 elements are fewer than 65536"


def test_the_error_takes_a_kernel_where_that_moves_less():
    x = jax.ShapeDtypeStruct((384, 128), jnp.float32)
    for name in ("quest", "int4 channel", "int4 groups", "mxfp4"):
        quantizer = QUANTIZERS[name]
        tiling.tiling_for_tpu(quantizer, x.shape, x.dtype)  # there is a kernel
        function = jax.jit(partial(cage.quantization_error, quantizer=quantizer))
        text = function.trace(x).lower(lowering_platforms=("tpu",)).as_text()
        # A difference is part of what compilers make, not of a kernel.
        assert ("cage_fake_quant" in text) == (name == "quest"), name
