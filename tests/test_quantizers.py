import copy
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, QUANTIZERS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cage_jax import Quantizer, fake_quant, int2, int3, int4, int8, quantize, quest
from cage_jax.formats import Integer, MidRise
from cage_jax.scales import AbsMax, Fixed, Gaussian, MinMax

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


compiled = jax.jit(fake_quant, static_argnums=1)
codes_of = jax.jit(quantize, static_argnums=1)


def positions(x, quantizer):
    """Values over their scale plus the zero point, and the scale, in float64."""
    quantized = codes_of(x, quantizer)
    scale = np.float64(quantized.scale)
    zero = 0 if quantized.zero_point is None else np.asarray(quantized.zero_point, int)
    return np.float64(x) / scale + zero, scale


# --- properties -----------------------------------------------------------------------


@each(PLAIN)
@properties
@given(x=arrays)
def test_number_of_levels(quantizer, x):
    result = np.asarray(compiled(x, quantizer))
    most = 2**quantizer.bits - (quantizer.format == Integer(quantizer.bits))
    assert all(len(np.unique(column)) <= most for column in result.T)
    codes = np.asarray(codes_of(x, quantizer).codes, int)
    assert np.floor(quantizer.format.low) <= codes.min()
    assert codes.max() <= np.floor(quantizer.format.high)


@each(PLAIN)
def test_every_level_is_used(quantizer, rng):
    x = rng.uniform(-5 if quantizer.asymmetric else -32, 32, (4096, 3))
    codes = np.asarray(codes_of(x.astype(np.float32), quantizer).codes, int)
    levels = np.floor(quantizer.format.values)
    if quantizer == int4(narrow=False):
        # Its scale is the bound over 7.5: only a group's extreme can reach -8.
        codes, levels = np.maximum(codes, -7), levels[1:]
    for column in codes.T:
        np.testing.assert_array_equal(np.unique(column), levels)


@each(SYMMETRIC)
@properties
@given(x=arrays)
def test_odd_symmetry(quantizer, x):
    if not quantizer.format.symmetric:
        # -8 has no opposite: only what rounds to neither -8 nor (clipped) 7 is odd.
        position, _ = positions(x, quantizer)
        x = np.where(np.abs(position) < 7.4, x, 0).astype(np.float32)
    position, _ = positions(x, quantizer)
    total = np.asarray(compiled(x, quantizer)) + np.asarray(compiled(-x, quantizer))
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
    once = compiled(x, quantizer)
    # The scale is rounded when it is found again (1 ulp), and its product too.
    chex.assert_trees_all_close(compiled(once, quantizer), once, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize(
    "quantizer",
    [int4(narrow=False), int4(scale=AbsMax(0.7)), int4(scale=Gaussian()), quest(4)],
    ids=str,
)
def test_what_is_not_idempotent_walks(quantizer, rng):
    x = rng.standard_normal((128, 4)).astype(np.float32)
    assert not quantizer.idempotent
    norms = []
    for _ in range(20):
        x = compiled(x, quantizer)
        norms.append(float(jnp.linalg.norm(x)))
    assert abs(norms[-1] / norms[0] - 1) > 0.02


@each({n: q for n, q in QUANTIZERS.items() if q.idempotent})
def test_idempotence_with_groups_and_rotations(quantizer, rng):
    x = rng.standard_normal((64, 32)).astype(np.float32)
    once = compiled(x, quantizer)
    # A rotation there and back adds a rounding for each of its stages.
    tolerance = 2 * EPS if quantizer.hadamard is None else 32 * EPS
    chex.assert_trees_all_close(
        compiled(once, quantizer), once, rtol=tolerance, atol=4 * tolerance
    )


@each(PLAIN)
@properties
@given(x=arrays)
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(quantizer, x):
    position, scale = positions(x, quantizer)
    error = np.abs(np.float64(x) - np.float64(compiled(x, quantizer))) / scale
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
    chex.assert_trees_all_equal(
        np.asarray(compiled(x * factor, quantizer)),
        np.asarray(compiled(x, quantizer)) * factor,
    )


# --- the paper's quantizer ------------------------------------------------------------


def matrix(block):
    return np.array(
        [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    ) / np.sqrt(block)


def rotated(x, block):
    x = np.float64(x)
    if block is None:
        return x
    return (matrix(block) @ x.reshape(-1, block, x.shape[-1])).reshape(x.shape)


def paper(x, bits, block):
    """Rotated weights, their quantized values, the rms and the step; float64."""
    x = rotated(x, block)
    rms = np.sqrt(np.mean(x**2, axis=0, keepdims=True))
    bound = QUEST_CLIP[bits] * rms
    step = 2 * bound / (2**bits - 1)
    level = np.round(x / step + 0.5) - 0.5
    top = (2**bits - 1) / 2
    return x, step * np.clip(level, -top, top), rms, step


each_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4])
each_block = pytest.mark.parametrize("block", [None, 32])


