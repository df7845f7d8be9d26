"""Quantizers as a whole: their properties, the paper's own, shapes and descriptions."""

import copy
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, QUANTIZERS, assert_raises
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import rotate

from cage_jax import (
    Quantizer,
    fake_quant,
    int2,
    int3,
    int4,
    int8,
    nvfp4,
    quantize,
    quest,
)
from cage_jax.quantizers.formats import Integer, MidRise
from cage_jax.quantizers.scales import AbsMax, Fixed, Gaussian, MinMax

EPS = float(np.finfo(np.float32).eps)

QUEST_CLIP = {1: 0.7978845587, 2: 1.4935346200, 3: 2.0510683541, 4: 2.5139305786}

# Without a rotation, so that the values of a group lie on its grid.
PLAIN = {
    "int2": int2(),
    "int4": int4(),
    "int4 full range": int4(narrow=False),
    "int4 asymmetric": int4(symmetric=False),
    "int4 clipped": int4(scale=AbsMax(0.7)),
    "int8": int8(),
    "int8 fixed": int8(scale=Fixed(0.25)),
    "midrise": Quantizer(MidRise(3), AbsMax()),
    "quest2": quest(2, hadamard=None),
}
SYMMETRIC = {name: q for name, q in PLAIN.items() if not q.asymmetric}
IDEMPOTENT = {name: q for name, q in PLAIN.items() if q.idempotent}

# Numbers whose scales are far from underflow, which is tested elsewhere.
numbers = st.one_of(
    st.just(0.0), st.floats(2**-10, 1e3, width=32), st.floats(-1e3, -(2**-10), width=32)
)
arrays = hnp.arrays(np.float32, (8, 3), elements=numbers)
properties = settings(max_examples=25, deadline=None, derandomize=True)


def each(quantizers):
    return pytest.mark.parametrize("quantizer", quantizers.values(), ids=quantizers)


@functools.partial(jax.jit, static_argnums=1)
def both(x, quantizer):
    return fake_quant(x, quantizer), quantize(x, quantizer)


def values_of(x, quantizer):
    return np.asarray(both(x, quantizer)[0])


def codes_of(x, quantizer):
    return np.asarray(both(x, quantizer)[1].codes, int)


def positions(x, quantizer):
    """Values over their scale plus the zero point, and the scale, in float64."""
    quantized = both(x, quantizer)[1]
    scale = np.float64(quantized.scale)
    zero = 0 if quantized.zero_point is None else np.asarray(quantized.zero_point, int)
    return np.float64(x) / scale + zero, scale


@functools.partial(jax.jit, static_argnums=1)
def all_values(arrays, quantizers):
    """The fake-quantized arrays of several quantizers, in one program."""
    return [fake_quant(x, quantizer) for x, quantizer in zip(arrays, quantizers)]


# --- properties -----------------------------------------------------------------------


@each(PLAIN)
@properties
@given(x=arrays)
def test_number_of_levels(quantizer, x):
    result = values_of(x, quantizer)
    most = 2**quantizer.bits - (quantizer.format == Integer(quantizer.bits))
    assert all(len(np.unique(column)) <= most for column in result.T)
    codes = codes_of(x, quantizer)
    assert np.floor(quantizer.format.low) <= codes.min()
    assert codes.max() <= np.floor(quantizer.format.high)


def test_every_level_is_used(rng):
    @jax.jit
    def codes_of_all(symmetric, asymmetric):
        return {
            name: quantize(asymmetric if q.asymmetric else symmetric, q).codes
            for name, q in PLAIN.items()
        }

    x = rng.uniform(-32, 32, (4096, 3)).astype(np.float32)
    lopsided = rng.uniform(-5, 32, (4096, 3)).astype(np.float32)
    for name, codes in codes_of_all(x, lopsided).items():
        codes, levels = np.asarray(codes, int), np.floor(PLAIN[name].format.values)
        if name == "int4 full range":
            # Its scale is the bound over 7.5: only a group's extreme can reach -8.
            codes, levels = np.maximum(codes, -7), levels[1:]
        for column in codes.T:
            np.testing.assert_array_equal(np.unique(column), levels, name)


@each(SYMMETRIC)
@properties
@given(x=arrays)
def test_odd_symmetry(quantizer, x):
    if not quantizer.format.symmetric:
        # -8 has no opposite: only what rounds to neither -8 nor (clipped) 7 is odd.
        position, _ = positions(x, quantizer)
        x = np.where(np.abs(position) < 7.4, x, 0).astype(np.float32)
    position, _ = positions(x, quantizer)
    total = values_of(x, quantizer) + values_of(-x, quantizer)
    # Midway between two levels rounding takes the even one, which is not odd for the
    # mid-rise grid; zero is such a point of it.
    tie = np.abs(position * 2 - np.round(position * 2)) < 1e-4
    assert np.all((total == 0) | tie)


