"""Scales as they are stored, against float64 NumPy and `ml_dtypes`."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import assert_raises
from hypothesis import given, settings
from hypothesis import strategies as st

from cage_jax.quantizers.formats import Float, Integer, MidRise
from cage_jax.quantizers.scale_types import Float8, Full, Narrow, PowerOfTwo

TINY = 2.0**-126  # of float32; what is smaller counts as zero
BAD = [np.inf, -np.inf, np.nan]
E2M1, E4M3 = Float("e2m1"), Float("e4m3")

TYPES = {
    "full": Full(),
    "float16": Narrow("float16"),
    "float16 unrounded": Narrow("float16", unrounded=True),
    "bfloat16": Narrow("bfloat16"),
    "e8m0 down": PowerOfTwo("down"),
    "e8m0 nearest": PowerOfTwo("nearest"),
    "e8m0 up": PowerOfTwo("up"),
    "e4m3": Float8(tensor_divisor=False),
    "e4m3 and one a tensor": Float8(),
}
each_type = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)


GROUPS = 320


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def compiled(kind, bounds, format, range):
    return kind.store(bounds, range, format, (0, 1))


def stored(kind, bounds, format=E2M1, range=None):
    """What `kind` stores for each bound, as a column of groups of one tensor.

    The bounds are repeated, which changes nothing, so that all calls have one shape.
    """
    column = np.resize(np.float32(bounds), (GROUPS, 1))
    found = compiled(kind, column, format, range or format.half_range)
    found = jax.tree.map(np.asarray, found)
    return found._replace(scale=found.scale[: len(bounds)])


def scales(kind, bounds, format=E2M1):
    return stored(kind, bounds, format).scale.ravel()


@each_type
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    bound=st.floats(0, float(np.finfo(np.float32).max), width=32),
    other=st.floats(0, float(np.finfo(np.float32).max), width=32),
)
def test_a_finite_bound_has_a_finite_scale_that_the_file_holds(kind, bound, other):
    found = stored(kind, [bound, other])
    scale = np.asarray(found.scale)
    least = 0 if getattr(kind, "unrounded", False) else TINY
    assert np.all(np.isfinite(scale)) and np.all(scale >= least)
    if kind.dtype is not None:
        # Through NumPy: jax flushes what is no normal float32.
        np.testing.assert_array_equal(
            scale.astype(kind.dtype).astype(np.float32), scale
        )
    if found.tensor_divisor is not None:
        assert np.all(np.isfinite(found.tensor_divisor))
        assert np.all(np.asarray(found.tensor_divisor) > 0)
        assert np.all(np.float64(scale) / np.float64(found.tensor_divisor) >= TINY)
    if kind.rounds_by is not None:
        rounds_by = scales(kind.rounds_by, [bound, other])
        assert np.all(np.isfinite(1 / rounds_by)) and np.all(rounds_by != 0)


def test_a_bound_that_is_no_number_has_no_scale_and_spoils_no_other():
    for name, kind in TYPES.items():
        finite = scales(kind, [1.0, 0.5])
        for bad in BAD:
            found = scales(kind, [1.0, bad, 0.5])
            assert np.isnan(found[1]), name
            np.testing.assert_array_equal(found[[0, 2]], finite, name)


def test_the_scale_of_nothing():
    for name, kind in TYPES.items():
        empty = scales(kind, [0.0, 1.0])[0]
        if isinstance(kind, Float8):
            assert empty == 0.125, name
        else:
            assert empty == (0 if getattr(kind, "unrounded", False) else 1), name


def test_full_is_the_quotient():
    bounds = np.float32([3.0, 0.1, 1e38, 8e-38])
    np.testing.assert_array_equal(scales(Full(), bounds), bounds / np.float32(6))
    # Too small to divide by: 1 where the format has a zero, else next to nothing.
    assert scales(Full(), [1e-38])[0] == 1
    assert scales(Full(), [1e-38], MidRise(2))[0] == np.float32(TINY)


def test_narrow_is_the_rounded_quotient(rng):
    bounds = ((0.1 + rng.random(200)) * 10.0 ** rng.integers(-2, 3, 200)).astype("f4")
    for name in ("float16", "bfloat16"):
        dtype = ml_dtypes.finfo(name).dtype
        expected = (bounds / np.float32(6)).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(scales(Narrow(name), bounds), expected, name)


def test_float16_overflows_to_its_largest_and_underflows_to_its_least_normal():
    found = scales(Narrow("float16"), [1e30, 6 * 65504, 1e-30, 6 * 2.0**-15])
    np.testing.assert_array_equal(found, [65504, 65504, 2.0**-14, 2.0**-14])
    # A file format's own program keeps smaller ones, down to 0.
    kind, bounds = Narrow("float16", unrounded=True), [1e30, 6 * 2.0**-15, 1e-30]
    np.testing.assert_array_equal(scales(kind, bounds), [65504, 2.0**-15, 0])
    # Rounded by the stored scale where it is cut off, by the exact one elsewhere.
    rounds_by = scales(kind.rounds_by, bounds)
    np.testing.assert_allclose(rounds_by, [65504, 2.0**-15, 1e-30 / 6], rtol=1e-6)


def test_a_negative_bound_has_a_negative_scale():
    for kind in (Full(), Narrow("float16"), Narrow("bfloat16")):
        assert kind.signed
        assert np.all(scales(kind, [-3.0, -1e-30]) < 0)
    assert not PowerOfTwo().signed
    assert not Float8().signed


def power_oracle(bound, rounding, format):
    """The power of two of a scale, in exact arithmetic."""
    largest = {"e2m1": 6.0, "e4m3": 448.0}[format.name]
    if rounding == "up":
        return 2.0 ** np.ceil(np.log2(np.float64(bound) / largest))
    power = np.floor(np.log2(np.float64(bound)))
    if rounding == "nearest":
        power += bound / 2.0**power >= 1.75
    return 2.0 ** (power - np.floor(np.log2(largest)))


@pytest.mark.parametrize("rounding", ["down", "nearest", "up"])
def test_powers_of_two(rounding, rng):
    bounds = (rng.random(300) * 10.0 ** rng.integers(-6, 6, 300)).astype(np.float32)
    bounds = np.concatenate([bounds, np.float32([6, 1.75, 1.7499999, 448, 2.0**-20])])
    for format in (E2M1, E4M3):
        expected = [power_oracle(bound, rounding, format) for bound in bounds]
        found = scales(PowerOfTwo(rounding), bounds, format)
        np.testing.assert_array_equal(found, np.float32(expected), str(format))
    # What is no normal number counts as zero, since some processors take it for that.
    found = scales(PowerOfTwo(rounding), [2e-38, 1e-44], E4M3)
    np.testing.assert_array_equal(found, [np.float32(TINY), 1])
    # At a range of 1 the largest bound needs the largest power there is.
    largest = float(np.finfo(np.float32).max)
    found = stored(PowerOfTwo(rounding), [largest], Integer(2), range=1.0)
    assert found.scale[0, 0] == 2.0**127


def test_e4m3_alone(rng):
    bounds = (rng.random(300) * 10.0 ** rng.integers(-3, 4, 300)).astype(np.float32)
    ideal = np.clip(bounds / np.float32(6), 2.0**-9, 448)
    expected = ideal.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = scales(Float8(tensor_divisor=False), bounds)
    np.testing.assert_array_equal(found, np.maximum(expected, 2.0**-9))


def test_e4m3_below_a_scale_of_the_tensor(rng):
    bounds = (rng.random(300) * 10.0 ** rng.integers(-3, 4, 300)).astype(np.float32)
    found = stored(Float8(), bounds)
    divisor = float(found.tensor_divisor[0, 0])
    np.testing.assert_allclose(divisor, 448 * 6 / bounds.max(), rtol=1e-6)
    scale = np.asarray(found.scale).ravel()
    assert scale.max() == 448
    ideal = np.maximum(np.float64(bounds) / 6 * divisor, 2.0**-9)
    # Half a step of three bits of mantissa; of the denormal ones 2**-10.
    assert np.all(np.abs(scale - ideal) <= np.maximum(ideal * 2.0**-4, 2.0**-10))


def test_a_tensor_of_zeros_or_of_the_smallest_numbers_has_a_divisor():
    for bounds in ([0.0, 0.0], [1e-44, 0.0], [np.nan, 1e-38]):
        found = stored(Float8(), bounds)
        assert np.isfinite(found.tensor_divisor).all()
        assert float(found.tensor_divisor[0, 0]) > 0


@each_type
def test_the_same_bits_with_and_without_jit(kind, rng):
    bounds = rng.random((GROUPS, 1)).astype(np.float32)
    apart = kind.store(jnp.asarray(bounds), 6.0, E2M1, (0, 1))
    for one, other in zip(apart, compiled(kind, bounds, E2M1, 6.0), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


def test_each_is_a_value_with_a_text():
    for name, kind in TYPES.items():
        assert kind in {kind}, name
        assert bool(str(kind)) == (kind != Full()), name


def test_bad_arguments():
    assert_raises(
        [
            (
                lambda: Narrow("float8"),
                ValueError,
                r"`name` must be one of .*'float8'.*Full\(\)",
            ),
            (
                lambda: PowerOfTwo("even"),
                ValueError,
                r"`rounding` must be one of .*'even'.*'down'",
            ),
        ]
    )