@each_bits
@each_block
def test_quest_is_the_papers(bits, block, rng):
    x = rng.standard_normal((64, 32)).astype(np.float32)
    _, expected, _, step = paper(x, bits, block)
    expected = rotated(expected, block)
    result = np.float64(fake_quant(x, quest(bits, hadamard=block)))
    # Float32: the scale, 2 x 5 stages of the rotation and a product. No value of this
    # sample is so near to a tie that it could fall on the other side.
    chex.assert_trees_all_close(result, expected, atol=20 * EPS * step.max() * 2**bits)


@each_bits
@each_block
@pytest.mark.parametrize("rule", ["clip", "trust"])
def test_quest_passes_the_gradient_as_published(bits, block, rule, rng):
    x, cotangent = rng.standard_normal((2, 64, 32)).astype(np.float32)
    turned, values, rms, _ = paper(x, bits, block)
    bound = rms * QUEST_CLIP[bits]
    if rule == "clip":
        mask = np.abs(turned) <= bound
    else:
        mask = np.abs(turned - values) <= bound / (2**bits - 1)
    assert 0 < mask.mean() < 1
    expected = rotated(mask * rotated(cotangent, block), block)
    quantizer = quest(bits, hadamard=block, gradient=rule)
    _, pull_back = jax.vjp(lambda x: fake_quant(x, quantizer), x)
    (gradient,) = pull_back(jnp.asarray(cotangent))
    if block is None:
        np.testing.assert_array_equal(gradient, expected)
    else:
        # Ten stages of a rotation in float32, of numbers below 10.
        chex.assert_trees_all_close(np.float64(gradient), expected, atol=20 * EPS)


@pytest.mark.parametrize(("bits", "published"), [(2, 0.345), (3, 0.193), (4, 0.107)])
def test_quest_has_the_published_error(bits, published, rng):
    x = rng.standard_normal((1 << 14, 4)).astype(np.float32)
    result = np.float64(fake_quant(x, quest(bits)))
    relative = np.sqrt(np.mean((x - result) ** 2) / np.mean(np.float64(x) ** 2))
    # Published to three digits; the sample of 65536 adds about 0.3 %.
    assert relative == pytest.approx(published, abs=1e-3)


def test_quest_is_the_formula_in_pytorch(rng):
    torch = pytest.importorskip("torch", reason="the paper's own code is PyTorch")
    x = rng.standard_normal((64, 32)).astype(np.float32)
    for bits in (2, 3, 4):
        w = torch.from_numpy(x)
        bound = QUEST_CLIP[bits] * torch.sqrt(torch.mean(w**2, dim=0, keepdim=True))
        step = 2 * bound / (2**bits - 1)
        clipped = torch.clamp(w, -bound, bound)
        expected = torch.round(clipped / step + 0.5) * step - step / 2
        # That formula lets the very end round up to a level the grid does not have.
        expected = torch.clamp(expected, -bound, bound)
        chex.assert_trees_all_close(
            np.asarray(fake_quant(x, quest(bits, hadamard=None))),
            expected.numpy(),
            atol=8 * EPS * float(bound.max()),  # two orders of float32 operations
        )


# --- shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "shape", "groups", "scale_shape"),
    [
        (int4(), (64, 32), {0: 64}, (1, 32)),
        (int4(), (2, 64, 32), {1: 64}, (2, 1, 32)),
        (int4(axis=-1), (64, 32), {1: 32}, (64, 1)),
        (int4(axis=None), (64, 32), {0: 64, 1: 32}, (1, 1)),
        (int4(axis=None), (), {}, ()),
        (int4(group_size=16), (64, 32), {0: 16}, (4, 32)),
        (int4(axis=0, group_size=1), (8, 2), {0: 1}, (8, 2)),
        (int8(axis=(0, 1, 2)), (3, 3, 16, 8), {0: 3, 1: 3, 2: 16}, (1, 1, 1, 8)),
        (int8(axis=(-1, 0), group_size=(4, None)), (6, 8), {0: 6, 1: 4}, (1, 2)),
        (int4(group_size=16), (0, 32), {0: 16}, (0, 32)),
        (int4(), (0, 32), {0: 0}, (1, 32)),
    ],
)
def test_groups_and_scales(quantizer, shape, groups, scale_shape):
    assert list(quantizer.groups(shape).items()) == list(groups.items())
    assert quantizer.scale_shape(shape) == scale_shape


@pytest.mark.parametrize(
    ("quantizer", "scale_dtype", "bits"),
    [
        (int4(), jnp.float32, 4 * 64 * 32 + 32 * 32),
        (int4(group_size=16), jnp.float32, 4 * 64 * 32 + 32 * 4 * 32),
        (int4(group_size=16), jnp.float16, 4 * 64 * 32 + 16 * 4 * 32),
        (int3(axis=None), jnp.float32, 3 * 64 * 32 + 32),
        (int8(symmetric=False), jnp.float32, 8 * 64 * 32 + (32 + 8) * 32),
        (quest(1, hadamard=None), jnp.float64, 64 * 32 + 64 * 32),
    ],
    ids=str,
)
def test_storage_bits(quantizer, scale_dtype, bits):
    assert quantizer.storage_bits((64, 32), scale_dtype) == bits