@each(IDEMPOTENT)
@properties
@given(x=arrays)
def test_idempotence(quantizer, x):
    if quantizer.asymmetric:
        # A zero point midway between two codes can go either way.
        scale = (np.float64(x).max(0, initial=0) - np.float64(x).min(0, initial=0)) / 15
        zero = np.float64(x).min(0, initial=0) / np.where(scale == 0, 1, scale)
        assume(np.all(np.abs(zero % 1 - 0.5) > 1e-4))
    once = values_of(x, quantizer)
    # The scale is rounded when it is found again (1 ulp), and its product too.
    np.testing.assert_allclose(values_of(once, quantizer), once, 2 * EPS)


def test_what_is_not_idempotent_walks(rng):
    quantizers = (
        int4(narrow=False),
        int4(scale=AbsMax(0.7)),
        int4(scale=Gaussian()),
        quest(4),
    )
    x = [rng.standard_normal((128, 4)).astype(np.float32)] * len(quantizers)
    norms = []
    for _ in range(20):
        x = all_values(x, quantizers)
        norms.append([np.linalg.norm(each) for each in x])
    for quantizer, first, last in zip(quantizers, norms[0], norms[-1]):
        assert not quantizer.idempotent, quantizer
        assert abs(last / first - 1) > 0.02, quantizer


def test_idempotence_with_groups_and_rotations(rng):
    quantizers = tuple(q for q in QUANTIZERS.values() if q.idempotent)
    x = rng.standard_normal((64, 32)).astype(np.float32)
    once = all_values([x] * len(quantizers), quantizers)
    twice = all_values(once, quantizers)
    for quantizer, one, other in zip(quantizers, once, twice):
        # A rotation there and back adds a rounding for each of its stages.
        tolerance = 2 * EPS if quantizer.hadamard is None else 32 * EPS
        np.testing.assert_allclose(
            other, one, tolerance, 4 * tolerance, err_msg=str(quantizer)
        )


@each(PLAIN)
@properties
@given(x=arrays)
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(quantizer, x):
    position, scale = positions(x, quantizer)
    error = np.abs(np.float64(x) - np.float64(values_of(x, quantizer))) / scale
    low, high = quantizer.format.low - 0.5, quantizer.format.high + 0.5
    inside = (low <= position) & (position <= high)
    # Rounding of the position and of the product, in units of the step.
    slack = 4 * EPS * np.maximum(np.abs(position), 1) + EPS
    assert np.all(error[inside] <= (0.5 + slack)[inside])
    if not quantizer.scale.clips(quantizer.format):
        assert np.all((low - 1e-4 <= position) & (position <= high + 1e-4))


@each({n: q for n, q in PLAIN.items() if not isinstance(q.scale, Fixed)})
@properties
@given(x=arrays, exponent=st.integers(-20, 20))
def test_scale_equivariance(quantizer, x, exponent):
    # A power of two scales without rounding, so that the results are the same bits;
    # but the stand-in for the scale of a zero group does not scale.
    assume(np.all(np.any(x != 0, axis=0)))
    factor = np.float32(2.0**exponent)
    np.testing.assert_array_equal(
        values_of(x * factor, quantizer), values_of(x, quantizer) * factor
    )


# --- the paper's quantizer ------------------------------------------------------------


def paper(x, bits, block):
    """Rotated weights, their quantized values, the rms and the step; float64."""
    x = rotate(x, block)
    rms = np.sqrt(np.mean(x**2, axis=0, keepdims=True))
    bound = QUEST_CLIP[bits] * rms
    step = 2 * bound / (2**bits - 1)
    level = np.round(x / step + 0.5) - 0.5
    top = (2**bits - 1) / 2
    return x, step * np.clip(level, -top, top), rms, step