@pytest.mark.parametrize(("shape", "quantizer"), CASES.values(), ids=CASES)
def test_storage_is_what_the_arrays_take(shape, quantizer):
    quantized = jax.eval_shape(
        lambda x: quantize(x, quantizer), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    bits = quantized.codes.size * quantizer.bits + quantized.scale.size * 32
    if quantized.zero_point is not None:
        bits += quantized.zero_point.size * quantizer.bits
    assert quantizer.storage_bits(shape) == bits
    assert quantized.nbytes == np.ceil(bits / 8)


# --- descriptions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [
        (int4(), "int4 absmax, axis -2, identity"),
        (int3(axis=None), "int3 absmax, per tensor, identity"),
        (
            int4(axis=0, group_size=32, symmetric=False),
            "int4 full range minmax, group 32 of axis 0, identity",
        ),
        (
            int8(scale=AbsMax(0.5), axis=(0, 1)),
            "int8 absmax clip 0.5, axis (0, 1), clip",
        ),
        (int2(scale=Fixed(0.25)), "int2 fixed 0.25, axis -2, clip"),
        (
            quest(2, gradient="trust"),
            "midrise2 gaussian, axis -2, hadamard 128, trust",
        ),
    ],
)
def test_text(quantizer, text):
    assert str(quantizer) == text


@each(QUANTIZERS)
def test_is_a_value(quantizer):
    again = copy.deepcopy(quantizer)
    assert again == quantizer
    assert hash(again) == hash(quantizer)
    # A callable argument would be taken for a schedule by inject_hyperparams.
    assert not callable(quantizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantizer.axis = 0
    assert len(set(QUANTIZERS.values())) == len(QUANTIZERS)


@pytest.mark.parametrize(
    ("preset", "bits"), [(int2, 2), (int3, 3), (int4, 4), (int8, 8)]
)
def test_presets(preset, bits):
    assert preset() == Quantizer(Integer(bits), AbsMax(), axis=-2)
    assert preset(symmetric=False) == Quantizer(Integer(bits, narrow=False), MinMax())
    full = Quantizer(Integer(bits, narrow=False), AbsMax(), gradient="clip")
    assert preset(narrow=False) == full
    assert preset(scale=Gaussian()).gradient == "clip"
    assert preset(scale=Gaussian(), gradient="identity").gradient == "identity"
    assert preset.__name__ == f"int{bits}"


def test_quest_preset():
    expected = Quantizer(MidRise(4), Gaussian(), axis=-2, hadamard=128, gradient="clip")
    assert quest(4) == expected
    assert not quest(4).idempotent


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "name", "value", "remedy"),
    [
        (lambda: Quantizer(4), TypeError, "format", "4", "use a preset"),
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
        (lambda: int4(axis=(0, 1.0)), TypeError, "axis", "(0, 1.0)", "Use -2"),
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
            "None for one scale",
        ),
        (
            lambda: int4(axis=(0, 1), group_size=32),
            ValueError,
            "group_size",
            "group_size=32, axis=(0, 1)",
            "Use a tuple such as (128, 128)",
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
            lambda: int4(axis=(0, 1), hadamard=32),
            ValueError,
            "hadamard",
            "axis=(0, 1)",
            "hadamard=None",
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
    ],
)
def test_bad_arguments(build, error, name, value, remedy):
    with pytest.raises(error) as caught:
        build()
    message = str(caught.value)
    assert message.startswith(f"`{name}` ")
    assert value in message.split("got ", 1)[1]
    assert remedy in message


@pytest.mark.parametrize(
    ("quantizer", "shape", "message"),
    [
        (
            int4(group_size=48),
            (128, 64),
            "`group_size` must divide axis -2 of `x`; got group_size=48, x.shape=(128, "
            "64). Use a divisor of 128, or None for one scale per channel; where "
            "another axis is summed over, name that one, such as axis=(0, 1, 2) for a "
            "convolution.",
        ),
        (
            int4(),
            (64,),
            "`axis` must be within the dimensions of `x`; got axis=-2, x.shape=(64,). "
            "Use an axis from -1 to 0, axis=None for one scale per tensor, or None in "
            "`Rules` to leave the parameter alone.",
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
    ],
)
def test_shapes_that_do_not_fit(quantizer, shape, message):
    for function in (quantizer.groups, quantizer.scale_shape, quantizer.storage_bits):
        with pytest.raises(ValueError) as caught:
            function(shape)
        assert str(caught.value) == message