@pytest.mark.parametrize("rule", ["clip", "trust"])
@pytest.mark.parametrize("block", [None, 32])
def test_quest_is_the_papers_and_passes_the_gradient_as_published(block, rule, rng):
    x, cotangent = rng.standard_normal((2, 64, 32)).astype(np.float32)

    @jax.jit
    def values_and_gradients(x, cotangent):
        def both(bits):
            quantizer = quest(bits, hadamard=block, gradient=rule)
            value, pull_back = jax.vjp(lambda x: fake_quant(x, quantizer), x)
            return value, *pull_back(cotangent)

        return {bits: both(bits) for bits in (1, 2, 3, 4)}

    for bits, (value, gradient) in values_and_gradients(x, cotangent).items():
        turned, values, rms, step = paper(x, bits, block)
        # Float32: the scale, 2 x 5 stages of the rotation and a product. No value of
        # this sample is so near to a tie that it could fall on the other side.
        np.testing.assert_allclose(
            np.float64(value),
            rotate(values, block),
            rtol=1e-6,
            atol=20 * EPS * step.max() * 2**bits,
        )
        bound = rms * QUEST_CLIP[bits]
        if rule == "clip":
            mask = np.abs(turned) <= bound
        else:
            mask = np.abs(turned - values) <= bound / (2**bits - 1)
        assert 0 < mask.mean() < 1
        expected = rotate(mask * rotate(cotangent, block), block)
        if block is None:
            np.testing.assert_array_equal(gradient, expected, str(bits))
        else:
            # Ten stages of a rotation in float32, of numbers below 10.
            np.testing.assert_allclose(
                np.float64(gradient), expected, rtol=1e-6, atol=20 * EPS
            )


def test_quest_has_the_published_error(rng):
    x = rng.standard_normal((1 << 14, 4)).astype(np.float32)
    published = {2: 0.345, 3: 0.193, 4: 0.107}
    found = all_values([x] * 3, tuple(quest(bits) for bits in published))
    for (bits, expected), result in zip(published.items(), found):
        error = np.mean((x - np.float64(result)) ** 2)
        relative = np.sqrt(error / np.mean(np.float64(x) ** 2))
        # Published to three digits; the sample of 65536 adds about 0.3 %.
        assert relative == pytest.approx(expected, abs=1e-3), bits


# --- shapes ---------------------------------------------------------------------------


def test_groups_and_scales():
    table = [
        (int4(), (64, 32), {0: 64}, (1, 32)),
        (int4(axis=-2), (2, 64, 32), {1: 64}, (2, 1, 32)),
        (int4(axis=None), (2, 64, 32), {1: 64, 2: 32}, (2, 1, 1)),
        (int4(axis=(0, 1, 2)), (2, 64, 32), {0: 2, 1: 64, 2: 32}, (1, 1, 1)),
        (int4(axis=-1), (64, 32), {1: 32}, (64, 1)),
        (int4(axis=None), (64, 32), {0: 64, 1: 32}, (1, 1)),
        (int4(axis=None), (), {}, ()),
        (int4(group_size=16), (64, 32), {0: 16}, (4, 32)),
        (int4(axis=0, group_size=1), (8, 2), {0: 1}, (8, 2)),
        (int8(axis=(0, 1, 2)), (3, 3, 16, 8), {0: 3, 1: 3, 2: 16}, (1, 1, 1, 8)),
        (int8(axis=(-1, 0), group_size=(4, None)), (6, 8), {0: 6, 1: 4}, (1, 2)),
        (int4(group_size=16), (0, 32), {0: 16}, (0, 32)),
        (int4(), (0, 32), {0: 0}, (1, 32)),
    ]
    for quantizer, shape, groups, scale_shape in table:
        row = f"{quantizer} {shape}"
        blocks = quantizer.blocks(shape)
        assert list(blocks.by_axis.items()) == list(groups.items()), row
        assert blocks.scale_shape == scale_shape, row


def test_storage_bits():
    table = [
        (int4(), jnp.float32, 4 * 64 * 32 + 32 * 32),
        (int4(group_size=16), jnp.float32, 4 * 64 * 32 + 32 * 4 * 32),
        (int4(group_size=16), jnp.float16, 4 * 64 * 32 + 16 * 4 * 32),
        (int3(axis=None), jnp.float32, 3 * 64 * 32 + 32),
        (int8(symmetric=False), jnp.float32, 8 * 64 * 32 + (32 + 8) * 32),
        (quest(1, hadamard=None), jnp.float64, 64 * 32 + 64 * 32),
    ]
    for quantizer, scale_dtype, bits in table:
        assert quantizer.storage_bits((64, 32), scale_dtype) == bits, quantizer


def test_storage_is_what_the_arrays_take():
    for name, (shape, quantizer) in CASES.items():
        quantized = jax.eval_shape(
            functools.partial(quantize, quantizer=quantizer),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
        bits = quantized.codes.size * quantizer.bits + quantized.scale.size * 32
        if quantized.zero_point is not None:
            bits += quantized.zero_point.size * quantizer.bits
        assert quantizer.storage_bits(shape) == bits, name
        assert quantized.nbytes == np.ceil(bits / 8), name


# --- descriptions ---------------------------------------------------------------------


def test_text():
    table = [
        (int4(), "int4 absmax, identity"),
        (int4(axis=-2), "int4 absmax, axis -2, identity"),
        (int4(group_size=32), "int4 absmax, group 32, identity"),
        (int3(axis=None), "int3 absmax, per tensor, identity"),
        (
            int4(axis=0, group_size=32, symmetric=False),
            "int4 full range minmax, group 32 of axis 0, identity",
        ),
        (
            int8(scale=AbsMax(0.5), axis=(0, 1)),
            "int8 absmax clip 0.5, axis (0, 1), clip",
        ),
        (int2(scale=Fixed(0.25)), "int2 fixed 0.25, clip"),
        (
            quest(2, gradient="trust"),
            "midrise2 gaussian, hadamard 128, trust",
        ),
    ]
    for quantizer, text in table:
        assert str(quantizer) == text


def test_is_a_value():
    for name, quantizer in QUANTIZERS.items():
        again = copy.deepcopy(quantizer)
        assert again == quantizer, name
        assert hash(again) == hash(quantizer), name
        # A callable argument would be taken for a schedule by inject_hyperparams.
        assert not callable(quantizer)
        with pytest.raises(dataclasses.FrozenInstanceError):
            quantizer.axis = 0
    assert len(set(QUANTIZERS.values())) == len(QUANTIZERS)


def test_presets():
    for preset, bits in ((int2, 2), (int3, 3), (int4, 4), (int8, 8)):
        narrow, full = Integer(bits), Integer(bits, narrow=False)
        assert preset() == Quantizer(narrow, AbsMax(), axis="contracted")
        assert preset(symmetric=False) == Quantizer(full, MinMax())
        clipped = Quantizer(full, AbsMax(), gradient="clip")
        assert preset(narrow=False) == clipped
        assert preset(scale=Gaussian()).gradient == "clip"
        assert preset(scale=Gaussian(), gradient="identity").gradient == "identity"
        assert preset.__name__ == f"int{bits}"
    expected = Quantizer(MidRise(4), Gaussian(), hadamard=128, gradient="clip")
    assert quest(4) == expected
    assert not quest(4).idempotent


# --- bad input ------------------------------------------------------------------------


def test_bad_arguments():
    table = [
        (lambda: Quantizer(4), TypeError, "format", "4", "or a preset"),
        (lambda: Quantizer(Integer), TypeError, "format", "Integer", "Integer(4)"),
        (lambda: int4(scale=0.1), TypeError, "scale", "0.1", "Fixed(value)"),
        (
            lambda: Quantizer(Integer(4), AbsMax),
            TypeError,
            "scale",
            "AbsMax",
            "AbsMax()",
        ),
        (
            lambda: Quantizer(Integer(4), MinMax()),
            ValueError,
            "scale",
            "int4",
            "narrow=False",
        ),
        (lambda: int4(axis="in"), TypeError, "axis", "'in'", "Use -2"),
        (lambda: int4(axis=(0, 1.0)), TypeError, "axis", "1.0", "Use -2"),
        (lambda: int4(axis=[0, 1]), TypeError, "axis", "[0, 1]", "a tuple of ints"),
        (lambda: int4(axis=True), TypeError, "axis", "True", "Use -2"),
        (lambda: int4(group_size=0), ValueError, "group_size", "0", "a divisor"),
        (lambda: int4(group_size=-32), ValueError, "group_size", "-32", "a divisor"),
        (lambda: int4(group_size=32.0), TypeError, "group_size", "32.0", "a divisor"),
        (
            lambda: int4(axis=None, group_size=32),
            ValueError,
            "group_size",
            "axis=None",
            "Use axis=-2, group_size=32, or group_size=None for one scale",
        ),
        (
            lambda: int4(axis=(0, 1), group_size=32),
            ValueError,
            "group_size",
            "group_size=32, axis=(0, 1)",
            "Use group_size=(None, 32), where None is the whole axis, or",
        ),
        (
            lambda: int4(axis=(0, 1, 2), group_size=(3, 9)),
            ValueError,
            "group_size",
            "group_size=(3, 9), axis=(0, 1, 2)",
            "Use group_size=(None, None, 9), where",
        ),
        (lambda: quest(4, hadamard=48), ValueError, "hadamard", "48", "64 or 128"),
        (lambda: quest(4, hadamard=1), ValueError, "hadamard", "1", "None for no"),
        (lambda: quest(4, hadamard=0), ValueError, "hadamard", "0", "None for no"),
        (
            lambda: quest(4, hadamard=64.0),
            TypeError,
            "hadamard",
            "64.0",
            "power of two",
        ),
        (
            lambda: quest(4, hadamard=True),
            TypeError,
            "hadamard",
            "True",
            "power of two",
        ),
        (
            lambda: int4(axis=None, hadamard=32),
            ValueError,
            "hadamard",
            "axis=None",
            "hadamard=None",
        ),
        (lambda: int4(gradient="ste"), ValueError, "gradient", "'ste'", "Use 'clip'"),
        (
            lambda: int4(symmetric=False, narrow=True),
            ValueError,
            "narrow",
            "narrow=True",
            "Leave `narrow` out",
        ),
        (
            lambda: int4(symmetric=False, scale=AbsMax()),
            ValueError,
            "scale",
            "scale=absmax, symmetric=False",
            "Leave one of them out",
        ),
        (
            lambda: int4(scale=MinMax()),
            ValueError,
            "scale",
            "scale=minmax, symmetric=True",
            "Leave one of them out",
        ),
        (lambda: quest(0), ValueError, "bits", "0", "None in `Rules`"),
        (lambda: quest("4"), TypeError, "bits", "'4'", "whole number"),
    ]
    for build, error, name, value, remedy in table:
        got = f"^`{name}` .*got .*{re.escape(value)}"
        assert_raises([(build, error, got), (build, error, re.escape(remedy))])


def test_shapes_that_do_not_fit():
    table = [
        (
            int4(group_size=48),
            (128, 64),
            "`group_size` must divide axis -2 of `x`; got group_size=48, x.shape=(128, "
            "64). Use 32, or None for one scale per channel; where "
            "another axis is summed over, name that one, such as axis=(0, 1, 2) for a "
            "convolution.",
        ),
        (
            int4(),
            (64,),
            "`axis` must be within the dimensions of the array; got axis='contracted' "
            "(the default of most presets) and shape (64,). Leave the parameter alone "
            "by a line such as (r'.*bias', None) before this rule, or use axis=-1 or "
            "axis=None for one scale.",
        ),
        (
            int4(axis=-2),
            (64,),
            "`axis` must be within the dimensions of the array; got axis=-2 and shape "
            "(64,). Scales are shared along it: use an axis from -1 to 0, or axis=None "
            "for one scale per tensor. To leave parameters alone, put a line such as "
            "(r'.*bias', None) before this rule.",
        ),
        (
            int4(),
            (2, 64, 32),
            "`axis` must be known for an array of more than two dimensions; got axis="
            "'contracted' (the default of most presets), shape (2, 64, 32). Find the "
            "axes that its product sums over with rules = cage.resolve(rules, function,"
            " params, x), or name them, such as axis=-2 for a stack of (in, out) "
            "matrices and axis=(0, 1, 2) for a convolution.",
        ),
        (
            int4(axis=(0, -2)),
            (64, 32),
            "`axis` must name each axis once; got axis=(0, -2), x.shape=(64, 32). "
            "Leave the repeated one out.",
        ),
        (
            quest(4),
            (96, 32),
            "`hadamard` must divide axis -2 of `x`; got hadamard=128, x.shape=(96, "
            "32). Use 32 or less.",
        ),
        (
            quest(4),
            (27, 32),
            "`hadamard` must divide axis -2 of `x`; got hadamard=128, x.shape=(27, "
            "32). Use None.",
        ),
    ]
    for quantizer, shape, message in table:
        for function in (quantizer.blocks, quantizer.storage_bits):
            call = functools.partial(function, shape)
            assert_raises([(call, ValueError, f"^{re.escape(message)}$")])


def test_blocks_are_made_once_for_a_quantizer_and_a_shape():
    blocks = int4(group_size=16).blocks((64, 32))
    assert int4(group_size=16).blocks((64, 32)) is blocks
    assert int4(group_size=32).blocks((64, 32)) is not blocks
    assert blocks.pieces == ((0, 16),)
    assert quest(4, hadamard=32).blocks((64, 32)).pieces == ((0, 64),)
    rotated = int4(hadamard=32, group_size=16).blocks((64, 32))
    assert rotated.pieces == ((0, 32),)  # a rotation mixes two groups
    tensor = nvfp4(axis=-2).blocks((2, 64, 32))
    assert tensor.pieces == ((1, 64), (2, 32))
    assert tensor.tensor_shape == (2, 1, 1)
